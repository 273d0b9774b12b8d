"""Every method of PEFT on a GPTModel and on `as_transformers(model)`, against PEFT on transformers' GPT-2, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel, as_transformers
from MyGPT.cli import main
from MyGPT.finetuning.lora import add_lora, merge
from MyGPT.weights.pretrained import stored_name
from oracles_model import transformers_twin

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # such as "Setting fan_in_fan_out to True"
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

V, CONTEXT, WIDTH = 67, 16, 24
IDS = torch.arange(14).view(2, 7) * 11 % V
ALL = ["c_attn", "c_proj", "c_fc"]
DOWN = ["mlp.c_proj"]
"""Layers of one shape: some methods share one matrix among all layers."""

# The config class and its options. These methods adapt the Conv1D layers of transformers' GPT-2.
ON_CONV1D: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"target_modules": ALL}),
    "rsLoRA": ("LoraConfig", {"target_modules": ALL, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"target_modules": ALL, "use_dora": True}),
    "LoRA with bias": ("LoraConfig", {"target_modules": ALL, "lora_bias": True}),
    "LoRA, all-linear": ("LoraConfig", {"target_modules": "all-linear", "exclude_modules": ["lm_head"]}),
    "LoRA and modules_to_save": ("LoraConfig", {"target_modules": ALL, "modules_to_save": ["ln_f"]}),
    "IA3": ("IA3Config", {}),
    "LNTuning": ("LNTuningConfig", {}),
    "VeRA": ("VeraConfig", {"target_modules": DOWN}),
    "PVeRA": ("PveraConfig", {"target_modules": DOWN}),
    "RandLora": ("RandLoraConfig", {"target_modules": DOWN, "r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 10}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 8}),
    "VBLoRA": ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 4}),
    "UniLoRA": ("UniLoraConfig", {"theta_d_length": 101}),
    "TinyLoRA": ("TinyLoraConfig", {"target_modules": ["c_attn"], "r": 2, "u": 16}),
    "GraLoRA": ("GraloraConfig", {"target_modules": DOWN, "r": 4}),
    "HiRA": ("HiraConfig", {"target_modules": ALL}),
    "DEFT": ("DeftConfig", {"target_modules": ALL}),
    "FRoD": ("FrodConfig", {"target_modules": DOWN}),
}
# PEFT refuses Conv1D here, so transformers' GPT-2 gets linear layers with the same weights.
ON_LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LoHaConfig", {"target_modules": ALL}),
    "LoKr": ("LoKrConfig", {"target_modules": ALL}),
    "OFT": ("OFTConfig", {"target_modules": ALL, "r": 4, "oft_block_size": 0}),
    "BOFT": ("BOFTConfig", {"target_modules": ALL, "boft_block_size": 4}),
    "HRA": ("HRAConfig", {"target_modules": ALL}),
    "MiSS": ("MissConfig", {"target_modules": ALL, "r": 2}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "SHiRA": ("ShiraConfig", {"target_modules": ALL, "r": 2}),
    "RoAd": ("RoadConfig", {"target_modules": ALL, "group_size": 4}),
    "DeLoRA": ("DeloraConfig", {"target_modules": ALL}),
    "GLoRA": ("GloraConfig", {"target_modules": ALL}),
    "BEFT": ("BeftConfig", {"target_modules": ["c_fc"]}),
    "Lily": ("LilyConfig", {"target_modules": DOWN, "r": 2, "stride_A": 1, "num_B": 2}),
    "PEANuT": ("PeanutConfig", {"target_modules": ALL, "r": 2, "depth": 0}),
    "AdaMSS": ("AdamssConfig", {"target_modules": ["c_attn"], "r": 8}),
    "Supertuning": ("SupertuningConfig", {"target_modules": ALL, "sparsity": 0.5}),
    "Poly": ("PolyConfig", {"target_modules": ALL, "r": 2, "n_tasks": 2, "n_skills": 2, "n_splits": 1}),
}
# These methods need `as_transformers(model)`: virtual tokens need its interface, and AdaLoRA adds to the loss of the output.
NEEDS_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prefix tuning with projection": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "multitask prompt tuning": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 2}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}),
    "Cartridge": ("CartridgeConfig", {"num_virtual_tokens": 3}),
    "AdaLoRA": ("AdaLoraConfig", {"target_modules": ALL, "total_step": 10}),
    "TrainableTokens": ("TrainableTokensConfig", {"token_indices": [1, 11]}),
    "LoRA and trainable_token_indices": ("LoraConfig", {"target_modules": ALL, "trainable_token_indices": [1, 11]}),
}
# PEFT refuses float64 here. All but the first two refuse Conv1D too.
IN_FLOAT32: dict[str, tuple[str, dict[str, Any]]] = {
    "PiSSA": ("LoraConfig", {"target_modules": ALL, "init_lora_weights": "pissa"}),
    "MiCA": ("LoraConfig", {"target_modules": ALL, "init_lora_weights": "mica", "r": 4}),
    "OLoRA": ("LoraConfig", {"target_modules": ALL, "init_lora_weights": "olora", "r": 4}),
    "KaSA": ("LoraConfig", {"target_modules": ["c_attn"], "kasa_config": peft.KasaConfig(), "r": 4}),
    "PSOFT": ("PsoftConfig", {"target_modules": ["c_attn"], "r": 4, "psoft_alpha": 4}),
    "OSF": ("OSFConfig", {"target_modules": ALL}),
}
METHODS = {**ON_CONV1D, **ON_LINEAR, **NEEDS_TRANSFORMERS, **IN_FLOAT32}
TIED_AND_UNTIED = [
    # The methods of the first two groups do not touch the output head.
    pytest.param(
        method, tied, id=f"{method}-{'' if tied else 'un'}tied", marks=[] if tied or quick else pytest.mark.slow
    )
    for method in METHODS
    for tied in (True, False)
    for quick in [method == "LoRA" or method in NEEDS_TRANSFORMERS]
]


def base(tie_weights: bool = True) -> GPTModel:
    config = GPTConfig(V, CONTEXT, WIDTH, 3, 1, drop_rate=0.0, qkv_bias=True, tie_weights=tie_weights)
    return lively_model(config).double()


def transformers_base(tie_weights: bool, with_linear: bool) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with the weights of `base`; with_linear replaces Conv1D by nn.Linear."""
    twin = transformers_twin(base(tie_weights))
    for name, layer in list(twin.named_modules()):
        if with_linear and isinstance(layer, Conv1D):
            linear = nn.Linear(*layer.weight.shape, dtype=layer.weight.dtype)
            linear.weight, linear.bias = nn.Parameter(layer.weight.data.T), layer.bias
            twin.set_submodule(name, linear)
    return twin


