"""The notebooks run from the first cell to the last, and are stored with their outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from places import ROOT

TOUR, SOLUTIONS = ROOT / "MyGPT.ipynb", ROOT / "notebooks" / "solutions.ipynb"
TOKENIZERS, TEMPERATURE, LORA, HEADS = SHORT = [
    ROOT / "notebooks" / f"{name}.ipynb" for name in ("tokenizers", "temperature", "lora", "heads")
]


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


def run(path: Path) -> Any:
    """Return the notebook, executed afresh in the current directory."""
    notebook = read(path)
    n_pictures = pictures(notebook)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
    assert not [out for cell in code_cells(notebook) for out in cell.outputs if out.get("name") == "stderr"]
    assert pictures(notebook) == n_pictures
    return notebook


def table(text: str, name: str, n: int) -> list[float]:
    """Return the last n numbers of the printed line that begins with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*(?:e-\d+)?", line)][-n:]


@pytest.mark.parametrize("path", [TOUR, SOLUTIONS, *SHORT], ids=lambda path: path.stem)
def test_a_notebook_is_stored_executed_in_order_without_errors_or_traces_of_a_machine(path: Path) -> None:
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert pictures(notebook) >= (2 if path in SHORT else 3)
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
    stored = printed(read(TOUR))
    said = printed(run(TOUR))
    assert said.count("True") == stored.count("True") == 4  # results by hand equal the library's
    assert "False" not in said
    before, after = (float(word) for word in said.split("validation loss ")[1].split()[:3:2])
    # Untrained weights have about the loss of a uniform guess; trained ones are far better.
    assert before == pytest.approx(math.log(767), abs=0.3)
    assert after < 4.6
    assert "after:  'A very small GPT.'" in said
    run(SOLUTIONS)


def check_heads(said: str) -> None:
    """The heads form: previous-token in layer 0, induction in layer 1; ablation shows that both layers are needed."""
    first, last = map(float, re.search(r"loss ([\d.]+) at first, ([\d.]+) after", said).groups())  # type: ignore[union-attr]
    assert first == pytest.approx(math.log(26), abs=0.3) and last < 0.1
    previous, induction = (table(said, f"layer {i}, head", 1)[0] for i in (0, 1))
    assert previous > 0.5 and induction > 0.5
    single = [table(said, f"without [({i}, {j})]", 1)[0] for i in (0, 1) for j in (0, 1)]
    assert max(single[:2]) > 1 and min(single[:2]) < 0.5  # one head of layer 0 cannot be replaced
    assert max(single[2:]) < 0.5  # either head of layer 1 can
    assert all(table(said, f"without [({i}, 0), ({i}, 1)]", 1)[0] > 2 for i in (0, 1))
    assert [table(said, f"after {text}", 1)[0] for text in ("kqbxzhfq", "kmbxzhfq")] == pytest.approx([1, 0], abs=0.1)


def check_tokenizers(said: str) -> None:
    """Per token the order is one, per byte it is the reverse; only the word tokenizer changes the text."""
    losses = said.split("bits per byte")[1]
    per_token, per_byte = zip(*(table(losses, name, 2) for name in ("characters", "BPE 500", "BPE 2000")), strict=True)
    assert list(per_token) == sorted(per_token) and list(per_byte) == sorted(per_byte, reverse=True)
    characters, bpe, gpt2, words = (
        next(line for line in said.splitlines() if line.startswith(name))
        for name in ("char", "BPE 2000", "GPT-2", "words")
    )
    assert words.endswith("changed") and all(line.endswith("exactly") for line in (characters, bpe, gpt2))


def check_temperature(said: str) -> None:
    """Entropy rises with the temperature; low temperatures repeat, high ones write words that are in no book."""
    entropies = [float(number) for number in re.findall(r"entropy ([\d.]+) nats", said)]
    assert len(entropies) == 4 and entropies == sorted(entropies)
    lines = said.split("  nats per token\n")[1].splitlines()
    rows = [[float(word.rstrip("%")) for word in line.split()] for line in lines[:10]]
    assert rows[0][1] > 3 * rows[5][1]  # repeated: temperature 0.1 against 1
    assert rows[1][2] > 80 > 60 > rows[-1][2]  # words of the book
    nats = [row[3] for row in rows[1:]]
    assert nats == sorted(nats)
    assert rows[5][3] == pytest.approx(float(lines[10].split()[-1]), abs=0.5)  # temperature 1 against the book


def check_lora(said: str) -> None:
    """The LoRA update has rank 4, learns the capitals, forgets the book, and equals the merged weights."""
    base, full, lora = (table(said, name, 2) for name in ("base  ", "all weights  ", "LoRA, r = 4  "))
    assert full[0] < lora[0] < base[0] - 0.6  # capitals
    assert min(full[1], lora[1]) > base[1] + 0.5  # the book
    assert "same predictions at first: True" in said
    assert "LoRA, r = 4: rank 4, 100%" in said
    assert table(said, "largest difference between merged", 1)[0] < 1e-4
    off = float(said.split("switched off: loss ")[1].split()[0])
    assert off == base[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "check"),
    [(TOKENIZERS, check_tokenizers), (TEMPERATURE, check_temperature), (LORA, check_lora), (HEADS, check_heads)],
    ids=lambda value: getattr(value, "stem", ""),
)
def test_a_short_notebook_runs_afresh_and_shows_what_its_text_says(
    path: Path, check: Callable[[str], None], in_tmp_path: Path
) -> None:
    check(printed(read(path)))  # the stored outputs
    check(printed(run(path)))
