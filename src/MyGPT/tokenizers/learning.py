"""Learn the merges of a byte-level BPE from text: count the chunks of the text, then merge the most frequent pairs.

Both steps avoid repeated work. A text has far fewer distinct words than words, so only the distinct ones are split into
chunks, and only the distinct chunks are merged. After a merge, only the places where it happened are looked at again.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from MyGPT.tokenizers.added import special_pattern
from MyGPT.tokenizers.base import refuse_surrogates, require_text
from MyGPT.tokenizers.codec import cut_text

Pair = tuple[int, int]
"""The ids of two adjacent tokens."""
Integers = npt.NDArray[np.int64]
RankedPair = tuple[int, Pair, Integers]
"""The negative count of a pair, the pair, and its positions. Sorting puts the largest count first, then the smallest ids."""

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# GPT2_PATTERN for ASCII text. Python's module re is three times as fast as the module regex.
_ASCII_PATTERN = re.compile(rb"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
# A space before a character that is not white space. No white space in UTF-8 starts with one of these bytes.
_WORD_START = re.compile(rb" (?=[!-~\xc3-\xdf\xe0\xe4-\xff])")

SLICE_CHARACTERS = 1 << 20
"""A longer text is split in several steps, which limits their memory."""
MAX_WORDS = 1 << 19
MAX_WORD_BYTES = 1 << 26
"""The counts of words are turned into counts of chunks after this many distinct words or bytes of text. This limits the
memory for words, of which long texts have many more than chunks."""
_JOINED_WORDS = 1 << 14
"""The number of words that are split into chunks in one call."""


def count_chunks(texts: Iterable[str], special_tokens: Collection[str] = ()) -> Counter[bytes]:
    """Return how often each chunk (a match of GPT-2's pattern, as UTF-8 bytes) occurs in texts.

    The special tokens are removed from the texts first.

    A chunk always starts at a space before a word, whatever stands before the space. So this function splits the texts
    at these spaces, counts equal words, and applies the pattern only to the distinct words.
    """
    special = special_pattern(special_tokens)
    chunks: Counter[bytes] = Counter()
    words: Counter[bytes] = Counter()
    n_bytes = 0
    for text in texts:
        require_text(text)
        refuse_surrogates(text)
        for part in special.split(text)[::2]:
            for piece in cut_text(part, SLICE_CHARACTERS):
                data = piece.encode()
                first, *rest = _WORD_START.split(data)
                chunks.update(_split(first))
                words.update(rest)
                n_bytes += len(data)
                if len(words) >= MAX_WORDS or n_bytes >= MAX_WORD_BYTES:
                    _add_chunks(words, chunks)
                    words.clear()
                    n_bytes = 0
    _add_chunks(words, chunks)
    return chunks


def _split(data: bytes) -> list[bytes]:
    """Return the matches of GPT-2's pattern in UTF-8 text."""
    if data.isascii():
        return _ASCII_PATTERN.findall(data)
    return [chunk.encode() for chunk in _compiled_pattern().findall(data.decode())]


@cache
def _compiled_pattern() -> Any:
    import regex

    return regex.compile(GPT2_PATTERN)


def _add_chunks(words: Mapping[bytes, int], chunks: Counter[bytes]) -> None:
    """Split words into chunks and add the chunks to `chunks`, as often as the words occur.

    Each word is given without the space before it. Words with the same count are joined and split in one call.
    """
    groups: defaultdict[tuple[int, bool], list[bytes]] = defaultdict(list)
    for word, count in words.items():
        groups[count, word.isascii()].append(word)
    for (count, _), group in groups.items():
        for i in range(0, len(group), _JOINED_WORDS):
            found = _split(b" " + b" ".join(group[i : i + _JOINED_WORDS]))
            if count == 1:
                chunks.update(found)
                continue
            for chunk, times in Counter(found).items():
                chunks[chunk] += times * count


def learn_merges(chunk_counts: Mapping[bytes, int], n_merges: int, progress: bool = False) -> list[Pair]:
    """Learn `n_merges` merges from the number of occurrences of each chunk. Return them in order as pairs of token ids.

    Each merge joins the pair of adjacent tokens that is most frequent at that time. Ids 0 to 255 are the bytes; merge
    number i, counted from 0, creates id 256 + i. Fewer merges are returned if no pair is left.

    The textbook algorithm counts all pairs again after each merge. This function lists the positions of each pair when
    the pair comes into being, and counts them again only when the pair seems to be the most frequent one. In between,
    other merges can only take occurrences away. So a count in the heap can be too high, but never too low; an outdated
    pair is pushed again with its true count.
    """
    from MyGPT.progress import progress_bar

    text = _ChunkArray(chunk_counts, n_merges)
    heap: list[tuple[int, Pair, Integers, Iterator[RankedPair]]] = []

    def push_next(pairs: Iterator[RankedPair]) -> None:
        """Push the next pair of `pairs`, which are sorted, to the heap. The others follow when this pair is popped."""
        for negative_count, pair, positions in pairs:
            heapq.heappush(heap, (negative_count, pair, positions, pairs))
            break

    push_next(text.byte_pairs())
    merges: list[Pair] = []
    with progress_bar(progress, total=n_merges, desc="learning merges", unit="merge", leave=False) as bar:
        while heap and len(merges) < n_merges:
            negative_count, pair, positions, following = heapq.heappop(heap)
            push_next(following)
            positions, count = text.occurrences(pair, positions)
            if count == -negative_count:
                push_next(text.join(pair, positions, 256 + len(merges)))
                merges.append(pair)
                bar.update()
            elif count:
                push_next(iter([(-count, pair, positions)]))
    return merges


class _ChunkArray:
    """The distinct chunks as one array of bytes, in which pairs of tokens are joined step by step.

    A token covers one or more bytes. Its id is stored at its first and at its last byte, so its neighbours are found
    without a list: the next token starts after its last byte, and the id of the previous token is stored just before its
    first byte. All other places, also those between two chunks, contain the number `_gap`, which is no token's id.
    For example, with the ids of "th" and "the" written as T and E, and the gap as a dot:

        .the.then.  →  .TTe.TTen.  →  .E.E.E.En.

    Args:
        chunk_counts: the number of occurrences of each chunk in the text
        n_merges: upper bound of the number of merges
    """

    def __init__(self, chunk_counts: Mapping[bytes, int], n_merges: int) -> None:
        chunks = [chunk for chunk in chunk_counts if len(chunk) > 1]
        places = np.fromiter(map(len, chunks), np.int64, len(chunks)) + 1  # with the gap after the chunk
        counts = np.fromiter(map(chunk_counts.__getitem__, chunks), np.int64, len(chunks))
        data = np.frombuffer(b"".join([b"\0", *(part for chunk in chunks for part in (chunk, b"\0"))]), np.uint8)
        self._gap = 256 + min(n_merges, len(data))
        self._ids = data.astype(np.min_scalar_type(self._gap))
        self._ids[np.concatenate([[0], np.cumsum(places)])] = self._gap
        self._count_at = np.concatenate([[0], np.repeat(counts, places)])
        """For each byte, the number of occurrences of its chunk."""
        self._count_at = self._count_at.astype(np.min_scalar_type(self._count_at.max()))
        self._n_bytes = np.ones(self._gap + 1, np.int64)
        """The number of bytes of each token."""
        self._position_bits = len(data).bit_length()

    def byte_pairs(self) -> Iterator[RankedPair]:
        """Return the pairs of adjacent bytes, the most frequent first."""
        positions = np.flatnonzero((self._ids[:-1] != self._gap) & (self._ids[1:] != self._gap))
        keys = self._ids[positions].astype(np.int64) << 8 | self._ids[positions + 1]
        return ((count, divmod(key, 256), places) for count, key, places in self._ranked(keys, positions))

    def occurrences(self, pair: Pair, positions: Integers) -> tuple[Integers, int]:
        """Return those of the positions where a pair still stands, and how often it occurs there in the text.

        The pair stood at all `positions` before. A position that has become a part of a longer token has another id, so
        the first comparison finds it, and otherwise the next token starts after the bytes of the first one.
        """
        first, second = pair
        after = positions + self._n_bytes.item(first)
        is_there = (self._ids.take(positions) == first) & (self._ids.take(after) == second)
        positions = positions.compress(is_there)
        return positions, int(np.add.reduce(self._count_at.take(positions), dtype=np.int64))

    def join(self, pair: Pair, positions: Integers, new_id: int) -> Iterator[RankedPair]:
        """Join a pair at all its positions, in ascending order, and return the new pairs, the most frequent first."""
        first, second = (self._n_bytes.item(id_) for id_ in pair)
        if pair[0] == pair[1]:
            positions = _without_overlaps(positions, first)
        self._n_bytes[new_id] = first + second
        last = positions + (first + second - 1)
        self._ids[positions + (first - 1)] = self._gap
        self._ids[positions + first] = self._gap
        self._ids[last] = self._gap  # for a moment, so that two new tokens in a row count as one pair, not as two
        self._ids[positions] = new_id
        before = self._ids.take(positions - 1)
        self._ids[last] = new_id
        after = self._ids.take(last + 1)
        # The keys of pairs with the new token second are the ids of the other token. The keys of pairs with the new
        # token first are larger, so that sorted keys are sorted pairs.
        keys = np.concatenate([before, after]).astype(np.int64)
        is_pair = keys != self._gap
        keys[len(before) :] += new_id
        starts = np.concatenate([positions - self._n_bytes.take(before), positions])
        return (
            (count, (key, new_id) if key < new_id else (new_id, key - new_id), places)
            for count, key, places in self._ranked(keys.compress(is_pair), starts.compress(is_pair))
        )

    def _ranked(self, keys: Integers, positions: Integers) -> Iterator[tuple[int, int, Integers]]:
        """Yield the negative count, the key and the positions of each distinct key: the most frequent key first.

        Equally frequent keys come in ascending order, and so do the positions of a key. Counts are those in the text.
        """
        if len(keys) == 0:
            return
        entries = keys << self._position_bits | positions
        entries.sort()
        keys = entries >> self._position_bits
        positions = entries & ((1 << self._position_bits) - 1)
        is_start = np.ones(len(keys) + 1, bool)  # The last entry marks the end.
        np.not_equal(keys[1:], keys[:-1], out=is_start[1:-1])
        starts = is_start.nonzero()[0]
        negative_counts = -np.add.reduceat(self._count_at.take(positions), starts[:-1], dtype=np.int64)
        keys = keys.take(starts[:-1])
        for i in negative_counts.argsort(kind="stable"):
            yield negative_counts.item(i), keys.item(i), positions[starts[i] : starts[i + 1]]


def _without_overlaps(positions: Integers, n_bytes: int) -> Integers:
    """Return the positions at which a pair of equal tokens of `n_bytes` bytes is joined, from left to right.

    In a run of equal tokens, the pair stands at each token but the last. Every second of these positions is kept.
    """
    starts_run = np.concatenate([[True], positions[1:] != positions[:-1] + n_bytes])
    numbers = np.arange(len(positions))
    first_of_run = np.maximum.accumulate(np.where(starts_run, numbers, 0))
    return positions[(numbers - first_of_run) % 2 == 0]
