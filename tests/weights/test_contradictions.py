"""Model directories whose config and tensors contradict each other: the tensors decide, as in transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from conftest import lively_model, same_weights
from MyGPT import CharTokenizer, GPTConfig, GPTModel, load_weights_into_gpt
from MyGPT.cli import main
from MyGPT.finetuning.classification import GPTForClassification
from MyGPT.messages import FileWarning
from MyGPT.training.run import WholeModel
from MyGPT.weights.formats import huggingface
from oracles_layouts import NanoGPT

IDS = torch.arange(20).reshape(2, 10) * 3
SIZES: dict[str, Any] = {"vocab_size": 67, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
HEAD, WTE = "lm_head.weight", "transformer.wte.weight"
QKV_BIASES = [f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)]
EXACT = 1e-10
"""The tolerance of logits of size 10 in float64, which the two libraries sum in different orders."""


def save(directory: Path, **changes: Any) -> Path:
    lively_model(GPTConfig(**SIZES, **changes)).double().save_pretrained(directory)
    return directory


def edit(directory: Path, alter: Callable[[dict[str, Tensor]], Any], **settings: Any) -> Path:
    """Change the tensors in model.safetensors, and set keys of config.json (to remove a key, set it to None)."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    alter(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def theirs(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


def assert_equal_logits(ours: GPTModel, other: Any) -> None:
    with torch.no_grad():
        assert (ours(IDS) - other(IDS).logits).abs().max() < EXACT


def trained(directory: Path, only: str = "") -> Path:
    """Train a directory for one step in transformers, only the parameters whose names contain `only`, and save it again."""
    model = theirs(directory)
    weights = [parameter for name, parameter in model.named_parameters() if only in name]
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(weights, lr=0.1).step()
    model.save_pretrained(directory)
    return directory


# Biases of queries, keys and values


