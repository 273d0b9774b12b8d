"""mygpt explain"""

from __future__ import annotations

from pathlib import Path


def explain(
    *text: str, model: str, adapter: str | None = None, out: str = "explain.html", device: str = "auto"
) -> None:
    """Write a page on how a model reads a text: its tokens, attention, what each layer would say, what comes next.

    The page is one file that needs no network; open it in a browser.
    Example: mygpt explain --model runs/book "The wizard entered"

    Args:
        text: the text, in quotes, at most 128 tokens
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        adapter: an adapter's directory, or a run of mygpt finetune
        out: the page to write
        device: auto, cpu, cuda or mps
    """
    from MyGPT.commands._model import encode_for
    from MyGPT.files import atomic_write
    from MyGPT.inside.page import explain_page
    from MyGPT.opening import open_model

    if Path(out).suffix not in (".html", ".htm"):
        raise ValueError(f"a page is written as .html, got {out}")
    gpt, tokenizer = open_model(model, device, adapter)
    ids = encode_for(gpt, tokenizer, " ".join(text))
    page = explain_page(gpt, tokenizer, ids, Path(model).name)
    with atomic_write(out) as file:
        file.write(page)
    print(out)
