"""Simple, slow versions of algorithms that the library implements fast."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def naive_merges(chunk_counts: Mapping[bytes, int], n_merges: int) -> list[tuple[int, int]]:
    """Return the merges of textbook BPE, which counts all pairs again for every merge. Ties go to the smaller pair."""
    chunks = [(list(chunk), count) for chunk, count in chunk_counts.items()]
    merges: list[tuple[int, int]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in chunks:
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        chunks = [(replace_pair(ids, best, 256 + len(merges)), count) for ids, count in chunks]
        merges.append(best)
    return merges


def replace_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    replaced: list[int] = []
    for id_ in ids:
        replaced.append(id_)
        # Replacing from the left turns "aaa" into (aa)a.
        if tuple(replaced[-2:]) == pair:
            replaced[-2:] = [new_id]
    return replaced


def naive_bpe(chunk: bytes, merges: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """Return the tokens of a chunk, found by applying every merge in order, from the left."""
    tokens = [bytes([byte]) for byte in chunk]
    for pair in merges:
        joined: list[bytes] = []
        i = 0
        while i < len(tokens):
            if tuple(tokens[i : i + 2]) == pair:
                joined.append(pair[0] + pair[1])
                i += 2
            else:
                joined.append(tokens[i])
                i += 1
        tokens = joined
    return tokens


def book_words(text: str) -> list[str]:
    """Split a text into words and punctuation by the book's rule (chapter 2)."""
    parts = re.split(r'([,.:;?_!"()\']|--|\s)', text)
    return [part.strip() for part in parts if part.strip()]


def book_windows(ids: Sequence[int], max_length: int, stride: int) -> list[tuple[Tensor, Tensor]]:
    """Return the book's sliding windows (chapter 2): inputs and targets."""
    return [
        (torch.tensor(ids[i : i + max_length]), torch.tensor(ids[i + 1 : i + max_length + 1]))
        for i in range(0, len(ids) - max_length, stride)
    ]
