"""`mygpt info`: the size and cost of a model, a checkpoint or a recipe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from MyGPT.commands._memory import rows_per_rank, step_memory
from MyGPT.commands._recipe import read_plan
from MyGPT.config import GPT2_CONFIGS, GPTConfig, require_positive
from MyGPT.messages import error_message
from MyGPT.training.config import Parallel, TrainConfig

if TYPE_CHECKING:
    from MyGPT.opening import ModelFiles

Row = tuple[str, str]
Unit = tuple[str, int]
PRECISIONS = ("fp32", "bf16")
"""The precisions for which memory is shown. Even in bf16, training keeps weights, gradients and optimizer state in fp32."""
PURPOSES = {
    "weights": "weights",
    "KV cache": "KV cache, {}",
    "moments": "optimizer's moments",
    "gradients": "gradients",
    "activations": "activations, {}",
    "logits": "logits, head's gradient",
    "tying": "gradients of tied head",
    "copies": "bf16 copies of weights",
    "gathered": "gathered weights",
    "reducing": "gradients to be summed",
}
"""The purposes of memory in the order in which they are shown, with their labels; {} is replaced by the number of tokens."""
_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))


def info(*models: str, ranks: int = 1, parallel: Parallel | None = None, shard_size: int | None = None) -> None:
    """Show the size and cost of models: parameters, operations per token and memory.

    A model is a released size (124M or gpt2, 355M, 774M, 1558M), a YAML file with the options of a model or of training, or
    a checkpoint. A checkpoint is the directory of a run, of a model or of OpenAI's files, or a file that was written by
    nanoGPT, by the book's code or in the safetensors format.

    A training step is shown for one rank (a process with its own GPU), and what the rank sends to the others. A recipe
    sets the batch and the optimizer. Without a recipe, each rank computes one sequence.

    Examples:
        mygpt info gpt2 runs/book configs/gpt2_small.yaml
        mygpt info 1558M --ranks 8 --parallel fsdp

    Args:
        models: Names or paths of the models.
        ranks: Number of ranks that train together.
        parallel: How the ranks train together: ddp copies the weights to each rank, fsdp divides them. Default: as in the
            recipe, or else ddp on several ranks.
        shard_size: Number of ranks that divide one copy of the weights with --parallel fsdp. Default: as in the recipe,
            or else all.
    """
    require_positive(ranks=ranks)
    options = {"parallel": parallel, "shard_size": shard_size}
    given = {name: value for name, value in options.items() if value is not None}
    print("\n\n".join(explain(name, ranks, given) for name in models))


def explain(name: str, n_ranks: int = 1, options: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the report of `mygpt info` on the released model, checkpoint or YAML file with this name or path.

    `options` are fields of TrainConfig that replace those of a recipe.
    """
    one_sequence = TrainConfig(batch_size=n_ranks, **options)
    one_sequence.shard_size_on(n_ranks)  # checks the options before a checkpoint is read
    if name.endswith((".yaml", ".yml")):
        config, training, recipe = read_plan(name)
        if training is not None:
            training = dataclasses.replace(training, **options)
        file = recipe.get("with")
        rows = [] if file is None else [("with", f"{file} is not run, so all numbers are those of GPT-2's parts")]
        return describe(name, config, rows, training or one_sequence, n_ranks)
    from MyGPT.files import reading
    from MyGPT.weights.formats import find_format

    if name in GPT2_CONFIGS and find_format(Path(name)) is None:
        return describe(name, GPT2_CONFIGS[name], (), one_sequence, n_ranks)
    with reading(name):
        return _describe_files(name, one_sequence, n_ranks)


def _describe_files(name: str, training: TrainConfig, n_ranks: int) -> str:
    """Return the report on the model or adapter at the path `name`, or on a downloaded model with this name."""
    from MyGPT.opening import find_model_files
    from MyGPT.weights.formats import open_checkpoint
    from MyGPT.weights.layout import fit

    files = find_model_files(name)
    checkpoint = open_checkpoint(files.path)
    config = checkpoint.guess_config()
    dtypes = Counter(str(tensor.dtype or "no float").removeprefix("torch.") for tensor in checkpoint.tensors.values())
    rows = [
        ("format", checkpoint.format),
        ("weights in", str(checkpoint.path)),
        ("tensors", ", ".join(f"{n} of {dtype}" for dtype, n in dtypes.items())),
    ]
    if files.adapter is not None:
        from MyGPT.finetuning.foreign_adapters import adapted_config, count_adapter_parameters

        rows.insert(0, ("adapter", f"{files.adapter}, {count_adapter_parameters(files.adapter):,} parameters"))
    if checkpoint.config is None:
        rows.append(("heads", "not in the file; each is assumed to be 64 wide, as in GPT-2"))
    try:
        fit(checkpoint.tensors, config)
        rows += [("complete", "yes"), *(("note", note) for note in checkpoint.notes)]
    except ValueError as error:
        rows.append(("complete", f"no: {error_message(error)}"))
    if files.adapter is not None:
        config = adapted_config(config, files.adapter)
    rows.append(("tokenizer", tokenizer_source(files, config.vocab_size)))
    return describe(name, config, rows, training, n_ranks)


def tokenizer_source(files: ModelFiles, vocab_size: int) -> str:
    """Return the files of a model's tokenizer, or why it has none. `vocab_size` is the number of tokens of the model."""
    try:
        return files.tokenizer(vocab_size).source
    except (ValueError, OSError) as error:
        return f"none: {error_message(error)}"


