"""Frozen weights in bf16 and int8: products, gradients and losses, compared with torch in float64 on the rounded weights."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel
from MyGPT.acceleration import frozen
from MyGPT.acceleration.compiler import FLAGS, find_compiler
from MyGPT.acceleration.frozen import (
    FrozenLinear,
    Kernel,
    LoRALinear,
    compiled_kernel,
    dequantized,
    freeze,
    is_frozen_copy,
    product,
)
from MyGPT.acceleration.packed import row_scales

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
CONFIG = GPTConfig(vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
BLOCK = 128  # numbers of a row that are rounded with one scale: K_BLOCK in products.h


def rounded(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return a random int8 matrix and the scales of its rows."""
    W = torch.randn(N, K) * torch.rand(N, 1)
    scale = row_scales(W)
    return (W / scale[:, None]).round().to(torch.int8), scale


def error_bound(x: Tensor, matrix: Tensor) -> Tensor:
    """Return the largest possible error of x @ matrix.T if each x changes by half a 32,767th of the largest x of its block.

    The second term is for sums in float32: 2^-23 for each of the few roundings, relative to the sum of absolute values.
    """
    padded = F.pad(x.abs(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = padded.amax(2, keepdim=True).expand_as(padded).flatten(1)[:, : x.shape[1]]
    bound: Tensor = largest / 65534 @ matrix.abs().T + 1e-6 * (x.abs() @ matrix.abs().T)
    return bound


@pytest.fixture(scope="module", params=["native", "baseline"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel compiled for this CPU, and for any CPU of the architecture, as AVX-512 and ARM share its plain code."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("frozen") / f"{request.param}.so"
    flags = [flag for flag in FLAGS if request.param == "native" or "=native" not in flag]
    subprocess.run([compiler, *flags, str(frozen.SOURCE), "-o", str(library)], check=True)
    return Kernel(ctypes.CDLL(str(library)))


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (2, 24, 128), (7, 50, 131), (5, 1100, 30), (4, 30, 2100)])
def test_int8_products_have_the_error_of_16_bit_activations(M: int, N: int, K: int, kernel: Kernel) -> None:
    (weight, scale), bias = rounded(N, K), torch.randn(N)
    W = dequantized(weight, scale, torch.float64)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    y, dx = kernel.product(x, weight, scale, bias, False), kernel.product(dy, weight, scale, None, True)
    assert ((y - (x.double() @ W.T + bias)).abs() <= error_bound(x.double(), W) + 1e-6 * bias.abs()).all()
    # The scales of the rows are part of the numbers that are rounded.
    scaled = dy.double() * scale.double()
    assert ((dx - dy.double() @ W).abs() <= error_bound(scaled, weight.double().T)).all()


def test_a_row_of_a_product_depends_on_no_other_row_and_not_on_the_number_of_threads(kernel: Kernel) -> None:
    (weight, scale), x = rounded(50, 150), torch.randn(9, 150)
    y = kernel.product(x, weight, scale, None, False)
    assert all(torch.equal(kernel.product(x[i : i + 1], weight, scale, None, False), y[i : i + 1]) for i in range(9))
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernel.product(x, weight, scale, None, False), y)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_its_row_nan(value: float, kernel: Kernel) -> None:
    (weight, scale), x = rounded(30, 140), torch.randn(4, 140)
    x[2, 7] = value
    y = kernel.product(x, weight, scale, None, False)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_without_a_kernel_weights_are_converted_part_by_part(
    dtype: str, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "compiled_kernel", lambda: None)
    monkeypatch.setattr(frozen, "MAX_CONVERTED", 200)
    weight, scale = rounded(50, 60) if dtype == "int8" else (torch.randn(50, 60).bfloat16(), None)
    W, bias = dequantized(weight, scale, torch.float64), None if is_transposed else torch.randn(50)
    x = torch.randn(7, 50 if is_transposed else 60)
    expected = x.double() @ W if is_transposed else F.linear(x.double(), W, bias.double())  # type: ignore[union-attr]
    torch.testing.assert_close(product(x, weight, scale, bias, is_transposed).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_separate", [False, True])
def test_the_derivatives_of_a_layer_with_an_adapter_are_those_of_finite_differences(is_separate: bool) -> None:
    shapes = {"x": (2, 3, 5), "z": (2, 3, 5), "A": (2, 5), "B": (4, 2)}
    x, z, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
    W, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def layer(x: Tensor, z: Tensor, A: Tensor, B: Tensor) -> Any:
        return LoRALinear.apply(x, z if is_separate else None, W, None, bias, A, B, 1.5)

    expected = F.linear(x, W, bias) + 1.5 * (z if is_separate else x) @ A.T @ B.T
    torch.testing.assert_close(layer(x, z, A, B), expected, rtol=0, atol=1e-12)
    inputs = (x, z, A, B) if is_separate else (x, z.detach(), A, B)
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def twin(model: GPTModel) -> GPTModel:
    """Return a float64 model with the weights that a frozen model represents."""
    state = model.state_dict()
    weights = {
        name: dequantized(tensor, state.get(f"{name.removesuffix('weight')}scale"), torch.float64)
        for name, tensor in state.items()
        if not name.endswith("scale")
    }
    result = GPTModel(model.config).double()
    result.load_state_dict(weights)
    return result.eval()


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 1e-5), ("int8", 1e-3)])
def test_a_frozen_model_has_the_loss_and_gradients_of_its_rounded_weights(
    dtype: Any, tolerance: float, tie_weights: bool
) -> None:
    """Weights are rounded once; after that, bf16 weights give results of float32, and int8 those of 16-bit activations."""
    model = lively_model(GPTConfig(**{**vars(CONFIG), "tie_weights": tie_weights}))
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    freeze(model, dtype)
    exact = twin(model)
    for name, weight in exact.state_dict().items():
        largest = original[name].abs().amax(-1, keepdim=True)
        bound = largest / 254 if dtype == "int8" else original[name].abs() / 2**8
        assert ((weight - original[name]).abs() <= 1.001 * bound).all() or weight.dim() == 1, name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(2, 9, 24)
    targets = torch.randint(67, (2, 9)).index_fill(1, torch.tensor([0, 1]), -100)
    gradients, losses = [], []
    for each, dtype_of_x in ((model, torch.float32), (exact, torch.float64)):
        inputs = x.to(dtype_of_x, copy=True).requires_grad_()
        total, count = each(inputs_embeds=inputs, targets=targets)
        (total / count).backward()
        losses.append(total.item() / int(count))
        gradients.append(inputs.grad)
        assert int(count) == 14
    assert abs(losses[0] - losses[1]) < tolerance
    first, second = gradients
    assert first is not None and second is not None
    assert (first - second).norm() < tolerance * second.norm()
    ids = torch.randint(67, (2, 9))
    assert (model(ids) - exact(ids)).abs().max() < 20 * tolerance