def config_of(method: str) -> PeftConfig:
    """Return a new config, because PEFT changes the config that it gets."""
    name, options = METHODS[method]
    return getattr(peft, name)(task_type=TaskType.CAUSAL_LM, **options)


def inputs_of(method: str) -> dict[str, Tensor]:
    """Return the arguments of a training step."""
    more = {
        "multitask prompt tuning": {"task_ids": torch.tensor([0, 1])},
        "Poly": {"task_ids": torch.tensor([0, 1])},
        "CPT": {"input_type_mask": torch.full_like(IDS, 4)},
    }
    return {"input_ids": IDS, "labels": IDS, **more.get(method, {})}


def trained(model: PeftModel) -> list[nn.Parameter]:
    """Return the trained parameters, without the ranks of AdaLoRA's layers, which PEFT does not save."""
    return [weight for name, weight in model.named_parameters() if weight.requires_grad and "ranknum" not in name]


def adapted(base_model: nn.Module, method: str) -> PeftModel:
    """Return the model with an adapter that changes the logits, as most new adapters do not."""
    torch.manual_seed(3)
    model = get_peft_model(base_model, config_of(method))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits_of(model: PeftModel, method: str, with_labels: bool = True) -> Tensor:
    torch.manual_seed(5)  # PVeRA draws numbers in training
    inputs = inputs_of(method)
    result = model(**(inputs if with_labels else {**inputs, "labels": None}))
    return result if isinstance(result, Tensor) else result.logits


def two_steps(model: PeftModel, method: str) -> list[float]:
    """Return the losses of two training steps and the loss after them."""
    model.train()
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    losses = []
    for _ in range(3):
        logits = logits_of(model, method)[:, -IDS.shape[1] :]  # without those of virtual tokens
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses


@pytest.mark.parametrize(("method", "tie_weights"), TIED_AND_UNTIED)
def test_a_method_trains_as_on_transformers_and_its_adapters_load_on_both(
    method: str, tie_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # takes most of the time

    # Logits are below 10, so their rounding errors in float32 are some 1e-6.
    dtype, tolerance = (torch.float32, 1e-5) if method in IN_FLOAT32 else (torch.float64, 1e-10)

    def ours() -> Any:
        model = base(tie_weights).to(dtype)
        return as_transformers(model) if method in NEEDS_TRANSFORMERS else model

    model = adapted(ours(), method)
    model.eval().save_pretrained(tmp_path / "ours")
    with_linear = method in ON_LINEAR or method in ("OLoRA", "KaSA", "PSOFT", "OSF")
    twin = transformers_base(tie_weights, with_linear).to(dtype)
    if model.peft_config["default"].is_prompt_learning:  # PEFT loads these adapters for inference only
        theirs = adapted(twin, method).eval()
    else:
        theirs = PeftModel.from_pretrained(twin, tmp_path / "ours", is_trainable=True).eval()
    with torch.no_grad():
        untrained, expected = transformers_twin(base(tie_weights).to(dtype))(IDS).logits, logits_of(theirs, method)
        assert (expected[:, -IDS.shape[1] :] - untrained).abs().max() > 1e-4
        torch.testing.assert_close(logits_of(model, method), expected, rtol=0, atol=tolerance)
    losses = two_steps(theirs, method)
    assert abs(losses[2] - losses[0]) > 1e-7
    assert two_steps(model, method) == pytest.approx(losses, abs=10 * tolerance)

    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(ours(), tmp_path / "theirs")
    with torch.no_grad():
        found, expected = logits_of(again, method, False), logits_of(theirs, method, False)
    # PEFT computes and stores prompts in float32.
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-6 if again.active_peft_config.is_prompt_learning else tolerance
    )


