"""open_model: one function for released names, directories, runs, adapters and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import lively_model, same_weights
from MyGPT import BPETokenizer, GPTConfig, GPTModel, get_tokenizer, open_model
from MyGPT.data.templates import load_template
from MyGPT.devices import pick_device
from MyGPT.opening import find_model_files
from MyGPT.weights.formats import FORMATS, open_checkpoint
from oracles_layouts import NanoGPT
from oracles_model import transformers_twin
from oracles_openai import OPENAI

IDS = torch.arange(20).reshape(2, 10) * 3
CONFIG = GPTConfig(vocab_size=280, context_length=16, emb_dim=24, n_heads=3, n_layers=2, qkv_bias=True)


@pytest.fixture
def bpe() -> BPETokenizer:
    return BPETokenizer.train("the cat sat by the fire " * 5, 280, progress=False)


@pytest.fixture
def model() -> GPTModel:
    return lively_model(CONFIG)


def test_a_directory_a_run_and_a_file_open_with_the_same_weights_and_tokenizer(
    tmp_path: Path, model: GPTModel, bpe: BPETokenizer
) -> None:
    model.save_pretrained(tmp_path / "run/model", bpe)
    load_template("book").save(tmp_path / "run/model")
    for path in (tmp_path / "run", str(tmp_path / "run/model"), tmp_path / "run/model/model.safetensors"):
        opened, tokenizer = open_model(path, "cpu")
        assert same_weights(opened, model) and not opened.training
        assert tokenizer.encode("the cat") == bpe.encode("the cat")
        assert find_model_files(path).template() == load_template("book")


def test_a_model_without_tokenizer_gets_gpt2s_only_if_the_vocabulary_is_as_large(tmp_path: Path) -> None:
    torch.save(NanoGPT(50304, 16, 8, 1, 1, bias=True).checkpoint(), tmp_path / "ckpt.pt")
    _, tokenizer = open_model(tmp_path / "ckpt.pt", "cpu")
    assert tokenizer.encode("Hello") == get_tokenizer("gpt2").encode("Hello")
    torch.save(NanoGPT(67, 16, 8, 1, 1, bias=True).checkpoint(), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no tokenizer"):
        open_model(tmp_path / "ckpt.pt", "cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("has_template", [True, False])
def test_an_adapter_opens_with_its_model_and_the_nearest_template(
    has_template: bool, tmp_path: Path, model: GPTModel, bpe: BPETokenizer
) -> None:
    """The logits are those of PEFT. float32, logits of size 10: merged weights are rounded once more."""
    model.save_pretrained(tmp_path / "base", bpe)
    load_template("book").save(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"])
    peft_model = get_peft_model(GPTModel.from_pretrained(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, peft_model.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = peft_model(IDS)
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft_model.save_pretrained(tmp_path / "run/adapter", save_embedding_layers=False)
    if has_template:
        load_template("alpaca").save(tmp_path / "run/adapter")
    for arguments in (
        (tmp_path / "run", "cpu"),
        (tmp_path / "run/adapter", "cpu"),
        (tmp_path / "base", "cpu", tmp_path / "run"),
    ):
        opened, tokenizer = open_model(*arguments)
        with torch.no_grad():
            assert (opened(IDS) - expected).abs().max() < 1e-3
        assert tokenizer.encode("the cat") == bpe.encode("the cat")
        files = find_model_files(arguments[0], *arguments[2:])
        assert files.template() == load_template("alpaca" if has_template else "book")


@pytest.mark.parametrize("n_shards", [1, 2])
def test_a_directory_of_older_transformers_opens_with_equal_logits(n_shards: int, tmp_path: Path) -> None:
    """Before safetensors, transformers wrote pytorch_model.bin, or several such files and an index."""
    theirs = transformers_twin(lively_model(CONFIG).double())
    theirs.config.save_pretrained(tmp_path)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    if n_shards == 1:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        file_of = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(weights)}
        for file in set(file_of.values()):
            torch.save({name: weights[name] for name in weights if file_of[name] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": file_of}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = GPTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-10
    if n_shards == 2:
        (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
            GPTModel.from_pretrained(tmp_path)


def test_every_format_is_tried_and_describes_itself(tmp_path: Path, model: GPTModel) -> None:
    model.save_pretrained(tmp_path / "model")
    shutil.copy(tmp_path / "model/model.safetensors", tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    found = [open_checkpoint(path).format for path in (OPENAI, tmp_path / "model", tmp_path / "model.safetensors")]
    found.append(open_checkpoint(tmp_path / "model.pth").format)
    assert len(found) == len(set(found)) == len(FORMATS)
    with pytest.raises(FileNotFoundError, match="no model at"):
        open_checkpoint(tmp_path / "nothing")


def test_an_unknown_or_missing_device_names_the_available_ones() -> None:
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"device 'tpu' is not available on this machine: choose .*cpu"):
        pick_device("tpu")
