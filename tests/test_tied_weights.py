"""The token embedding and the output head share one parameter, whatever torch does to the model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from MyGPT import GPTConfig, GPTModel

CONFIG = GPTConfig(vocab_size=11, context_length=8, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)
IDS = torch.tensor([[1, 2, 3, 4]])
HEAD, WTE = "lm_head.weight", "transformer.wte.weight"


def is_tied(model: GPTModel) -> bool:
    return isinstance(model.lm_head.weight, nn.Parameter) and model.lm_head.weight is model.transformer.wte.weight


def on_meta() -> GPTModel:
    with torch.device("meta"):
        return GPTModel(CONFIG)


def inside(model: GPTModel, change: Callable[[nn.Module], object]) -> GPTModel:
    """Apply a change to a module that contains the model, and return the model."""
    change(nn.ModuleDict({"model": model}))
    return model


def pickled(model: GPTModel) -> GPTModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to_empty(device="cpu"),
        lambda model: inside(model, lambda outer: outer.to_empty(device="cpu")),
        lambda model: on_meta().to_empty(device="cpu"),
        lambda model: model.to("meta"),
        lambda model: model.half(),
        lambda model: model.to(torch.float64),
        lambda model: model.share_memory(),
        copy.deepcopy,
        lambda model: copy.deepcopy(model).to_empty(device="cpu"),
        pickled,
        lambda model: pickled(model).to_empty(device="cpu"),
    ],
)
def test_the_weight_stays_shared(change: Callable[[GPTModel], GPTModel]) -> None:
    model = change(GPTModel(CONFIG))
    assert is_tied(model)
    assert {HEAD, WTE} <= model.state_dict().keys() and len({*model.parameters()}) == len([*model.parameters()])


def test_a_conversion_that_swaps_tensors_keeps_the_weight_shared() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert is_tied(GPTModel(CONFIG).half())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_weights_that_were_emptied_and_drawn_again_are_those_of_a_new_model() -> None:
    model = on_meta().to_empty(device="cpu")
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    for name, weight in GPTModel(CONFIG).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_an_error_during_a_conversion_keeps_the_weight_shared() -> None:
    model, n_calls = GPTModel(CONFIG), 0

    def fail(_: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        model._apply(fail)
    assert n_calls == 1 and is_tied(model)


def test_loading_with_assign_keeps_the_weight_shared_in_a_model_and_around_it() -> None:
    given = GPTModel(CONFIG).state_dict()
    model = on_meta()
    model.load_state_dict(given, assign=True)
    assert is_tied(model) and model.lm_head.weight.data_ptr() == given[WTE].data_ptr()
    inner = inside(
        on_meta(), lambda outer: outer.load_state_dict({f"model.{k}": v for k, v in given.items()}, assign=True)
    )
    assert is_tied(inner) and torch.equal(inner(IDS), model(IDS))


def test_loading_with_assign_keeps_frozen_weights_frozen() -> None:
    model = GPTModel(CONFIG).requires_grad_(False)
    model.load_state_dict(GPTModel(CONFIG).state_dict(), assign=True)
    assert is_tied(model) and not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", [HEAD, WTE])
def test_with_assign_one_of_the_two_names_is_enough(name: str) -> None:
    given = GPTModel(CONFIG).state_dict()
    missing = given.pop(name)
    model = GPTModel(CONFIG)
    model.load_state_dict(given, assign=True)
    assert is_tied(model) and torch.equal(model.lm_head.weight, missing) and name not in given


def test_entries_that_differ_are_loaded_the_same_way_with_and_without_assign() -> None:
    given = GPTModel(CONFIG).state_dict()
    given[HEAD] = given[HEAD] + 1
    models = GPTModel(CONFIG), GPTModel(CONFIG)
    models[0].load_state_dict(given)
    models[1].load_state_dict(given, assign=True)
    assert all(is_tied(model) and torch.equal(model.lm_head.weight, given[HEAD]) for model in models)


def test_a_weight_of_its_own_is_loaded_as_such() -> None:
    """A user can untie the head by assignment. Neither loading nor moving the model then ties it again."""
    model, given = GPTModel(CONFIG), GPTModel(CONFIG).state_dict()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    given[HEAD] = given[HEAD] + 1
    model.load_state_dict(given, assign=True)
    model.half().to_empty(device="cpu")
    assert not is_tied(model)


def test_functional_calls_use_a_given_embedding_in_the_head_too() -> None:
    model, other = GPTModel(CONFIG).eval(), GPTModel(CONFIG).eval()
    logits = torch.func.functional_call(model, dict(other.named_parameters()), (IDS,))
    assert torch.equal(logits, other(IDS)) and is_tied(model) and not torch.equal(logits, model(IDS))
