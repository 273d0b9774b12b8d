"""Functions that show how a text is split into tokens: in a terminal, in a notebook (HTML), or as labels in plots."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from MyGPT.tokenizers.base import encode_with_specials, has_token

_MARKS = {" ": "·", "\n": "↵", "\r": "←", "\t": "⇥"}
_KEPT = {" ": " ", "\n": "↵\n", "\r": "←", "\t": "⇥   "}
# Light tints of Okabe and Ito's colours (2008), for black text. Adjacent tints also differ for colour-blind readers.
_TINTS = ("#a6d3f2", "#fbd38d", "#a8e0c8", "#f0c4dc", "#f4ec9c")
_TERMINAL_TINTS = (153, 222, 158, 225, 229)


def token_labels(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return a label for each token id: its text with · for a space, ↵ for a line end, \\xe2 for part of a character."""
    ids = list(ids)
    pairs = zip(ids, token_texts(tokenizer, ids), strict=True)
    return [_visible(text) if has_token(tokenizer, id_) else text for id_, text in pairs]


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return the text of each token id, decoded alone. A part of a character is written as an escape such as \\xe2.

    The text of an id without a token is <id 50300>, for example, because models often have more ids than tokens.
    """

    def text_of(id_: int) -> str:
        if not has_token(tokenizer, id_):
            return f"<id {id_}>"
        if hasattr(tokenizer, "decode_tokens_bytes"):
            return tokenizer.decode_tokens_bytes([id_])[0].decode("utf-8", errors="backslashreplace")
        return tokenizer.decode([id_])

    return [text_of(id_) for id_ in ids]


def tokens_to_terminal(tokenizer: Any, text: str, colour: bool = True) -> str:
    """Return a text for a terminal, in which each token has a coloured background.

    If `colour` is False, a vertical bar (|) is written between the tokens instead.
    """
    texts = token_texts(tokenizer, encode_with_specials(tokenizer, text))
    if not colour:
        return "|".join(_visible(text, _KEPT) for text in texts)
    painted = []
    for token, tint in zip(texts, cycle(_TERMINAL_TINTS), strict=False):
        # A background colour that continues over a line end would fill the rest of the line.
        lines = [f"\x1b[30;48;5;{tint}m{line}\x1b[0m" if line else "" for line in _visible(token, _KEPT).split("\n")]
        painted.append("\n".join(lines))
    return "".join(painted)


def tokens_to_html(tokenizer: Any, text: str) -> str:
    """Return a text as an HTML element in which each token has a coloured background and its id as a tooltip."""
    ids = encode_with_specials(tokenizer, text)
    spans = [
        f'<span style="background:{tint};color:#000;border-radius:2px" title="id {id_}">'
        f"{html.escape(_visible(token, _KEPT))}</span>"
        for id_, token, tint in zip(ids, token_texts(tokenizer, ids), cycle(_TINTS), strict=False)
    ]
    return f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.6">{"".join(spans)}</div>'


def shorten(labels: Sequence[str], longest: int) -> list[str]:
    """Return the labels, cut to at most `longest` characters each. A cut label ends with …."""
    return [label if len(label) <= longest else label[: longest - 1] + "…" for label in labels]


def _visible(text: str, marks: Mapping[str, str] = _MARKS) -> str:
    """Return `text` with each key of `marks` replaced by its value, and other unprintable characters as escapes."""
    return "".join(marks.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
