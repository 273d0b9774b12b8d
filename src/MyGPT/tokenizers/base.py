"""What every tokenizer offers, whatever its idea of a token.

A saved tokenizer is one `tokenizer.json` in the format of Hugging Face's `tokenizers`, so that transformers opens it
and turns text into the same ids.
"""

from __future__ import annotations

import json
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from MyGPT.files import atomic_write

ENDOFTEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
MAX_ID = 2**31 - 1
"""Far beyond any vocabulary; token files and torch have room for it."""


class Tokenizer(ABC):
    """Text to ids and back."""

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """How many ids there are; every id is below it."""

    @property
    @abstractmethod
    def eot_token(self) -> int | None:
        """The id of `<|endoftext|>`, or None where the vocabulary has none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens written out in the text become their ids."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; an id outside the vocabulary is a ValueError."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The content of `tokenizer.json`."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, and the `tokenizer_config.json` by which transformers knows what to make of it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(directory / "tokenizer.json") as file:
            described = self.to_json()
            json.dump(described, file, ensure_ascii=False, indent=1)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eot_token is not None:
            unknown = described["model"].get("unk_token") or ENDOFTEXT  # which other readers want to have a name
            settings |= {"bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": unknown}
        with atomic_write(directory / "tokenizer_config.json") as file:
            json.dump(settings, file, indent=1)


def encode_with_specials(tokenizer: Any, text: str) -> list[int]:
    """`tokenizer.encode(text)` with special tokens recognised, also for a plain `tiktoken.Encoding`, which would raise."""
    if hasattr(tokenizer, "special_tokens_set") and not isinstance(tokenizer, Tokenizer):
        return list(tokenizer.encode(text, allowed_special="all"))
    return list(tokenizer.encode(text))


def require_text(text: object) -> None:
    """A TypeError unless `text` is a str, for whose absence some tokenizers would give nonsense."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer encodes a str, got {type(text).__name__}")


def refuse_surrogates(text: str) -> None:
    """A ValueError if `text` holds half a character, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "which is half a character and has no UTF-8 form"
        ) from None


def whole_numbers(ids: Iterable[int]) -> list[int]:
    """The ids as ints, from a list, array or tensor; a TypeError for floats and text, which int() would take."""
    try:
        return [operator.index(id_) for id_ in ids]
    except TypeError as error:
        raise TypeError(f"a tokenizer decodes a sequence of whole numbers: {error}") from None


def lookup_tokens(id_to_token: Mapping[int, str], ids: Iterable[int], n_vocab: int) -> list[str]:
    """The token of each id, or a ValueError that names the first id without one."""
    try:
        return [id_to_token[id_] for id_ in whole_numbers(ids)]
    except KeyError as error:
        raise ValueError(f"id {error.args[0]} is not in the vocabulary of {n_vocab} tokens") from None


def token_ids(vocab: Mapping[str, int]) -> dict[int, str]:
    """The vocabulary turned round.

    A ValueError if it is empty, two tokens share an id, a token is no text, or an id is no natural number.
    """
    if not vocab:
        raise ValueError("the vocabulary is empty: a tokenizer needs at least one token")
    for token, id_ in vocab.items():
        if not isinstance(token, str):
            raise ValueError(f"a token must be a str, got {token!r}")
        refuse_surrogates(token)
        if type(id_) is not int or not 0 <= id_ <= MAX_ID:
            raise ValueError(f"the id of token {token!r} must be a whole number from 0 to {MAX_ID}, got {id_!r}")
    turned = {id_: token for token, id_ in vocab.items()}
    if len(turned) != len(vocab):
        first, second = next((turned[id_], token) for token, id_ in vocab.items() if turned[id_] != token)
        raise ValueError(f"tokens {second!r} and {first!r} have the same id {vocab[first]}; each needs its own")
    return turned


def hugging_face_json(model: dict[str, Any], special_tokens: Mapping[str, int], **parts: Any) -> dict[str, Any]:
    """A `tokenizer.json` around `model`; parts not given (normalizer, pre_tokenizer, decoder, …) are null."""
    added = [
        {
            "id": id_,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, id_ in sorted(special_tokens.items(), key=lambda item: item[1])
    ]
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {"version": "1.0", "added_tokens": added, **empty, "decoder": None, **parts, "model": model}
