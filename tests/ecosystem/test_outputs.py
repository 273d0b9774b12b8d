"""The result of a model with labels, in the hands of tools that read results by position or by name."""

from __future__ import annotations

import io

import pytest
import torch
from accelerate.utils import convert_to_fp32, recursively_apply
from torch.utils._pytree import tree_map

from conftest import lively_model
from MyGPT import GPTConfig
from MyGPT.loss import CausalLMOutput
from oracles_model import transformers_twin

MODEL = lively_model(GPTConfig(vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=1, drop_rate=0.0))
IDS = torch.randint(67, (2, 5), generator=torch.Generator().manual_seed(2))


def test_positions_and_names_are_those_of_transformers() -> None:
    ours, theirs = MODEL(IDS, labels=IDS), transformers_twin(MODEL)(IDS, labels=IDS, use_cache=False)
    assert list(ours.keys()) == list(theirs.keys())
    assert len(ours) == len(theirs) and len(ours[1:]) == 1
    for read in (
        lambda it: it["loss"],
        lambda it: it[0],
        lambda it: dict(it)["loss"],
        lambda it: dict(it.items())["loss"],
    ):
        assert read(ours) is ours.loss
        assert read(theirs) is theirs.loss
    for read in (lambda it: it["logits"], lambda it: it[1], lambda it: it[-1], lambda it: it[1:][0]):
        assert read(ours) is ours.logits
        assert read(theirs) is theirs.logits
    for output in (ours, theirs):
        assert "loss" in output and "hidden_states" not in output
        with pytest.raises(KeyError, match="hidden_states"):
            output["hidden_states"]
    loss, logits = ours
    assert loss is ours.loss and logits is ours.logits


def test_accelerate_converts_its_tensors() -> None:
    half = tree_map(torch.Tensor.bfloat16, MODEL(IDS, labels=IDS))
    assert type(half) is CausalLMOutput and half.loss.dtype == torch.bfloat16
    full = convert_to_fp32(half)
    assert type(full) is CausalLMOutput and {tensor.dtype for tensor in full} == {torch.float32}
    moved = recursively_apply(lambda tensor: tensor[None], full, error_on_other_type=True)
    assert moved["logits"].shape == (1, *full.logits.shape)


@pytest.mark.slow
def test_the_compiler_reads_it_in_one_graph() -> None:
    def loss(ids: torch.Tensor) -> torch.Tensor:
        output = MODEL(ids, labels=ids)
        assert "loss" in output
        return output["loss"] + output.loss + output[0]

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), 3 * MODEL(IDS, labels=IDS).loss)


@pytest.mark.slow
def test_an_exported_program_that_returns_it_can_be_saved() -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(MODEL, (), {"input_ids": IDS, "labels": IDS}), file)
    file.seek(0)
    output = torch.export.load(file).module()(input_ids=IDS, labels=IDS)
    assert type(output) is CausalLMOutput
    torch.testing.assert_close(output.loss, MODEL(IDS, labels=IDS).loss)
