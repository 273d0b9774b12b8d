"""benchmarks/all.py, with small scripts in place of the benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks_modules import load

# Each run of this script appends its name and its minutes to the file "order".
SCRIPT = """
import sys
from pathlib import Path
name, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open(Path(options["--out"]) / "order", "a") as file:
    file.write(f"{name} {options['--minutes']} {options.get('--litgpt', '')}\\n")
print("LitGPT is left out: litgpt is not installed")
if name == "broken" and not Path(options["--out"], "repaired").exists():
    sys.exit("no memory")
"""


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load("all")


def run(runner: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict[str, Any]]:
    script = out.parent / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def benchmark(name: str, weight: float, **needs: tuple[str, ...]) -> Any:
        return runner.Benchmark(str(script), (name, "--litgpt=LITGPT"), weight, **needs)

    monkeypatch.setattr(
        runner,
        "BENCHMARKS",
        {
            "first": benchmark("first", 1),
            "broken": benchmark("broken", 2),
            "absent": benchmark("absent", 2, packages=("a_package_that_is_not_installed",), files=("text",)),
            "last": benchmark("last", 3),
        },
    )
    arguments = ["all.py", "--out", str(out), "--minutes", "6", "--models", str(out / "models"), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        runner.main()
    return stopped.value.code, json.loads((out / "all.json").read_text(encoding="utf-8"))


def test_a_failure_stops_nothing_and_an_interrupted_run_can_be_resumed(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, found = run(runner, out, monkeypatch)
    assert code == 1
    assert {name: (of["status"], of["message"]) for name, of in found.items()} == {
        "first": ("done", ""),
        "broken": ("failed", "no memory"),
        "absent": ("left out", "it needs --text and the package a_package_that_is_not_installed"),
        "last": ("done", ""),
    }
    assert found["first"]["left_out"] == ["LitGPT: litgpt is not installed"]
    shown = capsys.readouterr().out
    assert "broken: failed no memory" in shown and "left out: LitGPT: litgpt is not installed" in shown
    order = [line.split() for line in (out / "order").read_text().splitlines()]
    assert [name for name, *_ in order] == ["first", "broken", "last"]
    # A share is a weight among the weights that are left, of the minutes that are left.
    minutes = [float(line[1]) for line in order]
    assert minutes == pytest.approx([6 / 8, 12 / 7, 6], abs=0.5) and minutes[0] == 0.75

    (out / "repaired").touch()
    code, found = run(runner, out, monkeypatch, "--litgpt", "/other/python")
    assert code == 0 and found["broken"]["status"] == "done"
    order = [line.split() for line in (out / "order").read_text().splitlines()[3:]]
    assert [(name, *rest) for name, _, *rest in order] == [("broken", "/other/python")]
    assert (out / "all.log").read_text().count("=== broken") == 2


def test_every_benchmark_is_a_script_with_these_options(runner: ModuleType) -> None:
    """Each option that is passed appears in the script, or is shared by all scripts."""
    for name, benchmark in runner.BENCHMARKS.items():
        source = (Path(runner.__file__).parent / benchmark.script).read_text(encoding="utf-8")
        for argument in benchmark.arguments:
            option = argument.partition("=")[0]
            assert not option.startswith("--") or f'"{option}"' in source, f"{name} has no option {option}"


def test_every_table_is_measured_by_a_benchmark(runner: ModuleType) -> None:
    measured = set(runner.BENCHMARKS) | {"decode_124M", "speedrun_bytes"}
    for name, table in load("tables").TABLES.items():
        assert set(table.needs) <= measured, name
