"""The common interface of all tokenizers, and the checks that they share.

A tokenizer is saved as a `tokenizer.json` in the format of Hugging Face's `tokenizers` library. The transformers
library can open this file and encodes text to the same ids.
"""

from __future__ import annotations

import copy
import operator
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from MyGPT.files import atomic_write, json_text
from MyGPT.tokenizers.added import MAX_ID, AddedToken
from MyGPT.tokenizers.settings import CHAT_TEMPLATES, ROLES, token_name

if TYPE_CHECKING:
    from MyGPT.tokenizers.codec import TokenArray

ENDOFTEXT = "<|endoftext|>"
"""The special token that marks the end of a document."""
UNKNOWN = "<|unk|>"
"""The special token that replaces every word that is not in the vocabulary."""


class Tokenizer(ABC):
    """The base class of all tokenizers. A tokenizer encodes text to token ids and decodes token ids to text."""

    added_tokens: tuple[AddedToken, ...] = ()
    """The tokens that are found in a text before the rest is encoded: special tokens and added words."""
    settings: Mapping[str, Any] = MappingProxyType({})
    """The content of the tokenizer_config.json with which the tokenizer was opened. `save` writes it back."""
    source: str = ""
    """The files from which the tokenizer was opened, such as "tokenizer.json in runs/x/model", or the reason why it is
    GPT-2's. Empty for a tokenizer that was trained or made in Python."""
    is_assumed: bool = False
    """True for GPT-2's tokenizer if it was chosen because a model's directory has no tokenizer."""
    optional_tokens: frozenset[str] = frozenset()
    """Added tokens that no file names, but that transformers adds. They are left out if the model has no row for them."""
    _end_of_model: str | None = None

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """The vocabulary size: the largest token id plus 1."""

    @property
    def eot_token(self) -> int | None:
        """The id of the token that ends a text, or None if there is no such token.

        It is the eos_token of the directory from which the tokenizer was opened, or else the token that the model's config
        names, or else `<|endoftext|>`. The last choice is left out if the directory says that there is no eos_token (null).
        """
        names = [token_name(self.settings, "eos_token"), self._end_of_model]
        if not self.lacks_end:
            names.append(ENDOFTEXT)
        return next((id_ for id_ in map(self.id_of, filter(None, names)) if id_ is not None), None)

    @property
    def bos_token(self) -> int | None:
        """The id of the token with which a text starts: the directory's bos_token, or else `eot_token`."""
        own = self._named_id("bos_token")
        return self.eot_token if own is None else own

    @property
    def pad_token(self) -> int | None:
        """The id of the directory's pad_token, which fills up short sequences, or None if the directory names none."""
        return self._named_id("pad_token")

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """Return the id of a token, written as in tokenizer.json, or None if the vocabulary lacks the token."""

    @abstractmethod
    def token_of(self, id_: int) -> str | None:
        """Return the token with this id, written as in tokenizer.json, or None if the vocabulary lacks the id."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. A special token in the text, such as `<|endoftext|>`, becomes a single id."""

    @abstractmethod
    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids, without special tokens if `skip_special_tokens` is True.

        An id without a token is skipped, as in transformers: models often have more ids than their tokenizer has tokens.
        A negative id, or one above 2**31 - 1, raises ValueError, and a float raises TypeError.
        """

    def encode_to_array(self, texts: Iterable[str | bytes], ends_document: Iterable[bool] | None = None) -> TokenArray:
        """Return the token ids of many texts, one after the other, in one array of uint16, or uint32 for large vocabularies.

        After each text that ends a document, the array has the end-of-text id, if the tokenizer has one. A document that
        already ends with this token, perhaps before white space, does not get a second one, as in `encode_without_end`.
        Special tokens in the texts become single ids.

        This is the fastest way to encode many texts, because the ids never become Python integers. Where gigatoken is
        installed, byte-level BPE encodes a batch of at least some tens of kilobytes in one call, which releases the GIL;
        batches of one to a few megabytes are best. The method may be called from several threads at once, but only one
        of them encodes at a time, so use processes to encode on several cores. A tokenizer can be pickled to them.

        Args:
            texts: the texts, as str or as UTF-8 bytes
            ends_document: for each text, False if the same document continues in the next text. Texts must then be cut
                where a token ends. Default: each text is a whole document.

        Raises:
            ValueError: bytes are not valid UTF-8, a text contains a lone surrogate, or the tokenizer does not know a word
                or character.
        """
        from array import array

        import numpy as np

        from MyGPT.tokenizers.codec import id_dtype

        end, ids = self.eot_token, array("I")
        for text, ends in zip_ends(texts, ends_document):
            if ends and end is not None:
                ids.extend(encode_without_end(self, text))
                ids.append(end)
            else:
                ids.extend(self.encode(text))
        return np.array(ids, id_dtype(self.n_vocab))

    def ids(self) -> Collection[int]:
        """Return the ids that have a token. They can be fewer than `n_vocab`."""
        return range(self.n_vocab)

    def first_token_bytes(self, text: str, ids: Sequence[int]) -> int:
        """Return how many bytes of a text, in UTF-8, its first token represents. `ids` are the token ids of the text.

        White space that the tokenizer drops before the first token is counted too.
        """
        return len(self.decode(ids[:1]).encode())

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the content of the `tokenizer.json` that `save` writes for this tokenizer."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` to a directory.

        The second file names the special tokens. If the tokenizer was opened from a directory, its settings are kept. Files
        of an older tokenizer that transformers would mix with the two (`replaced_files`) are deleted.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = self.to_json()
        with atomic_write(directory / "tokenizer.json") as file:
            file.write(json_text(content, ensure_ascii=False, indent=1))
        with atomic_write(directory / "tokenizer_config.json") as file:
            settings = self._settings_to_save(content["model"].get("unk_token"))
            file.write(json_text(settings, ensure_ascii=False, indent=1))
        for path in (directory / name for name in self.replaced_files):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @property
    def replaced_files(self) -> tuple[str, ...]:
        """The names of files and directories that `save` deletes, because tokenizer_config.json has their content."""
        has_template = self.settings.get("chat_template") is not None
        return ("special_tokens_map.json", "added_tokens.json", *(CHAT_TEMPLATES if has_template else ()))

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """Return a copy of this tokenizer with the settings of a tokenizer_config.json. It shares the vocabulary.

        Raises ValueError if a special token in the settings is neither a string, nor an object with a string "content",
        nor null.
        """
        for role in ROLES:
            token_name(settings, role)
        changed = copy.copy(self)
        changed.settings = dict(settings)
        return changed

    def ending_with(self, ids: Iterable[int]) -> Self:
        """Return a copy that ends texts with the first of `ids` that is in the vocabulary, or return the tokenizer itself.

        `ids` come from the model's config. The settings come first: if they name an eos_token, nothing changes.
        """
        token = next((token for token in map(self.token_of, ids) if token is not None), None)
        if token is None or self._named_id("eos_token") is not None:
            return self
        changed = copy.copy(self)
        changed._end_of_model = token
        return changed

    def _shown(self, ids: Iterable[int], skip_special_tokens: bool) -> list[int]:
        """Return the ids as a list of int, without those of special tokens if `skip_special_tokens` is True."""
        if not skip_special_tokens:
            return valid_ids(ids)
        special = {token.id for token in self.added_tokens if token.special}
        return [id_ for id_ in valid_ids(ids) if id_ not in special]

    def _named_id(self, role: str) -> int | None:
        """Return the id of the token that the settings name for a role such as "eos_token", or None."""
        name = token_name(self.settings, role)
        return None if name is None else self.id_of(name)

    @property
    def lacks_end(self) -> bool:
        """True if the settings say that no token ends a text: they contain the key eos_token with the value null."""
        return "eos_token" in self.settings and token_name(self.settings, "eos_token") is None

    def _settings_to_save(self, unknown: str | None) -> dict[str, Any]:
        """Return the content of tokenizer_config.json. `unknown` is the unknown token of the model in tokenizer.json."""
        if "tokenizer_class" in self.settings:
            return dict(self.settings)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if not self.settings:
            settings["clean_up_tokenization_spaces"] = False
        if self.eot_token is not None:
            end = self.token_of(self.eot_token)
            start = end if self.id_of(ENDOFTEXT) is None else ENDOFTEXT
            settings |= {"bos_token": start, "eos_token": end}
            if "pad_token" not in self.settings:
                settings["pad_token"] = end  # as TRL does, because the model has no row for a further token
            if unknown is None:  # transformers requires an unknown token
                settings["unk_token"] = start
        if unknown is not None and self.id_of(unknown) is not None:  # transformers would add a token that is missing
            settings["unk_token"] = unknown
        settings |= {key: value for key, value in self.settings.items() if value is not None}
        return settings


def zip_ends(texts: Iterable[str | bytes], ends_document: Iterable[bool] | None) -> Iterator[tuple[str, bool]]:
    """Yield each text as a str, and whether it ends a document; True if `ends_document` is None.

    Bytes that are not valid UTF-8 raise ValueError.
    """
    pairs = ((text, True) for text in texts) if ends_document is None else zip(texts, ends_document, strict=True)
    for text, ends in pairs:
        yield (text if isinstance(text, str) else str(text, "utf-8")), ends


def encode_with_specials(tokenizer: Any, text: str) -> list[int]:
    """Encode a text with a tokenizer of MyGPT or a `tiktoken.Encoding`; each special token becomes a single id.

    This function exists because, by default, `tiktoken.Encoding.encode` raises ValueError for a special token in the
    text.
    """
    if hasattr(tokenizer, "special_tokens_set") and not isinstance(tokenizer, Tokenizer):
        return list(tokenizer.encode(text, allowed_special="all"))
    return list(tokenizer.encode(text))


def end_of_text(tokenizer: Any) -> int | None:
    """Return the id of the tokenizer's end-of-text token, or None if there is no such token or no tokenizer.

    `tokenizer` is a tokenizer of MyGPT, a `tiktoken.Encoding`, another object, or None.
    """
    try:
        return getattr(tokenizer, "eot_token", None)
    except KeyError:  # raised by an Encoding without <|endoftext|>
        return None


def encode_without_end(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without the end-of-text token that may be at its end.

    The caller then adds this token, so a text that already has it does not get a second one. White space after the
    token is also left out. `tokenizer` is a tokenizer of MyGPT or a `tiktoken.Encoding`.
    """
    end, stripped = end_of_text(tokenizer), text.rstrip()
    ids = encode_with_specials(tokenizer, stripped)
    if end is not None and ids[-1:] == [end]:
        return ids[:-1]
    return ids if stripped == text else encode_with_specials(tokenizer, text)