def test_the_chunked_loss_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "chunk_sizes", lambda device: (None, 3 * 67))  # three rows at a time
    model = lively_model(CONFIG)
    freeze(model, "bf16")
    hidden = torch.randn(2, 5, 24, requires_grad=True)
    targets = torch.randint(67, (2, 5))
    total, _ = model.lm_head.token_loss(hidden, targets)  # type: ignore[operator, union-attr]
    expected = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    (ours,), (theirs,) = (torch.autograd.grad(loss, hidden) for loss in (total, expected))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@needs_compiler
def test_int8_weights_on_a_cpu_use_the_kernel() -> None:
    assert compiled_kernel() is not None


def test_freezing_shares_the_weights_of_a_tied_head_and_keeps_no_float_copy() -> None:
    model = lively_model(CONFIG)
    freeze(model, "int8")
    assert model.lm_head.weight is model.transformer.wte.weight
    floats = [weight for weight in model.parameters() if weight.is_floating_point() and weight.dim() == 2]
    assert len(floats) == 1 and floats[0] is model.transformer.wpe.weight
    assert is_frozen_copy(model) and type(model.transformer.h[0].mlp.c_fc) is FrozenLinear


def test_autocast_multiplies_frozen_weights_in_bf16() -> None:
    model, x = lively_model(CONFIG), torch.randn(1, 3, 24)
    freeze(model, "int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.transformer.h[0].mlp.c_fc(x).dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="must be fp32, bf16, int8, got 'int4'"):
        freeze(lively_model(CONFIG), "int4")  # type: ignore[arg-type]


def test_the_weights_of_a_file_are_released_after_rounding(tmp_path: Path) -> None:
    """Otherwise the pages of the file would stay in memory."""
    lively_model(CONFIG).save_pretrained(tmp_path)
    model = GPTModel.from_pretrained(tmp_path)
    freeze(model, "int8")
    if (maps := Path("/proc/self/maps")).is_file():
        assert str(tmp_path) not in maps.read_text(encoding="utf-8")
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