def describe(name: str, config: GPTConfig, rows: Sequence[Row], training: TrainConfig, n_ranks: int) -> str:
    """Return a table of a model's size, its FLOPs per token, and the memory for generation and for a training step.

    `rows` are labels and values to show first. `training` sets the batch size and the optimizer of the training step,
    in which n_ranks ranks take part.
    """
    import torch

    from MyGPT.costs import cache_bytes, generation_memory, parameters_by_part
    from MyGPT.model import GPTModel

    with torch.device("meta"):
        model = GPTModel(config)
    n, parts = model.num_parameters(), parameters_by_part(config)
    sizes = [
        ("layers, heads, width", f"{config.n_layers}, {config.n_heads}, {config.emb_dim}"),
        ("vocabulary, context", f"{config.vocab_size:,}, {config.context_length:,}"),
        ("parameters", f"{n:,} ({model.num_parameters(exclude_embeddings=True):,} without the embeddings)"),
        *((f"  {part}", f"{count:>13,}  {count / n:6.1%}") for part, count in parts.items() if count),
        ("", "the output head shares the token embedding" if config.tie_weights else ""),
        ("FLOPs per token", f"{model.estimate_flops(backward=False):,} forward, {model.estimate_flops():,} training"),
    ]
    text = [(label, value) for label, value in [*rows, *sizes] if value]
    text.append(("memory", "".join(f"{precision:>13}" for precision in PRECISIONS)))
    widths, context = (4, 2), config.context_length  # bytes per number in fp32 and bf16
    text.append(("  KV cache per token", "".join(f"{_bytes(cache_bytes(config, width)):>13}" for width in widths)))
    generation = [generation_memory(config, width) for width in widths]
    on_gpu, on_cpu = (
        [step_memory(config, training, precision == "bf16", device, n_ranks) for precision in PRECISIONS]
        for device in ("cuda", "cpu")
    )
    unit = _unit(min(sum(parts.values()) for parts in generation))
    text += memory_rows("generation", generation, unit, f"{context:,} tokens")
    shape = f"{rows_per_rank(training, n_ranks)[1]} x {context:,}"
    more = [step.peak for step in on_cpu] if config.drop_rate else None
    size = training.shard_size_on(n_ranks)
    shared = "" if size is None else f", each of {n_ranks} ranks" + (f", weights divided by {size}" if size > 1 else "")
    text += memory_rows(f"training step{shared}", [step.at_peak() for step in on_gpu], unit, shape, more)
    text.append(("", "when a step needs most: the backward pass frees activations while it makes gradients"))
    if size is not None and n_ranks > 1:
        text += communication_rows(config, training, n_ranks, size, unit)
    if config.drop_rate:
        text.append(("", f"on a CPU, dropout {config.drop_rate:g} stores all attention weights; drop_rate 0 does not"))
    return "\n".join([name, *(f"  {label:<28} {value}".rstrip() for label, value in text)])


def communication_rows(
    config: GPTConfig, training: TrainConfig, n_ranks: int, shard_size: int, unit: Unit
) -> list[Row]:
    """Return a table of the bytes that a rank sends to others in a training step, for each of PRECISIONS."""
    from MyGPT.costs import communication

    n_rows, n_sequences = rows_per_rank(training, n_ranks)
    columns = [
        communication(
            config,
            n_ranks,
            shard_size,
            n_micro_batches=-(-n_rows // n_sequences),
            bf16=precision == "bf16",
            optimizer=training.optimizer,
        )
        for precision in PRECISIONS
    ]
    rows = [("  sent per step, each rank", "")]
    for operation in columns[0]:
        numbers = [column[operation] for column in columns]
        if any(numbers):
            rows.append((f"    {operation}", "".join(f"{f'{round(n / unit[1]):,} {unit[0]}':>13}" for n in numbers)))
    return rows


def memory_rows(
    title: str, columns: Sequence[Mapping[str, int]], unit: Unit, shape: str, on_cpu: Sequence[int] | None = None
) -> list[Row]:
    """Return a table of memory: a line with `title`, a line for each purpose, and the total.

    Every number is rounded to whole units, and a total is the sum of the numbers above it, so that the lines add up.

    Args:
        title: what needs the memory.
        columns: for each of PRECISIONS, the bytes for each purpose.
        unit: the name of the unit of all numbers, and its size in bytes.
        shape: the number of tokens, shown with the purposes that depend on it.
        on_cpu: for each of PRECISIONS, the bytes needed on a CPU, or None if they are the same as on a GPU.
    """
    name, size = unit

    def row(label: str, numbers: Sequence[int]) -> Row:
        return f"    {label}", "".join(f"{f'{number:,} {name}':>13}" for number in numbers)

    purposes = [purpose for purpose in PURPOSES if any(column.get(purpose) for column in columns)]
    parts = [[round(column.get(purpose, 0) / size) for column in columns] for purpose in purposes]
    totals = [sum(numbers) for numbers in zip(*parts, strict=True)]
    rows = [(f"  {title}", "")]
    rows += [row(PURPOSES[purpose].format(shape), numbers) for purpose, numbers in zip(purposes, parts, strict=True)]
    rows.append(row("total" if on_cpu is None else "total on a GPU", totals))
    if on_cpu is not None:
        more = [round(needed / size) - total for needed, total in zip(on_cpu, totals, strict=True)]
        rows.append(row("more on a CPU", more))
        rows.append(row("total on a CPU", [total + number for total, number in zip(totals, more, strict=True)]))
    return rows


def _bytes(n: int) -> str:
    """Return a number of bytes as text with three digits and a unit: 1,234,567 gives "1.23 MB"."""
    for unit, size in _UNITS[:-1]:
        if n >= size:
            return f"{n / size:,.{max(0, 3 - len(str(n // size)))}f} {unit}"
    return f"{n} B"


def _unit(n: int) -> Unit:
    """Return the name and the size of the largest unit of which `n` bytes are at least a hundred."""
    return next((unit for unit in _UNITS if n >= 100 * unit[1]), _UNITS[-1])
