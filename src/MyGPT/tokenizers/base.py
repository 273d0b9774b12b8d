"""The common interface of all tokenizers, and the checks that they share.

A tokenizer is saved as a `tokenizer.json` in the format of Hugging Face's `tokenizers` library. The transformers
library can open this file and encodes text to the same ids.
"""

from __future__ import annotations

import json
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from MyGPT.files import atomic_write

ENDOFTEXT = "<|endoftext|>"
"""The special token that marks the end of a document."""
UNKNOWN = "<|unk|>"
"""The special token that replaces every word that is not in the vocabulary."""
MAX_ID = 2**31 - 1
"""The largest token id that a vocabulary may contain; real vocabularies are far smaller."""


class Tokenizer(ABC):
    """The base class of all tokenizers. A tokenizer encodes text to token ids and decodes token ids to text."""

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """The vocabulary size: the largest token id plus 1."""

    @property
    @abstractmethod
    def eot_token(self) -> int | None:
        """The id of `<|endoftext|>`, or None if the vocabulary lacks this token."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. A special token in the text, such as `<|endoftext|>`, becomes a single id."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids.

        An id without a token is skipped, as in transformers: models often have more ids than their tokenizer has tokens.
        A negative id, or one above 2**31 - 1, raises ValueError, and a float raises TypeError.
        """

    def ids(self) -> Collection[int]:
        """Return the ids that have a token. They can be fewer than `n_vocab`."""
        return range(self.n_vocab)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the content of the `tokenizer.json` that `save` writes for this tokenizer."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` to a directory.

        `load_tokenizer` needs only the first file; the transformers library needs both.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = self.to_json()
        with atomic_write(directory / "tokenizer.json") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eot_token is not None:
            unknown = content["model"].get("unk_token") or ENDOFTEXT  # transformers requires an unknown token.
            settings |= {"bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": unknown}
        with atomic_write(directory / "tokenizer_config.json") as file:
            json.dump(settings, file, indent=1)


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a regular expression that matches any of the tokens, and the longest one if several match.

    Its method `split` returns a list with the matched tokens at odd indices and the texts between them at even indices.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"((?!))")


def encode_with_specials(tokenizer: Any, text: str) -> list[int]:
    """Encode a text with a tokenizer of MyGPT or a `tiktoken.Encoding`; each special token becomes a single id.

    This function exists because, by default, `tiktoken.Encoding.encode` raises ValueError for a special token in the
    text.
    """
    if hasattr(tokenizer, "special_tokens_set") and not isinstance(tokenizer, Tokenizer):
        return list(tokenizer.encode(text, allowed_special="all"))
    return list(tokenizer.encode(text))


def require_text(text: object) -> None:
    """Raise TypeError if `text` is not a str, because some tokenizers would return wrong ids for other types."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer encodes a str, got {type(text).__name__}")


def refuse_surrogates(text: str, prefix: str = "") -> None:
    """Raise ValueError if a text contains half of a character (a lone surrogate). The message starts with `prefix`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
        reason = "half of a character, which UTF-8 cannot represent"
        raise ValueError(f"{prefix}the text contains {found}, {reason}") from None


def valid_ids(ids: Iterable[int]) -> list[int]:
    """Return token ids, given as a list, array or tensor, as a list of int.

    Floats and strings raise TypeError. An id that no vocabulary can have, below 0 or above MAX_ID, raises ValueError.
    """
    try:
        numbers = [operator.index(id_) for id_ in ids]
    except TypeError as error:
        raise TypeError(f"a tokenizer decodes a sequence of whole numbers: {error}") from None
    if numbers and not (min(numbers) >= 0 and max(numbers) <= MAX_ID):
        wrong = next(id_ for id_ in numbers if not 0 <= id_ <= MAX_ID)
        raise ValueError(f"{wrong} is not a token id: ids are whole numbers from 0 to {MAX_ID}")
    return numbers


def lookup_tokens(id_to_token: Mapping[int, str], ids: Iterable[int]) -> list[str]:
    """Return the token of each id. An id without a token is skipped."""
    return [id_to_token[id_] for id_ in valid_ids(ids) if id_ in id_to_token]


def ids_without_token(tokenizer: Any, vocab_size: int) -> list[int]:
    """Return the ids from 0 to vocab_size - 1 that have no token, in ascending order.

    `tokenizer` is a tokenizer of MyGPT, of tiktoken or of transformers. The result is empty for any other object.
    """
    if isinstance(tokenizer, Tokenizer):
        known: Collection[int] = tokenizer.ids()
    elif hasattr(tokenizer, "get_vocab"):
        known = set(tokenizer.get_vocab().values())
    elif hasattr(tokenizer, "token_byte_values"):
        known = _ids_of_tiktoken(tokenizer)
    else:
        return []
    n = max(known, default=-1) + 1
    gaps = [] if len(known) == n else [id_ for id_ in range(min(n, vocab_size)) if id_ not in known]
    return [*gaps, *range(n, vocab_size)]


def _ids_of_tiktoken(encoding: Any) -> Collection[int]:
    """Return the ids that have a token in a `tiktoken.Encoding`, which can have gaps before its special tokens."""
    n = encoding.n_vocab
    if len(encoding.token_byte_values()) + len(encoding.special_tokens_set) == n:
        return range(n)

    def has_token(id_: int) -> bool:
        try:
            encoding.decode_single_token_bytes(id_)
        except KeyError:
            return False
        return True

    return set(filter(has_token, range(n)))


def invert_vocabulary(vocab: Mapping[str, int]) -> dict[int, str]:
    """Return a dict from ids to tokens, given a dict from tokens to ids.

    An invalid vocabulary, for example with the same id for two tokens, raises ValueError.
    """
    if not vocab:
        raise ValueError("the vocabulary is empty: a tokenizer needs at least one token")
    for token, id_ in vocab.items():
        if not isinstance(token, str):
            raise ValueError(f"a token must be a str, got {token!r}")
        refuse_surrogates(token)
        if type(id_) is not int or not 0 <= id_ <= MAX_ID:
            raise ValueError(f"the id of token {token!r} must be a whole number from 0 to {MAX_ID}, got {id_!r}")
    inverted = {id_: token for token, id_ in vocab.items()}
    if len(inverted) != len(vocab):
        first, second = next((inverted[id_], token) for token, id_ in vocab.items() if inverted[id_] != token)
        raise ValueError(f"tokens {second!r} and {first!r} have the same id {vocab[first]}; each needs its own")
    return inverted


def hugging_face_json(model: dict[str, Any], special_tokens: Mapping[str, int], **parts: Any) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` in Hugging Face's format, with `model` as the value of the key "model".

    `special_tokens` maps each special token to its id. `parts` are values of other keys, such as pre_tokenizer and
    decoder; the keys that are not given are null.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    in_order = sorted(special_tokens.items(), key=lambda item: item[1])
    added = [{"id": id_, "content": token, **flags} for token, id_ in in_order]
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {"version": "1.0", "added_tokens": added, **empty, "decoder": None, **parts, "model": model}
