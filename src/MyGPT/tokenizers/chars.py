"""A tokenizer whose tokens are single characters. It is simple and suits small models, but its sequences are long."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from MyGPT.tokenizers.base import Tokenizer, hugging_face_json, invert_vocabulary, lookup_tokens, require_text

PRE_TOKENIZER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


class CharTokenizer(Tokenizer):
    """A tokenizer whose tokens are single characters. They get the ids 0, 1, 2 and so on, in the given order."""

    def __init__(self, characters: Iterable[str]) -> None:
        characters = list(characters)
        for character in characters:
            if not isinstance(character, str) or len(character) != 1:
                raise ValueError(f"a character vocabulary must contain single characters, got {character!r}")
        self._id_of = {character: id_ for id_, character in enumerate(characters)}
        if len(self._id_of) != len(characters):
            raise ValueError(f"a character vocabulary must contain each character once, got {''.join(characters)!r}")
        self._character_of = invert_vocabulary(self._id_of)

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return a tokenizer for the distinct characters of a text, in sorted order."""
        require_text(text)
        return cls(sorted(set(text)))

    @property
    def n_vocab(self) -> int:
        return len(self._id_of)

    @property
    def eot_token(self) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        """Return one token id per character. A character that is not in the vocabulary raises ValueError."""
        require_text(text)
        try:
            return [self._id_of[character] for character in text]
        except KeyError as error:
            place = f"{error.args[0]!r} at position {text.index(error.args[0])}"
            raise ValueError(f"character {place} is not in the vocabulary of {self.n_vocab} characters") from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(lookup_tokens(self._character_of, ids))

    def ids(self) -> Collection[int]:
        return self._character_of.keys()

    def to_json(self) -> dict[str, Any]:
        # A WordLevel model must name an unknown token. "<|none|>" is not in the vocabulary, so other readers also raise
        # an error for an unknown character.
        model = {"type": "WordLevel", "vocab": self._id_of, "unk_token": "<|none|>"}
        return hugging_face_json(model, {}, pre_tokenizer=PRE_TOKENIZER, decoder={"type": "Fuse"})
