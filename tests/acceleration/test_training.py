"""The fused blocks of training, compared with the model's own code in float64, with autograd, and with finite differences."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT import GPTModel, TrainConfig, Trainer
from MyGPT.acceleration import training
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.training import Buffers, dropout_options, fused_blocks, is_plain, load_kernels

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIN_NUMBERS", 1)


@pytest.fixture
def n_fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows by one number for each block that the kernels compute."""
    calls: list[int] = []
    apply = training._FusedBlock.apply

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return apply(*arguments)

    monkeypatch.setattr(training._FusedBlock, "apply", counting)
    yield calls


def model_of(T: int, C: int, H: int, drop_rate: float = 0.0, **options: Any) -> GPTModel:
    """Return a model with two blocks in training mode, whose biases and LayerNorms have an effect."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "context_length": T, "emb_dim": C, "n_heads": H, "n_layers": 2}
    model = GPTModel({**sizes, "drop_rate": drop_rate, "qkv_bias": True, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def run(model: nn.Module, B: int, is_fused: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss of B fixed sequences and all gradients."""
    ids = torch.randint(0, 61, (B, model.config.context_length), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    if is_fused:
        with fused_blocks(model, Buffers()):
            total, count = model.token_loss(ids, ids.roll(-1, 1))
    else:
        total, count = model.token_loss(ids, ids.roll(-1, 1))
    (total / count).backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (total / count).detach(), [parameter.grad.clone() for parameter in parameters]


# More than one block of queries and of keys, rows that fill no register, and heads whose width fills none.
SIZES = [(2, 70, 48, 3), (2, 130, 40, 5), (1, 16, 24, 2), (3, 7, 30, 3), (1, 1, 16, 2)]


@needs_compiler
@pytest.mark.parametrize(("B", "T", "C", "H"), SIZES)
@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "qkv_bias": False}], ids=["tanh", "exact"])
def test_loss_and_gradients_are_those_of_float64(
    B: int, T: int, C: int, H: int, options: dict[str, Any], n_fused: list[int]
) -> None:
    """The loss is within 1e-6 of float64, relatively. Gradients are below 1, so errors of 1e-6 are a few roundings."""
    model = model_of(T, C, H, **options)
    expected_loss, expected = run(copy.deepcopy(model).double(), B, is_fused=False)
    loss, gradients = run(model, B, is_fused=True)
    assert len(n_fused) == 2
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)


def factors(seed: int, rate: float, rows: int, columns: int) -> Tensor:
    y = torch.empty(rows, columns)
    load_kernels().dropout_factors(*dropout_options(seed, rate), rows, columns, y)
    return y


def block_with_masks(block: nn.Module, x: Tensor, seed: int, rate: float) -> Tensor:
    """Return a block's result in float64 from plain operations, with dropout by the kernels' own factors."""
    B, T, C = x.shape
    H = block.attn.n_heads
    weights, attn_out, mlp_out = (
        factors(seed + i, rate, rows, columns).double()
        for i, (rows, columns) in enumerate([(B * H * T, T), (B * T, C), (B * T, C)])
    )
    q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2))
    scores = q @ k.transpose(2, 3) / (C // H) ** 0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    y = (scores.softmax(3) * weights.view(B, H, T, T)) @ v
    x = x + attn_out.view(B, T, C) * block.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
    hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=block.mlp.approximate)
    return x + mlp_out.view(B, T, C) * block.mlp.c_proj(hidden)


@needs_compiler
@pytest.mark.parametrize(("B", "T", "C", "H"), [(2, 70, 48, 3), (1, 21, 30, 3)])
def test_forward_and_backward_pass_drop_the_same_numbers(B: int, T: int, C: int, H: int) -> None:
    """Autograd differentiates the block with the same factors in float64. Errors of 1e-5 are roundings of sums of 140 rows."""
    model = model_of(T, C, H, drop_rate=0.3)
    block = model.transformer.h[0]
    x, upstream = torch.randn(B, T, C, requires_grad=True), torch.randn(B, T, C)
    state = torch.get_rng_state()
    with fused_blocks(model, Buffers()):
        y = block(x, None, None)
    torch.set_rng_state(state)
    seed = int(torch.randint(1 << 62, ()))
    ours = torch.autograd.grad(y, [x, *block.parameters()], upstream)
    exact, exact_x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    expected = block_with_masks(exact, exact_x, seed, 0.3)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    theirs = torch.autograd.grad(expected, [exact_x, *exact.parameters()], upstream.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_gradient_with_dropout_is_a_finite_difference() -> None:
    """With an unchanged seed, dropout drops the same numbers, so the loss is a smooth function of the input."""
    model = model_of(24, 32, 4, drop_rate=0.2)
    x, direction, upstream = torch.randn(2, 24, 32, requires_grad=True), torch.randn(2, 24, 32), torch.randn(2, 24, 32)

    def value(shift: float) -> Tensor:
        torch.manual_seed(5)
        with fused_blocks(model, Buffers()):
            return (model.transformer.h[1](x + shift * direction, None, None) * upstream).sum()

    (gradient,) = torch.autograd.grad(value(0.0), x)
    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-2, atol=0.1)


