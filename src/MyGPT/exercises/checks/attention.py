"""The check of attention.py: results and gradients are compared with torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, expect_tensor
from MyGPT.exercises.student import Student

B, H, D = 2, 3, 4


def lower(T: int, S: int, diagonal: int = 0) -> Tensor:
    """Return a bool mask (T, S) of the keys up to each query's own position, moved to the right by `diagonal`."""
    return torch.ones(T, S, dtype=torch.bool).tril(S - T + diagonal)


def weigh(scores: Tensor, mask: Tensor, v: Tensor, hidden: float = -math.inf, dim: int = -1) -> Tensor:
    """Return softmax(scores) v, where hidden scores are replaced by `hidden`."""
    return scores.masked_fill(~mask, hidden).softmax(dim) @ v


def mistakes(q: Tensor, k: Tensor, v: Tensor, given: Tensor | None) -> Mistakes:
    """Return the outputs of programs with a common mistake."""
    T, S, width = q.shape[2], k.shape[2], q.shape[3]
    causal = lower(T, S)
    mask = causal if given is None else given
    dots = q @ k.transpose(-2, -1)
    scores = dots / math.sqrt(width)
    right = weigh(scores, mask, v)
    everything = torch.ones_like(mask)
    found: list[tuple[str, Tensor]] = []
    if given is None:
        off_by_one = "the mask is off by one: a token must see itself, so the diagonal belongs to the allowed keys"
        found += [
            ("there is no causal mask, so tokens see later tokens", weigh(scores, everything, v)),
            (off_by_one, weigh(scores, lower(T, S, -1), v)),
            (off_by_one, weigh(scores, lower(T, S, -1), v, -1e9)),
            ("the mask is off by one: every token also sees the next token", weigh(scores, lower(T, S, 1), v)),
            (
                "the mask is aligned to the first key, but the queries are the last T tokens",
                weigh(scores, lower(T, S, T - S), v),
            ),
        ]
    else:
        found += [
            ("the argument mask is ignored, and the causal mask is used", weigh(scores, causal, v)),
            ("the argument mask is ignored, and nothing is hidden", weigh(scores, everything, v)),
            ("the causal mask is applied in addition to the argument mask", weigh(scores, mask & causal, v)),
            ("the mask is added to the scores as the numbers 0 and 1", (scores + mask).softmax(-1) @ v),
        ]
    inverted = (
        "the mask is used the wrong way round: True means that a query may see a key, and masked_fill needs ~mask"
    )
    weights = scores.softmax(-1)
    zeroed = "the mask is applied after the softmax, so the weights of a query do not sum to 1; apply it before"
    ways = [(mask, -math.inf), (mask, -1e9)]
    found += [
        *((inverted, weigh(scores, ~way, v, value)) for way, value in ways),
        ("the scores are not divided by √D", weigh(dots, mask, v)),
        ("the scores are divided by D, but √D is expected", weigh(dots / width, mask, v)),
        ("the scores are multiplied by √D, but they must be divided", weigh(dots * math.sqrt(width), mask, v)),
        (
            "the scores are divided by √(H · D); D is the width of one head",
            weigh(dots / math.sqrt(q.shape[1] * width), mask, v),
        ),
        ("the scores are divided by √S, but √D is expected", weigh(dots / math.sqrt(S), mask, v)),
        ("the scores are divided by √T, but √D is expected", weigh(dots / math.sqrt(T), mask, v)),
        (
            "the softmax runs over the queries (dim=-2), but it must run over the keys (dim=-1)",
            weigh(scores, mask, v, dim=-2),
        ),
        (
            "the softmax runs over the queries (dim=-2), but it must run over the keys (dim=-1)",
            weigh(scores, mask, v, -1e9, -2),
        ),
        (
            "the softmax runs over the heads (dim=1), but it must run over the keys (dim=-1)",
            weigh(scores, mask, v, dim=1),
        ),
        (
            "the softmax runs over the heads (dim=1), but it must run over the keys (dim=-1)",
            weigh(scores, mask, v, -1e9, 1),
        ),
        (
            "the softmax runs over the batch (dim=0), but it must run over the keys (dim=-1)",
            weigh(scores, mask, v, dim=0),
        ),
        (zeroed, weights.masked_fill(~mask, 0) @ v),
        (zeroed, weights.masked_fill(~mask, -math.inf) @ v),
        (
            "hidden scores are set to 0, but softmax gives them weight 0 only if they are minus infinity",
            weigh(scores, mask, v, 0),
        ),
        ("the softmax is missing", scores.masked_fill(~mask, 0) @ v),
        (
            "the attention weights are returned; they must be multiplied by v",
            scores.masked_fill(~mask, -math.inf).softmax(-1),
        ),
        ("the keys are used in place of the values", weigh(scores, mask, k)),
        ("the dimensions of heads and tokens are exchanged; the result must be (B, H, T, D)", right.transpose(1, 2)),
        ("the heads are put side by side; the result must be (B, H, T, D)", right.transpose(1, 2).flatten(2)),
    ]
    if T == S:
        found.append(("q and k are exchanged: the scores must be q kᵀ", weigh(scores.transpose(-2, -1), mask, v)))
    return found


