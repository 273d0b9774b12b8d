"""benchmarks/measurements.py: the format of results, and what the scripts share."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks_modules import load
from places import ROOT


@pytest.fixture(scope="module")
def measurements() -> ModuleType:
    return load("measurements")


def example(measurements: ModuleType) -> object:
    results = measurements.Results("example", {"size": "124M", "vocab_size": 65}, ["numpy"])
    for speed in (20.5, 19.25, 1 / 3):
        results.add("MyGPT", "speed", "tokens/s", speed, precision="fp32")
    results.add("peer", "speed", "tokens/s", 10.25, 38.5)  # stopped after two rounds
    results.add("peer", "memory", "bytes", 123_456_789_012)
    results.compare("MyGPT", "peer", "speed", target=1.2)
    results.compare("MyGPT", "peer", "memory")  # not measured
    return results


def test_results_are_read_as_they_were_written(measurements: ModuleType, tmp_path: Path) -> None:
    results = example(measurements)
    results.save(tmp_path / "new")
    loaded = measurements.Results.load(tmp_path / "new/example.json")
    assert loaded.text() == results.text()
    assert loaded.row("MyGPT", "speed").values == [20.5, 19.25, 0.333333333]
    assert loaded.row("MyGPT", "speed").about == {"precision": "fp32"}
    assert loaded.row("peer", "memory").values == [123_456_789_012]


def test_the_file_has_the_documented_fields(measurements: ModuleType, tmp_path: Path) -> None:
    """The table of fields in benchmarks/README.md names every key, and nothing else."""
    example(measurements).save(tmp_path)
    content = json.loads((tmp_path / "example.json").read_text(encoding="utf-8"))
    documented = {
        line.split("`")[1]
        for line in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and not line.startswith("| `--")
    }
    keys = set(content) | {f"rows.{key}" for row in content["rows"] for key in row}
    keys |= {f"ratios.{key}" for ratio in content["ratios"] for key in ratio}
    keys |= {f"machine.{key}" for key in content["machine"]}
    keys |= {"machine.threads"}  # only if torch was imported
    assert keys - {"machine.memory_gb"} == documented - {"machine.memory_gb"}  # Windows does not tell its memory
    assert content["format"] == 1
    assert content["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert content["rows"][0]["median"] == statistics.median([20.5, 19.25, 1 / 3])
    (ratio,) = content["ratios"]
    assert ratio == {"name": "MyGPT", "other": "peer", "measure": "speed", "values": [2.0, 0.5], "target": 1.2,
                     "median": 1.25}  # fmt: skip


def test_a_file_of_another_format_or_with_a_changed_value_is_refused(measurements: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "example.json"
    path.write_text('{"machine": {}, "tables": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="does not have format 1"):
        measurements.Results.load(path)
    text = example(measurements).text()
    path.write_text(text.replace("[20.5, 19.25", "[20.5, 29.25"), encoding="utf-8")
    with pytest.raises(ValueError, match="the median of speed of MyGPT does not fit its values"):
        measurements.Results.load(path)


def test_a_value_in_another_unit_is_refused(measurements: ModuleType) -> None:
    results = example(measurements)
    with pytest.raises(ValueError, match="is in tokens/s, so a value in s cannot be added"):
        results.add("MyGPT", "speed", "s", 1.0)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (["--rounds", "4"], "--rounds 4"),
        (["--text", "/home/me/my text.txt", "--repeat=20"], "--text TEXT --repeat 20"),
        (["--out", "results", "--minutes", "3", "--models", "small", "char"], "--models small char"),
        (["--out=results", "--programs", "MyGPT int8", "--busy"], '--programs "MyGPT int8" --busy'),
    ],
)
def test_the_stored_command_has_no_paths(measurements: ModuleType, given: list[str], stored: str) -> None:
    found = measurements.command(["/somewhere/benchmarks/bpe.py", *given])
    assert found == f"python benchmarks/bpe.py {stored}"


@pytest.mark.parametrize(
    ("minutes", "warm_up", "expected"),
    [(float("inf"), False, [1, 2, 3, 4]), (float("inf"), True, [0, 1, 2, 3, 4]), (0.0, True, [0, 1]),
     (2.5, False, [1, 2]), (4.0, False, [1, 2, 3, 4])],
)  # fmt: skip
def test_no_round_begins_that_would_end_too_late(
    measurements: ModuleType, monkeypatch: pytest.MonkeyPatch, minutes: float, warm_up: bool, expected: list[int]
) -> None:
    """Each round takes a minute of this clock."""
    now = [0.0]
    monkeypatch.setattr(measurements.time, "monotonic", lambda: now[0])
    found = []
    for turn in measurements.rounds(argparse.Namespace(rounds=4, minutes=minutes), warm_up):
        now[0] += 60
        found.append(turn)
    assert found == expected


def test_a_function_of_a_script_runs_in_its_own_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""import argparse, os, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from measurements import in_a_process, parse

def divide(a, b):
    print("something else")
    return {{"ratio": a / b, "process": os.getpid()}}

parser = argparse.ArgumentParser()
parser.add_argument("--needed", required=True)
options = parse(parser, divide, rounds=1)
found = in_a_process(divide, a=1, b=4)
print(found["ratio"], found["process"] != os.getpid())
in_a_process(divide, a=1, b=0)
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script), "--needed", "x"], capture_output=True, text=True)
    assert done.stdout == "0.25 True\n"
    assert done.returncode == 1
    assert "divide of {'a': 1, 'b': 0} failed:" in done.stderr and "ZeroDivisionError" in done.stderr
