"""PEFT on GPTModel, against PEFT on transformers' GPT-2 with the same weights and the same adapter, in float64."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import lively_model, same_weights
from MyGPT import GPTConfig, GPTModel, generate, train_model_simple
from MyGPT.model import Transformer
from oracles_model import transformers_twin

# PEFT uses a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
turns_the_flag_off = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but:UserWarning")
turns_the_flag_on = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but:UserWarning")

V, CONTEXT = 67, 16
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"modules_to_save": ["ln_f"]},
    {"bias": "lora_only"},
    {"target_modules": ["c_proj"], "rank_pattern": {"attn.c_proj": 2}, "layers_to_transform": [1]},
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: ",".join(options) or "plain")


def base(**changes: Any) -> GPTModel:
    config = GPTConfig(V, CONTEXT, 24, 3, 2, drop_rate=0.0, qkv_bias=True)
    return lively_model(dataclasses.replace(config, **changes)).double()


def lora_config(**options: Any) -> LoraConfig:
    """Return the README's config without dropout. PEFT modifies a config, so each model needs its own."""
    defaults = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **{**defaults, **options})


def adapted(model: nn.Module, **options: Any) -> Any:
    """Return the model with an adapter whose weights are random, because a new adapter adds nothing."""
    peft_model = get_peft_model(model, lora_config(**options)).eval()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model


def adapted_pair(model: GPTModel | None = None, **options: Any) -> tuple[Any, Any]:
    """Return PEFT models on MyGPT's and on transformers' GPT-2, with equal weights and equal adapters."""
    model = base() if model is None else model
    twin = transformers_twin(model)
    ours, theirs = adapted(model, **options), get_peft_model(twin, lora_config(fan_in_fan_out=True, **options)).eval()
    result = set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    assert not result.unexpected_keys
    return ours, theirs


def random_ids(B: int = 3, T: int = 9) -> Tensor:
    return torch.randint(V, (B, T))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def weights_by_our_names(twin: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": weight.T if isinstance(module, Conv1D) and kind == "weight" else weight
        for name, module in twin.named_modules()
        for kind, weight in module.named_parameters(recurse=False)
    }


@variants
def test_logits_and_gradients_are_those_of_peft_on_transformers(options: dict[str, Any]) -> None:
    ours, theirs = adapted_pair(**options)
    ids = random_ids()
    logits = ours(input_ids=ids)
    assert distance(logits, theirs(input_ids=ids).logits) < 1e-10
    assert distance(logits, base()(ids)) > 0.1
    upstream = torch.randn_like(logits)
    (logits * upstream).sum().backward()
    (theirs(input_ids=ids).logits * upstream).sum().backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    found = {name: weight.grad for name, weight in ours.named_parameters() if weight.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert distance(gradient, expected[name]) < 1e-10 * max(1.0, float(expected[name].abs().max())), name


@variants
def test_training_goes_step_by_step_as_on_transformers_and_merges_into_the_same_weights(
    options: dict[str, Any],
) -> None:
    """The learning rate is ten times the usual one, so that eight steps change the first digit of the loss."""
    ours, theirs = adapted_pair(**options)
    optimizers = [torch.optim.AdamW([w for w in m.parameters() if w.requires_grad], lr=1e-2) for m in (ours, theirs)]
    losses = []
    for step in range(8):
        ids = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(step % 2))
        loss = ours(input_ids=ids, labels=ids).loss
        their_logits = theirs(input_ids=ids).logits[:, :-1]
        expected = F.cross_entropy(their_logits.flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        losses.append(loss.item())
        for optimizer, each in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    merged, their_merged = ours.merge_and_unload(), weights_by_our_names(theirs.merge_and_unload())
    for name, weight in merged.named_parameters():
        assert distance(weight, their_merged[name]) < 1e-9, name


def test_the_documented_call_wraps_and_takes_every_keyword_of_peft() -> None:
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["c_attn", "c_proj", "c_fc"],
    )
    model = get_peft_model(base(), config).eval()
    ids = random_ids()
    mask = torch.ones_like(ids)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    logits = model(ids)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        inputs_embeds=None,
        labels=labels,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    )
    assert distance(output.logits, logits) < 1e-10
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-10)
    embedded = model(inputs_embeds=model.get_base_model().transformer.wte(ids), labels=labels)
    assert embedded.loss.item() == pytest.approx(expected.item(), abs=1e-10)


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = random_ids()
    assert torch.equal(get_peft_model(base(), lora_config())(ids), base()(ids))


