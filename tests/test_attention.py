"""`plain_attention`, compared with the formula in numpy and with the fused attention of the model."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel
from MyGPT.inside.tracing import plain_attention
from MyGPT.model import CausalSelfAttention
from oracles_model import naive_attention

sizes = st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**31))


def random_qkv(T: int, S: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(n, D, dtype=torch.float64) for n in (T, S, S))  # type: ignore[return-value]


@given(sizes)
@settings(deadline=None, max_examples=40)
def test_plain_attention_is_the_formula_under_any_mask(size: tuple[int, int, int, int]) -> None:
    T, past, D, seed = size
    torch.manual_seed(seed)
    q, k, v = random_qkv(T, T + past, D)
    visible = torch.rand(T, T + past) < 0.5
    visible[torch.arange(T), torch.randint(T + past, (T,))] = True
    expected = naive_attention(q.numpy(), k.numpy(), v.numpy(), visible.numpy())
    torch.testing.assert_close(plain_attention(q, k, v, visible), torch.from_numpy(expected), rtol=0, atol=1e-12)


@given(sizes)
@settings(deadline=None, max_examples=40)
def test_without_a_mask_a_query_sees_the_keys_up_to_its_own_time(size: tuple[int, int, int, int]) -> None:
    T, past, D, seed = size
    torch.manual_seed(seed)
    q, k, v = random_qkv(T, T + past, D)
    visible = torch.tensor([[s <= t + past for s in range(T + past)] for t in range(T)])
    expected = naive_attention(q.numpy(), k.numpy(), v.numpy(), visible.numpy())
    torch.testing.assert_close(plain_attention(q, k, v), torch.from_numpy(expected), rtol=0, atol=1e-12)


def fast_and_plain(layer: CausalSelfAttention, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output of the layer, and the same computed with `plain_attention` between its projections."""
    B, T, C = x.shape
    q, k, v = (part.view(B, T, layer.n_heads, -1).transpose(1, 2) for part in layer.c_attn(x).split(C, dim=2))
    y = plain_attention(q, k, v, mask).transpose(1, 2).reshape(B, T, C)
    return layer(x, mask, None), layer.c_proj(y)


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_is_plain_attention_in_value_and_gradient(padded: bool, tiny_model64: GPTModel) -> None:
    layer = tiny_model64.transformer.h[1].attn
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    mask = None
    if padded:
        mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
        mask[1, :, :, :3] = False
        mask |= torch.eye(7, dtype=torch.bool)
    fast, plain = fast_and_plain(layer, x, mask)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    upstream = torch.randn_like(fast)
    of = [x, *layer.parameters()]
    gradients = zip(torch.autograd.grad(fast, of, upstream), torch.autograd.grad(plain, of, upstream), strict=True)
    for ours, expected in gradients:
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (3, 2), (4, 1), (1, 4)])
def test_the_fast_path_over_a_cache_is_plain_attention_over_all_keys(pieces: tuple[int, ...]) -> None:
    model = lively_model(GPTConfig(vocab_size=11, context_length=8, emb_dim=12, n_heads=2, n_layers=1)).double()
    seen: dict[str, list[Tensor]] = {"x": [], "y": []}
    layer = model.transformer.h[0].attn
    layer.register_forward_hook(lambda _, args, out: (seen["x"].append(args[0]), seen["y"].append(out), None)[-1])
    ids, cache, start = torch.randint(11, (2, 5)), model.new_cache(2), 0
    for piece in pieces:
        with torch.no_grad():
            model(ids[:, start : start + piece], cache=cache)
        start += piece
    x, y = torch.cat(seen["x"], dim=1), torch.cat(seen["y"], dim=1)
    _, plain = fast_and_plain(layer, x, None)
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-12)


def test_attention_is_the_mean_of_the_values_when_all_keys_are_equal() -> None:
    q, v = torch.randn(4, 3), torch.randn(4, 3)
    out = plain_attention(q, torch.ones(4, 3), v)
    running_mean = v.cumsum(0) / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(out, running_mean)
