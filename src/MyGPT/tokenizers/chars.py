"""A tokenizer whose tokens are single characters. It is simple and suits small models, but its sequences are long."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from MyGPT.tokenizers.added import AddedToken, AddedTokenSplitter, with_added
from MyGPT.tokenizers.base import (
    Tokenizer,
    hugging_face_json,
    invert_vocabulary,
    lookup_tokens,
    require_text,
)

PRE_TOKENIZER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


class CharTokenizer(Tokenizer):
    """A tokenizer whose tokens are single characters. They get the ids 0, 1, 2 and so on, in the given order.

    `added_tokens` are further tokens, such as a token that ends a text, which are found in a text as a whole.
    """

    def __init__(self, characters: Iterable[str], added_tokens: Iterable[AddedToken] = ()) -> None:
        characters = list(characters)
        for character in characters:
            if not isinstance(character, str) or len(character) != 1:
                raise ValueError(f"a character vocabulary must contain single characters, got {character!r}")
        self._id_of = {character: id_ for id_, character in enumerate(characters)}
        if len(self._id_of) != len(characters):
            raise ValueError(f"a character vocabulary must contain each character once, got {''.join(characters)!r}")
        self.added_tokens = tuple(added_tokens)
        self._splitter = AddedTokenSplitter(self.added_tokens)
        self._token_of = invert_vocabulary(with_added(self._id_of, self.added_tokens))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer for the distinct characters of a text, in sorted order."""
        require_text(text)
        return cls(sorted(set(text)))

    @property
    def n_vocab(self) -> int:
        return max(self._token_of) + 1

    def id_of(self, token: str) -> int | None:
        added = next((added.id for added in self.added_tokens if added.content == token), None)
        return self._id_of.get(token) if added is None else added

    def token_of(self, id_: int) -> str | None:
        return self._token_of.get(id_)

    def encode(self, text: str) -> list[int]:
        """Return one token id per character. A character that is not in the vocabulary raises ValueError."""
        require_text(text)
        ids: list[int] = []
        try:
            for part in self._splitter.split(text):
                ids += [part.id] if isinstance(part, AddedToken) else [self._id_of[character] for character in part]
            return ids
        except KeyError as error:
            place = f"{error.args[0]!r} at position {text.index(error.args[0])}"
            raise ValueError(f"character {place} is not in the vocabulary of {self.n_vocab} characters") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return "".join(lookup_tokens(self._token_of, self._shown(ids, skip_special_tokens)))

    def ids(self) -> Collection[int]:
        return self._token_of.keys()

    def to_json(self) -> dict[str, Any]:
        # A WordLevel model must name an unknown token. "<|none|>" is not in the vocabulary, so other readers also raise
        # an error for an unknown character.
        model = {"type": "WordLevel", "vocab": self._id_of, "unk_token": "<|none|>"}
        return hugging_face_json(model, self.added_tokens, pre_tokenizer=PRE_TOKENIZER, decoder={"type": "Fuse"})
