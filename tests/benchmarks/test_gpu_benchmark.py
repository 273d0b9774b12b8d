"""benchmarks/gpu.py, which runs on rare machines: its toy sizes run here, and no part can harm the others."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks_modules import load
from places import ROOT

SCRIPT = ROOT / "benchmarks/gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load("gpu")


def run_python(script: Any, code: str, seconds: float = 20) -> tuple[dict[str, Any], str]:
    log = io.StringIO()
    return script.run_part([sys.executable, "-c", code], seconds, log), log.getvalue()


def test_a_part_returns_its_rows_and_logs_the_rest(script: Any) -> None:
    part, log = run_python(script, """print('compiling'); print('ROW {"fact": "CPU", "value": 1.5}')""")
    assert (part["status"], part["rows"]) == ("done", [{"fact": "CPU", "value": 1.5}])
    assert "compiling" in log


def test_a_part_that_fails_keeps_its_rows_and_its_reason(script: Any) -> None:
    part, log = run_python(script, """print('ROW {"fact": 1}'); raise ValueError("no memory")""")
    assert (part["status"], part["rows"]) == ("failed", [{"fact": 1}])
    assert part["message"] == "with status 1: ValueError: no memory"
    assert "Traceback" in log


def test_a_part_that_hangs_is_stopped_with_its_children_and_keeps_its_rows(script: Any) -> None:
    """The child keeps the output open, so waiting for the part alone would wait for the child."""
    code = """import subprocess, sys; print('ROW {"fact": 1}', flush=True); subprocess.run(["sleep", "60"])"""
    part, _ = run_python(script, code, seconds=0.5)
    assert (part["status"], part["rows"]) == ("stopped", [{"fact": 1}])
    assert part["seconds"] < 10


def test_a_part_that_cannot_run_here_is_skipped_with_a_sentence(script: Any) -> None:
    part, _ = run_python(script, "print('transformers is not installed'); raise SystemExit(77)")
    assert (part["status"], part["message"]) == ("skipped", "transformers is not installed")


def test_captured_decoding_stays_only_if_it_is_faster_than_eager_decoding(script: Any) -> None:
    def verdict(one: float, many: float, failures: tuple[str, ...] = ()) -> bool:
        speeds = {("MyGPT, captured", 1): one, ("MyGPT, eager", 1): 1.0, ("MyGPT, captured", 64): many,
                  ("MyGPT, eager", 64): 1.0, ("transformers", 1): 0.3}  # fmt: skip
        rows = [{"program": name, "sequences": B, "tokens_per_second": speed} for (name, B), speed in speeds.items()]
        tests = [{"failed_test": f"tests/gpu: {name}"} for name in failures]
        found = script.verdicts({"decoding": {"rows": rows}, "tests": {"rows": tests}})
        return {row["question"]: row["is_met"] for row in found}["Does captured.py stay?"]

    assert verdict(1.6, 1.0) and not verdict(1.4, 1.0) and not verdict(1.6, 0.9)
    assert not verdict(1.6, 1.0, ("test_captured_logits",)) and verdict(1.6, 1.0, ("test_resume",))


@pytest.mark.slow
def test_the_toy_sizes_run_on_any_machine_and_give_the_documented_results(script: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(tmp_path / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "gpu/gpu.json").read_text())
    parts = results["parts"]
    assert results["toy"] is True and results["seconds"] > 0
    assert list(parts) == list(script.LIMITS)
    assert {part["status"] for part in parts.values()} == {"done"}, done.stdout
    assert all(
        part["rows"] and not any("error" in row and "program" in row for row in part["rows"]) for part in parts.values()
    )
    assert {row["program"] for row in parts["training"]["rows"]} >= {"MyGPT", "MyGPT, not compiled"}
    assert {row["sequences"] for row in parts["decoding"]["rows"]} == {1, 64}
    assert all(row["equal_ids"] > 0.5 for row in parts["decoding"]["rows"] if row["program"] == "MyGPT, captured")
    assert {row["parallel"] for row in parts["sharding"]["rows"]} == {"none", "fsdp"}
    answers = {row["question"]: row["is_met"] for row in results["verdicts"]}
    for question in (
        "Do the tests pass?", "Is the CPU kernel right on this CPU?", "Does FSDP2 on one device change the loss?",
    ):  # fmt: skip
        assert answers[question] is True
    assert "Does captured.py stay?" in answers
    text = (tmp_path / "gpu/gpu.md").read_text()
    assert text in done.stdout
    assert all(f"### {name.capitalize()}\n" in text for name in parts)