def test_padding_is_masked_as_in_the_model_alone() -> None:
    model, ids = adapted(base()), random_ids(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    assert distance(model(input_ids=padded, attention_mask=mask)[:, 4:], model(ids)) < 1e-10


def test_dropout_of_the_adapter_falls_in_training_only() -> None:
    model, ids = adapted(base(), lora_dropout=0.5), random_ids()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_trainable_parameters_are_counted_as_on_transformers(
    tie_weights: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = adapted_pair(base(tie_weights=tie_weights))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    # r (in + out) for each of four layers in each of two blocks
    assert ours.get_nb_trainable_parameters()[0] == 2 * 4 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)
    assert ours.num_parameters(only_trainable=True) == ours.get_nb_trainable_parameters()[0]
    ours.print_trainable_parameters()
    assert "trainable params: 3,072" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("task_type", [TaskType.CAUSAL_LM, None])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["wte"]}, {"modules_to_save": ["lm_head"]}],
    ids=lambda options: str(*options.values()),
)
def test_generation_goes_through_the_cache_and_equals_the_one_without(
    options: dict[str, Any], task_type: TaskType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond the context length, and for prompts of different lengths."""
    lengths = []
    forward = Transformer.forward

    def spy(self: Transformer, input_ids: Tensor, *rest: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(Transformer, "forward", spy)
    model = adapted(base(), **options)
    model.peft_config["default"].task_type = task_type
    model = model if task_type else PeftModel(model.unload(), lora_config(**options)).eval()
    ids = random_ids(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with_cache = generate(model, ids, CONTEXT, attention_mask=mask)
    assert lengths[:4] == [5, 1, 1, 1]
    assert torch.equal(with_cache, generate(model, ids, CONTEXT, attention_mask=mask, use_cache=False))
    assert torch.equal(with_cache, generate(model.merge_and_unload(), ids, CONTEXT, attention_mask=mask))


def test_generation_is_that_of_transformers_with_the_adapter() -> None:
    ours, theirs = adapted_pair()
    ids = random_ids(1, 4)
    expected = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generate(ours, ids, 10), expected)


def test_generation_leaves_dropout_of_the_adapter_on() -> None:
    model = adapted(base(), lora_dropout=0.5).train()
    first = generate(model, random_ids(1, 4), 6)
    assert torch.equal(first, generate(model, first[:, :4], 6))
    assert all(module.training for module in model.modules())


@variants
def test_save_pretrained_writes_the_adapter_alone_and_from_pretrained_reads_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = adapted(base(), **options), random_ids()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert not any(parameter.requires_grad for name, parameter in again.named_parameters() if "lora_" in name)
    assert not any(module.training for module in again.modules())


def test_a_saved_adapter_can_be_trained_on(tmp_path: Path) -> None:
    model = adapted(base())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@variants
def test_merging_leaves_the_logits_as_they_were(options: dict[str, Any]) -> None:
    model, ids = adapted(base(), **options), random_ids()
    before = model(ids).detach()
    merged = model.merge_and_unload()
    assert type(merged) is GPTModel
    assert merged.state_dict().keys() == base().state_dict().keys()
    assert distance(merged(ids), before) < 1e-11


def test_merging_in_float32_changes_logits_by_less_than_1e_5() -> None:
    """The model has GPT-2's initial weights: its logits are below 1, with some hundred roundings of 6e-8 each."""
    torch.manual_seed(2)
    model = adapted(GPTModel(GPTConfig(V, CONTEXT, 24, 3, 2, drop_rate=0.0)).eval())
    ids = random_ids()
    before = model(ids).detach()
    assert distance(model.merge_and_unload()(ids), before) < 1e-5


def test_a_merged_model_saves_and_opens_as_any_other(tmp_path: Path) -> None:
    merged = adapted(base()).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same_weights(GPTModel.from_pretrained(tmp_path / "merged"), merged)


def test_several_adapters_take_turns_on_one_model(tmp_path: Path) -> None:
    ids = random_ids()
    first = adapted(base())
    second = adapted(base(), r=2, target_modules=["c_fc"])
    expected = {"default": first(ids), "second": second(ids)}
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "second")
    for name in ("second", "default", "second"):
        first.set_adapter(name)
        assert distance(first(ids), expected[name]) < 1e-11
    with first.disable_adapter():
        assert torch.equal(first(ids), base()(ids))
    mixed = first(ids, adapter_names=["default", "__base__", "second"])  # one adapter per row
    for row, logits in enumerate((expected["default"], base()(ids), expected["second"])):
        assert distance(mixed[row], logits[row]) < 1e-11
    first.set_adapter("default")
    first.delete_adapter("second")
    assert distance(first(ids), expected["default"]) < 1e-11


