"""The written-out LoRA layers and the helpers around PEFT, compared with PEFT itself in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel
from MyGPT.finetuning.foreign_adapters import open_adapter
from MyGPT.finetuning.lora import (
    LinearWithLoRA,
    LoRALayer,
    add_lora,
    merge,
    replace_linear_with_lora,
)
from oracles_model import transformers_twin

# PEFT uses a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

V = 67


def base(**changes: Any) -> GPTModel:
    config = GPTConfig(V, 16, 24, 3, 2, drop_rate=0.0, qkv_bias=True)
    return lively_model(dataclasses.replace(config, **changes)).double()


def random_ids() -> Tensor:
    return torch.randint(V, (3, 9))


def as_if_trained(peft_model: Any) -> Any:
    """Change all trainable weights of an adapted model, because a new adapter adds nothing, and return the model."""
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model.eval()


def saved_adapter(directory: Path, model: nn.Module | None = None, **options: Any) -> Tensor:
    """Save an adapter, and return the logits of the adapted model for ids drawn with seed 5."""
    defaults: dict[str, Any] = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "task_type": "CAUSAL_LM"}
    model = base() if model is None else model
    peft_model = as_if_trained(get_peft_model(model, LoraConfig(**{**defaults, **options})))
    peft_model.save_pretrained(directory)
    with torch.no_grad():
        output = peft_model(input_ids=ids_of_seed_5())
    return output if isinstance(output, Tensor) else output.logits


def ids_of_seed_5() -> Tensor:
    return torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(5))


def assert_untouched(model: GPTModel) -> None:
    """Check that the model has no adapter and no frozen or changed weight."""
    expected = base(tie_weights=model.config.tie_weights)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in expected.named_modules()
    ]
    weights = dict(expected.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 16), (4, 16), (8, 3)])
def test_the_spelled_out_lora_has_the_logits_and_gradients_of_peft(rank: int, alpha: int, tie_weights: bool) -> None:
    """All linear layers are adapted, like PEFT's "all-linear", including an untied head."""
    plain, ids = base(tie_weights=tie_weights), random_ids()
    plain.requires_grad_(False)
    replace_linear_with_lora(plain, rank, alpha)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    theirs = as_if_trained(get_peft_model(base(tie_weights=tie_weights), config))
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, LinearWithLoRA)}
    assert layers.keys() == set(theirs.base_model.targeted_module_names)
    twins = {name: theirs.get_base_model().get_submodule(name) for name in layers}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora.A.copy_(twins[name].lora_A["default"].weight.T)
            layer.lora.B.copy_(twins[name].lora_B["default"].weight.T)
    logits, expected = plain(ids), theirs(ids)
    assert (logits - expected).abs().max() < 1e-10
    upstream = torch.randn_like(logits)
    (logits * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for name, layer in layers.items():
        for ours, their in ((layer.lora.A, twins[name].lora_A), (layer.lora.B, twins[name].lora_B)):
            gradient = their["default"].weight.grad.T
            assert (ours.grad - gradient).abs().max() < 1e-10 * max(1.0, float(gradient.abs().max())), name
    assert all(weight.grad is None for name, weight in plain.named_parameters() if ".lora." not in name)


def test_fresh_lora_layers_change_nothing() -> None:
    model, ids = base(), random_ids()
    replace_linear_with_lora(model, rank=4, alpha=8)
    assert torch.equal(model(ids), base()(ids))


def test_the_spelled_out_a_starts_within_the_bounds_of_peft() -> None:
    """The outer tenth of the range contains none of 2000 uniform numbers with probability 10^-91."""
    ours = LoRALayer(100, 7, rank=20, alpha=1).A
    theirs = get_peft_model(nn.Sequential(nn.Linear(100, 7)), LoraConfig(r=20, target_modules=["0"]))
    for A in (ours, theirs.get_base_model()[0].lora_A["default"].weight):
        assert 0.9 / math.sqrt(100) < A.abs().max() <= 1 / math.sqrt(100)


def test_a_lora_layer_given_alpha_times_rank_is_that_of_the_book() -> None:
    """The book's layer, from its appendix E: alpha (x A B)."""
    layer, x = LoRALayer(5, 3, rank=2, alpha=7 * 2).double(), torch.randn(4, 5, dtype=torch.float64)
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), 7 * (x @ layer.A @ layer.B), rtol=0, atol=1e-12)


