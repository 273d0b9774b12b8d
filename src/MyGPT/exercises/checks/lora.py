"""The check of lora.py: the layer is compared with the product of full matrices, and with torch's gradients."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, Wrong, expect_tensor, require_type
from MyGPT.exercises.student import Student

RANK, ALPHA = 3, 12.0


def make_linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer with random weights."""
    linear = nn.Linear(n_in, n_out, bias=bias)
    generator = torch.Generator().manual_seed(n_in)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return linear


def make_layer(student: Student, linear: nn.Linear, fills: bool = True) -> nn.Module:
    """Return the student's layer. With fills=True, A and B are set to random numbers."""
    call = f"LoRALinear(nn.Linear({linear.in_features}, {linear.out_features}), rank={RANK}, alpha={ALPHA:g})"
    kind = student.function("LoRALinear")
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise Wrong("LoRALinear is not a subclass of nn.Module: keep the class of the original file")
    layer: nn.Module = student.call(call, kind, linear, RANK, ALPHA)
    shapes = {"A": (linear.in_features, RANK), "B": (RANK, linear.out_features)}
    for name, shape in shapes.items():
        value = getattr(layer, name, None)
        if not isinstance(value, nn.Parameter):
            have = "missing" if value is None else f"of the type {type(value).__name__}"
            raise Wrong(f"{call}: the attribute {name} is {have}, but an nn.Parameter is expected")
        if tuple(value.shape) != shape:
            cause = "; likely cause: the dimensions are exchanged" if tuple(value.shape) == shape[::-1] else ""
            raise Wrong(f"{call}: {name} has the shape {tuple(value.shape)}, but {shape} is expected{cause}")
    if not isinstance(getattr(layer, "linear", None), nn.Module):
        raise Wrong(f"{call}: the attribute linear is missing; store the frozen layer there")
    if fills:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, shape in shapes.items():
                getattr(layer, name).copy_(0.5 * torch.randn(shape, generator=generator))
    return layer


def parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the matrices A and B without gradients."""
    A, B = (getattr(layer, name).detach() for name in "AB")
    return A, B


def mistakes(linear: nn.Linear, A: Tensor, B: Tensor, x: Tensor) -> Mistakes:
    """Return the outputs of layers with a common mistake."""
    base, correction = linear(x), x @ A @ B
    scale = ALPHA / RANK
    bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
    found = [
        ("the factor alpha / rank is missing", base + correction),
        ("the factor is alpha, but alpha / rank is expected", base + ALPHA * correction),
        ("the factor is rank / alpha, but alpha / rank is expected", base + correction / scale),
        ("the factor is 1 / rank, but alpha / rank is expected", base + correction / RANK),
        ("the factor is alpha / √rank, but alpha / rank is expected", base + ALPHA / math.sqrt(RANK) * correction),
        ("the factor alpha / rank is applied to the frozen layer as well", scale * (base + correction)),
        ("the factor alpha / rank is applied twice", base + scale**2 * correction),
        ("the output of the frozen layer is missing", scale * correction),
        ("the correction is missing: the output of the frozen layer is returned", base),
        ("the correction is subtracted, but it must be added", base - scale * correction),
        ("the bias of the frozen layer is missing", base - bias + scale * correction),
        ("the bias of the frozen layer is added twice", base + bias + scale * correction),
    ]
    if linear.in_features == linear.out_features:
        found += [
            ("the correction is transposed: x A B is expected", base + scale * (x @ (A @ B).T)),
            ("the correction reads the output of the frozen layer, but it must read x", base + scale * (base @ A @ B)),
            ("the frozen weight is transposed", x @ linear.weight + bias + scale * correction),
        ]
    return [(sentence, wrong) for sentence, wrong in found if not torch.allclose(wrong, base + scale * correction)]


def full_output(linear: nn.Linear, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """Return the output of a linear layer whose weight is the complete sum W + alpha / rank (A B)ᵀ."""
    return nn.functional.linear(x, linear.weight + ALPHA / RANK * (A @ B).T, linear.bias)


def _start(student: Student) -> None:
    linear = make_linear(5, 7)
    before = copy.deepcopy(linear)
    layer = make_layer(student, linear, fills=False)
    A, B = parts(layer)
    call = "LoRALinear at the start"
    if not A.any() and not B.any():
        raise Wrong(
            f"{call}: A and B are both zero, so neither gets a gradient and nothing is learned; start A with random numbers"
        )
    if A.any() and B.any():
        raise Wrong(
            f"{call}: A and B are both random, so the output of the layer changes before training begins; start B with zeros"
        )
    if not B.any() and torch.unique(A).numel() < A.numel() // 2:
        raise Wrong(
            f"{call}: the numbers of A are equal, so all its columns would learn the same; start A with random numbers"
        )
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expect_tensor(call, student.call(call, layer, x), before(x), mistakes(before, A, B, x))
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    if trained != {"A", "B"}:
        name = next(iter(sorted(trained ^ {"A", "B"})))
        is_free = name in trained
        raise Wrong(
            f"{call}: {name} {'is trained, but only A and B may be: freeze the linear layer' if is_free else 'is not trained'}"
        )


def _case(n_in: int, n_out: int, shape: tuple[int, ...], bias: bool = True) -> Callable[[Student], None]:
    @torch.no_grad()
    def step(student: Student) -> None:
        linear = make_linear(n_in, n_out, bias)
        before = copy.deepcopy(linear)
        layer = make_layer(student, linear)
        A, B = parts(layer)
        x = torch.randn(*shape, n_in, generator=torch.Generator().manual_seed(n_out))
        call = f"LoRALinear of x {tuple(x.shape)} with rank {RANK} and alpha {ALPHA:g}"
        got = student.call(call, layer, x)
        expect_tensor(call, got, full_output(before, A, B, x), mistakes(before, A, B, x))

    return step


def _gradients(student: Student) -> None:
    linear = make_linear(5, 7)
    layer = make_layer(student, linear)
    A, B = (part.clone().requires_grad_() for part in parts(layer))
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    full_output(copy.deepcopy(linear), A, B, x).square().sum().backward()
    call = "the gradients of LoRALinear"

    def backward(x: Tensor) -> list[Tensor | None]:
        layer(x).square().sum().backward()
        return [getattr(layer, name).grad for name in "AB"]

    for name, got, ours in zip("AB", student.call(call, backward, x), (A, B), strict=True):
        assert ours.grad is not None
        expect_tensor(call, got, ours.grad, name=f"the gradient of {name}")


def _merging(n_in: int, n_out: int, bias: bool) -> Callable[[Student], None]:
    @torch.no_grad()
    def step(student: Student) -> None:
        linear = make_linear(n_in, n_out, bias)
        before = copy.deepcopy(linear)
        layer = make_layer(student, linear)
        A, B = parts(layer)
        call = f"merged() of a layer with {n_in} inputs and {n_out} outputs"
        merged = student.call(call, getattr(layer, "merged", None) or student.function("merged"))
        require_type(call, merged, nn.Linear, "an nn.Linear")
        if merged is linear or not torch.equal(linear.weight, before.weight):
            raise Wrong(
                f"{call}: the weight of the frozen layer is changed; make a new layer, for example with copy.deepcopy"
            )
        W, correction = before.weight, (A @ B).T
        known = [
            ("the factor alpha / rank is missing", W + correction),
            ("the factor is alpha, but alpha / rank is expected", W + ALPHA * correction),
            ("the correction is missing", W),
            ("the frozen weight is missing", ALPHA / RANK * correction),
            ("the correction is subtracted, but it must be added", W - ALPHA / RANK * correction),
        ]
        if n_in == n_out:
            known.append(
                (
                    "the correction is not transposed: the weight has the shape (out, in), so add (A @ B).T",
                    W + ALPHA / RANK * correction.T,
                )
            )
        expect_tensor(call, merged.weight, W + ALPHA / RANK * correction, known, name="the weight")
        if (merged.bias is None) != (before.bias is None):
            have, want = ("no bias" if one.bias is None else "a bias" for one in (merged, before))
            raise Wrong(f"{call}: the result has {have}, but the frozen layer has {want}")
        if before.bias is not None:
            expect_tensor(call, merged.bias, before.bias, name="the bias")

    return step


CHECK = Check(
    [
        ("starts with the output of the frozen layer", _start),
        ("adds the scaled correction", _case(5, 7, (4,))),
        ("adds the correction of a square layer", _case(6, 6, (2, 3))),
        ("works without a bias and with one input", _case(5, 4, (), bias=False)),
        ("gives torch's gradients", _gradients),
        ("merges a square layer", _merging(6, 6, True)),
        ("merges a layer without a bias", _merging(5, 7, False)),
    ],
    library="finetuning/lora.py (LoRALayer and LinearWithLoRA)",
)
"""The check of the task lora."""
