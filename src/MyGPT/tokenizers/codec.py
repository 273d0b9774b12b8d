"""Apply the merges of a byte-level BPE to text: with tiktoken, or with gigatoken for large amounts of text.

tiktoken is the reference. Of a long text, it encodes only the distinct words. gigatoken is an optional package that
encodes many times as fast and gives the same ids (tests/tokenizers/test_codec.py). It needs a part of a second to start,
so it is used from the first megabytes on.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import metadata
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""Token ids in a compact array."""
Ids = npt.NDArray[np.uint32]

GIGATOKEN_VERSION = "0.10."
"""The start of the version numbers of gigatoken that are used. Only for them, equal ids have been tested."""
LOAD_CHARACTERS = 1 << 21
"""A tokenizer loads gigatoken after it has encoded this many characters. tiktoken encodes them in about the time that
loading takes."""
MIN_CHARACTERS = 1 << 12
"""Shorter texts are encoded with tiktoken even if gigatoken is loaded, because a call of gigatoken takes 20 microseconds."""
CALL_CHARACTERS = 1 << 22
"""A longer text is encoded in several calls of gigatoken, which limits their memory."""
MAX_CACHE_BYTES = 1 << 28
"""gigatoken 0.10 caches the ids of every word that it sees, without a limit. MyGPT loads it anew, with an empty cache, when
the memory of the process has grown by more than this number of bytes since gigatoken was first loaded."""
CACHE_GROWTH = 10
"""Upper bound of the bytes by which the cache grows per byte of text. Random words reach 8.5."""

PIECE_CHARACTERS = 1 << 17
"""A longer text is encoded with tiktoken in several steps."""
MAX_WORD_CHARACTERS = 1 << 21
"""A codec remembers the ids of words with this many characters in total, and then forgets them all."""
MAX_MEAN_WORD = 32
"""If the words of a text have more characters than this on average, their ids are not remembered."""

_SEPARATOR = "\U0010ffff"
"""A character that Unicode reserves for internal use. MyGPT puts it between texts that it gives to gigatoken in one call."""

# gigatoken 0.10 knows the letters and numbers of Unicode 17, and tiktoken 0.14 those of Unicode 16, so the two split texts with
# one of the new characters differently. Such texts are encoded with tiktoken.
NEW_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011ddb"
    "\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    "\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5"
    "\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)
# The first bytes of these characters in UTF-8. Searching for the very first byte is so fast that it takes no time.
_NEW_BYTES = {
    b"\xe0": re.compile(rb"\xe0(?:\xa2\x8f|[\xb1\xb3]\x9c)"),
    b"\xea": re.compile(rb"\xea\x9f[\x8e\x8f\x92\x94\xb1]"),
    b"\xf0": re.compile(rb"\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]"),
}

# GPT2_PATTERN of learning.py has the same matches. Possessive repeats keep the regex engine from running out of stack.
_TIKTOKEN_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Unicode's White_Space, the characters that \s matches in tiktoken. Python's \s also matches \x1c to \x1f.
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_WHITE_SPACE_RUN = re.compile(f"[{_WHITE_SPACE}]{{1000,}}")
# A space before a word. A token always starts there, whatever stands before the space.
_WORD_START = re.compile(f" (?=[^{_WHITE_SPACE}])")
_TOKEN_END = re.compile(r"\S(?=[ \n])")

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
"""Maps each byte to the character that stands for it in GPT-2's files: the character with the same number if it is
visible, else a character from U+0100 on."""


