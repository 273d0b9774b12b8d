"""The tables and progress bars that notebooks show, which nbclient runs as Jupyter does."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from conftest import lively_model
from MyGPT import GPTConfig, GPTDataset
from MyGPT.evaluation.perplexity import Result
from MyGPT.finetuning.classification import LabelledTexts
from MyGPT.inside.tracing import trace
from MyGPT.notebooks import html_table, shown
from MyGPT.progress import bar_class, is_notebook
from tiny_runs import TEXT, TOKENIZER, make_trainer


class Cells(HTMLParser):
    """Collects the texts of an HTML page, and the names of all its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_table_shows_names_and_values_and_escapes_them() -> None:
    page = html_table("<script>alert(1)</script>", {"a<b>": "<img src=x onerror=alert(1)>", "n": 124_439_808})
    cells = Cells(page)
    assert cells.tags == {"div", "table", "tr", "td"}
    assert cells.texts == ["<script>alert(1)</script>", "a<b>", "<img src=x onerror=alert(1)>", "n", "124,439,808"]


def test_numbers_are_readable() -> None:
    assert [shown(value) for value in (1234, 0.0, 1.5, 1e-5, 2e9, True, None)] == [
        "1,234", "0.0000", "1.5000", "1e-05", "2e+09", "True", "None"
    ]  # fmt: skip


def test_models_traces_data_sets_and_results_describe_themselves(tmp_path: Path, tiny_config: GPTConfig) -> None:
    model = lively_model(tiny_config)
    of_model = Cells(model._repr_html_()).texts
    assert of_model[:3] == ["GPTModel", "parameters", f"{sum(p.numel() for p in set(model.parameters())):,}"]
    assert f"{model.config.emb_dim}" in of_model
    assert "emb_dim" in Cells(model.config._repr_html_()).texts
    found = trace(model, torch.tensor([[1, 2, 3]]))
    assert str(tuple(found["logits"].shape)) in Cells(found._repr_html_()).texts
    assert repr(found).startswith(f"Trace(activations={len(found)}, wte=(1, 3, {model.config.emb_dim})")
    dataset = GPTDataset(TEXT[:100], TOKENIZER, 8, 4)
    assert repr(dataset) == f"GPTDataset(windows={len(dataset)}, tokens=100, max_length=8, stride=4)"
    labelled = LabelledTexts([("the fox", "a"), ("the dog", "b"), ("a fox", "a")], ["a", "b"], TOKENIZER, 5)
    assert repr(labelled) == "LabelledTexts(texts=3, labels=2 a, 1 b, longest=5, cut=2)"
    assert Cells(Result(3.0, 2)._repr_html_()).texts[1:3] == ["loss (nats per token)", "1.5000"]
    trainer = make_trainer(tmp_path / "run")
    trainer.run()
    assert Cells(trainer._repr_html_()).texts[:3] == ["Trainer", "steps", "8 of 8"]


def test_this_process_is_no_notebook() -> None:
    assert not is_notebook()
    assert bar_class().__module__ == "tqdm.std"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter
def test_an_executed_notebook_shows_tables_figures_and_one_bar_without_warnings(in_tmp_path: Path) -> None:
    import nbclient
    import nbformat

    sources = [
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, MyGPT\n"
        "from MyGPT import GPTConfig, GPTModel, TrainConfig, Trainer\n"
        "model = GPTModel(GPTConfig(vocab_size=9, context_length=8, emb_dim=8, n_heads=2, n_layers=1))\nmodel",
        "from MyGPT.inside.tracing import trace\ntrace(model, torch.zeros(1, 4, dtype=torch.long))",
        "config = TrainConfig(max_steps=3, batch_size=2, warmup_steps=0, log_every=1, sample_every=0)\n"
        "ids = [i % 9 for i in range(200)]\ntrainer = Trainer(model, config, ids, ids, run_dir='run')\n"
        "trainer.run()\ntrainer",
        "from MyGPT.inside.plots import plot_losses\nplot_losses(['run'])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [cell["outputs"] for cell in notebook["cells"]]
    pages = [output["data"].get("text/html", "") for part in outputs for output in part if "data" in output]
    assert [Cells(page).texts[0] for page in pages if page] == ["GPTModel", "Trace", "Trainer"]
    bars = "".join(output["text"] for output in outputs[2] if output.get("name") == "stderr")
    assert "training" in bars and "3/3" in bars
    assert "Warning" not in bars
    pictures = [output for output in outputs[3] if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
