"""Loading weights from OpenAI, Hugging Face, the book and nanoGPT, completely or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import MyGPT.weights.formats.huggingface
from conftest import lively_model, same_weights
from http_server import file, serving
from MyGPT import (
    BPETokenizer,
    GPTConfig,
    GPTModel,
    download_and_load_gpt2,
    load_gpt2_params_from_tf_ckpt,
    load_weights_into_gpt,
)
from MyGPT.weights import released
from MyGPT.weights.formats import open_checkpoint
from MyGPT.weights.pretrained import find_model
from oracles_layouts import BookGPT, NanoGPT
from oracles_model import transformers_twin
from oracles_openai import OPENAI, openai_logits, openai_params
from texts import OPENAI_FILES

IDS = torch.arange(20).reshape(2, 10) * 3
SIZES: dict[str, Any] = {"vocab_size": 67, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
CONFIG = GPTConfig(**SIZES, drop_rate=0.1, qkv_bias=True)
EXACT = 1e-12
"""The tolerance for float64 logits of size 10 that are computed by the same products in another order."""


def lively(model: nn.Module) -> Any:
    """Return the model with random weights, in float64 and evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.35)
    return model.double().eval()


def fresh(**changes: Any) -> GPTModel:
    return GPTModel(dataclasses.replace(CONFIG, **changes)).double().eval()


@torch.no_grad()
def difference(ours: nn.Module, theirs: nn.Module, ids: Tensor = IDS) -> float:
    logits = theirs(ids)
    return float((ours(ids) - getattr(logits, "logits", logits)).abs().max())


