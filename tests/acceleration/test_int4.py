"""Four-bit weights: the error of rounding, the products of the kernel, and error feedback."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import lively_model
from MyGPT.acceleration import kernel
from MyGPT.acceleration.compiler import FLAGS, LIBRARIES, find_compiler
from MyGPT.acceleration.int4 import GROUP, Int4Weight, input_moments, round_weight
from MyGPT.acceleration.kernel import Build
from MyGPT.acceleration.packed import PanelLinear, PlainLinear
from MyGPT.acceleration.step import accelerate
from MyGPT.acceleration.storage import Arrays
from MyGPT.config import GPTConfig
from MyGPT.weights.lazy import LazyTensor

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def panels(weight: Tensor, kernel: Any = None) -> PanelLinear:
    return PanelLinear("layer", LazyTensor.of(weight), None, "int4", kernel or Build().wait(), Arrays())


def in_groups(tensor: Tensor) -> list[Tensor]:
    return list(tensor.split(GROUP, dim=1))


def rounded_rows(x: Tensor) -> Tensor:
    """Return float32 rows rounded as the kernel does: to 127 steps up to the largest absolute value of each group, in float64."""
    groups = []
    for group in in_groups(x):
        largest = group.abs().amax(1, keepdim=True)
        inverse = torch.where(largest > 1e-30, 127 / largest, 0.0)
        groups.append((group * inverse).round().double() * (largest / 127).double())
    return torch.cat(groups, 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 100), st.floats(1e-30, 1e30), st.booleans())
def test_weights_are_rounded_by_half_a_step_and_a_unit(N: int, K: int, size: float, is_shifted: bool) -> None:
    weight = (torch.randn(N, K) + 3 * is_shifted) * size
    rounded = round_weight(weight).values()
    groups = in_groups(weight)
    ranges = torch.stack([group.amax(1) - group.amin(1) for group in groups])
    largest = torch.stack([group.abs().amax(1) for group in groups])
    # A scale is at most (largest range / 15, or largest weight and half a step) / 127. Steps and offsets are off by half a scale.
    scale = (largest.amax(0) + ranges.amax(0) / 15) / 127
    for group, result, width in zip(groups, in_groups(rounded), ranges, strict=True):
        bound = (width / 15 / 2 + 8.5 * scale) * 1.001
        # The chosen step has the smallest sum of squares, so a single weight may be off by more than the bound.
        assert ((result - group).square().sum(1) <= group.shape[1] * bound.square()).all()


def test_the_error_is_a_tenth_below_that_of_a_scale_without_an_offset() -> None:
    """A scale per group alone is llama.cpp's q4_0, which needs as many bits: its relative error on normal numbers is 0.086."""
    torch.manual_seed(0)
    weight = torch.randn(256, 768)
    groups = weight.view(256, -1, GROUP)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    q4_0 = (extreme / -8) * (groups / (extreme / -8)).round().clamp(-8, 7)
    theirs = (q4_0 - groups).norm()
    assert (round_weight(weight).values() - weight).norm() < 0.9 * theirs


def test_rows_of_zeros_and_equal_weights_stay_as_they_are() -> None:
    weight = torch.zeros(4, 40)
    weight[1], weight[2], weight[3] = 0.7, -1e30, 1e-40
    rounded = round_weight(weight).values()
    assert torch.equal(rounded[0], weight[0])
    torch.testing.assert_close(rounded[1:3], weight[1:3], rtol=1e-6, atol=0)
    assert (rounded[3] == 0).all()  # below 1e-35


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 600), st.integers(1, 140), st.integers(0, 2**31))
def test_products_are_those_of_the_rounded_numbers(N: int, K: int, M: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(N, K), torch.randn(M, K)
    linear = panels(weight)
    used = linear.rows(torch.arange(N)[None])[0]
    assert torch.equal(used, PlainLinear(weight, None, "int4").rows(torch.arange(N)[None])[0])
    rounded = rounded_rows(x)
    # Sums of a group are exact. Adding K / 32 of them in float32, their scales and an activation at the edge of two steps remain.
    edge = torch.cat([group.abs().amax(1, keepdim=True).expand_as(group) for group in in_groups(x)], 1).double() * 1e-6
    bound = (K / 32 + 8) * 2**-24 * (rounded.abs() @ used.abs().double().T)
    error = (linear(x) - rounded @ used.double().T).abs()
    is_near_edge = ((x / (edge * 1e6) * 127) % 1 - 0.5).abs() < 1e-3  # rounding may go either way in another arithmetic
    steps = (edge * 1e6 / 127 * is_near_edge) @ used.abs().double().T
    assert (error <= bound + steps + edge @ used.abs().double().T).all()
    row = int(torch.randint(M, ()))
    assert torch.equal(linear(x[row : row + 1])[0], linear(x)[row])


@needs_compiler
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int) -> None:
    """Codes of 15 and activations of 127 give the largest sums of 16-bit halves of a lane, codes of 0 the largest offset."""
    kernel = Build().wait()
    codes = torch.full((2, 1, GROUP), 15, dtype=torch.uint8)
    codes[1] = 0
    numbers = torch.full((2, 1), 127, dtype=torch.int8)
    weight = Int4Weight(codes, numbers, -numbers, torch.ones(2), GROUP)
    linear = panels(torch.zeros(2, GROUP))
    linear.panels.copy_(weight.panels(kernel.panel))
    linear.scale.copy_(weight.scale)  # type: ignore[union-attr]
    x = torch.full((4, GROUP), float(sign))
    assert linear(x)[0].tolist() == [GROUP * sign * 127 * (7 - 1), GROUP * sign * 127 * (-8 - 1)]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs use the portable code anyway")
