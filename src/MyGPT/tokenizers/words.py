"""Words and punctuation as tokens: the simplest tokenizer, and why one wants a better one.

A word that is not in the vocabulary becomes `<|unk|>`, and white space is lost. The splitting rule is that of
"Build a Large Language Model (From Scratch)" (Raschka, 2024), chapter 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from MyGPT.tokenizers.base import (
    ENDOFTEXT,
    UNKNOWN,
    Tokenizer,
    hugging_face_json,
    lookup_tokens,
    require_text,
    token_ids,
)

_PUNCTUATION = r"""[,.:;?_!"()']|--"""
_SPLIT = re.compile(rf"({_PUNCTUATION}|\s)")
_SPACE_BEFORE_PUNCTUATION = re.compile(r"""\s+([,.:;?!"()'])""")
# What Python's \s is, spelled out: other regex engines leave out the separators \x1c to \x1f.
_WHITE_SPACE = r"[\s\x1c-\x1f\x85\xa0]"
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _WHITE_SPACE}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": _PUNCTUATION}, "behavior": "Isolated", "invert": False},
    ],
}


class SimpleTokenizer(Tokenizer):
    """Words and punctuation marks, each an id of `vocab` (token to id)."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self.int_to_str = token_ids(vocab)
        self.str_to_int = dict(vocab)
        specials = [token for token in (ENDOFTEXT, UNKNOWN) if token in self.str_to_int]
        self._special = re.compile("(" + "|".join(map(re.escape, specials)) + ")") if specials else None

    @classmethod
    def from_text(cls, text: str) -> SimpleTokenizer:
        """The sorted words and marks of `text`, then `<|endoftext|>` and `<|unk|>`."""
        require_text(text)
        plain = text.replace(ENDOFTEXT, " ").replace(UNKNOWN, " ")
        return cls({token: id_ for id_, token in enumerate([*sorted(set(_words(plain))), ENDOFTEXT, UNKNOWN])})

    @property
    def n_vocab(self) -> int:
        return max(self.int_to_str) + 1

    @property
    def eot_token(self) -> int | None:
        return self.str_to_int.get(ENDOFTEXT)

    def encode(self, text: str) -> list[int]:
        """The ids of the words and marks; an unknown word is `<|unk|>`, or a ValueError where the vocabulary has none."""
        require_text(text)
        unknown = self.str_to_int.get(UNKNOWN)
        ids = []
        for word in self._split(text):
            id_ = self.str_to_int.get(word, unknown)
            if id_ is None:
                raise ValueError(f"{word!r} is not in the vocabulary of {self.n_vocab} tokens, which has no {UNKNOWN}")
            ids.append(id_)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The tokens joined by spaces, without the space before a punctuation mark."""
        text = " ".join(lookup_tokens(self.int_to_str, ids, self.n_vocab))
        return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", text)

    def to_json(self) -> dict[str, Any]:
        specials = {token: id_ for token, id_ in self.str_to_int.items() if token in (ENDOFTEXT, UNKNOWN)}
        model = {"type": "WordLevel", "vocab": self.str_to_int, "unk_token": UNKNOWN}
        return hugging_face_json(model, specials, pre_tokenizer=PRE_TOKENIZER)

    def _split(self, text: str) -> Iterable[str]:
        for part in self._special.split(text) if self._special else [text]:
            if part in (ENDOFTEXT, UNKNOWN) and part in self.str_to_int:
                yield part
            else:
                yield from _words(part)


def _words(text: str) -> list[str]:
    return [word for word in _SPLIT.split(text) if word.strip()]
