"""Files that torch.save wrote: nanoGPT's ckpt.pt, model.pth of Raschka's book, and state dicts from other training scripts.

These files are pickles, which can run arbitrary code when they are loaded. They are opened only with torch's
`weights_only` loader, which refuses everything except tensors and plain values.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from MyGPT.config import GPTConfig, config_beside
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.lazy import LazyTensor, flatten

# The keys under which training scripts (nanoGPT, the book, Lightning) save the weights.
_STATE_DICT_KEYS = ("model", "model_state_dict", "state_dict")
_NANOGPT_SIZES = ("vocab_size", "block_size", "n_embd", "n_head", "n_layer")


def matches(path: Path) -> bool:
    """Return whether `path` is a file. `read` then checks whether torch.save wrote the file."""
    return path.is_file()


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in a file that torch.save wrote. Raises ValueError for any other file.

    The config comes from nanoGPT's checkpoint, or else from config.json in the same directory. Without either it is None.
    """
    tensors, config = read_torch_file(path)
    return Checkpoint.of(path, tensors, config or config_beside(path), "nanoGPT's checkpoint" if config else None)


def read_torch_file(path: Path) -> tuple[dict[str, LazyTensor], GPTConfig | None]:
    """Return the tensors by name from a file that torch.save wrote, and the config.

    The config is None unless the file is a checkpoint of nanoGPT.
    """
    content = _load(path)
    try:
        weights, config = split_checkpoint(content)
        tensors = flatten({key: value for key, value in weights.items() if not isinstance(value, (int, float, str))})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # Training scripts overwrite their checkpoint in place, and a process that has it mapped would crash, so copy it.
    return {name: tensor.map(tensor.shape, torch.clone) for name, tensor in tensors.items()}, config


def read_dataset(path: Path) -> str | None:
    """Return the name of the data set in the config of a nanoGPT checkpoint, or None if `path` has no such name.

    A name that is not a plain directory name, such as one with a slash, also gives None.
    """
    try:
        config = _load(path).get("config") if path.is_file() and path.suffix != ".safetensors" else None
    except ValueError:
        return None  # not a checkpoint of torch.save
    dataset = config.get("dataset") if isinstance(config, Mapping) else None
    return dataset if isinstance(dataset, str) and re.fullmatch(r"\w[\w.-]*", dataset) else None


def split_checkpoint(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], GPTConfig | None]:
    """Return the state dict and the config from `content`, the checkpoint of a training script.

    The config comes from the key `model_args`, which nanoGPT writes. Without this key, the config is None.
    """
    weights = next((content[key] for key in _STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), content)
    arguments = content.get("model_args")
    if not isinstance(arguments, Mapping):
        return weights, None
    missing = [name for name in _NANOGPT_SIZES if name not in arguments]
    if missing:
        raise ValueError(f"model_args lacks {', '.join(missing)}")
    vocab, context, width, heads, layers = (arguments[name] for name in _NANOGPT_SIZES)
    drop_rate = arguments.get("dropout", 0.0)
    return weights, GPTConfig(vocab, context, width, heads, layers, drop_rate, qkv_bias=True, activation="gelu")


def _load(path: Path) -> Mapping[str, Any]:
    """Return the dict that torch.save wrote to a file.

    Raises ValueError if the file contains something else, or is a pickle that could run code.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before version 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|callable) (\S*\w)", str(error))
        if found is None:
            raise ValueError(f"{path} is not a checkpoint: neither safetensors nor written by torch.save") from None
        raise ValueError(
            f"{path} is not opened because it contains {found[1]}, which could run arbitrary code: "
            "only tensors and plain values are allowed"
        ) from None
    except Exception as error:  # torch's loader raises many types on damaged files, even AssertionError
        if isinstance(error, OSError) and error.filename:  # the file cannot be opened at all
            raise
        raise ValueError(f"{path} is not a readable checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains {type(content).__name__}, but a checkpoint is a dict of tensors")
    return content
