"""The communication of ranks: sums, the values of rank 0, and errors of rank 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from MyGPT import ranks
from ranks import run_on_ranks


def communicate(k: int) -> tuple[Any, ...]:
    """Return the rank, the number of ranks, the sum of a tensor over the ranks, and the value that rank 0 broadcasts."""
    total = ranks.sum_over_ranks(torch.ones(2) * k).tolist()
    return ranks.rank(), ranks.world_size(), total, ranks.broadcast(ranks.rank())


def fail_on_first_rank() -> None:
    def fail() -> None:
        raise ValueError("x")

    ranks.on_first_rank(fail)


@pytest.mark.torchrun
def test_all_ranks_get_sums_values_and_errors() -> None:
    assert run_on_ranks(4, communicate, 2) == [(r, 4, [8.0, 8.0], 0) for r in range(4)]
    with pytest.raises(AssertionError, match="ValueError: x"):
        run_on_ranks(2, fail_on_first_rank)
