"""From a name to the weights in a model: what `from_pretrained` and `load_weights_into_gpt` do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from MyGPT.config import GPT2_CONFIGS, GPTConfig
from MyGPT.download import cache_directory
from MyGPT.weights.checkpoint import is_openai_directory, open_checkpoint, unwrap
from MyGPT.weights.gpt2_files import download_gpt2
from MyGPT.weights.hub import download_from_hub
from MyGPT.weights.layout import HEAD, WTE, align, fit, flatten, to_ours

COPIES = os.name == "nt"
"""Whether a model keeps nothing of its file: Windows neither replaces nor deletes one that is mapped."""


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory or file of a model: a path, or the name of one that is downloaded where it is not there yet.

    gpt2, gpt2-medium, gpt2-large, gpt2-xl (or 124M, 355M, 774M, 1558M) are OpenAI's own files; openai-community/gpt2 and the
    like, or hf://user/model, come from the Hugging Face hub. A path that holds a model goes before a name.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if holds_model(path):
        return path
    return download_model(name) if _repository(name) or name in GPT2_CONFIGS else path


def holds_model(path: Path) -> bool:
    """Whether there is a model at a path. `gpt2` may also be the directory into which the models were downloaded."""
    configs = (path / "config.json", path / "model" / "config.json")
    return path.is_file() or is_openai_directory(path) or any(config.is_file() for config in configs)


def download_model(name: str, directory: str | os.PathLike[str] | None = None, base_url: str | None = None) -> Path:
    """The directory of a model that can be downloaded, below `directory` (default: the cache), complete."""
    place = Path(directory) if directory is not None else cache_directory() / "models"
    repository = _repository(name)
    if repository:
        return download_from_hub(repository, place / repository.replace("/", "--"))
    if name in GPT2_CONFIGS:
        return download_gpt2(name, place, base_url)
    raise ValueError(f"no model {name!r} to download; there are {', '.join(GPT2_CONFIGS)}, or hf://user/model")


def _repository(name: str) -> str | None:
    """The repository on the Hugging Face hub that a name stands for, if it does."""
    match = re.fullmatch(r"(?:hf://|(?=openai-community/))([\w.-]+/[\w.-]+)", name)
    if match is None and name.startswith("hf://"):
        raise ValueError(f"a repository on the Hugging Face hub is written hf://user/model, got {name!r}")
    return match[1] if match else None


def read_weights(
    name_or_path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and the state dict of a model by name or path, in `dtype` or as it is stored.

    What has its type already is a view of the mapped file, which can be written to (see `MappedFile`). Beside what has to be
    converted there is never more than one tensor in memory.
    """
    checkpoint = open_checkpoint(find_model(name_or_path))
    if checkpoint.config is None:
        raise ValueError(
            f"{checkpoint.path} does not say how many heads the model has: make it with GPTModel(config), and give what "
            "torch.load(..., weights_only=True) or safetensors.torch.load_file returns to load_weights_into_gpt"
        )
    try:
        tensors = fit(checkpoint.tensors, checkpoint.config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    state_dict: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == HEAD and checkpoint.config.tie_weights:
            state_dict[name] = state_dict[WTE]
        else:
            state_dict[name] = _in_memory(tensor.load(), dtype)
    return checkpoint.config, state_dict


def load_weights_into_gpt(model: nn.Module, params: Mapping[str, Any]) -> None:
    """Puts the weights of a GPT-2 into a `GPTModel`, all of them or none.

    params is what `download_and_load_gpt2` returned, or a state dict in Hugging Face's layout, the book's, nanoGPT's or our
    own, or a checkpoint that holds one under "model", "state_dict" or "model_state_dict"; its keys tell which. The model
    keeps its dtype and device. One made with qkv_bias=False gets the biases that there are (its config says so afterwards;
    make the optimizer after that), a shorter context takes the first positions. What cannot be aligned is one ValueError
    that lists every mismatch, and the model is left untouched.
    """
    config, parameters = getattr(model, "config", None), dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(config, GPTConfig) or WTE not in parameters:
        raise ValueError(f"weights are loaded into a GPTModel, got {type(model).__name__}")
    if not isinstance(params, Mapping):
        raise ValueError(f"weights come as a dict of tensors or arrays, got {type(params).__name__}")
    weights, theirs = unwrap(params)
    for field in ("n_heads", "activation") if theirs else ():
        ours, saved = getattr(config, field), getattr(theirs, field)
        if ours != saved:
            raise ValueError(f"the weights were trained with {field}={saved!r}, the model has {ours!r}")
    tensors, config = align(to_ours(flatten(weights))[0], config)
    # All are there before the first is written, so that nothing can fail in between; most are views of what was given.
    loaded = {name: tensor.load() for name, tensor in fit(tensors, config).items()}
    like = parameters[WTE]
    with torch.no_grad():
        for name, tensor in loaded.items():
            if name in parameters:
                parameters[name].copy_(tensor)
            else:
                layer = model.get_submodule(name.removesuffix(".bias"))
                layer.bias = nn.Parameter(tensor.to(like.device, like.dtype, copy=True))
    model.config = config  # type: ignore[assignment]


def _in_memory(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The weight in `dtype`, a view of the file if it has it already.

    A kernel that is turned by its strides costs float32 and float64 nothing. Some processors multiply it ten times more slowly
    in bf16 and fp16, so there it is laid out anew.
    """
    tensor = tensor.to(dtype or tensor.dtype, copy=COPIES)
    return tensor if tensor.dtype.itemsize >= 4 else tensor.contiguous()
