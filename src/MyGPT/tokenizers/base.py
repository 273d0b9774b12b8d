"""The common interface of all tokenizers, and the checks that they share.

A tokenizer is saved as a `tokenizer.json` in the format of Hugging Face's `tokenizers` library. The transformers
library can open this file and encodes text to the same ids.
"""

from __future__ import annotations

import copy
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from MyGPT.files import atomic_write, json_text, read_json

ENDOFTEXT = "<|endoftext|>"
"""The special token that marks the end of a document."""
UNKNOWN = "<|unk|>"
"""The special token that replaces every word that is not in the vocabulary."""
MAX_ID = 2**31 - 1
"""The largest token id that a vocabulary may contain; real vocabularies are far smaller."""


@dataclass(frozen=True)
class AddedToken:
    """A token that `encode` finds in a text before it splits the rest of the text into other tokens.

    The fields are those of `tokenizer.json`.
    """

    content: str
    """The token's text."""
    id: int
    special: bool = True
    """True for a token with a meaning for the model, such as `<|endoftext|>`, which transformers leaves out of decoded
    text with skip_special_tokens=True. False for ordinary text, such as a word of a special field."""
    normalized: bool = False
    """True finds the token only in the text that the tokens with False leave."""
    single_word: bool = False
    """True finds the token only where no letter, digit or underscore touches it."""
    lstrip: bool = False
    """True removes white space before the token."""
    rstrip: bool = False
    """True removes white space after the token."""

    def __post_init__(self) -> None:
        if not isinstance(self.content, str) or not self.content:
            raise ValueError(f"a special token must be a string of at least one character, got {self.content!r}")
        for name in ("special", "normalized", "single_word", "lstrip", "rstrip"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(
                    f"{name} of the token {self.content!r} must be true or false, got {getattr(self, name)!r}"
                )


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

        It is the eos_token of the directory from which the tokenizer was opened, or else `<|endoftext|>`.
        """
        return next((id_ for id_ in (self._named_id("eos_token"), *self._default_ends()) if id_ is not None), None)

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

        The second file names the special tokens. If the tokenizer was opened from a directory, its settings are kept.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = self.to_json()
        with atomic_write(directory / "tokenizer.json") as file:
            file.write(json_text(content, ensure_ascii=False, indent=1))
        with atomic_write(directory / "tokenizer_config.json") as file:
            settings = self._settings_to_save(content["model"].get("unk_token"))
            file.write(json_text(settings, ensure_ascii=False, indent=1))

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
        special = {token.id for token in self.added_tokens if token.special} if skip_special_tokens else ()
        return [id_ for id_ in valid_ids(ids) if id_ not in special]

    def _named_id(self, role: str) -> int | None:
        """Return the id of the token that the settings name for a role such as "eos_token", or None."""
        name = token_name(self.settings, role)
        return None if name is None else self.id_of(name)

    def _default_ends(self) -> Iterator[int | None]:
        """Yield the ids of the tokens that may end a text if the settings name none; None for a missing token."""
        yield None if self._end_of_model is None else self.id_of(self._end_of_model)
        yield self.id_of(ENDOFTEXT)

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
            # transformers requires an unknown token.
            settings |= {"bos_token": start, "eos_token": end, "unk_token": unknown or start}
        settings |= {key: value for key, value in self.settings.items() if value is not None}
        return settings


# Unicode's White_Space, the characters that \s matches in the tokenizers library.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B))
)
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a tokenizer_config.json can name."""


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a directory's tokenizer_config.json, and of special_tokens_map.json in older directories.

    The result is empty if both files are missing. A damaged file raises ValueError.
    """
    settings = read_object(Path(directory, "tokenizer_config.json"))
    if "added_tokens_decoder" in settings:  # transformers then ignores the older file
        return settings

    def name_of(value: Any) -> Any:
        """Return the text of a token that is described by an object, which tokenizer_config.json cannot contain."""
        if isinstance(value, list):
            return [name_of(item) for item in value]
        return value["content"] if isinstance(value, dict) and "content" in value else value

    older = read_object(Path(directory, "special_tokens_map.json"))
    return settings | {key: name_of(value) for key, value in older.items()}


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dict if there is no file. Raises ValueError for any other content."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def read_end_ids(directory: str | os.PathLike[str]) -> list[int]:
    """Return the ids that end a text according to generation_config.json or else config.json in a directory.

    The result is empty if the two files are missing or do not name such an id.
    """
    for name in ("generation_config.json", "config.json"):
        content = read_json(Path(directory, name)) if Path(directory, name).is_file() else None
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        if ids := [id_ for id_ in (value if isinstance(value, list) else [value]) if type(id_) is int]:
            return ids
    return []


def token_name(settings: Mapping[str, Any], role: str) -> str | None:
    """Return the token that the settings name for a role such as "eos_token", or None. A wrong type raises ValueError."""
    value = settings.get(role)
    name = value.get("content") if isinstance(value, Mapping) else value
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{role} in tokenizer_config.json must be a string, got {value!r:.80}")
    return name


def split_added(text: str, tokens: Iterable[AddedToken]) -> list[str | AddedToken]:
    """Return the added tokens in a text, and the texts before, between and after them, in order.

    Tokens are found as in Hugging Face's tokenizers library: at each position the longest one, first those that are not
    `normalized`, and then the others in the texts that are left.
    """
    parts: list[str | AddedToken] = [text]
    groups: dict[bool, dict[str, AddedToken]] = {False: {}, True: {}}
    for token in tokens:
        groups[token.normalized][token.content] = token
    for group in filter(None, groups.values()):
        pattern = special_pattern(group)
        parts = [
            piece for part in parts for piece in (_find(part, group, pattern) if isinstance(part, str) else [part])
        ]
    return [part for part in parts if part != ""]


def _find(text: str, tokens: Mapping[str, AddedToken], pattern: re.Pattern[str]) -> Iterator[str | AddedToken]:
    """Yield the tokens that `pattern` matches in a text, and the texts between them. `tokens` maps texts to tokens."""
    end = 0
    for match in pattern.finditer(text):
        token, (start, stop) = tokens[match[0]], match.span()
        if token.single_word and re.search(r"\w", text[max(start - 1, 0) : start] + text[stop : stop + 1]):
            continue
        while token.lstrip and start > end and text[start - 1] in _WHITE_SPACE:
            start -= 1
        while token.rstrip and stop < len(text) and text[stop] in _WHITE_SPACE:
            stop += 1
        yield text[end:start]
        yield token
        end = stop
    yield text[end:]


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


def encode_without_end(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, without the end-of-text token that may be at its end.

    The caller then adds this token, so a text that already has it does not get a second one. White space after the
    token is also left out. `tokenizer` is a tokenizer of MyGPT or a `tiktoken.Encoding`.
    """
    try:
        end: int | None = tokenizer.eot_token
    except (AttributeError, KeyError):  # an Encoding without this token
        end = None
    stripped = text.rstrip()
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
        way_out = "train a model with mygpt train --tokenizer bpe, or use one that has it, such as gpt2"
        raise ValueError(f"{owner} has no {ENDOFTEXT} token, with which {task} marks the end of an answer: {way_out}")


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
    first = 0
    if isinstance(tokenizer, Tokenizer) and len(tokenizer.ids()) == tokenizer.n_vocab:
        first = tokenizer.n_vocab  # There are no gaps.
    return [id_ for id_ in range(first, vocab_size) if not has_token(tokenizer, id_)]


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


def place_added_tokens(vocab: Mapping[str, int], added: Iterable[AddedToken]) -> list[AddedToken]:
    """Return the added tokens with the ids that Hugging Face's `tokenizers` library gives them.

    The library ignores the ids of added tokens in a file. A token of `vocab` keeps its id there, and the other tokens
    get the next ids in the order in which they are listed. If `vocab` has gaps, the next id can belong to another
    token. In this case only, the id in the file is used, or the first id above all others if the file has no id, which
    is written as -1. A repeated token counts once.

    Args:
        vocab: maps each token of the model to its id.
        added: the added tokens in the order of the file.

    Raises:
        ValueError: a token has no free id.
    """
    taken = set(vocab.values())
    placed: dict[str, AddedToken] = {}
    for token in added:
        id_ = vocab.get(token.content)
        if id_ is None and token.content not in placed:
            id_ = max(len(vocab), 1 + max((other.id for other in placed.values()), default=-1))
            if id_ in taken:
                id_ = max(taken) + 1 if token.id == -1 else token.id
            if type(id_) is not int or id_ < 0 or id_ in taken:
                raise ValueError(f"the added token {token.content!r} needs an id of its own, but got {token.id!r}")
            taken.add(id_)
        if id_ is not None:
            placed.setdefault(token.content, replace(token, id=id_))
    return list(placed.values())


def with_added(vocab: Mapping[str, int], added_tokens: Iterable[AddedToken]) -> dict[str, int]:
    """Return a vocabulary with the added tokens. An added token that has another id in `vocab` raises ValueError."""
    whole = dict(vocab)
    for token in added_tokens:
        if whole.setdefault(token.content, token.id) != token.id:
            raise ValueError(f"the token {token.content!r} has two ids, {whole[token.content]} and {token.id}")
    return whole


def hugging_face_json(model: dict[str, Any], added_tokens: Iterable[AddedToken], **parts: Any) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` in Hugging Face's format, with `model` as the value of the key "model".

    `parts` are values of other keys, such as pre_tokenizer and decoder; the keys that are not given are null.
    """
    names = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    in_order = sorted(added_tokens, key=attrgetter("id"))
    added = [{name: getattr(token, name) for name in names} for token in in_order]
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {"version": "1.0", "added_tokens": added, **empty, "decoder": None, **parts, "model": model}
