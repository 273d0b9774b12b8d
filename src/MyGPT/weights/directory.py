"""A model directory in Hugging Face's GPT-2 layout: config.json, model.safetensors, the tokenizer's files.

There is no other model format and no export step: transformers opens the same directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.files import atomic_directory, restore_directory
from MyGPT.weights.layout import from_hugging_face, to_hugging_face


def write_directory(
    directory: str | os.PathLike[str], config: GPTConfig, state_dict: Mapping[str, Tensor], tokenizer: Any = None
) -> None:
    """Writes a model directory as a whole or not at all; other files that it held stay in it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    eot_token = getattr(tokenizer, "eot_token", None)
    description = {**config.to_dict(), "bos_token_id": eot_token, "eos_token_id": eot_token}
    tensors = {name: tensor.detach().cpu() for name, tensor in to_hugging_face(state_dict, config).items()}
    with atomic_directory(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, in safetensors' own words
            raise OSError(f"cannot write {Path(directory) / 'model.safetensors'}: {error}") from error
        if tokenizer is not None:
            tokenizer.save(temporary)


def read_directory(directory: str | os.PathLike[str]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the state dict, in our names, of a model directory or of a run (its `model/`)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(directory)
    weights = model_directory(directory) / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing")
    try:
        # load_file maps the file, which others may overwrite while the model is in use: keep a copy.
        tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from None
    try:
        return config, from_hugging_face(tensors, config)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None


def read_config(directory: str | os.PathLike[str]) -> GPTConfig:
    """The config of a model directory or of a run."""
    path = model_directory(directory) / "config.json"
    try:
        return GPTConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT-2 model: {error}") from None


def model_directory(name_or_dir: str | os.PathLike[str]) -> Path:
    """The directory that holds the model: itself, or `model/` in a run's directory."""
    path = Path(name_or_dir)
    for candidate in (path, path / "model"):
        restore_directory(candidate)
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"no model at {path}: neither it nor {path / 'model'} has a config.json")
