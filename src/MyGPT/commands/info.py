"""mygpt info"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from MyGPT.commands._recipe import read_recipe
from MyGPT.config import GPT2_CONFIGS, GPTConfig, as_config


def info(*models: str) -> None:
    """Say what a model is and costs: parameters, operations a token, memory; of a checkpoint also whose it is.

    A model is a released size (124M or gpt2, 355M, 774M, 1558M), a YAML file with a model's fields, or a checkpoint: the
    directory of a model, a run or OpenAI's files, or a file of nanoGPT's, the book's or safetensors.
    Example: mygpt info gpt2 runs/book configs/gpt2_small.yaml

    Args:
        models: what to describe
    """
    print("\n\n".join(explain(name) for name in models))


def explain(name: str) -> str:
    """All that can be said of a name, a checkpoint or a recipe."""
    recipe = _read_recipe(name)
    if recipe is not None:
        return describe(name, recipe)
    from MyGPT.weights.checkpoint import guess_config, open_checkpoint
    from MyGPT.weights.layout import fit
    from MyGPT.weights.pretrained import holds_model

    if name in GPT2_CONFIGS and not holds_model(Path(name)):
        return describe(name, GPT2_CONFIGS[name])

    checkpoint = open_checkpoint(name)
    config = guess_config(checkpoint)
    dtypes = Counter(str(tensor.dtype or "no float").removeprefix("torch.") for tensor in checkpoint.tensors.values())
    rows = [
        ("format", checkpoint.kind),
        ("weights in", str(checkpoint.path)),
        ("tensors", ", ".join(f"{n} of {dtype}" for dtype, n in dtypes.items())),
    ]
    if checkpoint.config is None:
        rows.append(("heads", "not in the file; 64 wide, as in GPT-2, if nothing else is known"))
    try:
        fit(checkpoint.tensors, config)
        rows.append(("complete", "yes"))
    except ValueError as error:
        rows.append(("complete", f"no: {error}"))
    return describe(name, config, rows)


def _read_recipe(name: str) -> GPTConfig | None:
    """The model of a YAML file, None for anything else."""
    if name.endswith((".yaml", ".yml")):
        recipe = read_recipe(name)
        fields = {key: value for key, value in recipe.items() if key in GPTConfig.__dataclass_fields__}
        try:
            return as_config({"vocab_size": 50257, **fields})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return None


def describe(name: str, config: GPTConfig, rows: Sequence[tuple[str, str]] = ()) -> str:
    """A table of a model's size and cost."""
    import torch

    from MyGPT.model import GPTModel

    with torch.device("meta"):
        model = GPTModel(config)
    n, blocks = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    cache = 2 * config.n_layers * config.emb_dim
    costs = [
        ("layers, heads, width", f"{config.n_layers}, {config.n_heads}, {config.emb_dim}"),
        ("vocabulary, context", f"{config.vocab_size:,}, {config.context_length:,}"),
        ("parameters", f"{n:,} ({blocks:,} without the embeddings)"),
        ("weights, fp32 / bf16", f"{_megabytes(4 * n)} / {_megabytes(2 * n)}"),
        ("training state, fp32", f"{_megabytes(16 * n)} (weights, gradients, AdamW's two moments)"),
        ("KV cache, fp32", f"{_megabytes(4 * cache * config.context_length)} for a full context"),
        (
            "operations a token",
            f"{model.estimate_flops(backward=False):,} forward, {model.estimate_flops():,} training",
        ),
    ]
    return "\n".join([name, *(f"  {label:<22} {value}" for label, value in [*rows, *costs])])


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