def id_dtype(n_vocab: int) -> np.dtype[Any]:
    """Return the smallest dtype for the ids of a vocabulary of `n_vocab` tokens: uint16 if they fit, else uint32."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


@cache
def gigatoken_version() -> str | None:
    """Return the version of gigatoken that encodes large amounts of text, or None if only tiktoken is used.

    The version is None if gigatoken is not installed or does not load, has an untested version, or is switched off by the
    environment variable MYGPT_GIGATOKEN=0.
    """
    if os.environ.get("MYGPT_GIGATOKEN") == "0":
        return None
    try:
        version = metadata.version("gigatoken")
        if not version.startswith(GIGATOKEN_VERSION):
            return None
        import gigatoken  # noqa: F401
    except (metadata.PackageNotFoundError, ImportError):
        return None
    return version


class Codec:
    """An encoder of ordinary text, without added tokens, to the ids of a byte-level BPE. It can be pickled.

    Args:
        vocab: maps each token (bytes) to its id. The tokens are the 256 single bytes and the results of `merges`.
        merges: pairs of tokens to join, in the order in which they are joined
    """

    def __init__(self, vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]) -> None:
        import tiktoken

        self._vocab, self._merges = vocab, merges
        self.ranks = _ranks(vocab, merges)
        """Maps each token to the number by which tiktoken orders the merges."""
        self._id_of_rank = None if self.ranks is vocab else [vocab[token] for token in self.ranks]
        self._encoding = tiktoken.Encoding(
            "mygpt", pat_str=_TIKTOKEN_PATTERN, mergeable_ranks=dict(self.ranks), special_tokens={}
        )
        self._ids_of_words: dict[str, tuple[int, ...]] = {}
        """The ids of words that have been encoded, each with the space before it."""
        self._n_word_characters = 0
        self._n_characters = 0
        self._gigatoken: _Gigatoken | None = None

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_ids_of_words": {}, "_n_word_characters": 0, "_gigatoken": None}
        return self.__dict__ | fresh  # Another process has its own.

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Lone surrogates must have been refused before."""
        if len(text) >= MIN_CHARACTERS and self._uses_gigatoken(len(text)):
            ids: list[int] = self.encode_joined([text], [-1]).tolist()
            return ids
        return self._encode_text(text)

    def encode_joined(self, texts: Sequence[str], inserted: Sequence[int]) -> Ids:
        """Return the token ids of many texts in one array. The id `inserted[i]` follows text i, or none if it is negative."""
        n_characters = sum(map(len, texts))
        if n_characters >= MIN_CHARACTERS and (gigatoken := self._uses_gigatoken(n_characters)):
            return gigatoken.encode(self, texts, inserted)
        return self._encode_with_tiktoken(texts, inserted)

    def _encode_with_tiktoken(self, texts: Sequence[str], inserted: Sequence[int]) -> Ids:
        """Return the result of `encode_joined`, computed with tiktoken."""
        ids = array("I")
        for text, id_ in zip(texts, inserted, strict=True):
            ids.extend(self._encode_text(text))
            if id_ >= 0:
                ids.append(id_)
        return np.array(ids, np.uint32)

    def _encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text, computed with tiktoken.

        A long text is split at the spaces before words, and only words that are seen for the first time are encoded.
        """
        if len(text) < MIN_CHARACTERS:
            return self._call_tiktoken(text)
        ids: list[int] = []
        for piece in cut_text(text, PIECE_CHARACTERS):
            first, *words = _WORD_START.split(piece)
            if len(words) * MAX_MEAN_WORD < len(piece):
                ids += self._call_tiktoken(piece)
            else:
                ids += self._call_tiktoken(first)
                ids += chain.from_iterable(map(self._with_ids_of(words).__getitem__, words))
        return ids

    def _with_ids_of(self, words: Collection[str]) -> Mapping[str, tuple[int, ...]]:
        """Return a dict with the ids of at least these words. New words are encoded with one call of tiktoken."""
        ids_of = self._ids_of_words
        new = list(set(words).difference(ids_of))
        if self._n_word_characters > MAX_WORD_CHARACTERS:
            # Other threads may still read the old dict.
            ids_of, new = {}, list(set(words))
            self._ids_of_words, self._n_word_characters = ids_of, 0
        if new:
            self._n_word_characters += sum(map(len, new))
            ids = self._call_tiktoken(" " + " ".join(new))
            ids = [*map(self._same_int.__getitem__, ids)]
            token_ends = np.cumsum([*map(self._n_bytes.__getitem__, ids)])
            word_ends = np.cumsum([len(word if word.isascii() else word.encode()) + 1 for word in new])
            stops = (np.searchsorted(token_ends, word_ends) + 1).tolist()
            for word, start, stop in zip(new, [0, *stops], stops, strict=False):
                ids_of[word] = tuple(ids[start:stop])
        return ids_of

    @cached_property
    def _same_int(self) -> dict[int, int]:
        """Maps each id to one int object. Equal ids that share an object need less memory and are copied faster."""
        return {id_: id_ for id_ in self._vocab.values()}

    @cached_property
    def _n_bytes(self) -> dict[int, int]:
        """Maps each id to the number of bytes of its token."""
        return {id_: len(token) for token, id_ in self._vocab.items()}

    def _call_tiktoken(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = []
        for stretch in _cut_long_white_space(text):
            ids += self._encoding.encode_ordinary(stretch)
        return ids if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ids]

    def _uses_gigatoken(self, n_characters: int) -> _Gigatoken | None:
        """Return gigatoken's encoder if it should encode the next `n_characters`, loading it first if necessary."""
        self._n_characters += n_characters
        if self._n_characters < LOAD_CHARACTERS or gigatoken_version() is None or _SEPARATOR.encode() in self._vocab:
            return None
        # A forked process must not use an encoder that another thread may have been using when the process was forked.
        if self._gigatoken is None or self._gigatoken.pid != os.getpid():
            self._gigatoken = _Gigatoken(self._vocab, self._merges)
        return self._gigatoken