@pytest.mark.parametrize("wrapped", [False, True], ids=["GPTModel", "as_transformers"])
def test_an_adapter_names_its_base_model_and_opens_by_name_everywhere(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base().save_pretrained(tmp_path / "runs/base/model")
    monkeypatch.chdir(tmp_path)
    opened = GPTModel.from_pretrained("runs/base")  # the directory of a training run
    model = adapted(as_transformers(opened) if wrapped else opened, "LoRA").eval()
    model.save_pretrained("adapter")
    with torch.no_grad():
        expected = logits_of(model, "LoRA", with_labels=False)
        monkeypatch.chdir("/")
        elsewhere = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
        assert type(elsewhere.get_base_model()) is GPT2LMHeadModel
        torch.testing.assert_close(logits_of(elsewhere, "LoRA"), expected, rtol=0, atol=1e-10)
        merged = GPTModel.from_pretrained(tmp_path / "runs/base")
        merged = merge(PeftModel.from_pretrained(merged, tmp_path / "adapter"))
        torch.testing.assert_close(merged(IDS), expected, rtol=0, atol=1e-10)
    assert merged.name_or_path is None  # the files contain the weights without the adapter


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("124M", "gpt2"),
        ("gpt2-xl", "gpt2-xl"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("hf://user/model", "user/model"),
    ],
)
def test_a_name_is_stored_as_transformers_knows_it(given: str, stored: str) -> None:
    assert stored_name(given) == stored


def test_an_adapter_of_a_model_from_the_hub_compares_its_vocabulary_with_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT then asks for the config of the base model, to decide whether the embeddings must be saved."""
    base().save_pretrained(tmp_path / "base")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "base" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: True)
    opened = GPTModel.from_pretrained(tmp_path / "base")
    opened.name_or_path = "user/model"
    adapted(opened, "IA3").save_pretrained(tmp_path / "adapter")
    assert asked == [("user/model", "config.json")]
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "user/model"


@pytest.mark.parametrize("method", ["LoRA", "prompt tuning", "prefix tuning"])
def test_generate_gives_the_tokens_of_transformers(method: str) -> None:
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompts = {"input_ids": IDS[:, :4], "attention_mask": torch.ones_like(IDS[:, :4])}
    ours, theirs = (adapted(model, method).eval() for model in (as_transformers(base()), transformers_twin(base())))
    assert torch.equal(ours.generate(**prompts, **greedy), theirs.generate(**prompts, **greedy))


@pytest.mark.parametrize("method", ["LoRA and trainable_token_indices", "TrainableTokens"])
def test_trained_tokens_of_a_tied_model_merge_into_embedding_and_head(method: str) -> None:
    model = base()
    tuned = adapted(as_transformers(model), method).eval()
    with torch.no_grad():
        expected = logits_of(tuned, method)
        tuned.merge_and_unload()
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-10)
    assert model.lm_head.weight is model.transformer.wte.weight
    unlike = (model.transformer.wte.weight != base().transformer.wte.weight).any(dim=1)
    assert unlike.nonzero().flatten().tolist() == [1, 11]


@pytest.mark.parametrize("tie_weights", [True, False])
def test_all_linear_leaves_the_head_out(tie_weights: bool) -> None:
    def names(model: nn.Module, fan_in_fan_out: bool = False) -> list[str]:
        config = LoraConfig(target_modules="all-linear", fan_in_fan_out=fan_in_fan_out)
        return sorted(get_peft_model(model, config).base_model.targeted_module_names)

    expected = names(transformers_twin(base(tie_weights)), fan_in_fan_out=True)
    assert names(as_transformers(base(tie_weights))) == expected
    assert sorted(add_lora(base(tie_weights), target_modules="all-linear").base_model.targeted_module_names) == expected


@pytest.mark.parametrize("method", ["IA3", "prompt tuning"])
def test_the_command_says_how_to_open_another_kind_of_adapter(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base().save_pretrained(tmp_path / "base")
    model = as_transformers(GPTModel.from_pretrained(tmp_path / "base"))
    adapted(model, method).save_pretrained(tmp_path / "adapter")
    assert main(["generate", "--model", str(tmp_path / "adapter"), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "open it in Python with PeftModel.from_pretrained(as_transformers(model), directory)" in error
