"""The notebooks run from the first cell to the last, and are stored with their outputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from places import ROOT

TOUR, SOLUTIONS = ROOT / "MyGPT.ipynb", ROOT / "notebooks" / "solutions.ipynb"


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


@pytest.mark.parametrize("path", [TOUR, SOLUTIONS], ids=lambda path: path.stem)
def test_a_notebook_is_stored_executed_in_order_without_errors_or_traces_of_a_machine(path: Path) -> None:
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert pictures(notebook) >= 3
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text and "/home/" not in text and "/tmp/" not in text
    assert len(text) < 3_000_000


def test_every_exercise_has_a_solution_that_is_folded() -> None:
    tour, solutions = read(TOUR), read(SOLUTIONS)
    numbers = range(1, 10)
    asked = "".join(cell.source for cell in tour.cells)
    assert all(f"**Exercise {number}.**" in asked for number in numbers)
    for number in numbers:
        place = next(i for i, cell in enumerate(solutions.cells) if cell.source.startswith(f"## Exercise {number}\n"))
        folded = solutions.cells[place + 1]
        assert folded.cell_type == "code"
        assert folded.metadata["jupyter"]["source_hidden"]


@pytest.mark.slow
def test_the_notebooks_run_afresh(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebooks run one after the other, because the second one reads the model that the first one trains."""
    (in_tmp_path / "tests").symlink_to(ROOT / "tests")  # the first notebook opens a checkpoint in tests/
    monkeypatch.setenv("MYGPT_GPT2_URL", "http://127.0.0.1:9/")  # nothing listens there, so a download fails at once
    for path in (TOUR, SOLUTIONS):
        notebook = read(path)
        stored = printed(notebook), pictures(notebook)
        client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": "."}})
        client.execute()
        assert not [out for cell in code_cells(notebook) for out in cell.outputs if out.get("name") == "stderr"]
        assert pictures(notebook) == stored[1]
        if path == TOUR:
            said = printed(notebook)
            assert said.count("True") == stored[0].count("True") == 4  # results by hand equal the library's
            assert "False" not in said
            before, after = (float(word) for word in said.split("validation loss ")[1].split()[:3:2])
            # Untrained weights have about the loss of a uniform guess; trained ones are far better.
            assert before == pytest.approx(math.log(767), abs=0.3)
            assert after < 4.6
            assert "after:  'A very small GPT.'" in said
