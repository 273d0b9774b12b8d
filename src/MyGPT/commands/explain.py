"""`mygpt explain`: an HTML page that shows how a model reads a text."""

from __future__ import annotations

from pathlib import Path


def explain(
    *text: str,
    model: str,
    adapter: str | None = None,
    out: str = "explain.html",
    device: str = "auto",
    with_: str | None = None,
) -> None:
    """Write an HTML page that shows how a model reads a text.

    The page shows the tokens, the attention of every head, the prediction after every layer, and the most likely next tokens.
    It is one file that works without a network.

    Example:
        mygpt explain --model runs/book "The wizard entered"

    Args:
        text: The text in quotes, at most 128 tokens.
        out: The .html file to write.
    """
    from MyGPT.commands._model import check_html_path, encode_for, report_tokenizer
    from MyGPT.files import atomic_write
    from MyGPT.inside.page import explain_page
    from MyGPT.opening import open_model

    check_html_path(out)
    if not "".join(text):
        raise ValueError("the text is empty; give at least one token")
    gpt, tokenizer = open_model(model, device, adapter, with_)
    report_tokenizer(tokenizer)
    ids = encode_for(gpt, tokenizer, " ".join(text))
    page = explain_page(gpt, tokenizer, ids, Path(model).name)
    with atomic_write(out) as file:
        file.write(page)
    print(out)
