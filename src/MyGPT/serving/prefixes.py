"""The slots of an engine's key-value cache, and the prompts whose beginnings they still hold."""

from __future__ import annotations

import time
from collections.abc import Sequence

from MyGPT.cache import SlotCache


class PrefixCache:
    """A `SlotCache` together with the token ids whose keys and values each slot holds.

    A slot keeps them after its request has ended, so that a later prompt with the same beginning need not compute them again.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.ids: list[list[int]] = [[] for _ in cache.lengths]
        """The ids in each slot."""
        self._last_use = [0.0] * len(self.ids)

    def __len__(self) -> int:
        """Return the number of slots."""
        return len(self.ids)

    def take(self, ids: list[int], limit: int, busy: set[int]) -> int:
        """Choose a slot that is not in `busy`, let it hold only the longest cached beginning of `ids`, and return the slot.

        The beginning has at most `limit` tokens. If another slot holds it, it is copied from there.
        """
        free = [slot for slot in range(len(self)) if slot not in busy]
        shared = [min(limit, n_common(ids, held)) for held in self.ids]
        best = max(range(len(self)), key=lambda slot: (shared[slot], slot in free))
        # Taking a slot discards the rest of its tokens. If less than half of them are needed, they are copied instead.
        if best in free and 2 * shared[best] >= len(self.ids[best]):
            slot = best
        else:
            slot = min(free, key=lambda slot: self._last_use[slot] if self.ids[slot] else -1.0)
        self.copy(best, slot, ids[: shared[best]])
        return slot

    def copy(self, source: int, target: int, ids: list[int]) -> None:
        """Replace the tokens of the slot `target` by `ids`, which must be the first tokens of the slot `source`."""
        self.cache.copy_prefix(source, target, len(ids))
        self.ids[target] = list(ids)

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """Record the ids that the model has appended to a slot."""
        self.ids[slot] += ids

    def clear(self, slot: int) -> None:
        """Remove all tokens from a slot."""
        self.cache.truncate(slot, 0)
        self.ids[slot] = []

    def release(self, slot: int) -> None:
        """Record that a request has left the slot. The slot that has been free for the longest time is overwritten first."""
        self._last_use[slot] = time.monotonic()


def n_common(a: list[int], b: list[int]) -> int:
    """Return the number of ids that two lists have in common at their beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # much faster than a loop
        return n
    return next(i for i in range(n) if a[i] != b[i])