def expected_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return torch's attention output."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=lower(q.shape[2], k.shape[2]) if mask is None else mask)


def check_attention(student: Student, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Raise Wrong unless the student's output is torch's."""
    shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
    call = f"attention(q, k, v) with {shapes}" if mask is None else f"attention(q, k, v, mask) with {shapes}"
    arguments = (q, k, v) if mask is None else (q, k, v, mask)
    got = student.call(call, student.function("attention"), *arguments)
    expect_tensor(call, got, expected_of(q, k, v, mask), mistakes(q, k, v, mask))


def tensors(
    B: int, H: int, T: int, S: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q (B, H, T, D), k and v (B, H, S, D)."""
    generator = torch.Generator().manual_seed(S)
    q, k, v = (1.5 * torch.randn(B, H, n, D, generator=generator, dtype=dtype) for n in (T, S, S))
    return q, k, v


def _case(B: int, H: int, T: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> Callable[[Student], None]:
    return lambda student: check_attention(student, *tensors(B, H, T, S, D, dtype))


def _example(student: Student) -> None:
    q, k, v = (torch.tensor(row).view(1, 1, 2, 1) for row in ([1.0, 2.0], [1.0, 3.0], [10.0, 20.0]))
    check_attention(student, q, k, v)


def _mask(student: Student) -> None:
    T, S = 4, 6
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True  # every query sees at least one key
    check_attention(student, *tensors(B, H, T, S, D), mask)


def _extreme(student: Student) -> None:
    q, k, v = tensors(B, H, 5, 5, D)
    check_attention(student, 100 * q, k, v)
    check_attention(student, torch.zeros_like(q), k, v)


def _gradients(student: Student) -> None:
    ours, theirs = tensors(B, H, 5, 5, D), tensors(B, H, 5, 5, D)
    for tensor in ours + theirs:
        tensor.requires_grad_()
    weights = torch.randn(B, H, 5, D, generator=torch.Generator().manual_seed(2))
    call = "the gradients of attention(q, k, v)"
    attention = student.function("attention")

    def backward(*arguments: Tensor) -> list[Tensor | None]:
        (attention(*arguments) * weights).sum().backward()
        return [argument.grad for argument in arguments]

    got = student.call(call, backward, *theirs)
    (expected_of(*ours, None) * weights).sum().backward()
    for name, gradient, tensor in zip("qkv", got, ours, strict=True):
        assert tensor.grad is not None
        expect_tensor(call, gradient, tensor.grad, name=f"the gradient of {name}")


CHECK = Check(
    [
        ("gives torch's numbers for 2 sequences, 3 heads and 5 tokens", _case(B, H, 5, 5, D)),
        ("computes the example", _example),
        ("lets 3 queries see 7 keys, as with a cache", _case(B, H, 3, 7, D)),
        ("lets 1 query see 5 keys", _case(B, H, 1, 5, D)),
        ("uses a mask that is given", _mask),
        ("computes one token of one sequence with one head", _case(1, 1, 1, 1, 8)),
        ("stays finite for large scores, and handles equal scores", _extreme),
        ("returns float64 for float64", _case(1, 2, 3, 3, 8, torch.float64)),
        ("gives torch's gradients", _gradients),
    ],
    library="inside/tracing.py (plain_attention) and model.py (CausalSelfAttention)",
    after="Train a model with it: mygpt train --with {path}",
)
"""The check of the task attention."""
