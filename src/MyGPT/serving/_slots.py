"""A cache with one row per request, computed one request after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """New token ids of one slot, and the number of its last positions whose logits are wanted."""

    slot: int
    ids: list[int]
    n_logits: int


class SlotCache:
    """One KV cache per slot."""

    def __init__(self, model: Any, slots: int) -> None:
        self.rows = [model.new_cache(1) for _ in range(slots)]
        self.capacity = self.rows[0].capacity
        self.storage = self.rows[0].storage
        self.n_bytes = sum(row.storage.nbytes for row in self.rows)

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        self.rows[target].storage[..., :n, :] = self.rows[source].storage[..., :n, :]
        self.rows[target].length = n

    def truncate(self, slot: int, n: int) -> None:
        self.rows[slot].length = n


def forward_slots(model: Any, pieces: list[Piece], cache: SlotCache) -> Tensor:
    rows = []
    for slot, ids, n in pieces:
        logits = model(torch.tensor([ids]), cache=cache.rows[slot])[0]
        rows.append(logits[len(ids) - n :])
    return torch.cat(rows)
