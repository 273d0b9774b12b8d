"""A tokenizer whose tokens are words and punctuation marks, for teaching.

The tokenizer has two limits: a word that is not in the vocabulary becomes `<|unk|>`, and white space is lost. The rule
that splits a text is from "Build a Large Language Model (From Scratch)" (Raschka, 2024), chapter 2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from MyGPT.tokenizers.added import AddedToken, AddedTokenSplitter, with_added
from MyGPT.tokenizers.base import (
    ENDOFTEXT,
    UNKNOWN,
    Tokenizer,
    hugging_face_json,
    invert_vocabulary,
    lookup_tokens,
    require_text,
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
_WITHOUT_SPACE = {
    "type": "Replace",
    "pattern": {"Regex": _WHITE_SPACE + r"""+(?=[,.:;?!"()'])"""},
    "content": "",
}
"""The decoder that removes white space before punctuation marks, as `_SPACE_BEFORE_PUNCTUATION` does."""


class SimpleTokenizer(Tokenizer):
    """A tokenizer whose tokens are words and punctuation marks. `vocab` maps each of these tokens to its id.

    `added_tokens` are found in a text as a whole. Default: `<|endoftext|>` and `<|unk|>`, if they are in `vocab`.
    """

    def __init__(self, vocab: Mapping[str, int], added_tokens: Iterable[AddedToken] | None = None) -> None:
        if added_tokens is None:
            added_tokens = [AddedToken(token, vocab[token]) for token in (ENDOFTEXT, UNKNOWN) if token in vocab]
        self._vocab, self.added_tokens = dict(vocab), tuple(added_tokens)
        self.str_to_int = with_added(vocab, self.added_tokens)
        self.int_to_str = invert_vocabulary(self.str_to_int)
        self._splitter = AddedTokenSplitter(self.added_tokens)

    @classmethod
    def from_text(cls, text: str) -> SimpleTokenizer:
        """Return a tokenizer for the words and punctuation marks of a text, plus `<|endoftext|>` and `<|unk|>`."""
        require_text(text)
        plain = text.replace(ENDOFTEXT, " ").replace(UNKNOWN, " ")
        return cls({token: id_ for id_, token in enumerate([*sorted(set(_words(plain))), ENDOFTEXT, UNKNOWN])})

    @property
    def n_vocab(self) -> int:
        return max(self.int_to_str) + 1

    def id_of(self, token: str) -> int | None:
        return self.str_to_int.get(token)

    def token_of(self, id_: int) -> str | None:
        return self.int_to_str.get(id_)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the words and punctuation marks in a text.

        An unknown word becomes `<|unk|>`. If the vocabulary lacks `<|unk|>`, an unknown word raises ValueError.
        """
        require_text(text)
        unknown = self.str_to_int.get(UNKNOWN)
        ids = []
        for word in self._words(text):
            id_ = self.str_to_int.get(word, unknown)
            if id_ is None:
                raise ValueError(f"{word!r} is not in the vocabulary of {self.n_vocab} tokens, which has no {UNKNOWN}")
            ids.append(id_)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the tokens of the ids, joined by spaces, without a space before a punctuation mark.

        Special tokens are left out if `skip_special_tokens` is True. An id without a token is skipped, as in transformers.
        An id that no vocabulary can have raises ValueError.
        """
        text = " ".join(lookup_tokens(self.int_to_str, self._shown(ids, skip_special_tokens)))
        return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", text)

    def ids(self) -> Collection[int]:
        return self.int_to_str.keys()

    def first_token_bytes(self, text: str, ids: Sequence[int]) -> int:
        # An unknown word has another length than <|unk|>, so the length is that of the word in the text.
        n_dropped = len(text) - len(text.lstrip())
        return len(text[:n_dropped].encode()) + len(self._words(text)[0].encode())

    def _words(self, text: str) -> list[str]:
        """Return the words, punctuation marks and added tokens of a text."""
        parts = self._splitter.split(text)
        return [word for part in parts for word in ([part.content] if isinstance(part, AddedToken) else _words(part))]

    def to_json(self) -> dict[str, Any]:
        model = {"type": "WordLevel", "vocab": self._vocab, "unk_token": UNKNOWN}
        # The decoder "WordPiece" puts a space before each token that does not start with its prefix.
        prefix = "\uffff"
        while any(token.startswith(prefix) for token in self.str_to_int):
            prefix += "\uffff"
        decoders = [{"type": "WordPiece", "prefix": prefix, "cleanup": False}, {"type": "Fuse"}, _WITHOUT_SPACE]
        decoder = {"type": "Sequence", "decoders": decoders}
        return hugging_face_json(model, self.added_tokens, pre_tokenizer=PRE_TOKENIZER, decoder=decoder)


def _words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text that contains no added tokens. White space is dropped."""
    return [word for word in _SPLIT.split(text) if word.strip()]
