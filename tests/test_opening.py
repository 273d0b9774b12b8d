"""open_model: one function for released names, directories, runs, adapters and files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import lively_model, same_weights
from MyGPT import BPETokenizer, GPTConfig, GPTModel, get_tokenizer, open_model
from MyGPT.cli import main
from MyGPT.data.templates import load_template
from MyGPT.devices import pick_device
from MyGPT.opening import find_model_files
from MyGPT.weights.formats import FORMATS, open_checkpoint
from MyGPT.weights.formats.gguf import write_gguf
from MyGPT.weights.released import FILES
from oracles_layouts import NanoGPT, write_llmc
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


# Adapters whose model is known only by its name


def save_adapter(directory: Path, base: str, model: GPTModel) -> Path:
    """Save a small LoRA adapter that claims to have been trained on `base`."""
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"]))
    peft_model.peft_config["default"].base_model_name_or_path = base
    peft_model.save_pretrained(directory, save_embedding_layers=False)
    return directory


USERS = {
    "generate": ["--model", "ADAPTER"],
    "chat": ["--model", "ADAPTER"],
    "info": ["ADAPTER"],
    "evaluate": ["--model", "ADAPTER", "--data", "alice"],
    "explain": ["the cat", "--model", "ADAPTER", "--out", "OUT.html"],
    "plot": ["lens", "--model", "ADAPTER", "--text", "the cat", "--out", "OUT.png"],
    "bench": ["--model", "ADAPTER"],
}
"""The arguments of every command that opens an adapter."""


def run_command(command: str, adapter: Path, out: Path) -> int:
    arguments = [part.replace("ADAPTER", str(adapter)).replace("OUT", str(out)) for part in USERS[command]]
    return main([command, *arguments])


@pytest.mark.parametrize("command", USERS)
@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("gpt2", "gpt2"),
        ("124M", "124M"),
        ("openai-community/gpt2-xl", "openai-community/gpt2-xl"),
        ("user/model", "hf://user/model"),
        ("hf://user/model", "hf://user/model"),
    ],
)
def test_an_adapter_never_makes_a_command_download_its_model(
    base: str,
    name: str,
    command: str,
    tmp_path: Path,
    model: GPTModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stranger's adapter could otherwise make us download gigabytes, or a model of the stranger's choice."""
    adapter = save_adapter(tmp_path / "an adapter", base, model)
    for function in ("download_from_hub", "download_gpt2"):
        monkeypatch.setattr(f"MyGPT.weights.pretrained.{function}", lambda *arguments: pytest.fail("it downloads"))
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("MyGPT.commands._model.start_build", lambda *arguments: None)
    assert run_command(command, adapter, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"was trained on {base}, which is not on this machine" in error
    assert f"mygpt download {name}, " in error and f"--model MODEL --adapter '{adapter}'" in error


@pytest.mark.parametrize(
    ("base", "cached"),
    [
        ("user/model", "user--model"),
        ("hf://user/model", "user--model"),
        ("gpt2", "openai-community--gpt2"),
        ("openai-community/gpt2", "openai-community--gpt2"),
    ],
)
def test_an_adapter_opens_with_its_model_from_the_cache(
    base: str, cached: str, tmp_path: Path, model: GPTModel, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    model.save_pretrained(tmp_path / "models" / cached, bpe)
    adapter = save_adapter(tmp_path / "adapter", base, model)
    opened, tokenizer = open_model(adapter, "cpu")
    assert same_weights(opened, GPTModel.from_pretrained(tmp_path / "models" / cached))
    assert tokenizer.n_vocab == bpe.n_vocab


def test_openais_files_in_the_cache_are_the_model_of_an_adapter_on_the_hubs_gpt2(
    tmp_path: Path, model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    (tmp_path / "models/124M").mkdir(parents=True)
    adapter = save_adapter(tmp_path / "adapter", "openai-community/gpt2", model)
    for name in FILES:
        with pytest.raises(FileNotFoundError, match="not on this machine"):
            find_model_files(adapter)
        (tmp_path / "models/124M" / name).write_bytes(b"")
    assert find_model_files(adapter).path == tmp_path / "models/124M"


def test_a_local_model_with_the_name_of_a_repository_is_the_model_of_an_adapter(
    tmp_path: Path, model: GPTModel, bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/base", bpe)
    adapter = save_adapter(tmp_path / "adapter", "runs/base", model)
    assert find_model_files(adapter).path == Path("runs/base")
    shutil.rmtree("runs/base")
    with pytest.raises(FileNotFoundError, match="was trained on runs/base, which is not on this machine"):
        find_model_files(adapter)


# Commands open the same models


@pytest.mark.parametrize(
    "kind",
    ["directory", "run", "config", "safetensors", "bin", "shard", "nanogpt", "openai", "adapter", "run of adapter"],
)
def test_info_opens_what_generate_opens(
    kind: str,
    tmp_path: Path,
    model: GPTModel,
    bpe: BPETokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("MyGPT.weights.formats.huggingface.MAX_SHARD_BYTES", 20_000 if kind == "shard" else 10**9)
    directory, n_parameters = tmp_path / "run/model", model.num_parameters()
    model.save_pretrained(directory, bpe)
    path = {
        "directory": directory,
        "run": tmp_path / "run",
        "config": directory / "config.json",
        "safetensors": directory / "model.safetensors",
        "bin": directory / "pytorch_model.bin",
        "shard": next(directory.glob("model-00002-of-*"), None),
        "nanogpt": tmp_path / "ckpt.pt",
        "openai": OPENAI,
        "adapter": tmp_path / "tuned/adapter",
        "run of adapter": tmp_path / "tuned",
    }[kind]
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    torch.save(NanoGPT(280, 16, 24, 3, 2, bias=True).checkpoint(), tmp_path / "ckpt.pt")
    assert path is not None
    if "adapter" in kind:
        save_adapter(tmp_path / "tuned/adapter", str(directory), model)
        n_adapter = 2 * 2 * (24 + 72)  # two layers of rank 2
    opened = find_model_files(path).model()
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{opened.num_parameters():,} (" in out and re.search("complete +yes", out)
    assert kind == "openai" or opened.num_parameters() == n_parameters
    assert ("adapter" not in kind) or f"{tmp_path / 'tuned/adapter'}, {n_adapter:,} parameters" in out


@pytest.mark.parametrize("wrong", ["nothing", "text", "config", "index", "base"])
def test_info_and_generate_give_the_same_error(
    wrong: str,
    tmp_path: Path,
    model: GPTModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / wrong
    if wrong == "text":
        path.write_text("hello")
    elif wrong in ("config", "index"):
        path.mkdir()
        (path / "config.json").write_text("{}" if wrong == "index" else "{")
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    elif wrong == "base":
        save_adapter(path, str(tmp_path / "gone"), model)
    monkeypatch.setattr("MyGPT.commands.generate.start_build", lambda *arguments: None)
    assert main(["generate", "--model", str(path)]) == 2
    expected = capsys.readouterr().err.removeprefix("mygpt generate: ")
    assert main(["info", str(path)]) == 2
    assert capsys.readouterr().err.removeprefix("mygpt info: ") == expected


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
    write_gguf(model, tmp_path / "model.gguf", None)
    write_llmc(tmp_path / "model.bin", model, torch.float32)
    found += [open_checkpoint(tmp_path / name).format for name in ("model.pth", "model.gguf", "model.bin")]
    assert len(found) == len(set(found)) == len(FORMATS)
    with pytest.raises(FileNotFoundError, match="no model at"):
        open_checkpoint(tmp_path / "nothing")


def test_an_unknown_or_missing_device_names_the_available_ones() -> None:
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"device 'tpu' is not available on this machine: choose .*cpu"):
        pick_device("tpu")
