"""Model directories: MyGPT and transformers open each other's, and damaged or incomplete ones give clear errors."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Model

import MyGPT.weights.checkpoint
from conftest import lively_model, same_weights
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, generate, load_tokenizer
from oracles_model import transformers_twin

IDS = torch.arange(20).reshape(2, 10) * 3


def config(**changes: Any) -> GPTConfig:
    sizes = {"vocab_size": 67, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.25}
    return GPTConfig(**{**sizes, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lively_model(config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bpe() -> BPETokenizer:
    return BPETokenizer.train("the cat and the 🐈 sat by the fire " * 5, 280, progress=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# To transformers, and back


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformers_opens_what_we_save_with_equal_logits(
    dtype: torch.dtype, qkv_bias: bool, tie_weights: bool, tmp_path: Path
) -> None:
    """The two sum in different orders: logits of size 10 agree to 1e-4 in float32 and to 1e-10 in float64."""
    model = lively_model(config(qkv_bias=qkv_bias, tie_weights=tie_weights)).to(dtype)
    model.save_pretrained(tmp_path / "model")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.config.resid_pdrop == theirs.config.embd_pdrop == theirs.config.attn_pdrop == 0.25
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert (model(IDS) - theirs.eval()(IDS).logits).abs().max() < tolerance


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_we_open_what_we_save_bit_by_bit(dtype: torch.dtype, qkv_bias: bool, tie_weights: bool, tmp_path: Path) -> None:
    model = lively_model(config(qkv_bias=qkv_bias, tie_weights=tie_weights)).to(dtype)
    model.save_pretrained(tmp_path / "model")
    again = GPTModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert (again.lm_head.weight is again.transformer.wte.weight) == tie_weights
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == dtype and torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("tie_weights", [True, False])
def test_we_open_what_transformers_saves_with_equal_logits(tie_weights: bool, tmp_path: Path) -> None:
    theirs = transformers_twin(lively_model(config(tie_weights=tie_weights, qkv_bias=True)).double())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPTModel.from_pretrained(tmp_path / "theirs")
    assert ours.config.qkv_bias and ours.config.tie_weights == tie_weights
    assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-10


def test_we_open_transformers_model_without_a_head(tmp_path: Path) -> None:
    """Its tensor names lack the prefix `transformer.`, like those of the released gpt2."""
    theirs = transformers_twin(lively_model(config(qkv_bias=True)).double())
    theirs.transformer.save_pretrained(tmp_path / "theirs")
    ours = GPTModel.from_pretrained(tmp_path / "theirs")
    assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-10
    hidden = GPT2Model.from_pretrained(tmp_path / "theirs").eval()(IDS).last_hidden_state
    assert (ours.lm_head(hidden) - ours(IDS)).abs().max() < 1e-10


def test_mask_buffers_of_old_checkpoints_are_ignored(saved: Path) -> None:
    before = GPTModel.from_pretrained(saved)
    change(saved, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}))
    change(saved, lambda tensors: tensors.update({"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}))
    assert torch.equal(GPTModel.from_pretrained(saved)(IDS), before(IDS))


def test_a_saved_tokenizer_gives_transformers_the_same_ids(tmp_path: Path, bpe: BPETokenizer) -> None:
    lively_model(config(vocab_size=bpe.n_vocab)).save_pretrained(tmp_path / "model", bpe)
    text = "the 🐈 sat<|endoftext|>Ünknown\n\n  fire"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs(text)["input_ids"] == bpe.encode(text) == load_tokenizer(tmp_path / "model").encode(text)
    assert theirs.decode(bpe.encode(text)) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == theirs.eos_token_id == bpe.eot_token


def test_a_tokenizer_without_an_end_of_text_can_be_saved(tmp_path: Path) -> None:
    chars = CharTokenizer.from_text("the cat")
    lively_model(config(vocab_size=chars.n_vocab)).save_pretrained(tmp_path / "model", chars)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a cat")["input_ids"] == chars.encode("a cat")


def test_a_model_that_began_with_torchs_weights_can_be_opened_again_by_both(tmp_path: Path) -> None:
    model = GPTModel(config(init_std=None, tie_weights=False)).eval()
    model.save_pretrained(tmp_path / "model")
    assert same_weights(GPTModel.from_pretrained(tmp_path / "model"), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (model(IDS) - theirs(IDS).logits).abs().max() < 1e-4


def test_transformers_continues_what_we_saved_as_we_do(tmp_path: Path, bpe: BPETokenizer) -> None:
    model = lively_model(config(vocab_size=bpe.n_vocab)).double()
    model.save_pretrained(tmp_path / "model", bpe)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    mask = torch.ones_like(IDS)
    expected = theirs.generate(IDS, attention_mask=mask, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(generate(model, IDS, 6), expected)


def test_an_opened_model_is_in_evaluation_mode_and_can_be_trained(saved: Path) -> None:
    model = GPTModel.from_pretrained(saved)
    assert not any(module.training for module in model.modules())
    before = model(IDS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert not torch.equal(model(IDS), before)
    assert model.lm_head.weight is model.transformer.wte.weight


def n_mappings(path: Path) -> int:
    """Return how often a file is mapped into this process."""
    return Path("/proc/self/maps").read_text().count(f" {path.resolve()}")


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mapped files")


@needs_proc
def test_weights_are_mapped_once_and_only_while_the_model_lives(saved: Path) -> None:
    model = GPTModel.from_pretrained(saved)
    assert n_mappings(saved / "model.safetensors") == 1
    assert model.transformer.h[0].mlp.c_fc.weight.T.is_contiguous()  # (in, out), as in the file
    del model
    assert n_mappings(saved / "model.safetensors") == 0


@needs_proc
@pytest.mark.parametrize("reason", ["another dtype", "Windows"])
def test_a_model_that_has_to_be_copied_keeps_nothing_of_its_file(
    reason: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "Windows":
        monkeypatch.setattr(MyGPT.weights.checkpoint, "COPY_WEIGHTS", True)
    model = GPTModel.from_pretrained(saved, dtype=torch.float32 if reason == "Windows" else torch.bfloat16)
    assert n_mappings(saved / "model.safetensors") == 0
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize("happens", ["saved over", "deleted"])
def test_an_opened_model_outlives_its_file(happens: str, saved: Path) -> None:
    model = GPTModel.from_pretrained(saved)
    before = model(IDS)
    if happens == "deleted":
        (saved / "model.safetensors").unlink()
    else:
        lively_model(config()).save_pretrained(saved)
    assert torch.equal(model(IDS), before)


def test_changing_an_opened_model_does_not_change_its_file(saved: Path) -> None:
    before = contents(saved)
    model = GPTModel.from_pretrained(saved)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    trained = model(IDS)
    assert contents(saved) == before
    model.save_pretrained(saved)  # replaces the file from which the weights are mapped
    assert (GPTModel.from_pretrained(saved)(IDS) - trained).abs().max() < 1e-4  # float32, logits of size 10


def two_steps(model: GPTModel, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)  # for dropout
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


def test_an_opened_model_trains_bit_identically_to_the_saved_one(saved: Path) -> None:
    """The optimizer's state is loaded too. With transposed weights, torch's fused AdamW would silently combine each number with
    the moments of another."""
    model = GPTModel(config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    two_steps(model, optimizer)
    model.save_pretrained(saved)
    states = copy.deepcopy(optimizer.state_dict())
    two_steps(model, optimizer)
    opened = GPTModel.from_pretrained(saved).train()
    again = torch.optim.AdamW(opened.parameters(), lr=0.01, fused=True)
    again.load_state_dict(states)
    two_steps(opened, again)
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@needs_proc
def test_a_model_that_trains_keeps_nothing_of_its_file(saved: Path) -> None:
    model = GPTModel.from_pretrained(saved)
    parameters = list(model.parameters())
    assert n_mappings(saved / "model.safetensors") == 1
    nn.ModuleList([model]).train()  # as wrappers of PEFT and torch do
    assert n_mappings(saved / "model.safetensors") == 0
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_files_have_the_permissions_of_any_other(saved: Path) -> None:
    ordinary = saved.parent / "ordinary"
    ordinary.touch()
    for path in saved.iterdir():
        assert path.stat().st_mode == ordinary.stat().st_mode, path.name


def test_a_run_is_opened_by_the_model_in_it(tmp_path: Path) -> None:
    model = lively_model(config())
    model.save_pretrained(tmp_path / "run/model")
    (tmp_path / "run/config.yaml").write_text("max_steps: 3\n")
    for run in (tmp_path / "run", str(tmp_path / "run")):
        assert same_weights(GPTModel.from_pretrained(run), model)


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = lively_model(config()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Saving that fails


def test_saving_again_replaces_the_model_and_keeps_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    other = lively_model(config(n_layers=1))
    other.save_pretrained(saved)
    assert same_weights(GPTModel.from_pretrained(saved), other)
    assert (saved / "notes.txt").read_text() == "mine"
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_in_the_words_of_safetensors(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [disk_full, disk_full_in_the_words_of_safetensors])
def test_a_full_disk_leaves_the_old_model_whole_and_nothing_beside_it(
    failure: Callable[..., None], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved.parent)
    monkeypatch.setattr(safetensors.torch, "save_file", failure)
    with pytest.raises(OSError, match="No space left on device"):
        lively_model(config(n_layers=1)).save_pretrained(saved)
    assert contents(saved.parent) == before


def test_a_full_disk_leaves_no_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        lively_model(config()).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_saved_leaves_the_old_model_whole(saved: Path) -> None:
    class Broken:
        eot_token = 0

        def save(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(saved.parent)
    with pytest.raises(OSError, match="No space left"):
        lively_model(config(n_layers=1)).save_pretrained(saved, Broken())
    assert contents(saved.parent) == before


def test_a_file_in_the_place_of_the_directory_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OSError):
        lively_model(config()).save_pretrained(tmp_path / "thesis.txt")
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_head_that_is_no_longer_tied_is_not_silently_left_out(tmp_path: Path) -> None:
    """A tied head is not saved, so a head that the user replaced would be lost without an error."""
    model = lively_model(config())
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tie_weights"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Opening damaged directories


def change(directory: Path, alter: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    alter(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_every_missing_unknown_and_misshapen_tensor_is_in_one_error(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["transformer.ln_f.bias"], tensors["transformer.h.1.mlp.c_fc.weight"]
        tensors["transformer.h.7.ln_1.weight"] = torch.ones(24)
        tensors["transformer.wpe.weight"] = torch.ones(15, 24)
        tensors["transformer.h.0.attn.c_proj.weight"] = torch.ones(24, 23)
        tensors["transformer.h.0.attn.c_attn.bias"] = torch.ones(71)

    change(saved, spoil)
    with pytest.raises(ValueError) as caught:
        GPTModel.from_pretrained(saved)
    for part in (
        str(saved / "model.safetensors"),
        "transformer.ln_f.bias is missing",
        "transformer.h.1.mlp.c_fc.weight is missing",
        "transformer.h.7.ln_1.weight is unknown",
        "transformer.wpe.weight is (15, 24), expected (16, 24)",
        "transformer.h.0.attn.c_proj.weight is (23, 24), expected (24, 24)",
        "transformer.h.0.attn.c_attn.bias is (71,), expected (72,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 100, 1000, -1])
def test_an_error_about_truncated_weights_names_the_file(keep: int, saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{weights} is damaged"):
        GPTModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"n_embd": 24',
        b"[1, 2]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"model_type": "llama"}',
        b'{"model_type": "gpt2", "activation_function": "relu"}',
        b'{"model_type": "gpt2", "n_embd": "24"}',
        b'{"model_type": "gpt2", "n_embd": 25, "n_head": 3}',
        b'{"model_type": "gpt2", "resid_pdrop": 0.1, "embd_pdrop": 0.2}',
        b'{"model_type": "gpt2", "resid_pdrop": null}',
        b'{"model_type": "gpt2", "resid_pdrop": []}',
        b"[" * 100_000,
    ],
)
def test_an_error_about_an_invalid_config_names_the_file(text: bytes, saved: Path) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"{saved / 'config.json'} does not describe a GPT-2 model"):
        GPTModel.from_pretrained(saved)


def test_an_error_about_a_missing_file_names_the_file(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{saved / 'model.safetensors'} is missing"):
        GPTModel.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{saved}.*config.json"):
        GPTModel.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file"):
        GPTModel.from_pretrained(saved / "nowhere")


def test_config_json_says_what_transformers_needs(saved: Path) -> None:
    described = json.loads((saved / "config.json").read_text())
    assert described["model_type"] == "gpt2" and described["architectures"] == ["GPT2LMHeadModel"]
    assert described["bos_token_id"] is None and described["eos_token_id"] is None