def require_end_token(tokenizer: Any, task: str, name: str = "") -> None:
    """Raise ValueError if a tokenizer has no end-of-text token, which marks where an answer ends.

    `task` is what needs the token, such as "fine-tuning"; `name` is the model's name. Both are for the message.
    """
    if tokenizer.eot_token is None:
        owner = f"the tokenizer of {name}" if name else "the tokenizer"
        if getattr(tokenizer, "lacks_end", False):
            missing = f"with which {task} marks the end of an answer"
            way_out = f"name a token there, such as {ENDOFTEXT}"
            raise ValueError(
                f'{owner} has no end token, {missing}: tokenizer_config.json has "eos_token": null; {way_out}'
            )
        way_out = "train a model with mygpt train --tokenizer bpe, or use one that has it, such as gpt2"
        raise ValueError(f"{owner} has no {ENDOFTEXT} token, with which {task} marks the end of an answer: {way_out}")


def require_text(text: object) -> None:
    """Raise TypeError if `text` is not a str, because some tokenizers would return wrong ids for other types."""
    if not isinstance(text, str):
        raise TypeError(f"a tokenizer encodes a str, got {type(text).__name__}")


def refuse_surrogates(text: str, prefix: str = "") -> None:
    """Raise ValueError if a text contains half of a character (a lone surrogate). The message starts with `prefix`."""
    if text.isascii():  # This is known without a look at the characters.
        return
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
        numbers = list(map(operator.index, ids))
    except TypeError as error:
        raise TypeError(f"a tokenizer decodes a sequence of whole numbers: {error}") from None
    if numbers and not (min(numbers) >= 0 and max(numbers) <= MAX_ID):
        wrong = next(id_ for id_ in numbers if not 0 <= id_ <= MAX_ID)
        raise ValueError(f"{wrong} is not a token id: ids are whole numbers from 0 to {MAX_ID}")
    return numbers


