"""mygpt info"""

from __future__ import annotations

import yaml

from MyGPT.config import GPT2_CONFIGS, GPTConfig, as_config


def info(*models: str) -> None:
    """Say what a model costs: parameters, operations a token, memory.

    A model is a released size (124M or gpt2, 355M, 774M, 1558M), a model's or run's directory, or a YAML file with a
    model's fields. Example: mygpt info gpt2 runs/book configs/gpt2_small.yaml

    Args:
        models: what to describe
    """
    print("\n\n".join(describe(name, find_config(name)) for name in models))


def find_config(name: str) -> GPTConfig:
    """The configuration that a name, a directory or a YAML recipe stands for."""
    if name in GPT2_CONFIGS:
        return GPT2_CONFIGS[name]
    if name.endswith((".yaml", ".yml")):
        with open(name, encoding="utf-8") as file:
            try:
                recipe = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{name} is not YAML: {error}") from None
        if not isinstance(recipe, dict):
            raise ValueError(f"{name} is no recipe: it holds no keys")
        fields = {key: value for key, value in recipe.items() if key in GPTConfig.__dataclass_fields__}
        return as_config({"vocab_size": 50257, **fields})
    from MyGPT.weights.directory import read_config

    return read_config(name)


def describe(name: str, config: GPTConfig) -> str:
    """A table of a model's size and cost."""
    import torch

    from MyGPT.model import GPTModel

    with torch.device("meta"):
        model = GPTModel(config)
    n, blocks = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    cache = 2 * config.n_layers * config.emb_dim
    rows = [
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
    return "\n".join([name, *(f"  {label:<22} {value}" for label, value in rows)])


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
