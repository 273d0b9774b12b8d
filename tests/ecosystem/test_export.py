"""torch.export, torch.jit.trace and torch.onnx.export on a GPTModel, run at sizes other than those of the example."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel

KINDS = ["plain", "mask", "labels"]
# With one layer, whose code is that of all layers, the slow exporters take a third of the time.
SIZES = {"vocab_size": 67, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 1, "drop_rate": 0.0}


def model_with(tie_weights: bool) -> GPTModel:
    return lively_model(GPTConfig(**SIZES, qkv_bias=True, tie_weights=tie_weights))


def inputs(kind: str, B: int, T: int) -> dict[str, Tensor]:
    ids = torch.randint(67, (B, T), generator=torch.Generator().manual_seed(T))
    mask = torch.ones_like(ids)
    mask[0, : T // 2] = 0
    return {"input_ids": ids} | {
        "plain": {},
        "mask": {"attention_mask": mask},
        "labels": {"labels": ids.masked_fill(mask == 0, -100)},
    }[kind]


def sizes(kind: str) -> list[tuple[int, int]]:
    """Return pairs of B and T to compute. torch.export computes a loss only where there are at least two targets."""
    return [(3, 9), (1, 16), (2, 3)] + [(2, 1)] * (kind != "labels")


def assert_same(ours: object, model: GPTModel, arguments: dict[str, Tensor]) -> None:
    expected = tree_leaves(model(**arguments))
    results = [torch.as_tensor(leaf) for leaf in tree_leaves(ours)]
    assert len(results) == len(expected)
    for one, other in zip(results, expected, strict=True):
        # Logits are up to 10, and the exporters may order sums otherwise.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tie_weights"), [("plain", True), ("mask", False), ("labels", True)])
def test_an_exported_program_accepts_other_sizes(kind: str, tie_weights: bool) -> None:
    model, example = model_with(tie_weights), inputs(kind, 2, 5)
    dynamic = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, dynamic)).module()
    for B, T in sizes(kind):
        arguments = inputs(kind, B, T)
        assert_same(program(**arguments), model, arguments)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_model_accepts_other_sizes(kind: str, tie_weights: bool) -> None:
    model = model_with(tie_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit as a whole is deprecated
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs(kind, 2, 5))
    for B, T in sizes(kind):
        arguments = inputs(kind, B, T)
        assert_same(traced(**arguments), model, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # The exporter warns about torch's own code.
@pytest.mark.parametrize(("kind", "tie_weights"), [("plain", True), ("mask", False), ("labels", True)])
def test_onnx_runtime_runs_a_model_that_torch_exports(kind: str, tie_weights: bool, tmp_path: Path) -> None:
    import onnxruntime

    model, example = model_with(tie_weights), inputs(kind, 2, 5)
    dynamic = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    options = {"dynamic_shapes": dict.fromkeys(example, dynamic), "external_data": False, "verbose": False}
    torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=example, dynamo=True, **options)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for B, T in sizes(kind):
        arguments = inputs(kind, B, T)
        given = {name: tensor.numpy() for name, tensor in arguments.items()}
        assert_same(session.run(None, given), model, arguments)
