"""Estimates of memory, compared with what torch allocates, and of parameters and time."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from MyGPT import GPT2_CONFIGS, GPTConfig, GPTModel
from MyGPT.cli import main
from MyGPT.commands._findings import find_recipe
from MyGPT.costs import cache_bytes, generation_bytes, parameters_by_part, training_memory
from places import ROOT

CONFIG = GPTConfig(vocab_size=100, context_length=64, emb_dim=64, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True)
B, T, C = 3, 64, 64


def saved_bytes(config: GPTConfig, bf16: bool = False, gradient_checkpointing: bool = False) -> int:
    """Return the bytes that autograd stores for the backward pass of B x T tokens. Parameters do not count."""
    model = GPTModel(config).train()
    model.gradient_checkpointing = gradient_checkpointing
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(config.vocab_size, (B, T))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.token_loss(ids, ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(n_layers: int, drop_rate: float, bf16: bool) -> None:
    """The estimate is within 3%, because it leaves out a few numbers per token: means, deviations and positions."""
    config = dataclasses.replace(CONFIG, n_layers=n_layers, drop_rate=drop_rate)
    estimate = training_memory(config, B, bf16=bf16)
    logits = 4 * B * T * config.vocab_size
    assert estimate.activations + estimate.copies + logits == pytest.approx(saved_bytes(config, bf16), rel=0.03)


def test_checkpointing_keeps_the_blocks_inputs_and_one_block() -> None:
    def activations(config: GPTConfig, **options: Any) -> int:
        return training_memory(config, B, **options).activations

    deeper = dataclasses.replace(CONFIG, n_layers=4)
    one_block = (activations(deeper) - activations(CONFIG)) // 2
    estimate = activations(deeper, gradient_checkpointing=True)
    logits = 4 * B * T * CONFIG.vocab_size
    kept = saved_bytes(deeper, gradient_checkpointing=True)
    assert estimate - one_block + logits == pytest.approx(kept, rel=0.03)


def test_the_optimizers_moments_are_as_many_as_torch_makes() -> None:
    from MyGPT.training.config import TrainConfig
    from MyGPT.training.trainer import Trainer

    for name in ("adamw", "muon"):
        training = TrainConfig(optimizer=name, batch_size=2)  # type: ignore[arg-type]
        trainer = Trainer(GPTModel(CONFIG), training, [i % 100 for i in range(500)], progress=False)
        trainer.setup()
        trainer.step()
        tensors = [t for o in trainer.optimizers for state in o.state.values() for t in state.values() if t.dim()]
        expected = training_memory(CONFIG, 2, optimizer=name)
        assert sum(tensor.nbytes for tensor in tensors) == expected.moments
        assert sum(parameter.nbytes for parameter in trainer.model.parameters()) == expected.weights


def test_the_peak_is_the_larger_of_the_two_ways() -> None:
    small, large = training_memory(CONFIG, 1, length=1), training_memory(CONFIG, 50)
    assert small.peak == small.weights + small.moments + small.gradients + 2 * 4 * 100 * C
    assert large.peak == large.weights + large.moments + large.activations + large.head
    waiting = training_memory(CONFIG, 50, accumulates=True)
    assert waiting.peak == large.peak + large.gradients


@torch.no_grad()
def test_the_cache_of_a_token_is_what_a_cache_takes() -> None:
    model = GPTModel(CONFIG)
    for dtype in (torch.float32, torch.bfloat16):
        cache = model.to(dtype).new_cache(5, 7)
        assert cache.storage.nbytes == 5 * 7 * cache_bytes(CONFIG, dtype.itemsize)
    assert generation_bytes(CONFIG, 4, 2, 10) > 4 * model.num_parameters() + 20 * cache_bytes(CONFIG)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_parts_add_up_to_the_model(tie_weights: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_weights=tie_weights)
    parts = parameters_by_part(config)
    assert sum(parts.values()) == GPTModel(config).num_parameters()
    assert parts["output head"] == (0 if tie_weights else 100 * C)
    assert parts["attention"] == 2 * (3 * C * C + 3 * C + C * C + C)
    assert parts["MLP"] == 2 * (4 * C * C + 4 * C + 4 * C * C + C)
    assert parts["LayerNorms"] == 5 * 2 * C


@pytest.mark.slow
def test_info_tells_the_cost_of_every_released_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "124M", "355M", "774M", "1558M"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("KV cache per token") == 4
    assert "KV cache per token               73.7 kB      36.9 kB" in printed  # 2 * 12 * 768 numbers
    with torch.device("meta"):
        total = GPTModel(GPT2_CONFIGS["1558M"]).num_parameters()
    assert f"{total:,}" in printed and "6,230 MB     3,115 MB" in printed


@pytest.mark.parametrize(
    "recipe", [None, "max_steps: 3", "max_steps: 3\nmicro_batch_size: 2\ndrop_rate: 0.1\noptimizer: muon"]
)
def test_the_memory_that_info_shows_adds_up_and_is_the_estimate(
    recipe: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The totals are sums of the rounded numbers in the lines above, as a reader adds them."""
    name = "gpt2"
    if recipe is not None:
        name = str(tmp_path / "mine.yaml")
        (tmp_path / "mine.yaml").write_text(recipe)
    assert main(["info", name]) == 0
    sums, n_totals, units = [0, 0], 0, set()
    for line in capsys.readouterr().out.partition("generation\n")[2].splitlines():
        found = re.fullmatch(r" +(\w.*?) {2,}([\d,]+) (\w+) +([\d,]+) (\w+)", line)
        if found is None:  # the title of the next table, or a remark
            sums = [0, 0]
            continue
        numbers = [int(found[i].replace(",", "")) for i in (2, 4)]
        units |= {found[3], found[5]}
        if found[1].startswith("total"):
            assert numbers == sums
            n_totals += 1
        else:
            sums = [before + number for before, number in zip(sums, numbers, strict=True)]
    assert n_totals == (2 if recipe == "max_steps: 3" else 3) and len(units) == 1
    size = {"MB": 10**6, "kB": 10**3}[units.pop()]
    if recipe is None:
        config = GPT2_CONFIGS["gpt2"]
        peak = training_memory(config, 1, bf16=True, device="cpu").peak
        assert abs(numbers[1] * size - peak) < 5 * size


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("vocab_size", [100, 50_000])
def test_the_parts_at_the_peak_are_those_of_one_moment(vocab_size: int, accumulates: bool) -> None:
    memory = training_memory(dataclasses.replace(CONFIG, vocab_size=vocab_size), 2, accumulates=accumulates)
    parts = memory.at_peak()
    assert sum(parts.values()) == memory.peak and parts["weights"] == memory.weights
    assert ("activations" in parts) != ("tying" in parts)