@needs_compiler
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_is_independent_of_row_column_and_seed(rate: float) -> None:
    """All counts of 2^20 flags are within five standard deviations of the binomial distribution's mean."""
    kept = factors(3, rate, 1024, 1024).numpy() != 0
    n, sigma = kept.size, np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 5 * sigma / np.sqrt(n)
    for axis in (0, 1):  # no row and no column is dropped more often than the others: 1,024 tests each
        assert np.abs(kept.mean(axis) - (1 - rate)).max() < 5 * sigma / np.sqrt(1024)
    centred = (kept - kept.mean()) / sigma
    other = factors(4, rate, 1024, 1024).numpy() != 0
    pairs = [np.roll(centred, shift, axis) for shift in (1, 16, 32) for axis in (0, 1)]
    for partner in (*pairs, (other - other.mean()) / sigma):
        assert abs((centred * partner).mean()) < 5 / np.sqrt(n)
    found = factors(3, rate, 8, 40)
    torch.testing.assert_close(found[found != 0].unique(), torch.tensor([1 / (1 - rate)]), rtol=1e-4, atol=0)


@needs_compiler
def test_the_mean_result_with_dropout_is_that_of_torch() -> None:
    """Means of 400 passes with either generator differ by less than five standard errors, at nearly all of 640 places."""
    model = model_of(20, 32, 4, drop_rate=0.2)
    x = torch.randn(1, 20, 32)
    block = model.transformer.h[0]
    with torch.no_grad():
        theirs = torch.stack([block(x, None, None) for _ in range(400)]).double()
        with fused_blocks(model, Buffers()):
            ours = torch.stack([block(x, None, None) for _ in range(400)]).double()
    errors = ((ours.var(0) + theirs.var(0)) / 400).sqrt()
    distances = ((ours.mean(0) - theirs.mean(0)) / errors).abs()
    assert distances.max() < 5
    assert distances.square().mean() == pytest.approx(1, abs=0.3)  # chi-squared; neighbours are correlated
    torch.testing.assert_close(ours.var(0).mean(), theirs.var(0).mean(), rtol=0.05, atol=0)


@needs_compiler
def test_results_depend_on_the_seed_and_not_on_the_number_of_threads() -> None:
    model = model_of(70, 48, 3, drop_rate=0.1)
    results = []
    for seed, threads in ((1, 1), (1, 3), (2, 1)):
        torch.manual_seed(seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with fused_blocks(model, Buffers()):
                y = model.transformer.h[0](torch.ones(2, 70, 48) * torch.arange(48), None, None)
        finally:
            torch.set_num_threads(before)
        results.append(y.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(results[0], results[2])


@needs_compiler
def test_frozen_weights_get_no_gradient() -> None:
    model = model_of(16, 24, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "h.1.mlp" in name or "ln_2" in name
    exact = copy.deepcopy(model).double()
    for ours, theirs in zip(run(model, 2, True)[1], run(exact, 2, False)[1], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    assert model.transformer.h[0].attn.c_attn.weight.grad is None


@needs_compiler
def test_a_second_backward_pass_raises_an_error() -> None:
    model = model_of(16, 24, 2)
    with fused_blocks(model, Buffers()):
        y = model.transformer.h[0](torch.randn(1, 16, 24), None, None).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def with_adapter(model: GPTModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"])).base_model.model


def with_hook(model: GPTModel) -> nn.Module:
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda module, inputs, output: None)
    return model


def compiled(model: GPTModel) -> nn.Module:
    for block in model.transformer.h:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("change", [with_adapter, with_hook, compiled, GPTModel.double, GPTModel.bfloat16])
def test_other_blocks_are_not_replaced(change: Any) -> None:
    model = change(model_of(16, 24, 2))
    assert not any(is_plain(block) for block in model.transformer.h)
    with fused_blocks(model, Buffers()):
        assert all("forward" not in block.__dict__ for block in model.transformer.h)


def test_masks_caches_autocast_and_small_inputs_use_the_models_own_code(
    n_fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16, 24, 2)
    ids = torch.randint(0, 61, (2, 16))
    padding = torch.ones(2, 16, dtype=torch.long)
    padding[0, :3] = 0
    expected = model(ids, padding)
    with fused_blocks(model, Buffers()):
        assert torch.equal(model(ids, padding), expected)
        with torch.no_grad():
            model(ids, cache=model.new_cache(2))
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        monkeypatch.setattr(training, "MIN_NUMBERS", 2 * 16 * 24 + 1)
        model(ids)
    assert n_fused == []


def test_without_a_compiler_the_models_own_code_runs(n_fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "load_kernels", lambda: None)
    model = model_of(16, 24, 2)
    assert torch.equal(run(model, 2, is_fused=True)[0], run(model, 2, is_fused=False)[0])
    assert n_fused == []


def trained(drop_rate: float, **options: Any) -> list[float]:
    """Return the losses of four steps of a Trainer."""
    ids = torch.randint(0, 61, (500,), generator=torch.Generator().manual_seed(2)).numpy().astype(np.uint16)
    config = TrainConfig(max_steps=4, batch_size=4, warmup_steps=0, **options)
    with Trainer(model_of(16, 24, 2, drop_rate), config, ids, progress=False) as trainer:
        return [trainer.step()["loss"] for _ in range(4)]


@needs_compiler
def test_a_trainer_uses_the_kernels_and_has_the_same_losses(
    n_fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout the losses are within 1e-6 of those of torch's operations, also with micro-batches."""
    losses, in_parts = trained(0.0), trained(0.0, micro_batch_size=3)
    assert len(n_fused) == 4 * 2 + 4 * 2 * 2
    with_dropout = trained(0.2)
    assert with_dropout == trained(0.2)
    trained(0.0, gradient_checkpointing=True)
    assert len(n_fused) == 4 * 2 * 5
    monkeypatch.setattr(training, "load_kernels", lambda: None)
    expected = trained(0.0)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert in_parts == pytest.approx(expected, rel=1e-6)
    assert with_dropout == pytest.approx(trained(0.2), rel=0.05)