# OpenAI's


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_openais_parameters_give_openais_logits(tie_weights: bool, qkv_bias: bool) -> None:
    """The tolerance is float32 rounding, see test_tensorflow.py. A model without qkv biases gets them, also in its config."""
    sizes = {"vocab_size": 503, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    model = GPTModel(GPTConfig(**sizes, qkv_bias=qkv_bias, tie_weights=tie_weights)).eval()
    load_weights_into_gpt(model, openai_params())
    assert model.config == GPTConfig(**sizes, qkv_bias=True, tie_weights=tie_weights)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_weights
    ids, expected = openai_logits()
    assert (model(ids) - expected).abs().max() <= 1e-5


def test_a_directory_with_openais_files_is_opened_with_openais_logits() -> None:
    model = GPTModel.from_pretrained(OPENAI)
    assert not model.training and model.config.qkv_bias and model.config.tie_weights
    ids, expected = openai_logits()
    assert (model(ids) - expected).abs().max() <= 1e-5


def test_a_shorter_context_takes_the_first_positions() -> None:
    model = GPTModel(GPTConfig(vocab_size=503, context_length=5, emb_dim=24, n_heads=3, n_layers=2)).eval()
    load_weights_into_gpt(model, openai_params())
    ids, expected = openai_logits()
    assert (model(ids[:, :5]) - expected[:, :5]).abs().max() <= 1e-5


def test_gpt2_is_downloaded_opened_and_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call downloads from a server with OpenAI's files; the second call needs no network."""
    data = (OPENAI / "model.ckpt.data-00000-of-00001").read_bytes()
    monkeypatch.setitem(released.DATA_BYTES, "124M", len(data))
    ids, expected = openai_logits()
    with serving() as server:
        for name in released.FILES:
            source = OPENAI if (OPENAI / name).is_file() else OPENAI_FILES
            server.will(file((source / name).read_bytes()))
        monkeypatch.setenv("MYGPT_GPT2_URL", server.address)
        monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
        model = GPTModel.from_pretrained("gpt2")
        assert (model(ids) - expected).abs().max() <= 1e-5
        n_requests = len(server.requests)
        assert torch.equal(GPTModel.from_pretrained("124M")(ids), model(ids))
        assert len(server.requests) == n_requests == len(released.FILES)
    settings, params = download_and_load_gpt2("124M", models_dir=str(tmp_path / "cache/models"))
    assert settings == json.loads((OPENAI / "hparams.json").read_text())
    again = GPTModel(GPTConfig(vocab_size=503, context_length=32, emb_dim=24, n_heads=3, n_layers=2)).eval()
    load_weights_into_gpt(again, params)
    assert torch.equal(again(ids), model(ids))


def test_the_books_module_name_gives_the_same_functions() -> None:
    import gpt_download3

    assert gpt_download3.download_and_load_gpt2 is download_and_load_gpt2
    assert gpt_download3.load_gpt2_params_from_tf_ckpt is load_gpt2_params_from_tf_ckpt


def test_a_local_directory_is_preferred_to_a_released_model_of_the_same_name(in_tmp_path: Path) -> None:
    lively_model(CONFIG).save_pretrained("gpt2")
    assert find_model("gpt2") == Path("gpt2")
    assert GPTModel.from_pretrained("gpt2").config == CONFIG


# Hugging Face's


def test_transformers_state_dict_gives_its_logits_with_and_without_its_prefix() -> None:
    theirs = transformers_twin(lively_model(CONFIG).double())
    for state_dict in (theirs.state_dict(), theirs.transformer.state_dict()):
        buffers = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        model = fresh()
        load_weights_into_gpt(model, {**state_dict, **buffers})
        assert difference(model, theirs) < EXACT


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_a_model_with_either_gelu_is_the_same_in_transformers(activation: Any, tmp_path: Path) -> None:
    model = lively_model(dataclasses.replace(CONFIG, activation=activation)).double()
    model.save_pretrained(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert difference(model, theirs) < EXACT
    assert GPTModel.from_pretrained(tmp_path / "model").config == model.config


# The book's


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("model_has_bias", [True, False])
def test_the_books_state_dict_gives_its_logits(model_has_bias: bool, qkv_bias: bool, tmp_path: Path) -> None:
    theirs = lively(BookGPT(67, 16, 24, 3, 2, qkv_bias))
    torch.save(
        {"model_state_dict": theirs.state_dict(), "optimizer_state_dict": {}}, tmp_path / "model_and_optimizer.pth"
    )
    for state_dict in (theirs.state_dict(), torch.load(tmp_path / "model_and_optimizer.pth", weights_only=True)):
        model = fresh(qkv_bias=model_has_bias, tie_weights=False)
        load_weights_into_gpt(model, state_dict)
        assert difference(model, theirs) < EXACT
        assert model.config.qkv_bias == (qkv_bias or model_has_bias)


def test_the_books_head_goes_into_a_tied_model_only_if_it_is_the_embedding() -> None:
    theirs = lively(BookGPT(67, 16, 24, 3, 2, qkv_bias=True))
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight.*tie_weights"):
        load_weights_into_gpt(model, theirs.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        theirs.out_head.weight.copy_(theirs.tok_emb.weight)
    load_weights_into_gpt(model, theirs.state_dict())
    assert difference(model, theirs) < EXACT


def test_a_state_dict_without_the_number_of_heads_is_refused_with_advice(tmp_path: Path) -> None:
    theirs = lively(BookGPT(67, 16, 64, 2, 2, qkv_bias=True))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth does not say how many heads .* load_weights_into_gpt"):
        GPTModel.from_pretrained(tmp_path / "model.pth")
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.format == "a state dict in the book's layout" and checkpoint.config is None
    assert checkpoint.guess_config() == GPTConfig(
        vocab_size=67, context_length=16, emb_dim=64, n_heads=1, n_layers=2, qkv_bias=True, tie_weights=False
    )


# nanoGPT's


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_opens_with_its_logits(bias: bool, tmp_path: Path) -> None:
    theirs = lively(NanoGPT(67, 16, 24, 3, 2, bias))
    torch.save(theirs.checkpoint(), tmp_path / "ckpt.pt")
    model = GPTModel.from_pretrained(tmp_path / "ckpt.pt")
    assert model.config == dataclasses.replace(CONFIG, drop_rate=0.2, activation="gelu")
    assert difference(model, theirs) < EXACT
    again = fresh(activation="gelu")
    load_weights_into_gpt(again, theirs.checkpoint())
    assert difference(again, theirs) < EXACT
    (tmp_path / "ckpt.pt").write_bytes(b"")  # a training script overwrites the file in place
    assert difference(model, theirs) < EXACT


def test_nanogpts_checkpoint_is_refused_by_a_model_that_computes_something_else() -> None:
    """The tensor shapes show neither the number of heads nor the GELU variant."""
    checkpoint = lively(NanoGPT(67, 16, 24, 3, 2, True)).checkpoint()
    with pytest.raises(ValueError, match="trained with n_heads=3, but the model has 2"):
        load_weights_into_gpt(fresh(n_heads=2, activation="gelu"), checkpoint)
    with pytest.raises(ValueError, match="trained with activation='gelu', but the model has 'gelu_new'"):
        load_weights_into_gpt(fresh(), checkpoint)


class Touch:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(is_old: bool, in_tmp_path: Path) -> None:
    torch.save({"model": Touch()}, "ckpt.pt", _use_new_zipfile_serialization=not is_old)
    with pytest.raises(
        ValueError, match=r"ckpt\.pt is not opened because it contains posix.system, which could run arbitrary code"
    ):
        GPTModel.from_pretrained("ckpt.pt")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [b"", b"x\n", b"\x80\x02.", b"PK\x03\x04", b"<html>"])
def test_a_file_of_another_kind_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"ckpt\.pt is not a (readable )?checkpoint"):
        GPTModel.from_pretrained(tmp_path / "ckpt.pt")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_file_is_a_value_error_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A damaged file may still open: some bytes of a zip archive have no meaning."""
    directory = tmp_path_factory.mktemp("damaged")
    torch.save(lively(NanoGPT(5, 4, 4, 2, 1, True)).checkpoint(), directory / "ckpt.pt")
    content = bytearray((directory / "ckpt.pt").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (directory / "ckpt.pt").write_bytes(content)
    try:
        GPTModel.from_pretrained(directory / "ckpt.pt")
    except ValueError as error:
        assert "ckpt.pt" in str(error)


# All or nothing


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_mismatch_is_listed_and_the_model_left_untouched(data: st.DataObject) -> None:
    state_dict = dict(transformers_twin(lively_model(CONFIG)).state_dict())
    names = data.draw(
        st.lists(st.sampled_from(sorted(state_dict.keys() - {"lm_head.weight"})), min_size=1, unique=True)
    )
    spoilt: dict[str, str] = {}
    for name in names:
        change = data.draw(st.sampled_from(["missing", "unknown", "longer", "integers"]))
        tensor = state_dict.pop(name)
        if change == "unknown":
            state_dict[f"{name}2"] = tensor
            spoilt[f"{name}2"] = "is unknown"
        if change in ("missing", "unknown"):
            is_first_bias = name.endswith("c_attn.bias") and not any(n.endswith("c_attn.bias") for n in state_dict)
            if not is_first_bias:
                spoilt[name] = "is missing"
        elif change == "longer":
            state_dict[name] = torch.cat([tensor, tensor])
            if not name.endswith("wpe.weight"):  # a longer table is allowed: its first positions are used
                spoilt[name] = r"is \("
        else:
            state_dict[name] = tensor.int()
            spoilt[name] = "does not hold floating-point"
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widening = [name for name in state_dict if name.endswith(("c_attn.weight", "c_fc.weight"))]
    if not widening or not spoilt:
        return
    with pytest.raises(ValueError) as caught:
        load_weights_into_gpt(model, state_dict)
    missing_biases = [name for name in spoilt if name.endswith("c_attn.bias")]
    for name in spoilt.keys() - set(missing_biases):
        assert name in str(caught.value)
    assert model.config == CONFIG
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "not the weights of a GPT-2 model; the tensor names are none"),
        ({"layers.0.weight": torch.ones(2, 2), "b": torch.ones(1)}, r"the tensor names are layers\.0\.weight, b$"),
        ({"wte": [1, 2]}, "wte is list, but weights must be tensors or arrays"),
        ([torch.ones(3)], "weights must be a dict of tensors or arrays, got list"),
        ({"model": {}, "model_args": {"n_head": 2}}, "model_args lacks vocab_size, block_size, n_embd, n_layer"),
    ],
)
def test_weights_of_another_model_are_refused(params: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_weights_into_gpt(fresh(), params)


def test_weights_are_loaded_into_our_model_only() -> None:
    with pytest.raises(ValueError, match="into a GPTModel, got Linear"):
        load_weights_into_gpt(nn.Linear(2, 2), openai_params())


def test_the_model_keeps_its_dtype_its_parameters_and_its_mode(tmp_path: Path) -> None:
    """The parameters stay the same objects, so an optimizer that was made before still trains them."""
    source = lively_model(CONFIG)
    model = GPTModel(CONFIG).bfloat16().train()
    parameters = list(model.parameters())
    load_weights_into_gpt(model, source.state_dict())
    assert model.training and all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name].bfloat16()), name


def test_parameters_do_not_share_memory_with_what_they_came_from() -> None:
    params = openai_params()
    model = GPTModel(GPTConfig(vocab_size=503, context_length=32, emb_dim=24, n_heads=3, n_layers=2)).eval()
    load_weights_into_gpt(model, params)
    ids, expected = openai_logits()
    for array in (params["wte"], params["blocks"][0]["attn"]["c_attn"]["b"]):
        array[:] = 7
    assert (model(ids) - expected).abs().max() <= 1e-5


# Shards


def test_weights_past_the_limit_are_written_in_shards_that_both_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MyGPT.weights.formats.huggingface, "MAX_SHARD_BYTES", 20_000)
    model = lively_model(CONFIG).double()
    model.save_pretrained(tmp_path / "model")
    shards = sorted(tmp_path.glob("model/*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    parameters = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    assert index["metadata"]["total_size"] == sum(parameters.values())
    assert all(shard.stat().st_size < 45_000 for shard in shards)  # one tensor can be larger than the limit
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    assert difference(model, theirs) < EXACT
    assert same_weights(GPTModel.from_pretrained(tmp_path / "model"), model)


def test_we_open_the_shards_of_transformers(tmp_path: Path) -> None:
    theirs = transformers_twin(lively_model(CONFIG).double())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(tmp_path.glob("theirs/*.safetensors"))) > 1
    assert difference(GPTModel.from_pretrained(tmp_path / "theirs"), theirs) < EXACT


def test_old_shards_do_not_stay_beside_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads every *.safetensors file in the directory."""
    with monkeypatch.context() as context:
        context.setattr(MyGPT.weights.formats.huggingface, "MAX_SHARD_BYTES", 20_000)
        lively_model(CONFIG).save_pretrained(tmp_path)
    model = lively_model(dataclasses.replace(CONFIG, n_layers=1))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert same_weights(GPTModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3, None])
