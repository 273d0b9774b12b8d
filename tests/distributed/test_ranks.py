import pytest
import torch

from MyGPT import ranks
from ranks import run_on_ranks


def f(k):
    return (
        ranks.rank(),
        ranks.world_size(),
        ranks.sum_over_ranks(torch.ones(2) * k).tolist(),
        ranks.broadcast(ranks.rank()),
    )


def g():
    def bad():
        raise ValueError("x")

    ranks.on_first_rank(bad)


@pytest.mark.torchrun
def test_a():
    assert run_on_ranks(4, f, 2) == [(r, 4, [8.0, 8.0], 0) for r in range(4)]
    with pytest.raises(AssertionError, match="ValueError: x"):
        run_on_ranks(2, g)
