"""`mygpt explain`: HTML pages that show how a model reads a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

OPTIONAL = ("text",)
_EXAMPLE = 'mygpt explain --model runs/book "The wizard entered"'


def explain(
    *text: str,
    model: str | None = None,
    live: bool = False,
    precision: Literal["fp16", "int8"] | None = None,
    adapter: str | None = None,
    out: str = "explain.html",
    device: str = "auto",
) -> None:
    """Write an HTML page that shows how a model reads a text.

    The page shows the tokens, the attention of every head, the prediction after every layer, and the most likely next tokens.
    It is one file that works without a network. With --live, the page contains the model and computes while you type.

    Examples:
        mygpt explain --model runs/book "The wizard entered"
        mygpt explain --model runs/book --live

    Args:
        text: The text in quotes, at most 128 tokens. With --live, it is optional: the text with which the page starts.
        live: Write a page that contains the model, which can have up to 32 million parameters.
        precision: With --live, the number format of the weights. int8 makes the page half as large as fp16. Default: fp16.
        out: The .html file to write.
    """
    from MyGPT.commands._model import check_html_path

    check_html_path(out)
    missing = [name for name, is_given in (("TEXT", text or live), ("--model", model)) if not is_given]
    if model is None or missing:
        raise ValueError(f"missing {' and '.join(missing)}; for example: {_EXAMPLE} (see mygpt explain --help)")
    if live:
        if device != "auto":
            raise ValueError(f"--device does not apply to --live, because the browser computes; got --device {device}")
        _write_live_page(" ".join(text), model, precision or "fp16", adapter, out)
    else:
        if precision is not None:
            raise ValueError(f"--precision is an option of --live, got --precision {precision} without --live")
        _write_page(text, model, adapter, out, device)
    print(out)


def _write_page(text: tuple[str, ...], model: str, adapter: str | None, out: str, device: str) -> None:
    """Write a page that shows how the model reads one text."""
    from MyGPT.commands._model import encode_for, report_tokenizer
    from MyGPT.files import atomic_write
    from MyGPT.inside.page import explain_page
    from MyGPT.opening import open_model

    if not "".join(text):
        raise ValueError("the text is empty; give at least one token")
    gpt, tokenizer = open_model(model, device, adapter)
    report_tokenizer(tokenizer)
    ids = encode_for(gpt, tokenizer, " ".join(text))
    page = explain_page(gpt, tokenizer, ids, Path(model).name)
    with atomic_write(out) as file:
        file.write(page)


def _write_live_page(text: str, model: str, precision: Literal["fp16", "int8"], adapter: str | None, out: str) -> None:
    """Write a page that contains the model. Report the size of the page before it is written."""
    from MyGPT.commands._model import report_tokenizer
    from MyGPT.files import atomic_write
    from MyGPT.inside.live import LivePage
    from MyGPT.opening import open_model

    gpt, tokenizer = open_model(model, "cpu", adapter)
    report_tokenizer(tokenizer)
    page = LivePage(gpt, tokenizer, text, Path(model).name, precision)
    n = gpt.num_parameters()
    print(f"the page has {page.n_bytes / 1e6:,.1f} MB, with {n:,} parameters in {precision}", file=sys.stderr)
    with atomic_write(out) as file:
        file.writelines(page.pieces())