class _Gigatoken:
    """gigatoken's encoder for the vocabulary and merges of a `Codec`."""

    def __init__(self, vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]) -> None:
        from gigatoken.gigatoken_rs import PadTruncate

        self.pid = os.getpid()
        tokens = [*sorted((bytes([byte]) for byte in range(256)), key=vocab.__getitem__), *map(b"".join, merges)]
        ids = np.array([vocab[token] for token in tokens], np.uint32)
        self._separator = len(tokens)
        # gigatoken gets the numbers 0, 1, 2, … as ids, because it allocates memory for every id up to the largest.
        self._id_of_rank = None if np.array_equal(ids, np.arange(len(ids))) else np.append(ids, np.uint32(0))
        self._json = _tokenizer_json(tokens, merges)
        self._options = PadTruncate(0)
        self._memory = _resident_bytes()
        self._load()

    def _load(self) -> None:
        """Make gigatoken's encoder, with an empty cache."""
        from gigatoken.gigatoken_rs import load_hf_json

        self._n_bytes = 0
        self._encoder = load_hf_json(self._json)

    def encode(self, codec: Codec, texts: Sequence[str], inserted: Sequence[int]) -> Ids:
        """Return the result of `Codec.encode_joined`."""
        parts = [self._encode_some(codec, *some) for some in _in_calls(texts, inserted)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint32)])

    def _encode_some(self, codec: Codec, texts: Sequence[str], inserted: Sequence[int]) -> Ids:
        """Encode texts with one call of gigatoken, and texts for which gigatoken's ids may differ with tiktoken."""
        data = _with_separators(texts)
        if not any(first in data and pattern.search(data) for first, pattern in _NEW_BYTES.items()):
            return self._call(codec, data, texts, inserted)
        parts, start = [], 0
        for i in [*(i for i, text in enumerate(texts) if NEW_CHARACTERS.search(text)), len(texts)]:
            parts.append(self._call(codec, _with_separators(texts[start:i]), texts[start:i], inserted[start:i]))
            parts.append(codec._encode_with_tiktoken(texts[i : i + 1], inserted[i : i + 1]))
            start = i + 1
        return np.concatenate(parts)

    def _call(self, codec: Codec, data: bytes, texts: Sequence[str], inserted: Sequence[int]) -> Ids:
        """Encode texts with one call of gigatoken, which releases the GIL. `data` is the texts, each with a separator."""
        # This method returns one array and, unlike gigatoken's other methods for batches, does not import awkward.
        encoded: Ids = self._encoder.encode_batch_padded([data], self._options, parallel=False)[0][0]
        self._n_bytes += len(data)
        if self._is_large():
            self._load()
        places = np.flatnonzero(encoded == self._separator)
        if len(places) != len(texts):  # A text contains the separator.
            return codec._encode_with_tiktoken(texts, inserted)
        ids = encoded if self._id_of_rank is None else self._id_of_rank[encoded]
        following = np.asarray(inserted, np.int64)
        ids[places] = following.astype(np.uint32)
        return ids if (following >= 0).all() else np.delete(ids, places[following < 0])

    def _is_large(self) -> bool:
        """Return True if gigatoken's cache may have more than MAX_CACHE_BYTES."""
        if self._n_bytes * CACHE_GROWTH < MAX_CACHE_BYTES:
            return False
        now = _resident_bytes()
        if now is None or self._memory is None:
            return self._n_bytes * CACHE_GROWTH >= 2 * MAX_CACHE_BYTES
        return now - self._memory > MAX_CACHE_BYTES


