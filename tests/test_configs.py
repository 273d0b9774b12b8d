"""Tests of the recipes in configs/: the real command trains two steps with each."""

from __future__ import annotations

from pathlib import Path

import pytest

from MyGPT.cli import main
from places import ROOT

SLOW = ("gpt2_124m", "gpt2_small")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# These options replace what makes a recipe slow. The test uses all other options of the recipe unchanged.
SMALL = "--data alice --max_steps 2 --batch_size 2 --micro_batch_size 1 --context_length 16 --warmup_steps 1 --eval_windows 2"
SMALL += " --sample_tokens 3 --val_fraction 0.003 --compile false --log_every 1"


def test_configs_contains_the_recipes() -> None:
    names = "quickstart shakespeare_char shakespeare_char_fast shakespeare_char_quick gpt2_small gpt2_124m"
    assert {c.stem for c in CONFIGS} >= set(names.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else (), id=path.stem) for path in CONFIGS],
)
def test_a_recipe_trains(config: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run"), *SMALL.split()]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_quick_start_begins_without_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A newcomer once read, before the first step, that a token was missing."""
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    assert main(["train", "--config", quickstart, "--out", str(tmp_path / "run"), *SMALL.split()]) == 0
    captured = capsys.readouterr()
    assert "training and" in captured.out.splitlines()[0]
    assert "<|" not in captured.out + captured.err
