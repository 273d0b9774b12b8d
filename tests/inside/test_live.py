"""Test the page of `mygpt explain --live` in Chromium: JavaScript's numbers and token ids must equal Python's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from browser import open_browser
from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, GPTModel
from MyGPT.acceleration.packed import row_scales
from MyGPT.inside.live import LivePage

Ask = Callable[[str], Any]
TEXT = "The cat sat on the mat, and the cat slept."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser(logs=("browser", "performance")) as opened:
        opened.set_script_timeout(60)
        yield opened


def write_page(directory: Path, page: LivePage) -> Path:
    path = directory / "live.html"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(page.pieces())
    assert path.stat().st_size == page.n_bytes
    return path


def opened(browser: Any, path: Path) -> Ask:
    """Open a live page, wait until its worker is ready, and return a function that evaluates JavaScript in the page."""
    browser.get(path.as_uri())

    def ask(expression: str) -> Any:
        script = "const done = arguments[0]; (async () => (%s))().then(done, error => done({ error: error.message }));"
        return browser.execute_async_script(script % expression)

    assert ask("await source.ready") is None
    return ask


@torch.no_grad()
def rounded(model: GPTModel, precision: str) -> GPTModel:
    """Return a float32 copy of the model with the weights that the page stores."""
    copied = copy.deepcopy(model).float()
    for weight in copied.parameters():
        if precision == "fp16":
            weight.copy_(weight.half())
        elif weight.dim() == 2:
            scales = row_scales(weight)[:, None]
            weight.copy_((weight / scales).round() * scales)
    return copied


@torch.no_grad()
def logits_of(ask: Ask, model: GPTModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logits (V,) after the ids as the page and as Python compute them."""
    walked = ask(f"await source.walk({ids}, {{ layer: 0, head: 0, token: {len(ids) - 1} }})")
    del walked
    return torch.empty(0), model(torch.tensor([ids]))[0, -1]


def test_page_reads_as_python_does(browser: Any, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=64, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0)
    ask = opened(browser, write_page(tmp_path, LivePage(lively_model(config), tokenizer, TEXT, "</script>")))
    assert ask(f"await source.read({json.dumps(TEXT)})")["ids"] == tokenizer.encode(TEXT)