def test_lora_layers_have_rank_times_in_and_out_parameters_and_the_dtype_of_the_layer() -> None:
    layer = LinearWithLoRA(nn.Linear(5, 3, dtype=torch.bfloat16), rank=2, alpha=1)
    assert sum(weight.numel() for weight in layer.lora.parameters()) == 2 * (5 + 3)
    assert layer(torch.randn(1, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        LoRALayer(5, 3, rank=0, alpha=1)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_all_linear_leaves_the_head_out_as_in_transformers(tie_weights: bool) -> None:
    model = base(tie_weights=tie_weights)
    theirs = get_peft_model(transformers_twin(model), LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    names = add_lora(model, target_modules="all-linear").base_model.targeted_module_names
    assert sorted(names) == sorted(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize("target_modules", [["c_attn"], ("c_attn", "mlp.c_proj"), r".*\.c_fc"])
def test_add_lora_makes_what_get_peft_model_makes_from_the_same_seed(target_modules: Any) -> None:
    torch.manual_seed(3)
    ours = add_lora(base(), r=4, alpha=32, dropout=0.1, target_modules=target_modules, use_rslora=True)
    torch.manual_seed(3)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, lora_dropout=0.1, target_modules=targets, use_rslora=True
    )
    theirs = get_peft_model(base(), config)
    assert type(ours) is type(theirs)
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["c_attn", "c_porj"]},
            r"no layer called 'c_porj'; the layers are attn, c_attn, c_fc, c_proj,",
        ),
        ({"target_modules": ["attn"], "modules_to_save": ["ln_3"]}, r"no layer called 'ln_3'"),
        ({"target_modules": ["proj"]}, r"no layer called 'proj'"),
        ({"target_modules": ["c_attn", "lm_head"]}, r"includes lm_head, .* modules_to_save=\['lm_head'\]"),
        ({"target_modules": ["transformer.wte"]}, r"includes transformer\.wte, .* modules_to_save=\['wte'\]"),
        ({"target_modules": r".*(c_attn|head)"}, r"includes lm_head"),
        ({"r": 0}, r"`r` should be a positive integer"),
        ({"target_modules": r"nothing"}, r"Target modules nothing not found"),
    ],
)
def test_what_add_lora_refuses_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = base()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert_untouched(model)


def test_an_untied_head_is_adapted_where_it_is_named() -> None:
    model, ids = as_if_trained(add_lora(base(tie_weights=False), target_modules=["lm_head", "wte"])), random_ids()
    before = model(ids)
    assert (merge(model)(ids) - before).abs().max() < 1e-11


def test_a_second_adapter_of_the_same_name_is_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path)
    model = base()
    adapted = add_lora(model)
    for attempt in (lambda: add_lora(model), lambda: add_lora(adapted), lambda: open_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match=r"already has an adapter: .* add_adapter or load_adapter"):
            attempt()


VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "bias": "lora_only"},
    {"modules_to_save": ["ln_f"]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["c_attn"], "layers_to_transform": [1], "rank_pattern": {"c_attn": 2}},
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda options: ",".join(options) or "plain")


