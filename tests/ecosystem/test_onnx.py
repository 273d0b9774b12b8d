"""ONNX files with a KV cache, run by ONNX Runtime and compared with transformers and with `generate`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel, generate
from MyGPT.ecosystem import onnx as our_onnx
from MyGPT.ecosystem.onnx import write_onnx
from oracles_model import transformers_twin

SIZES = {"vocab_size": 67, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.1}
PAST = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]


def model_with(tie_weights: bool) -> GPTModel:
    return lively_model(GPTConfig(**SIZES, qkv_bias=True, tie_weights=tie_weights))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tied model in training mode, whose dropout must not be in the file."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(model_with(tie_weights=True).train(), path)
    assert [it.name for it in path.parent.iterdir()] == ["model.onnx"]
    return path


def session_of(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def inputs(ids: np.ndarray, mask: np.ndarray, past: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the inputs as Optimum passes them. mask (B, S) covers the earlier tokens too."""
    positions = np.where(mask == 0, 1, mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return arrays | dict(zip(PAST, past, strict=True))


def no_past(B: int, dtype: type = np.float32) -> list[np.ndarray]:
    return [np.zeros((B, 3, 0, 8), dtype)] * 4


@pytest.mark.slow
def test_names_and_shapes_are_those_of_optimum(file: Path) -> None:
    session = session_of(file)
    assert [it.name for it in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *PAST]
    presents = [name.replace("past_key_values", "present") for name in PAST]
    assert [it.name for it in session.get_outputs()] == ["logits", *presents]
    shapes = {it.name: it.shape for it in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 3, "past_sequence_length", 8]
    assert shapes["logits"] == ["batch_size", "sequence_length", 67]
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()  # a place on the user's disk


@pytest.mark.slow
def test_a_padded_batch_has_the_logits_of_transformers(file: Path) -> None:
    ids = torch.randint(67, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :2] = 0
    twin = transformers_twin(model_with(tie_weights=True))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = twin(ids, attention_mask=mask, position_ids=positions).logits
    session, start, past = session_of(file), 0, no_past(3)
    for end in (7, 8, 9, 14, 16):
        given = inputs(ids[:, start:end].numpy(), mask[:, :end].numpy(), past)
        logits, *past = session.run(None, given)
        tokens = mask[:, start:end] == 1
        # Logits are up to 10. ONNX Runtime's tanh and exp are accurate to about 1e-6.
        torch.testing.assert_close(torch.from_numpy(logits)[tokens], expected[:, start:end][tokens], rtol=0, atol=5e-5)
        start = end


@pytest.mark.slow
def test_greedy_tokens_are_those_of_generate(file: Path) -> None:
    prompt = torch.tensor([[5, 11, 2]])
    ids, past, new = prompt.numpy(), no_past(1), prompt.numpy()
    session = session_of(file)
    while ids.shape[1] < 16:
        logits, *past = session.run(None, inputs(new, np.ones_like(ids), past))
        new = logits[:, -1:].argmax(2)
        ids = np.concatenate([ids, new], axis=1)
    assert ids.tolist() == generate(model_with(tie_weights=True), prompt, 13).tolist()
    assert len(set(ids[0].tolist())) > 4


@pytest.mark.slow
def test_half_precision_and_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights above 2 GB are in a second file; here the limit is 0."""
    monkeypatch.setattr(our_onnx, "_LARGEST_FILE", 0)
    model = model_with(tie_weights=False)
    write_onnx(model, tmp_path / "half.onnx", dtype="f16")
    assert sorted(it.name for it in tmp_path.iterdir()) == ["half.onnx", "half.onnx.data"]
    n_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert 0.9 * n_bytes < (tmp_path / "half.onnx.data").stat().st_size < 1.5 * n_bytes
    ids = torch.randint(67, (1, 16))
    given = inputs(ids.numpy(), np.ones_like(ids.numpy()), no_past(1, np.float16))
    logits = session_of(tmp_path / "half.onnx").run(["logits"], given)[0]
    assert logits.dtype == np.float16
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits).float(), model(ids), rtol=0, atol=0.05)  # logits up to 10
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_a_file_with_other_logits_is_not_kept(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(tie_weights=True)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.bias[3] += 0.01
    monkeypatch.setattr(our_onnx, "_export", lambda model, path: shutil.copy(file, path))
    old = tmp_path / "model.onnx"
    old.write_text("the user's file")
    with pytest.raises(ValueError, match=r"differ from the model's by up to 0\.0.*no file was written"):
        write_onnx(model, old)
    assert [it.name for it in tmp_path.iterdir()] == ["model.onnx"] and old.read_text() == "the user's file"
    write_onnx(model_with(tie_weights=True), old)
    assert old.read_bytes() == file.read_bytes()


def test_missing_packages_and_other_dtypes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = None
    with pytest.raises(ValueError, match="dtype of an ONNX file must be f32 or f16, got 'bf16'"):
        write_onnx(model, tmp_path / "model.onnx", dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        write_onnx(model, tmp_path / "missing" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs the package onnxscript: pip install 'mygpt\[onnx\]'"):
        write_onnx(model, tmp_path / "model.onnx")
