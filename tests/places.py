"""Paths of the repository's files for the tests."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
ALICE = (ROOT / "src/MyGPT/assets/alice.txt").read_text(encoding="utf-8")
