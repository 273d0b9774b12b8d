"""Any GPT-2 checkpoint, told by its files and keys: whose it is, what model it holds, its tensors.

A checkpoint is a directory (ours and Hugging Face's, a run's, OpenAI's) or a file: .safetensors, or what torch.save wrote
(nanoGPT's ckpt.pt, the book's model.pth). The latter are pickles, which can run any code: they are opened by torch's
`weights_only` reader alone.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from MyGPT.config import GPTConfig
from MyGPT.weights.directory import read_config, read_directory, read_safetensors
from MyGPT.weights.layout import Lazy, config_of, flatten, to_ours
from MyGPT.weights.openai import read_openai_directory

# Where training scripts put the weights beside other things: nanoGPT, the book, Lightning.
_NESTED = ("model", "model_state_dict", "state_dict")
_NANOGPT = {
    "vocab_size": "vocab_size",
    "context_length": "block_size",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}


@dataclass(frozen=True)
class Checkpoint:
    """What a directory or file holds."""

    kind: str
    path: Path
    """The file with the weights; of OpenAI's several the prefix."""
    config: GPTConfig | None
    """None if the file does not say: a bare state dict tells all but the number of heads."""
    tensors: dict[str, Lazy]
    """Under our names, kernels (out, in)."""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a directory or a file; tensors are read when they are needed.

    A path at which there is none is a FileNotFoundError, a damaged or foreign one a ValueError that names the file.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)
    if is_openai_directory(path):
        return Checkpoint("OpenAI's TensorFlow checkpoint", *read_openai_directory(path))
    return Checkpoint("a model directory in Hugging Face's layout", *read_directory(path))


def is_openai_directory(path: Path) -> bool:
    """Whether a directory holds OpenAI's files."""
    return (path / "hparams.json").is_file() and (path / "checkpoint").is_file()


def unwrap(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], GPTConfig | None]:
    """The weights in what a training script saved, and their config if it says (nanoGPT's `model_args`)."""
    weights = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
    arguments = content.get("model_args")
    if not isinstance(arguments, Mapping):
        return weights, None
    missing = [theirs for theirs in _NANOGPT.values() if theirs not in arguments]
    if missing:
        raise ValueError(f"model_args lacks {', '.join(missing)}")
    sizes = {ours: arguments[theirs] for ours, theirs in _NANOGPT.items()}
    drop_rate = arguments.get("dropout", 0.0)
    return weights, GPTConfig(**sizes, drop_rate=drop_rate, qkv_bias=True, activation="gelu")


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        tensors, config = dict(read_safetensors(path)), None
        if (path.parent / "config.json").is_file():
            config = read_config(path.parent)
    else:
        content = _load_pickle(path)
        try:
            weights, config = unwrap(content)
            tensors = flatten(
                {key: value for key, value in weights.items() if not isinstance(value, (int, float, str))}
            )
            # Training scripts write over their checkpoint in its place, which who has it mapped does not survive.
            tensors = {name: tensor.map(tensor.shape, torch.clone) for name, tensor in tensors.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    try:
        ours, whose = to_ours(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kind = "nanoGPT's checkpoint" if config and config.activation == "gelu" else f"a state dict in {whose} layout"
    return Checkpoint(kind, path, config, ours)


def guess_config(checkpoint: Checkpoint) -> GPTConfig:
    """The checkpoint's config, or one told by the shapes with heads 64 wide, which all released GPT-2 models have."""
    if checkpoint.config is not None:
        return checkpoint.config
    emb_dim = config_of(checkpoint.tensors, n_heads=1).emb_dim
    return config_of(checkpoint.tensors, n_heads=emb_dim // 64 if emb_dim % 64 == 0 else 1)


def _load_pickle(path: Path) -> Mapping[str, Any]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|callable) (\S*\w)", str(error))
        if found is None:
            raise ValueError(f"{path} is no checkpoint: it is neither safetensors nor what torch.save writes") from None
        raise ValueError(
            f"{path} holds more than tensors and plain values, and could run any code ({found[1]}): it is not opened"
        ) from None
    except Exception as error:  # on damaged bytes torch's reader fails in any way, by its own assertions too
        if isinstance(error, OSError) and error.filename:  # the file cannot be opened at all
            raise
        raise ValueError(f"{path} is no checkpoint that can be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {type(content).__name__}, a checkpoint is a dict of tensors")
    return content
