"""`mygpt info`: the size and cost of a model, a checkpoint or a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.commands._recipe import read_plan
from MyGPT.config import GPT2_CONFIGS, GPTConfig
from MyGPT.training.config import TrainConfig

if TYPE_CHECKING:
    from MyGPT.costs import TrainingMemory

Row = tuple[str, str]
ONE_SEQUENCE = TrainConfig(batch_size=1)
PRECISIONS = ("fp32", "bf16")
"""The precisions for which memory is shown. Even in bf16, training keeps weights, gradients and optimizer state in fp32."""


def info(*models: str) -> None:
    """Show the size and cost of models: parameters, operations per token and memory.

    A model is a released size (124M or gpt2, 355M, 774M, 1558M), a YAML file with the options of a model or of training, or
    a checkpoint. A checkpoint is the directory of a run, of a model or of OpenAI's files, or a file that was written by
    nanoGPT, by the book's code or in the safetensors format.

    Example:
        mygpt info gpt2 runs/book configs/gpt2_small.yaml

    Args:
        models: Names or paths of the models.
    """
    print("\n\n".join(explain(name) for name in models))


def explain(name: str) -> str:
    """Return the report of `mygpt info` on the released model, checkpoint or YAML file with this name or path."""
    if name.endswith((".yaml", ".yml")):
        config, training, _ = read_plan(name)
        return describe(name, config, training=training or ONE_SEQUENCE)
    from MyGPT.files import reading
    from MyGPT.weights.formats import find_format, open_checkpoint
    from MyGPT.weights.layout import fit

    if name in GPT2_CONFIGS and find_format(Path(name)) is None:
        return describe(name, GPT2_CONFIGS[name])
    with reading(name):
        checkpoint = open_checkpoint(name)
    config = checkpoint.guess_config()
    dtypes = Counter(str(tensor.dtype or "no float").removeprefix("torch.") for tensor in checkpoint.tensors.values())
    rows = [
        ("format", checkpoint.format),
        ("weights in", str(checkpoint.path)),
        ("tensors", ", ".join(f"{n} of {dtype}" for dtype, n in dtypes.items())),
    ]
    if checkpoint.config is None:
        rows.append(("heads", "not in the file; each is assumed to be 64 wide, as in GPT-2"))
    try:
        fit(checkpoint.tensors, config)
        rows.append(("complete", "yes"))
    except ValueError as error:
        rows.append(("complete", f"no: {error}"))
    rows.append(("tokenizer", tokenizer_source(name, config.vocab_size)))
    return describe(name, config, rows)


def tokenizer_source(name: str, vocab_size: int) -> str:
    """Return the files of a model's tokenizer, or why it has none. `vocab_size` is the number of tokens of the model."""
    from MyGPT.opening import find_model_files

    try:
        return find_model_files(name).tokenizer(vocab_size).source
    except (ValueError, OSError) as error:
        return f"none: {error}"


def describe(name: str, config: GPTConfig, rows: Sequence[Row] = (), training: TrainConfig = ONE_SEQUENCE) -> str:
    """Return a table of a model's size, its FLOPs per token, and the memory for generation and for a training step.

    `rows` are labels and values to show first. `training` sets the batch size and the optimizer of the training step.
    """
    import torch

    from MyGPT.costs import cache_bytes, generation_bytes, parameters_by_part
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
    context, widths = config.context_length, (4, 2)  # bytes per number in fp32 and bf16
    costs = [
        ("weights", [n * width for width in widths]),
        ("KV cache per token", [cache_bytes(config, width) for width in widths]),
        (f"KV cache, {context:,} tokens", [context * cache_bytes(config, width) for width in widths]),
        ("generation, total", [generation_bytes(config, width) for width in widths]),
        *training_rows(config, training),
    ]
    text = [(label, value) for label, value in [*rows, *sizes] if value]
    text.append(("memory", "".join(f"{precision:>13}" for precision in PRECISIONS)))
    text += [(f"  {label}", "".join(f"{_bytes(size):>13}" for size in of_precision)) for label, of_precision in costs]
    if config.drop_rate:
        text.append(("", f"on a CPU, dropout {config.drop_rate:g} stores all attention weights; drop_rate 0 does not"))
    return "\n".join([name, *(f"  {label:<28} {value}" for label, value in text)])


def training_rows(config: GPTConfig, training: TrainConfig) -> list[tuple[str, list[int]]]:
    """Return the memory for a training step on one micro-batch: labels, each with the bytes in fp32 and in bf16.

    The total on a CPU is included only if the model has dropout, because otherwise it equals the total on a GPU.
    """
    gpu, cpu = (
        [step_memory(config, training, precision == "bf16", device) for precision in PRECISIONS]
        for device in ("cuda", "cpu")
    )
    sequences = training.micro_batch_size or training.batch_size
    rows = [
        ("training state", [step.weights + step.gradients + step.moments for step in gpu]),
        (f"  activations, {sequences} x {config.context_length:,}", [step.activations for step in gpu]),
        ("  total on a GPU", [step.peak for step in gpu]),
    ]
    return [*rows, ("  total on a CPU", [step.peak for step in cpu])] if config.drop_rate else rows


def step_memory(config: GPTConfig, training: TrainConfig, bf16: bool, device: str) -> TrainingMemory:
    """Return the memory in bytes for a training step on `device` ("cuda" or "cpu"), with bfloat16 arithmetic if `bf16`."""
    from MyGPT.costs import training_memory

    n_sequences = training.micro_batch_size or training.batch_size
    return training_memory(
        config,
        n_sequences,
        bf16=bf16,
        optimizer=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        accumulates=n_sequences < training.batch_size,
        device=device,
    )


def _bytes(n: int) -> str:
    """Return a number of bytes as text with three digits and a unit: 1,234,567 gives "1.23 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:,.{max(0, 3 - len(str(n // size)))}f} {unit}"
    return f"{n} B"