def test_info_reads_a_recipe_as_train_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: alice\ntokenizer: bpe\ntokenizer_size: 300\nlearning_rate: 6e-4\nbatch_size: 6\n")
    assert main(["info", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"vocabulary, context +300, 64\n", printed)  # the default context of the command
    assert "activations, 6 x 64" in printed
    recipe.write_text("data: records.json\nmodel: gpt2\n")
    assert main(["info", str(recipe)]) == 2
    assert "its model is 'gpt2'" in capsys.readouterr().err
    recipe.write_text("batch_size: [\n")
    assert main(["info", str(recipe)]) == 2
    assert "is not YAML" in capsys.readouterr().err


def test_custom_parts_of_a_recipe_are_not_run_and_not_counted(tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: alice\nmax_steps: 9\n")
    assert main(["info", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "GPT-2's parts" not in printed
    recipe.write_text("data: alice\nmax_steps: 9\nwith: no_such_file.py\n")
    assert main(["info", str(recipe)]) == 0
    row = "  with                         no_such_file.py is not run, so all numbers are those of GPT-2's parts\n"
    assert capsys.readouterr().out.replace(row, "", 1) == printed
    found = find_recipe(recipe, torch.device("cpu"), 1e9).text
    assert found.endswith(" GB with GPT-2's parts (no_such_file.py is not run)")


def test_info_shows_the_rank_with_most_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: alice\nmax_steps: 9\nbatch_size: 13\nmicro_batch_size: 5\nparallel: fsdp\nshard_size: 2\n")
    assert main(["info", str(recipe), "--ranks", "4"]) == 0
    printed = capsys.readouterr().out
    assert "training step, each of 4 ranks, weights divided by 2" in printed
    assert "activations, 4 x 64" in printed  # the other ranks have 3 sequences
    for operation in ("all-gather", "reduce-scatter", "all-reduce"):
        assert re.search(rf"^      {operation} +[\d,]+ kB +[\d,]+ kB$", printed, re.M), operation
    assert main(["info", str(recipe)]) == 2
    assert "shard_size must divide the number of ranks, which is 1, got 2" in capsys.readouterr().err


def test_divided_weights_take_their_part_of_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def weights(*options: str) -> list[str]:
        assert main(["info", "gpt2", *options]) == 0
        step = capsys.readouterr().out.partition("training step")[2]
        return re.findall(r"weights +([\d,]+ MB) ", step)[:1]

    assert weights() == weights("--ranks", "8") == ["498 MB"]
    assert weights("--ranks", "8", "--parallel", "fsdp") == ["62 MB"]
    assert weights("--ranks", "8", "--parallel", "fsdp", "--shard_size", "2") == ["249 MB"]
    for options, message in (
        (["--parallel", "none"], "parallel must be ddp or fsdp on 8 ranks, got none"),
        (["--parallel", "fsdp", "--shard_size", "3"], "shard_size must divide the number of ranks, which is 8, got 3"),
    ):
        assert main(["info", "gpt2", "--ranks", "8", *options]) == 2
        assert message in capsys.readouterr().err


def test_the_sizing_table_in_the_documentation_is_the_computed_one() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks/sizing.py"))["table"]()
    assert table in (ROOT / "docs/guide/scale.md").read_text(encoding="utf-8")
