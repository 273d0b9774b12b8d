"""The check of kv_cache.py: pieces computed with the student's cache are compared with one pass without a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, Wrong, expect_tensor, require_type
from MyGPT.exercises.student import Student
from MyGPT.exercises.tasks.kv_cache import OneLayerModel

VOCAB, CONTEXT, C, H = 11, 12, 12, 3


@dataclass
class Variant:
    """A program that uses a cache. The fields make mistakes."""

    positions: str = "right"
    mask: str = "right"
    overwrites: bool = False
    new_first: bool = False
    values_from_keys: bool = False
    keeps_first: bool = False
    drops_new: bool = False
    keys: Tensor | None = None
    values: Tensor | None = None
    n: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that attention reads."""
        v = k if self.values_from_keys else v
        if self.keys is None or self.values is None or self.overwrites:
            self.keys, self.values = k, v
            return k, v
        order = slice(None, None, -1 if self.new_first else 1)
        old = self.keys, self.values
        keys, values = torch.cat([self.keys, k][order], 2), torch.cat([self.values, v][order], 2)
        if not self.keeps_first:
            self.keys, self.values = keys, values
        return old if self.drops_new else (keys, values)

    def __call__(self, model: OneLayerModel, ids: Tensor) -> Tensor:
        """Return the logits of new tokens."""
        B, T = ids.shape
        start = {
            "right": self.n,
            "from 0": 0,
            "one late": self.n + 1,
            "one early": max(self.n - 1, 0),
            "last": self.n + T - 1,
        }
        positions = torch.arange(T) + start[self.positions]
        if self.positions == "last":
            positions = torch.full((T,), self.n + T - 1)
        x = model.wte(ids) + model.wpe(positions % CONTEXT)
        q, k, v = map(model.split_heads, model.c_attn(x).chunk(3, dim=-1))
        k, v = self.append(k, v)
        S = k.shape[2]
        diagonal = {
            "right": S - T,
            "none": S,
            "aligned to the first key": 0,
            "one too far": S - T + 1,
            "without itself": S - T - 1,
        }
        mask = torch.ones(T, S, dtype=torch.bool).tril(diagonal[self.mask])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        self.n += T
        return model.lm_head(x + model.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


MISTAKES = [
    ("the positions are not advanced: they must start at cache.length, not at 0", Variant(positions="from 0")),
    ("the positions are one too large: read cache.length before append", Variant(positions="one late")),
    ("the positions are one too small", Variant(positions="one early")),
    ("all new tokens get the same position", Variant(positions="last")),
    (
        "attention reads only the new keys and values; use those that append returns",
        Variant(overwrites=True),
    ),
    ("append does not store the joined keys and values, so later calls miss tokens", Variant(keeps_first=True)),
    ("append returns the earlier keys and values without the new ones", Variant(drops_new=True)),
    ("the new keys and values are put before the old ones", Variant(new_first=True)),
    ("the keys are stored in place of the values", Variant(values_from_keys=True)),
    ("there is no mask, so a new token sees the new tokens after it", Variant(mask="none")),
    (
        "the mask is aligned to the first key; query 0 is token S - T, so use tril(S - T) and not is_causal=True",
        Variant(mask="aligned to the first key"),
    ),
    ("the mask is off by one: every new token also sees the next one", Variant(mask="one too far")),
    ("the mask is off by one: a token must see itself", Variant(mask="without itself")),
    (
        "the positions are not advanced, and attention reads only the new keys and values",
        Variant(positions="from 0", overwrites=True),
    ),
]


def make_model() -> OneLayerModel:
    """Return a model with large random weights."""
    model = OneLayerModel(VOCAB, CONTEXT, C, H)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(
    compute: Callable[[OneLayerModel, Tensor], Tensor], model: OneLayerModel, pieces: Sequence[Tensor]
) -> list[Any]:
    """Return the results of calls with the pieces one after the other."""
    return [compute(model, piece) for piece in pieces]


def mistakes(model: OneLayerModel, pieces: Sequence[Tensor], number: int) -> Mistakes:
    """Return the logits of piece `number` that programs with a common mistake compute."""
    right = outputs(Variant(), model, pieces)[number]
    wrong = [
        (sentence, outputs(dataclasses.replace(variant), model, pieces[: number + 1])[number])
        for sentence, variant in MISTAKES
    ]
    return [(sentence, logits) for sentence, logits in wrong if not torch.allclose(logits, right, atol=1e-4)]


@torch.no_grad()
def check_pieces(student: Student, sizes: Sequence[int], B: int = 2) -> None:
    """Raise Wrong unless pieces of the given sizes give the logits of one pass without a cache."""
    model = make_model()
    ids = torch.randint(VOCAB, (B, sum(sizes)), generator=torch.Generator().manual_seed(len(sizes)))
    whole = model(ids).split(list(sizes), dim=1)
    pieces = ids.split(list(sizes), dim=1)
    forward_cached = student.function("forward_cached")
    cache = student.call("KVCache()", student.function("KVCache"))
    n_computed = 0

    def count(module: object, arguments: tuple[Tensor]) -> None:
        nonlocal n_computed
        n_computed += arguments[0].shape[1] if arguments[0].dim() == 3 else 0

    model.c_attn.register_forward_pre_hook(count)
    n_seen = 0
    for number, (piece, expected) in enumerate(zip(pieces, whole, strict=True)):
        T = piece.shape[1]
        new = f"{T} new token{'s' * (T != 1)}"
        call = f"forward_cached(model, ids, cache) with {new} after {n_seen} cached"
        n_computed = 0
        got = student.call(call, lambda ids: forward_cached(model, ids, cache), piece)
        expect_tensor(call, got, expected, partial(mistakes, make_model(), pieces, number))  # a model without the hook
        if n_computed > T:
            raise Wrong(f"{call}: c_attn computed {n_computed} tokens, but only the {new} must be computed")
        n_seen += T
        length = getattr(cache, "length", None)
        if length != n_seen:
            raise Wrong(f"{call}: afterwards cache.length is {length}, but {n_seen} is expected")


def _append(student: Student) -> None:
    """Check `append` alone, so that its mistakes are named before those of forward_cached."""
    generator = torch.Generator().manual_seed(3)
    first, second = ([torch.randn(2, H, T, 4, generator=generator) for _ in "kv"] for T in (3, 2))
    cache = student.call("KVCache()", student.function("KVCache"))
    append = getattr(cache, "append", None)
    if not callable(append):
        raise Wrong("KVCache has no method append: keep the names of the original file")
    for number, (k, v) in enumerate((first, second)):
        n = "a second" if number else "the first"
        call = f"append(k, v) of {n} piece of {k.shape[2]} tokens"
        got = student.call(call, append, k, v)
        require_type(call, got, tuple, "a tuple of the keys and the values of all tokens")
        if len(got) != 2:
            raise Wrong(f"{call}: the result is a tuple of {len(got)} elements, but keys and values are expected")
        for i, name in enumerate(("keys", "values")):
            old, new, other = first[i], (k, v)[i], (v, k)[i]
            expected = torch.cat([old, new], 2) if number else new
            known = [
                ("the cached tokens are overwritten by the new ones; join them with torch.cat", new),
                ("the new tokens are missing", old),
                ("the new tokens are put before the old ones", torch.cat([new, old], 2)),
                ("keys and values are exchanged", torch.cat([first[1 - i], other], 2) if number else other),
                ("the cached tokens are added twice", torch.cat([old, old, new], 2)),
                (
                    "the tensors are joined along the batch (dim=0); join them along the tokens (dim=2)",
                    torch.cat([old, old], 0)[: 2 * len(old)],
                ),
            ]
            expect_tensor(call, got[i], expected, known[: None if number else 4] if number else known[3:4], name=name)


CHECK = Check(
    [
        ("appends keys and values", _append),
        ("computes a prompt with an empty cache", lambda student: check_pieces(student, [4])),
        ("computes one new token at a time", lambda student: check_pieces(student, [3, 1, 1, 1])),
        ("computes several new tokens at once", lambda student: check_pieces(student, [2, 3, 2, 1])),
        (
            "starts with one token of one sequence, and fills the context",
            lambda student: check_pieces(student, [1, 5, 1, 5], B=1),
        ),
    ],
    library="cache.py (KVCache) and model.py (Transformer.forward)",
)
"""The check of the task kv_cache."""