def lookup_tokens(id_to_token: Mapping[int, str], ids: Iterable[int]) -> list[str]:
    """Return the token of each id. An id without a token is skipped."""
    return [id_to_token[id_] for id_ in ids if id_ in id_to_token]


def has_token(tokenizer: Any, id_: int) -> bool:
    """Return whether an id has a token. `tokenizer` is a tokenizer of MyGPT, tiktoken or transformers; others give True."""
    if isinstance(tokenizer, Tokenizer):
        return id_ in tokenizer.ids()
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer.convert_ids_to_tokens(id_) is not None
    if hasattr(tokenizer, "decode_single_token_bytes"):
        try:
            tokenizer.decode_single_token_bytes(id_)
        except KeyError:
            return False
    return True


def ids_without_token(tokenizer: Any, vocab_size: int) -> list[int]:
    """Return the ids from 0 to vocab_size - 1 that have no token (see `has_token`), in ascending order."""
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return list(_ids_without_token_in(tokenizer, vocab_size))
    if tokenizer is None:
        return []
    first = 0
    if isinstance(tokenizer, Tokenizer) and len(tokenizer.ids()) == tokenizer.n_vocab:
        first = tokenizer.n_vocab  # There are no gaps.
    return [id_ for id_ in range(first, vocab_size) if not has_token(tokenizer, id_)]


@lru_cache(maxsize=4)
def _ids_without_token_in(encoding: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the result of `ids_without_token` for a `tiktoken.Encoding`, which never changes.

    Without the cache, each call of `generate` would take 40 ms longer for GPT-2's vocabulary.
    """
    return tuple(id_ for id_ in range(vocab_size) if not has_token(encoding, id_))


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


def hugging_face_json(model: dict[str, Any], added_tokens: Iterable[AddedToken], **parts: Any) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` in Hugging Face's format, with `model` as the value of the key "model".

    `parts` are values of other keys, such as pre_tokenizer and decoder; the keys that are not given are null.
    """
    names = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    in_order = sorted(added_tokens, key=attrgetter("id"))
    added = [{name: getattr(token, name) for name in names} for token in in_order]
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {"version": "1.0", "added_tokens": added, **empty, "decoder": None, **parts, "model": model}