def test_adapters_can_be_merged_together() -> None:
    model, ids = adapted(base()), random_ids()
    model.add_adapter("second", lora_config(r=2))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.normal_(std=0.1)
    model.base_model.set_adapter(["default", "second"])
    both = model(ids).detach()
    assert distance(model.merge_and_unload()(ids), both) < 1e-11


@pytest.mark.parametrize("tie_weights", [True, False])
def test_all_linear_merges_without_touching_the_token_embedding(tie_weights: bool) -> None:
    """Merging an adapter on a tied head would also change the embedding (PEFT issue 2018)."""
    model, ids = adapted(base(tie_weights=tie_weights), target_modules="all-linear"), random_ids()
    before = model(ids).detach()
    merged, untouched = model.merge_and_unload(), base(tie_weights=tie_weights)
    assert distance(merged(ids), before) < 1e-11
    assert torch.equal(merged.transformer.wte.weight, untouched.transformer.wte.weight)


def test_all_linear_adapts_the_layers_that_it_adapts_in_transformers() -> None:
    ours, theirs = adapted_pair(target_modules="all-linear")
    assert sorted(ours.base_model.targeted_module_names) == sorted(theirs.base_model.targeted_module_names)
    assert len(ours.base_model.targeted_module_names) == 2 * 4


def test_peft_refuses_an_adapter_on_a_tied_head_by_name() -> None:
    with pytest.raises(ValueError, match=r"TiedHead.* is not supported"):
        get_peft_model(base(), lora_config(target_modules=["c_attn", "lm_head"]))


def test_an_untied_head_can_be_adapted() -> None:
    model, ids = adapted(base(tie_weights=False), target_modules=["c_attn", "lm_head"]), random_ids()
    before = model(ids).detach()
    total, count = model.token_loss(ids[:, :-1], ids[:, 1:])
    assert (total / count).item() == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-10)
    assert distance(model.merge_and_unload()(ids), before) < 1e-11


@pytest.mark.slow
@variants
@turns_the_flag_off
def test_an_adapter_of_transformers_gpt2_loads_onto_ours(options: dict[str, Any], tmp_path: Path) -> None:
    twin = adapted(transformers_twin(base()), fan_in_fan_out=True, **options)
    twin.save_pretrained(tmp_path)
    ids = random_ids()
    ours = PeftModel.from_pretrained(base(), tmp_path)
    assert distance(ours(input_ids=ids), twin(input_ids=ids).logits) < 1e-10
    assert distance(ours.merge_and_unload()(ids), twin(input_ids=ids).logits) < 1e-10


@variants
@turns_the_flag_on
def test_an_adapter_of_ours_loads_onto_transformers_gpt2(options: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(base(), **options)
    ours.save_pretrained(tmp_path)
    ids = random_ids()
    twin = PeftModel.from_pretrained(transformers_twin(base()), tmp_path)
    assert distance(twin(input_ids=ids).logits, ours(input_ids=ids)) < 1e-10
    assert distance(twin.merge_and_unload()(ids).logits, ours(input_ids=ids)) < 1e-10


def test_an_adapter_of_a_base_model_with_a_name_can_be_saved_again(tmp_path: Path) -> None:
    """PEFT then compares the vocabulary size with the config in the base model's directory."""
    base().save_pretrained(tmp_path / "base")
    model = adapted(base())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert "lm_head" not in " ".join(get_peft_model_state_dict(PeftModel.from_pretrained(base(), tmp_path / "adapter")))


@pytest.mark.slow
def test_bfloat16_weights_are_trained_with_a_float32_adapter() -> None:
    model = get_peft_model(base().bfloat16(), lora_config())
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    ids, optimizer, losses = random_ids(), torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in frozen.items())
    assert model(ids).dtype == torch.bfloat16
    assert generate(model, ids, 4).shape == (3, 13)
    assert {weight.dtype for weight in model.merge_and_unload().parameters()} == {torch.bfloat16}


def test_the_training_loop_of_the_book_trains_the_adapter_alone() -> None:
    model = get_peft_model(base(), lora_config())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    batches = [(ids[:, :-1], ids[:, 1:]) for ids in (random_ids(), random_ids())]
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses, _, _ = train_model_simple(model, batches, None, optimizer, "cpu", num_epochs=4, eval_freq=1)
    assert losses[-1] < losses[0]
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if re.search(r"\.lora_[AB]\.", name)}
