"""benchmarks/tables.py: the tables of the documentation are those of the stored results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks_modules import load
from places import ROOT

RESULTS = ROOT / "benchmarks/results"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load("tables")


def test_the_tables_of_the_documentation_are_made_from_the_stored_results(tables: ModuleType) -> None:
    """If this fails, run `python benchmarks/tables.py`."""
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        new, problems = tables.rendered(text, RESULTS)
        for problem in problems:  # a table without results must be empty
            assert (name := problem.split()[2]) in tables.TABLES, problem
            assert f"<!-- table: {name} -->\n<!-- end -->" in text, problem
        assert new == text, f"{page} differs from the results"
        assert text.count("<!-- table: ") == len(tables.REGION.findall(text)), f"{page}: a table has no end"


def test_every_file_of_results_has_the_format_and_its_own_name(tables: ModuleType) -> None:
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem not in ("gpu", "all"):  # the GPU's have a format of their own; all.json is a list of what was run
            assert tables.Results.load(path).name == path.stem


def test_the_readme_shows_the_medians_of_the_stored_values() -> None:
    """The cells are computed here from the JSON alone."""
    rows = json.loads((RESULTS / "decode_124M.json").read_text(encoding="utf-8"))["rows"]
    values = {(row["name"], row["measure"]): row["values"] for row in rows}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = re.search(r"\| MyGPT with `accelerate` \| (.*) \|", text)[1].split(" | ")
    expected = [
        f"{statistics.median(values[f'MyGPT {precision}', measure]):.0f}"
        for measure in ("one sequence", "eight sequences")
        for precision in ("fp32", "bf16", "int8")
    ]
    assert cells == expected


def test_a_changed_figure_is_found_and_repaired(tables: ModuleType) -> None:
    page = ROOT / "docs/performance/tokenizers.md"
    text = page.read_text(encoding="utf-8")
    begin = text.index("<!-- table: bpe -->")
    end = text.index("<!-- end -->", begin)
    changed = text[:begin] + text[begin:end].replace("1", "2") + text[end:]
    assert changed != text
    assert tables.rendered(changed, RESULTS) == (text, [])


def test_a_table_without_results_stays_and_is_reported(tables: ModuleType, tmp_path: Path) -> None:
    text = "Before\n<!-- table: bpe -->\n| old |\n<!-- end -->\n<!-- table: x -->\n<!-- end -->\n"
    new, problems = tables.rendered(text, tmp_path)
    assert new == text
    assert problems[0] == "the table bpe needs bpe.json and bpe_x20.json"
    assert problems[1].startswith("there is no table x; the tables are training_small, ")


def test_a_target_is_an_upper_limit_for_times_and_a_lower_one_for_speeds(tables: ModuleType) -> None:
    results = load("measurements").Results("example")
    for measure, unit in (("time", "s"), ("speed", "tokens/s")):
        results.add("MyGPT", measure, unit, 3.0, 4.0)
        results.add("peer", measure, unit, 4.0, 4.0)
        results.compare("MyGPT", "peer", measure, target=0.9)
    assert tables.targets(results).splitlines()[2:] == [
        "| MyGPT / peer, time | 0.9 | 0.88 (0.75 to 1.00) |",
        "| MyGPT / peer, speed | 0.9 | 0.88 (0.75 to 1.00), missed |",
    ]


def test_compiled_programs_are_peers_too(tables: ModuleType) -> None:
    """A ratio is taken from the fastest peer, whether it is compiled or not; the ceiling is a step of products alone."""
    results = load("measurements").Results("training_small", {"flops_per_token": 10})
    results.add("mm", "products, fp32", "FLOP/s", 9000.0, 11000.0)
    results.add("linear", "products, fp32", "FLOP/s", 10000.0, 9000.0)
    for name, speed in {"MyGPT": 600.0, "MyGPT, compiled": 300.0, "peer": 400.0, "peer, compiled": 500.0}.items():
        results.add(name, "speed, fp32", "tokens/s", speed)
        results.add(name, "memory, fp32", "bytes", 1e9)
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in tables.training(results).splitlines()[2:]]
    assert rows == [
        ["MyGPT", "600", "1.20", "57%"],  # the median of 10,000 and 11,000 FLOP/s is 1,050 tokens/s
        ["MyGPT, compiled", "300", "0.60", "29%"],
        ["peer", "400", "0.80", "38%"],
        ["peer, compiled", "500", "1.00", "48%"],
    ]


def test_slopes_and_bends_of_known_curves(tables: ModuleType) -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert tables.slopes(x, [3.0, 6.0, 24.0, 24.0]) == pytest.approx([1, 2, 0])
    assert tables.bends(x, [3.0, 6.0, 24.0, 24.0], law=1) == "2 to 8"
    assert tables.bends(x, [5.0, 5.0, 5.0, 5.0], law=0) == "nowhere"