@variants
def test_an_opened_adapter_gives_the_logits_of_the_saved_one(options: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_adapter(tmp_path, **options)
    opened = open_adapter(base().train(), tmp_path)
    assert torch.equal(opened(ids_of_seed_5()), expected)
    assert not any(module.training for module in opened.modules())
    assert not any(weight.requires_grad for name, weight in opened.named_parameters() if "lora_" in name)


@variants
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
def test_an_adapter_of_transformers_gpt2_opens_with_its_logits_and_no_warning(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The allowed warning is about training a copy of the tied head."""
    expected = saved_adapter(tmp_path, transformers_twin(base()), fan_in_fan_out=True, **options)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["fan_in_fan_out"]
    opened = open_adapter(base(), tmp_path)
    assert (opened(ids_of_seed_5()) - expected).abs().max() < 1e-10
    assert (merge(opened)(ids_of_seed_5()) - expected).abs().max() < 1e-10


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_an_adapter_on_an_untied_head_opens_with_the_head_that_peft_saved_beside_it(tmp_path: Path) -> None:
    twin = transformers_twin(base(tie_weights=False))
    expected = saved_adapter(tmp_path, twin, target_modules=["c_attn", "lm_head"])
    opened = open_adapter(base(tie_weights=False), tmp_path)
    assert (opened(ids_of_seed_5()) - expected).abs().max() < 1e-10


def test_a_base_model_that_the_adapter_names_is_not_looked_for(tmp_path: Path) -> None:
    """The name is a repository on the hub, and conftest blocks the network."""
    expected = saved_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    change_json(path, base_model_name_or_path="openai-community/gpt2")
    assert torch.equal(open_adapter(base(), tmp_path)(ids_of_seed_5()), expected)


def change_json(path: Path, **changes: Any) -> None:
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**described, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"emb_dim": 27},
            r"h\.0\.attn\.c_attn\.lora_A\.weight is \(4, 27\), but the model needs \(4, 24\) \(and 15 more\)$",
        ),
        ({"n_layers": 3}, r"the model has no transformer\.h\.2\.attn\.c_attn\.lora_A\.weight \(and 7 more\)$"),
        ({"n_layers": 1}, r"it lacks transformer\.h\.1\.attn\.c_attn\.lora_A\.weight \(and 7 more\)$"),
    ],
)
def test_an_adapter_for_a_model_of_other_sizes_is_one_sentence_and_changes_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved_adapter(tmp_path, base(**changes))
    model = base()
    with pytest.raises(ValueError, match=r"the adapter in .* does not fit the model: .*" + message):
        open_adapter(model, tmp_path)
    assert_untouched(model)


def test_a_copied_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path, base(vocab_size=70), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(70, 24\), but the model needs \(67, 24\)$"):
        open_adapter(base(), tmp_path)


def test_complete_matrices_of_transformers_are_refused_because_a_square_one_would_fit_transposed(
    tmp_path: Path,
) -> None:
    twin = transformers_twin(base())
    saved_adapter(tmp_path, twin, fan_in_fan_out=True, target_modules=["c_attn"], modules_to_save=["h.0.attn.c_proj"])
    model = base()
    with pytest.raises(ValueError, match=r"complete matrices .* such as .*h\.0\.attn\.c_proj\.weight"):
        open_adapter(model, tmp_path)
    assert_untouched(model)


def test_a_saved_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path)
    change_json(tmp_path / "adapter_config.json", target_modules=["c_attn", "lm_head"])
    model = base()
    with pytest.raises(ValueError, match=r"includes lm_head"):
        open_adapter(model, tmp_path)
    assert_untouched(model)


def test_an_adapter_of_another_kind_than_lora_is_refused(tmp_path: Path) -> None:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])
    get_peft_model(base(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'IA3', but only 'LORA' is supported"):
        open_adapter(base(), tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), FileNotFoundError, r"it has no adapter_config\.json"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), FileNotFoundError, r"neither adapter_model\.safet"),
        (lambda d: cut(d / "adapter_config.json"), ValueError, r"adapter_config\.json cannot be opened"),
        (lambda d: change_json(d / "adapter_config.json", peft_type="ME"), ValueError, r"cannot be opened"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), ValueError, r"cannot be opened"),
        (lambda d: cut(d / "adapter_model.safetensors"), ValueError, r"the weights in .* are damaged"),
        (
            lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
            ValueError,
            r"the weights in .* are damaged",
        ),
    ],
)
def test_a_damaged_adapter_names_its_directory_and_changes_nothing(
    damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    saved_adapter(tmp_path)
    damage(tmp_path)
    model = base()
    with pytest.raises(error, match=message) as caught:
        open_adapter(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert_untouched(model)


def test_an_old_adapter_written_by_torch_opens(tmp_path: Path) -> None:
    expected = saved_adapter(tmp_path)
    peft_model = PeftModel.from_pretrained(base(), tmp_path)
    peft_model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old/adapter_model.bin").is_file()
    assert torch.equal(open_adapter(base(), tmp_path / "old")(ids_of_seed_5()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_opens_onto_weights_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    saved_adapter(tmp_path)
    opened = open_adapter(base().to(dtype), tmp_path)
    assert opened(ids_of_seed_5()).dtype == dtype
    wanted = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {weight.dtype for name, weight in opened.named_parameters() if "lora_" in name} == {wanted}


@variants
def test_a_merged_model_has_the_logits_of_the_adapted_and_is_ordinary_again(
    options: dict[str, Any], tmp_path: Path
) -> None:
    expected = saved_adapter(tmp_path / "adapter", **options)
    model = base()
    merged = merge(open_adapter(model, tmp_path / "adapter"))
    assert merged is model
    assert (merged(ids_of_seed_5()) - expected).abs().max() < 1e-11
    assert merged.state_dict().keys() == base().state_dict().keys()
    assert all(weight.requires_grad for weight in merged.parameters())
    add_lora(merged)


@variants
def test_a_merged_model_opens_here_and_in_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_adapter(tmp_path / "adapter", **options)
    merge(open_adapter(base(), tmp_path / "adapter")).save_pretrained(tmp_path / "merged")
    ours = GPTModel.from_pretrained(tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert (ours(ids_of_seed_5()) - expected).abs().max() < 1e-10
    assert (theirs(ids_of_seed_5()).logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["lm_head", "wte"])
def test_a_trained_copy_of_a_tied_layer_unties_the_merged_model(name: str) -> None:
    model, ids = as_if_trained(add_lora(base(), modules_to_save=[name])), random_ids()
    before = model(ids)
    merged = merge(model)
    assert not merged.config.tie_weights
    assert (merged(ids) - before).abs().max() < 1e-11
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)


def test_merge_refuses_an_adapter_on_a_tied_embedding() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["c_attn", "wte"]))
    with pytest.raises(ValueError, match=r"includes transformer\.wte"):
        merge(model)
    assert model.targeted_module_names


def test_merge_refuses_a_model_that_is_not_ours() -> None:
    twin = get_peft_model(transformers_twin(base()), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="got one on GPT2LMHeadModel"):
        merge(twin)


@pytest.mark.slow
def test_importing_does_not_import_peft_or_transformers() -> None:
    code = "import sys, MyGPT.finetuning.lora; print({'peft', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