def test_an_index_that_leads_out_of_its_directory_is_refused(name: Any, tmp_path: Path) -> None:
    lively_model(CONFIG).save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json lists .*, which is not a weights file in its directory"):
        GPTModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000])
def test_an_error_about_a_damaged_index_names_the_file(text: str, tmp_path: Path) -> None:
    lively_model(CONFIG).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is not an index of weights"):
        GPTModel.from_pretrained(tmp_path)


def test_an_error_about_a_missing_shard_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MyGPT.weights.formats.huggingface, "MAX_SHARD_BYTES", 20_000)
    lively_model(CONFIG).save_pretrained(tmp_path)
    shard = min(tmp_path.glob("model-00002-of-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        GPTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_opened_in_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    model.save_pretrained(tmp_path)
    opened = GPTModel.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name
        assert tensor.is_contiguous() or dtype == torch.float64, name  # transposed views are slow in bf16 and fp16
    assert GPTModel.from_pretrained(OPENAI, dtype=dtype).transformer.wte.weight.dtype == dtype


# The rest of a directory


def test_the_model_card_is_rewritten_unless_the_user_changed_it(tmp_path: Path) -> None:
    lively_model(CONFIG).save_pretrained(tmp_path)
    assert f"| parameters | {GPTModel(CONFIG).num_parameters():,} (float32) |" in (tmp_path / "README.md").read_text()
    lively_model(dataclasses.replace(CONFIG, n_layers=1)).save_pretrained(tmp_path)
    assert "| 1, 3, 24 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    lively_model(CONFIG).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_ctranslate2_reads_what_we_save_with_equal_logits(tmp_path: Path) -> None:
    """ctranslate2 has its own converter and its own engine in C++. It computes in float32, so logits of size 10 agree to 1e-4."""
    tokenizer = BPETokenizer.train("the cat sat by the fire " * 5, 280, progress=False)
    model = lively_model(dataclasses.replace(CONFIG, vocab_size=tokenizer.n_vocab))
    model.save_pretrained(tmp_path / "model", tokenizer)
    ctranslate2.converters.TransformersConverter(str(tmp_path / "model")).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    found = generator.forward_batch(IDS.tolist(), return_log_probs=False)
    theirs = torch.from_numpy(np.array(found).astype(np.float32))
    assert (theirs - model(IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_one_file_of_a_model_directory_opens_as_the_directory_does(qkv_bias: bool, tmp_path: Path) -> None:
    """The file always contains query, key and value biases; config.json says whether the model has them."""
    model = lively_model(dataclasses.replace(CONFIG, qkv_bias=qkv_bias))
    model.save_pretrained(tmp_path)
    assert difference(GPTModel.from_pretrained(tmp_path / "model.safetensors"), model) == 0