@pytest.mark.parametrize("only", ["", "h.1.attn", "h.0.attn.c_attn.bias"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_model_of_ours_trained_by_transformers_and_by_us_keeps_its_logits_on_every_way(
    tie_weights: bool, only: str, tmp_path: Path
) -> None:
    """We save a model without qkv biases as one with biases of zero, which transformers trains."""
    path = trained(save(tmp_path / "model", tie_weights=tie_weights), only)
    with pytest.warns(FileWarning, match=r"model\.safetensors: it has .* biases .*qkv_bias=false"):
        ours = GPTModel.from_pretrained(path)
    assert ours.config.qkv_bias and ours.config.tie_weights == tie_weights
    assert_equal_logits(ours, theirs(path))
    ours(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(ours.parameters(), lr=0.1).step()
    ours.save_pretrained(path)
    trained(path)
    assert_equal_logits(GPTModel.from_pretrained(path), theirs(path))  # without a warning


def test_the_biases_are_read_from_every_file_of_the_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(save(run / "model"))
    tensors = safetensors.torch.load_file(run / "model/model.safetensors")
    expected = theirs(run / "model")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((run / "model/config.json").read_bytes())
    for path in (
        run,
        run / "model/model.safetensors",
        run / "model/config.json",
        tmp_path / "pytorch_model.bin",
        tmp_path,
    ):
        with pytest.warns(FileWarning, match="qkv_bias"):
            assert_equal_logits(GPTModel.from_pretrained(path), expected)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_and_each_file_that_it_lists_open_the_whole_model(suffix: str, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(save(tmp_path) / "model.safetensors")
    expected = theirs(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    file_of = {name: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, name in enumerate(tensors)}
    write = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    for file in set(file_of.values()):
        write({name: tensors[name] for name in tensors if file_of[name] == file}, tmp_path / file)
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    for path in (tmp_path, index, *(tmp_path / file for file in set(file_of.values()))):
        ours = GPTModel.from_pretrained(path)
        assert not ours.config.qkv_bias
        assert_equal_logits(ours, expected)
    (tmp_path / file_of[WTE]).unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing, but .* lists it"):
        GPTModel.from_pretrained(index)


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize(
    "lacking",
    [QKV_BIASES, QKV_BIASES[1:], ["ln_"], ["c_proj", "c_fc"], ["bias"]],
    ids=["all qkv", "one qkv", "LayerNorms", "linear layers", "all"],
)
def test_missing_biases_are_zero_as_in_transformers(lacking: list[str], flag: bool | None, tmp_path: Path) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("bias") and any(part in name for part in lacking)]:
            del tensors[name]

    path = edit(save(tmp_path, qkv_bias=True), remove, qkv_bias=flag)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = GPTModel.from_pretrained(path)
    assert_equal_logits(ours, theirs(path))
    assert any("zero" in str(warning.message) for warning in caught) == (lacking != QKV_BIASES or flag is not False)


def test_a_missing_weight_and_a_bias_that_only_some_blocks_have_are_errors(tmp_path: Path) -> None:
    for name in ("transformer.h.1.ln_1.bias", "transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.bias", WTE):
        path = edit(save(tmp_path), lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"{name} is missing"):
            GPTModel.from_pretrained(path)


def test_nanogpts_checkpoint_without_biases_opens_without_a_warning(tmp_path: Path) -> None:
    model = NanoGPT(67, 16, 24, 3, 2, bias=False)
    torch.save(model.checkpoint(), tmp_path / "ckpt.pt")
    assert GPTModel.from_pretrained(tmp_path / "ckpt.pt").config.qkv_bias


def test_the_best_model_of_a_run_is_restored_although_transformers_trained_it_since(tmp_path: Path) -> None:
    trained(save(tmp_path / "model"))
    model = GPTModel(GPTConfig(**SIZES)).double().eval()
    with pytest.warns(FileWarning, match="qkv_bias"):
        WholeModel(model, None).restore(tmp_path)
    assert_equal_logits(model, theirs(tmp_path / "model"))


# The output head


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[WTE] + 1


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("flag", [True, None], ids=["tied", "no flag"])
def test_a_head_of_its_own_is_kept_although_the_config_ties_it(flag: bool | None, suffix: str, tmp_path: Path) -> None:
    path = edit(save(tmp_path), other_head, tie_word_embeddings=flag)
    if suffix == "bin":
        torch.save(safetensors.torch.load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    with pytest.warns(FileWarning, match=rf"{HEAD} differs from {WTE}"):
        ours = GPTModel.from_pretrained(path)
    assert not ours.config.tie_weights
    assert_equal_logits(ours, theirs(path))
    ours.save_pretrained(path / "again")
    assert same_weights(GPTModel.from_pretrained(path / "again"), ours)
    assert_equal_logits(ours, theirs(path / "again"))


def test_a_head_in_another_dtype_is_compared_by_value(tmp_path: Path) -> None:
    path = edit(save(tmp_path), lambda tensors: tensors.update({WTE: tensors[WTE].bfloat16().double()}))
    edit(path, lambda tensors: tensors.update({HEAD: tensors[WTE].bfloat16()}))
    assert GPTModel.from_pretrained(path).config.tie_weights
    edit(path, lambda tensors: tensors.update({HEAD: (tensors[WTE] + 1).bfloat16()}))
    with pytest.warns(FileWarning, match=HEAD):
        assert not GPTModel.from_pretrained(path).config.tie_weights


@pytest.mark.parametrize("alter", [lambda t: t.update({HEAD: t[WTE].clone()}), lambda t: t.update({HEAD: t.pop(WTE)})])
def test_an_equal_head_or_one_in_place_of_the_embedding_stays_tied(alter: Any, tmp_path: Path) -> None:
    """safetensors.torch.save_model keeps only the alphabetically first of two names of one tensor: the head's."""
    path = edit(save(tmp_path), alter)
    ours = GPTModel.from_pretrained(path)
    assert ours.config.tie_weights and ours.lm_head.weight is ours.transformer.wte.weight
    assert_equal_logits(ours, theirs(path))


def test_nanogpts_untied_head_is_kept(tmp_path: Path) -> None:
    model = NanoGPT(67, 16, 24, 3, 2, bias=True).double()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    torch.save(model.checkpoint(), tmp_path / "ckpt.pt")
    with pytest.warns(FileWarning, match=HEAD):
        ours = GPTModel.from_pretrained(tmp_path / "ckpt.pt")
    with torch.no_grad():
        assert (ours(IDS) - model(IDS)).abs().max() < EXACT


def test_an_untied_config_without_a_head_copies_the_embedding_into_separate_memory(tmp_path: Path) -> None:
    path = edit(save(tmp_path), lambda tensors: None, tie_word_embeddings=False)
    before = (path / "model.safetensors").read_bytes()
    with pytest.warns(FileWarning, match=rf"it lacks {HEAD} .*: {WTE} is copied"):
        ours = GPTModel.from_pretrained(path)
    embedding = ours.transformer.wte.weight.detach().clone()
    assert not ours.config.tie_weights and torch.equal(ours.lm_head.weight, embedding)
    with torch.no_grad():
        ours.lm_head.weight.zero_()
    assert torch.equal(ours.transformer.wte.weight, embedding) and (path / "model.safetensors").read_bytes() == before


# Commands, classifiers, activations


@pytest.mark.parametrize("command", ["explain", "info"])
def test_a_command_prints_the_contradiction_once_in_one_plain_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = CharTokenizer.from_text("abcdefgh")
    path = tmp_path / "model"
    GPTModel(GPTConfig(**{**SIZES, "vocab_size": tokenizer.n_vocab})).save_pretrained(path, tokenizer)
    edit(path, other_head)
    options = ["a", "--model", str(path), "--out", str(tmp_path / "a.html")] if command == "explain" else [str(path)]
    assert main([command, *options]) == 0
    out, err = capsys.readouterr()
    assert (out + err).count(f"{HEAD} differs from") == 1 and "Warning" not in out + err
    if command == "explain":
        assert err.startswith(f"note: {path / 'model.safetensors'}: {HEAD} differs from {WTE}")


@pytest.mark.parametrize("suffix", ["bin", "sharded", "run"])
def test_a_classifier_opens_from_all_that_a_model_opens_from(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPTForClassification(lively_model(GPTConfig(**SIZES)), ["ham", "spam"]).eval()
    if suffix == "sharded":
        monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 20_000)
    directory = tmp_path / "model" if suffix == "run" else tmp_path
    model.save_pretrained(directory)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (suffix == "sharded")
    if suffix == "bin":
        torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    again = GPTForClassification.from_pretrained(tmp_path)
    assert torch.equal(again(IDS), model(IDS)) and again.labels == ["ham", "spam"]


GELUS = {
    name: min(("tanh", "none"), key=lambda way: (ACT2FN[name](X) - F.gelu(X, approximate=way)).abs().max())
    for X in [torch.linspace(-12, 12, 10_001, dtype=torch.float64)]
    for name in (
        "gelu",
        "gelu_python",
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "gelu_python_tanh",
        "gelu_accurate",
    )
}
"""The names of transformers' activations that are a GELU, with the approximation whose values are nearest."""


@pytest.mark.parametrize("name", GELUS)
def test_every_name_of_the_two_gelus_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    path = edit(save(tmp_path), lambda tensors: None, activation_function=name)
    ours = GPTModel.from_pretrained(path)
    assert (ours.config.activation == "gelu_new") == (GELUS[name] == "tanh")
    assert_equal_logits(ours, theirs(path))


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_10", "relu", "silu", "laplace", "gelu_typo"])
def test_other_activations_are_refused_with_the_names_of_the_supported_ones(name: str, tmp_path: Path) -> None:
    path = edit(save(tmp_path), lambda tensors: None, activation_function=name)
    with pytest.raises(ValueError, match=f"activation_function='{name}', MyGPT supports only .*'gelu_python'"):
        GPTModel.from_pretrained(path)


def test_weights_from_a_directory_that_transformers_trained_add_their_biases_to_a_model(tmp_path: Path) -> None:
    path = trained(save(tmp_path))
    model = GPTModel(GPTConfig(**SIZES)).double().eval()
    load_weights_into_gpt(model, safetensors.torch.load_file(path / "model.safetensors"))
    assert model.config.qkv_bias
    assert_equal_logits(model, theirs(path))