def test_portable_code_gives_the_same_results(tmp_path: Path) -> None:
    path = tmp_path / "kernel.so"
    flags = [flag for flag in FLAGS if not flag.startswith("-march")]
    command = [find_compiler() or "", *flags, str(kernel.SOURCE), *LIBRARIES, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    other = kernel.Kernel(ctypes.CDLL(str(path)))
    weight, x = torch.randn(50, 100), torch.randn(9, 100)
    ids = torch.arange(50)[None]
    assert torch.equal(panels(weight, other).rows(ids), panels(weight).rows(ids))
    # Without fused multiplication and addition, the sums of four groups are rounded in another way.
    torch.testing.assert_close(panels(weight, other)(x), panels(weight)(x), rtol=1e-5, atol=1e-5)


def test_error_feedback_lowers_the_error_of_the_outputs() -> None:
    """The inputs are correlated, as those of a layer of a model are. GPTQ's paper reports a lower error at every size."""
    torch.manual_seed(0)
    x = torch.randn(512, 24) @ torch.randn(24, 96) + 0.3 * torch.randn(512, 96)
    weight = torch.randn(40, 96)
    plain, corrected = (round_weight(weight, moments).values() for moments in (None, x.T @ x))
    exact = x @ weight.T
    assert (x @ corrected.T - exact).norm() < 0.7 * (x @ plain.T - exact).norm()


def test_error_feedback_without_correlations_is_plain_rounding() -> None:
    weight = torch.randn(20, 70)
    weight[:, 5] = 0
    plain, corrected = (round_weight(weight, moments).values() for moments in (None, torch.eye(70)))
    # The scale of a row has 10% of headroom, so the steps are not the same.
    assert (corrected - weight).norm() < 1.03 * (plain - weight).norm()


def test_inputs_that_are_always_zero_do_not_break_error_feedback() -> None:
    x = torch.randn(10, 40)
    x[:, 3] = 0
    corrected = round_weight(torch.randn(6, 40), x.T @ x).values()  # fewer inputs than columns, and a column of zeros
    assert corrected.isfinite().all()


def test_the_moments_are_those_of_the_inputs_of_each_layer() -> None:
    """They are compared with the inputs that the layers of a model without caches and hooks receive."""
    model = lively_model(GPTConfig(50, 16, 24, 3, 2, 0.1)).train()
    ids = torch.randint(50, (3, 7))
    moments = input_moments(model, ids)
    assert model.training and len(moments) == 8
    with torch.no_grad():
        model.eval()
        x = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(7))
        expected = model.transformer.h[0].ln_1(x).flatten(0, 1)
    torch.testing.assert_close(moments["transformer.h.0.attn.c_attn"], expected.T @ expected, rtol=1e-5, atol=1e-4)
    assert moments["transformer.h.1.mlp.c_proj"].shape == (96, 96)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_calibration_brings_the_logits_nearer_to_those_of_the_model(compiled: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = lively_model(GPTConfig(50, 32, 96, 3, 2, 0.0))
    model.save_pretrained(tmp_path)
    # Arithmetic sequences, so that the inputs of the layers are correlated, as they are in real texts.
    texts = (torch.arange(24)[:, None] + 7 * torch.arange(32)) % 50
    plain, corrected = (accelerate(model, "int4", compiled=compiled, calibration=it)(texts) for it in (None, texts))
    exact = model(texts)
    assert (corrected - exact).norm() < 0.9 * (plain - exact).norm()
    # The weights of an opened model have another layout, so its moments and with them some codes differ by rounding.
    opened = accelerate(tmp_path, "int4", compiled=compiled, calibration=texts)(texts)
    assert (opened - exact).norm() < 0.9 * (plain - exact).norm()
    with pytest.raises(ValueError, match="calibration is for the precision int4, got 'int8': leave it out"):
        accelerate(model, "int8", compiled=compiled, calibration=texts)
