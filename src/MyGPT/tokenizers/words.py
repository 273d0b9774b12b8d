"""A tokenizer whose tokens are words and punctuation marks, for teaching.

The tokenizer has two limits: a word that is not in the vocabulary becomes `<|unk|>`, and white space is lost. The rule
that splits a text is from "Build a Large Language Model (From Scratch)" (Raschka, 2024), chapter 2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from MyGPT.tokenizers.base import (
    ENDOFTEXT,
    UNKNOWN,
    Tokenizer,
    hugging_face_json,
    invert_vocabulary,
    lookup_tokens,
    require_text,
    special_pattern,
)

_PUNCTUATION = r"""[,.:;?_!"()']|--"""
_SPLIT = re.compile(rf"({_PUNCTUATION}|\s)")
_SPACE_BEFORE_PUNCTUATION = re.compile(r"""\s+([,.:;?!"()'])""")
# The characters that \s matches in Python. In other regex engines, \s does not match the separators \x1c to \x1f.
_WHITE_SPACE = r"[\s\x1c-\x1f\x85\xa0]"
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _WHITE_SPACE}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": _PUNCTUATION}, "behavior": "Isolated", "invert": False},
    ],
}


class SimpleTokenizer(Tokenizer):
    """A tokenizer whose tokens are words and punctuation marks. `vocab` maps each of these tokens to its id."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self.int_to_str = invert_vocabulary(vocab)
        self.str_to_int = dict(vocab)
        self._special_tokens = {token: vocab[token] for token in (ENDOFTEXT, UNKNOWN) if token in vocab}
        self._special = special_pattern(self._special_tokens)

    @classmethod
    def from_text(cls, text: str) -> SimpleTokenizer:
        """Return a tokenizer for the words and punctuation marks of a text, plus `<|endoftext|>` and `<|unk|>`."""
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
        """Return the token ids of the words and punctuation marks in a text.

        An unknown word becomes `<|unk|>`. If the vocabulary lacks `<|unk|>`, an unknown word raises ValueError.
        """
        require_text(text)
        unknown = self.str_to_int.get(UNKNOWN)
        words: list[str] = []
        for i, part in enumerate(self._special.split(text)):
            words += [part] if i % 2 else _words(part)
        ids = []
        for word in words:
            id_ = self.str_to_int.get(word, unknown)
            if id_ is None:
                raise ValueError(f"{word!r} is not in the vocabulary of {self.n_vocab} tokens, which has no {UNKNOWN}")
            ids.append(id_)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the tokens of the ids, joined by spaces, without a space before a punctuation mark.

        An id without a token is skipped, as in transformers. An id that no vocabulary can have raises ValueError.
        """
        text = " ".join(lookup_tokens(self.int_to_str, ids))
        return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", text)

    def ids(self) -> Collection[int]:
        return self.int_to_str.keys()

    def to_json(self) -> dict[str, Any]:
        model = {"type": "WordLevel", "vocab": self.str_to_int, "unk_token": UNKNOWN}
        return hugging_face_json(model, self._special_tokens, pre_tokenizer=PRE_TOKENIZER)


def _words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text that contains no special tokens. White space is dropped."""
    return [word for word in _SPLIT.split(text) if word.strip()]
