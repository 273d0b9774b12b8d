"""Every example is seen exactly `epochs` times and never twice in one batch, for every batch size and kind of training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import lively_model
from MyGPT import BPETokenizer, GPTConfig
from MyGPT.cli import main
from MyGPT.commands._tuning import count_steps
from MyGPT.data.instructions import InstructionDataset, LengthGroupedSampler
from MyGPT.data.packing import PackedSampler
from MyGPT.finetuning.classification import GPTForClassification, LabelledTexts, train_classifier
from MyGPT.finetuning.preference import PreferencePairs
from MyGPT.finetuning.splits import ExampleSampler
from MyGPT.training.config import TrainConfig
from MyGPT.training.trainer import Trainer

BYTES = BPETokenizer.train("", 257, progress=False)  # one token per byte
SIZES = {"vocab_size": 257, "context_length": 32, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}


def named(i: int) -> str:
    """Return a text that only example i has. The texts have different lengths, so packed rows have one or more of them."""
    return f"<{i}>" + "." * (i * 7 % 20)


def names_in(inputs: Tensor) -> list[str]:
    """Return the name of each example in the inputs of a batch."""
    text = BYTES.decode([id_ for id_ in inputs.flatten().tolist() if id_ not in (0, BYTES.eot_token)])
    return [part.partition("<")[2] for part in text.split(">")[:-1]]


def sampler_of(rows: str, n: int, batch_size: int, seed: int) -> LengthGroupedSampler | PackedSampler:
    dataset = InstructionDataset([{"text": named(i)} for i in range(n)], BYTES)
    if rows == "packed":
        return PackedSampler(dataset, 32, batch_size, pad_token_id=256, seed=seed)
    return LengthGroupedSampler(dataset, batch_size, pad_token_id=256, seed=seed)


def check(batches: list[list[str]], n: int, batch_size: int, epochs: int, packed: bool = False) -> None:
    """Check the names of the examples in each batch."""
    assert Counter(name for batch in batches for name in batch) == {str(i): epochs for i in range(n)}
    assert all(len(set(batch)) == len(batch) for batch in batches)
    assert packed or all(len(batch) <= batch_size for batch in batches)


@pytest.mark.parametrize("rows", ["padded", "packed"])
@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 25), batch_size=st.integers(1, 40), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_instructions(rows: str, n: int, batch_size: int, epochs: int, seed: int) -> None:
    sampler = sampler_of(rows, n, batch_size, seed)
    batches = [names_in(sampler.batch(step)[0]) for step in range(epochs * sampler.batches_per_epoch)]
    check(batches, n, batch_size, epochs, rows == "packed")


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 25), batch_size=st.integers(1, 40), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_preference_pairs(n: int, batch_size: int, epochs: int, seed: int) -> None:
    pairs = PreferencePairs([{"prompt": f"<{i}>", "chosen": "a", "rejected": "b"} for i in range(n)], BYTES, 32)
    batches = [names_in(inputs) for inputs, _ in pairs.batches(batch_size, seed, epochs)]
    for batch in batches:  # the prompts with their chosen answers, then the same prompts with their rejected answers
        assert batch[: len(batch) // 2] == batch[len(batch) // 2 :]
    check([batch[: len(batch) // 2] for batch in batches], n, batch_size, epochs)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 25), batch_size=st.integers(1, 40), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_batches_of_the_commands_dpo_and_classify(n: int, batch_size: int, epochs: int, seed: int) -> None:
    texts = [(named(i), "ab"[i % 2]) for i in range(n)]
    records = [{"prompt": named(i), "chosen": "a", "rejected": "b"} for i in range(n)]
    for dataset in (LabelledTexts(texts, ["a", "b"], BYTES, 32), PreferencePairs(records, BYTES, 32)):
        sampler = ExampleSampler(dataset, batch_size, seed)
        batches = []
        for step in range(count_steps(epochs, sampler)):
            ids = sampler.batch(step)[0]
            batches.append(names_in(ids if ids.dim() == 2 else ids[:, 0]))  # of a pair, only the chosen answer
        check([[name for name in batch if name] for batch in batches], n, batch_size, epochs)


@pytest.mark.parametrize(("n", "batch_size", "epochs"), [(1, 8, 2), (3, 8, 3), (8, 8, 1), (9, 8, 2), (5, 1, 2)])
def test_classification(n: int, batch_size: int, epochs: int) -> None:
    model = GPTForClassification(lively_model(GPTConfig(**SIZES)), ["a", "b"])
    batches = []
    model.register_forward_pre_hook(lambda _, arguments: batches.append(names_in(arguments[0] * arguments[1])))
    examples = [(named(i), "ab"[i % 2]) for i in range(n)]
    train_classifier(model, examples, BYTES, torch.optim.SGD(model.parameters()), epochs, batch_size)
    check(batches, n, batch_size, epochs)


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize(("n", "batch_size", "micro_batch_size"), [(3, 8, None), (10, 4, 3), (7, 2, 1)])
def test_a_run_that_is_resumed_in_the_middle(
    rows: str, n: int, batch_size: int, micro_batch_size: int | None, tmp_path: Path
) -> None:
    """The trainer computes a batch in micro batches; each of them is one forward pass."""
    steps = 3 * sampler_of(rows, n, batch_size, 1).batches_per_epoch
    seen: list[list[str]] = []
    for max_steps, resume in ((steps // 2, False), (steps, True)):
        model = lively_model(GPTConfig(**SIZES))
        compute = model.token_loss

        def record(inputs: Tensor, *rest: Tensor, compute: Any = compute) -> Any:
            seen.append(names_in(inputs))
            return compute(inputs, *rest)

        model.token_loss = record
        config = TrainConfig(
            max_steps=max_steps,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            checkpoint_every=1,
            warmup_steps=0,
        )
        sampler = sampler_of(rows, n, batch_size, 1)
        Trainer(model, config, sampler, run_dir=tmp_path / "run", recipe={}, resume=resume, progress=False).run()
    check(seen, n, batch_size, 3, rows == "packed")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 16])
def test_the_command(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four packed rows at a batch size of 8 were once four copies of each example in two epochs, and eight at 16."""
    lively_model(GPTConfig(**SIZES)).save_pretrained(tmp_path / "base", BYTES)
    (tmp_path / "records.json").write_text(json.dumps([{"text": named(i)} for i in range(8)]))
    seen, collate = [], PackedSampler.batch

    def record(sampler: PackedSampler, step: int) -> Any:
        batch = collate(sampler, step)
        seen.append(names_in(batch[0]))
        return batch

    monkeypatch.setattr(PackedSampler, "batch", record)
    options = (
        f"--rows packed --epochs 2 --batch_size {batch_size} --train_fraction 1 --test_fraction 0 --warmup_steps 0"
    )
    files = [
        "--model",
        str(tmp_path / "base"),
        "--data",
        str(tmp_path / "records.json"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["finetune", *files, *options.split(), "--sample_every", "0", "--device", "cpu"]) == 0
    check(seen, 8, batch_size, 2, packed=True)