def _with_separators(texts: Sequence[str]) -> bytes:
    """Return the texts in UTF-8, each followed by the separator.

    The bytes are joined, because the separator would make a joined string four times as large.
    """
    return _SEPARATOR.encode().join([*(text.encode() for text in texts), b""])


def _tokenizer_json(tokens: Sequence[bytes], merges: Iterable[tuple[bytes, bytes]]) -> str:
    """Return a tokenizer.json for gigatoken, in which tokens have the ids 0, 1, 2, …, and the separator the next id."""
    visible = {token: "".join(BYTE_TO_CHARACTER[byte] for byte in token) for token in tokens}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "added_tokens": [{"id": len(tokens), "content": _SEPARATOR, **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {visible[token]: id_ for id_, token in enumerate(tokens)},
            "merges": [[visible[first], visible[second]] for first, second in merges],
        },
    }
    return json.dumps(content)


def _in_calls(texts: Sequence[str], inserted: Sequence[int]) -> Iterator[tuple[list[str], list[int]]]:
    """Yield the texts, and the ids to insert after them, in groups of about CALL_CHARACTERS. Longer texts are cut."""
    some: list[str] = []
    following: list[int] = []
    size = 0
    for text, id_ in zip(texts, inserted, strict=True):
        pieces = cut_text(text, CALL_CHARACTERS)
        piece = next(pieces)
        for next_piece in pieces:
            yield [*some, piece], [*following, -1]
            some, following, size, piece = [], [], 0, next_piece
        some.append(piece)
        following.append(id_)
        size += len(piece)
        if size >= CALL_CHARACTERS:
            yield some, following
            some, following, size = [], [], 0
    if some:
        yield some, following


def cut_text(text: str, n_characters: int) -> Iterator[str]:
    """Yield a text in pieces of about `n_characters`, cut before white space where a token always ends."""
    start = 0
    while len(text) - start > n_characters:
        end = _TOKEN_END.search(text, start + n_characters - 1)
        if end is None:
            break
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


def _resident_bytes() -> int | None:
    """Return the bytes of memory that this process has in RAM, or None where Linux's /proc is missing."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _ranks(vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]) -> Mapping[bytes, int]:
    """Return the numbers by which tiktoken orders the merges: the ids if they increase, else new numbers from 0 on."""
    ids = [vocab[first + second] for first, second in merges]
    if all(one < other for one, other in pairwise(ids)):
        return vocab
    tokens = [*(bytes([byte]) for byte in range(256)), *(first + second for first, second in merges)]
    return {token: rank for rank, token in enumerate(tokens)}


def _cut_long_white_space(text: str) -> Iterable[str]:
    """Yield a text in parts, split at runs of 1,000 or more spaces, tabs or line ends. The token ids stay the same.

    Before a word, GPT-2's pattern matches a run of white space without its last character. tiktoken's engine finds this
    end by backtracking, which fails at about a million characters, so this function splits the text at the same
    position.
    """
    start = 0
    for run in _WHITE_SPACE_RUN.finditer(text):
        if run.end() == len(text):
            break
        yield text[start : run.start()]
        yield text[run.start() : run.end() - 1]
        start = run.end() - 1
    yield text[start:]
