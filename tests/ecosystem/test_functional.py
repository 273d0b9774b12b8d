"""torch.func on a GPTModel: gradients per sample and ensembles, compared with plain loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel
from MyGPT.cache import VocabularyError
from MyGPT.loss import VOCAB_CHUNK

V = VOCAB_CHUNK + 8  # large enough that a plain call computes its loss in chunks
IDS, TARGETS = torch.randint(V, (2, 3, 6), generator=torch.Generator().manual_seed(1))
TARGETS[1, :3] = -100


def model_with(tie_weights: bool) -> GPTModel:
    sizes = {"vocab_size": V, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2}
    return lively_model(GPTConfig(**sizes, drop_rate=0.0, qkv_bias=True, tie_weights=tie_weights)).double()


@pytest.fixture(autouse=True)
def _attention_with_a_batching_rule() -> Iterator[None]:
    """torch has no batching rule for the CPU's fused attention, computes it in a loop, and warns about this."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("kind", ["labels", "targets", "per_row", "mask"])
def test_gradients_per_sample_are_those_of_a_loop(tie_weights: bool, kind: str) -> None:
    model = model_with(tie_weights).train()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0

    def loss(parameters: dict[str, Tensor], ids: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        options = {
            "labels": {"labels": targets[None]},
            "targets": {"targets": targets[None]},
            "per_row": {"targets": targets[None], "per_row": True},
            "mask": {"targets": targets[None], "attention_mask": mask[None]},
        }[kind]
        result: Tensor = functional_call(model, parameters, (ids[None],), options)[0]
        return result.sum()

    parameters = dict(model.named_parameters())
    ours = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, IDS, TARGETS, mask)
    for row, arguments in enumerate(zip(IDS, TARGETS, mask, strict=True)):
        model.zero_grad()
        loss(parameters, *arguments).backward()
        for name, parameter in parameters.items():
            # Gradients are up to 100; sums in another order differ in the last of 16 digits.
            torch.testing.assert_close(ours[name][row], parameter.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_an_ensemble_computes_what_its_models_compute(tie_weights: bool) -> None:
    models = [model_with(tie_weights) for _ in range(3)]
    with torch.no_grad():
        for number, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + number / 4)
    parameters, buffers = stack_module_state(models)
    assert parameters["transformer.wte.weight"].shape == (3, V, 8)
    assert ("lm_head.weight" in parameters) != tie_weights
    skeleton = copy.deepcopy(models[0]).to("meta")

    def total(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = functional_call(skeleton, (parameters, buffers), (IDS,))
        return logits, functional_call(skeleton, (parameters, buffers), (IDS,), {"targets": TARGETS})[0]

    with torch.no_grad():
        logits, totals = vmap(total)(parameters, buffers)
        for number, model in enumerate(models):
            torch.testing.assert_close(logits[number], model(IDS), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(totals[number], model.token_loss(IDS, TARGETS)[0], rtol=1e-11, atol=0)


def test_a_replaced_shared_weight_is_used_by_the_embedding_and_the_head() -> None:
    model = model_with(tie_weights=True)
    other = {name: parameter.detach() * 1.5 for name, parameter in model.named_parameters()}
    logits = functional_call(model, other, (IDS,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(other[name])
    assert torch.equal(logits, model(IDS))


def test_wrong_ids_and_labels_are_refused_under_vmap() -> None:
    model = model_with(tie_weights=True)
    wrong = IDS.masked_fill(IDS[2, 1] == IDS, V)
    with pytest.raises(VocabularyError, match=f"id {V} is outside the vocabulary"):
        vmap(lambda ids: model(ids[None]))(wrong)
    with pytest.raises(VocabularyError, match=f"label {V} is outside the vocabulary"):
        vmap(lambda ids, labels: model(ids[None], labels=labels[None])[0])(IDS, wrong)
