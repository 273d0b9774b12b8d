"""Weight-decay groups, learning-rate schedules, Muon, and the limits of TrainConfig."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from MyGPT import GPTModel, TrainConfig
from MyGPT.training import optim
from MyGPT.training.optim import Muon, make_optimizers, orthogonalized, schedule_factor, set_learning_rate


def oracle_factors(make: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer, **options)
    factors = []
    for _ in range(100):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def test_the_cosine_equals_that_of_transformers_after_the_warmup() -> None:
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    theirs = oracle_factors(
        get_cosine_with_min_lr_schedule_with_warmup, num_warmup_steps=10, num_training_steps=100, min_lr=0.1
    )
    ours = [schedule_factor(config, step) for step in range(100)]
    assert ours[10:] == pytest.approx(theirs[10:], abs=1e-12)


def test_the_line_equals_that_of_transformers_after_the_warmup() -> None:
    config = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.0, schedule="linear")
    theirs = oracle_factors(get_linear_schedule_with_warmup, num_warmup_steps=10, num_training_steps=100)
    assert [schedule_factor(config, step) for step in range(10, 100)] == pytest.approx(theirs[10:], abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 20, 100])
def test_every_schedule_rises_then_never_rises_again_and_stays_within_its_bounds(
    schedule: Any, warmup_steps: int
) -> None:
    config = TrainConfig(max_steps=100, warmup_steps=warmup_steps, schedule=schedule)
    factors = [schedule_factor(config, step) for step in range(100)]
    rising, falling = factors[: warmup_steps + 1], factors[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert min(falling, default=1) >= 0.1 - 1e-12 and max(factors) <= 1 and factors[0] > 0


def test_wsd_is_flat_until_its_last_part() -> None:
    config = TrainConfig(max_steps=100, warmup_steps=5, schedule="wsd", decay_fraction=0.3, min_learning_rate=0.0)
    assert {schedule_factor(config, step) for step in range(5, 71)} == {1.0}
    assert schedule_factor(config, 85) == pytest.approx(0.5)


def test_matrices_decay_vectors_do_not_and_every_parameter_is_in_one_group(tiny_model: GPTModel) -> None:
    for name in ("adamw", "muon"):
        optimizers = make_optimizers(tiny_model, TrainConfig(optimizer=name))  # type: ignore[arg-type]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        members = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(members) == sorted(id(parameter) for parameter in tiny_model.parameters())
        for group in groups:
            assert all((parameter.dim() == 2) == (group["weight_decay"] > 0) for parameter in group["params"])


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(tiny_model: GPTModel) -> None:
    muon, _ = make_optimizers(tiny_model, TrainConfig(optimizer="muon"))
    taken = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    named = {name for name, parameter in tiny_model.named_parameters() if id(parameter) in taken}
    assert named == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def matrices(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    shapes = [(8, 24), (24, 8), (8, 24), (8, 8)]
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("momentum", [0.7, 0.95])
def test_muon_equals_torchs_up_to_bf16_when_the_polynomials_are_the_same(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch computes five polynomials in bf16 with slopes up to 3.4, so an update is off by a few percent, over ten steps."""
    monkeypatch.setattr(optim, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    optimizers = Muon(ours, 0.1, 0.1, momentum), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=momentum)
    for step in range(10):
        gradients = torch.Generator().manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=gradients)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.02 * 10 * 0.1 * one.shape[0] ** 0.5


def test_orthogonalized_matrices_keep_their_directions_and_lose_their_lengths() -> None:
    """The paper's polynomials are applied to the singular values alone for comparison."""
    for shape in ((3, 6, 10), (3, 10, 6)):
        stack = torch.randn(shape, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
        s = S / S.norm(dim=1, keepdim=True)
        for a, b, c in optim.POLYNOMIALS:
            s = a * s + b * s**3 + c * s**5
        assert (orthogonalized(stack) - U @ s.diag_embed() @ Vh).abs().max() < 1e-12


def test_singular_values_end_in_the_documented_range() -> None:
    """The singular values of this matrix range from 0.002 of its norm to almost 1."""
    given = torch.cat(
        [torch.logspace(math.log10(0.002), -1, 60, dtype=torch.float64), torch.tensor([0.9, 0.3]).double()]
    )
    U, V = (torch.linalg.qr(torch.randn(62, 62, dtype=torch.float64)).Q for _ in "UV")
    given[-2] = (1 - given[:-2].square().sum() - given[-1] ** 2).sqrt()  # makes the norm 1
    found = torch.linalg.svdvals(orthogonalized((U @ given.diag() @ V.T)[None])[0])
    assert 0.18 < found.min() < found.max() < 1.87


def test_muon_uses_the_momentum_of_the_config(tiny_model: GPTModel) -> None:
    muon, _ = make_optimizers(tiny_model, TrainConfig(optimizer="muon", muon_momentum=0.7))
    assert {group["momentum"] for group in muon.param_groups} == {0.7}


def test_a_matrix_without_a_gradient_does_not_change() -> None:
    still, moved = matrices(torch.float32)[:2]
    before, moved.grad = still.detach().clone(), torch.ones_like(moved)
    Muon([still, moved], 0.1, 0.1).step()
    assert torch.equal(still, before)


def test_every_group_keeps_its_own_peak(tiny_model: GPTModel) -> None:
    config = TrainConfig(optimizer="muon", warmup_steps=0, max_steps=10)
    optimizers = make_optimizers(tiny_model, config)
    assert set_learning_rate(optimizers, config, 0) == config.learning_rate
    factor = set_learning_rate(optimizers, config, 7) / config.learning_rate
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(config.muon_learning_rate * factor)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(config.learning_rate * factor)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("max_steps", 2.5),
        ("max_steps", True),
        ("batch_size", -1),
        ("micro_batch_size", 0),
        ("warmup_steps", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("min_learning_rate", -1.0),
        ("min_learning_rate", 1.0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("muon_momentum", 1.0),
        ("grad_clip", -1.0),
        ("decay_fraction", 0.0),
        ("decay_fraction", 1.5),
        ("schedule", "sine"),
        ("optimizer", "sgd"),
        ("precision", "fp8"),
        ("order", "backwards"),
        ("eval_every", 0),
        ("early_stop", 0),
        ("sample_every", -1),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        TrainConfig(**{field: value})
    assert str(value) in str(caught.value)
    assert "must be" in str(caught.value)
