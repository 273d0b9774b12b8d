"""LoRA layers in fewer operations, compared with PEFT's own layers in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel
from MyGPT.acceleration.frozen import LoRALinear, freeze
from MyGPT.finetuning import fused_lora
from MyGPT.finetuning.lora import add_lora, merge

CONFIG = GPTConfig(vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
IDS = torch.arange(18).view(2, 9)
OPTIONS: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}


def trained(model: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def pair(**options: Any) -> tuple[Any, Any]:
    """Return the same adapted float64 model with PEFT's layers and with ours."""
    both = [trained(get_peft_model(lively_model(CONFIG).double(), LoraConfig(**{**OPTIONS, **options}))) for _ in "12"]
    fused_lora.fuse(both[1])
    return both[0], both[1]


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # dropout
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equal(one: Any, other: Any) -> None:
    (loss, gradients), (expected, theirs) = loss_and_gradients(other), loss_and_gradients(one)
    assert abs(loss - expected) < 1e-12
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).abs().max() < 1e-10 * theirs[name].abs().max(), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of all calls of LoRALinear."""
    seen: list[Any] = []
    apply = LoRALinear.apply

    def counted(*args: Any) -> Any:
        seen.append(args)
        return apply(*args)

    monkeypatch.setattr(LoRALinear, "apply", counted)
    return seen


@pytest.mark.parametrize(
    ("options", "is_fused"),
    [
        ({}, True),
        ({"lora_dropout": 0.3}, True),
        ({"use_rslora": True, "target_modules": ["c_fc"]}, True),
        ({"modules_to_save": ["ln_f"]}, True),
        ({"use_dora": True}, False),
        ({"bias": "lora_only"}, False),
        ({"lora_bias": True}, False),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_peft(options: dict[str, Any], is_fused: bool, calls: list[Any]) -> None:
    peft_model, ours = pair(**options)
    assert_equal(peft_model, ours)
    assert bool(calls) == is_fused


def test_switching_adapters_is_that_of_peft(calls: list[Any]) -> None:
    peft_model, ours = pair()
    for model in (peft_model, ours):
        torch.manual_seed(6)
        model.add_adapter("other", LoraConfig(**{**OPTIONS, "r": 2}))
        model.set_adapter("other")
        trained(model)
    assert_equal(peft_model, ours)
    assert calls
    calls.clear()
    for model in (peft_model, ours):
        model.base_model.set_adapter(["default", "other"])
    assert_equal(peft_model, ours)
    for model in (peft_model, ours):
        model.base_model.set_adapter("default")
    with torch.no_grad(), peft_model.disable_adapter(), ours.disable_adapter():
        assert torch.equal(peft_model(input_ids=IDS), ours(input_ids=IDS))
    assert not calls
    for model in (peft_model, ours):
        model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(peft_model(input_ids=IDS), ours(input_ids=IDS))
    assert not calls


def test_autocast_and_vmap_compute_as_peft_does(calls: list[Any]) -> None:
    peft_model, ours = (model.float().eval() for model in pair())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(peft_model(input_ids=IDS), ours(input_ids=IDS))
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Any:
        return torch.func.functional_call(ours, weights, (), {"input_ids": ids, "labels": ids}).loss

    gradients = torch.func.grad(loss)(weights, IDS)
    assert gradients["base_model.model.transformer.h.0.mlp.c_fc.lora_A.default.weight"].abs().max() > 0
    assert not calls


def test_add_lora_fuses_its_layers(calls: list[Any]) -> None:
    model = add_lora(lively_model(CONFIG))
    assert all(type(module) is not lora.Linear for module in model.modules())
    model(input_ids=IDS)
    assert len(calls) == 8


def test_a_frozen_layer_below_the_first_adapter_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    transposed: list[int] = []
    forward = fused_lora.LoRALinear.backward
    monkeypatch.setattr(
        LoRALinear,
        "backward",
        staticmethod(lambda ctx, dy: transposed.append(ctx.needs_input_grad[0]) or forward(ctx, dy)),
    )
    model = trained(add_lora(lively_model(CONFIG), dropout=0.0))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert transposed == [True] * 7 + [False]  # the first layer's input comes from the frozen embedding


def test_frozen_weights_stay_mapped_and_trained_ones_become_contiguous(tmp_path: Path) -> None:
    lively_model(CONFIG).save_pretrained(tmp_path)
    model = GPTModel.from_pretrained(tmp_path)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert not weight.is_contiguous()  # transformers stores it transposed
    address = weight.data_ptr()
    adapted = add_lora(model).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert weight.data_ptr() == address
    model.requires_grad_(True)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_rounded_model_trains_as_the_original_does(dtype: Any) -> None:
    """Rounding changes a weight by at most 1/254 of the largest of its row. The losses of 20 steps, which fall by more than 30%,
    differ by less than 1.5% of the first loss."""
    losses = []
    for chosen in ("fp32", dtype):
        model = lively_model(CONFIG)
        freeze(model, chosen)
        torch.manual_seed(4)
        adapted = add_lora(model, dropout=0.0).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(20):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    original, rounded = losses
    assert original[-1] < 0.7 * original[0]
    differences = [abs(one - other) for one, other in zip(original, rounded, strict=True)]
    assert max(differences) < 0.015 * original[0], (max(differences), original)


def test_merging_into_rounded_weights_is_refused() -> None:
    model = lively_model(CONFIG)
    freeze(model, "int8")
    with pytest.raises(ValueError, match=r"rounded to bf16 or int8: save the adapter, and open it with open_model"):
        merge(add_lora(model))
