"""Solution of exercise 1: byte-pair encoding."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

Pair = tuple[int, int]


def join(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Return the ids with every occurrence of a pair replaced by the new id, from left to right."""
    joined = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            joined.append(new_id)
            i += 2
        else:
            joined.append(ids[i])
            i += 1
    return joined


def learn_merges(ids: list[int], n_merges: int) -> list[Pair]:
    """Return the merges in the order in which they are learned. Merge number i, counted from 0, creates the id 256 + i."""
    merges: list[Pair] = []
    while len(merges) < n_merges:
        counts = Counter(pairwise(ids))
        if not counts:
            break
        # The largest count comes first, and of equal counts the smallest pair.
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        ids = join(ids, best, 256 + len(merges))
        merges.append(best)
    return merges


def apply_merges(ids: list[int], merges: list[Pair]) -> list[int]:
    """Return the ids of a new text after all merges, each applied to the whole text in the order of the list."""
    ids = list(ids)
    for new_id, pair in enumerate(merges, start=256):
        ids = join(ids, pair, new_id)
    return ids
