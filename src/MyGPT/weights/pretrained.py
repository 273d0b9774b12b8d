"""Functions that find or download a model by name, read its weights, and copy weights into a GPTModel."""

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
from MyGPT.files import reading
from MyGPT.messages import MODEL_SYNONYMS, did_you_mean
from MyGPT.parts import Parts
from MyGPT.ranks import copy_whole, reshard
from MyGPT.weights.formats import find_format, open_checkpoint
from MyGPT.weights.formats.huggingface import find_directory
from MyGPT.weights.formats.torch_file import split_checkpoint
from MyGPT.weights.hub import download_from_hub, is_downloaded
from MyGPT.weights.layout import WTE, align, fit, to_ours
from MyGPT.weights.lazy import flatten
from MyGPT.weights.released import FILES, download_gpt2, released_size


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the directory or file of a model, given its path or name. Download a named model that is not in the cache.

    The names gpt2, gpt2-medium, gpt2-large and gpt2-xl (or 124M, 355M, 774M, 1558M) mean OpenAI's original files. Names
    such as openai-community/gpt2 or hf://user/model mean repositories on the Hugging Face hub. If a local path with the
    same name contains a model, the local model is used.
    """
    path, name = Path(name_or_path), str(name_or_path)
    # A directory called gpt2 may also contain downloaded models without being one.
    return download_model(name) if is_name(name) and find_format(path) is None else path


def is_name(name: str) -> bool:
    """Return whether `name` means a model that can be downloaded (see `find_model`). It may also be a local path."""
    return name in GPT2_CONFIGS or _repository(name) is not None


def stored_name(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name under which an adapter stores its base model. transformers opens the model by this name too.

    The result is the absolute path of a local model, or the name of a repository on the Hugging Face hub. Such a name is
    "gpt2" for OpenAI's files, and "user/model" for "hf://user/model".
    """
    path, name = Path(name_or_path), str(name_or_path)
    if find_format(path) is not None or not is_name(name):
        return str((find_directory(path) or path).resolve())
    aliases = [alias for alias in GPT2_CONFIGS if alias.startswith("gpt2")]
    return _repository(name) or next(alias for alias in aliases if GPT2_CONFIGS[alias] == GPT2_CONFIGS[name])


def find_downloaded(name: str) -> Path | None:
    """Return the directory of a model that was downloaded to the cache directory earlier, or None. Nothing is downloaded.

    `name` is one of the names of `find_model`. Names of the same released model, such as gpt2 and openai-community/gpt2,
    stand for each other.
    """
    models, released = cache_directory() / "models", name.removeprefix("hf://").removeprefix("openai-community/")
    names = [name, released, f"openai-community/{released}"] if released in GPT2_CONFIGS else [name]
    for candidate in names:
        repository = _repository(candidate)
        directory = models / (repository.replace("/", "--") if repository else released_size(candidate))
        if is_downloaded(directory) if repository else all((directory / file).is_file() for file in FILES):
            return directory
    return None


def download_model(name: str, directory: str | os.PathLike[str] | None = None, base_url: str | None = None) -> Path:
    """Download a model by name (see `find_model`), unless it is already complete, and return its directory.

    `directory` is the parent directory of all downloaded models. Default: `models` in the cache directory. `base_url`
    is a server with OpenAI's files. Default: the public servers.
    """
    parent = Path(directory) if directory is not None else cache_directory() / "models"
    repository = _repository(name)
    if repository:
        return download_from_hub(repository, parent / repository.replace("/", "--"))
    check_name(name)
    return download_gpt2(name, parent, base_url)


def check_name(name: str) -> None:
    """Raise ValueError if `name` is not the name of a model that `download_model` can download."""
    if name not in GPT2_CONFIGS and _repository(name) is None:
        hint = did_you_mean(name, GPT2_CONFIGS, MODEL_SYNONYMS)
        raise ValueError(f"unknown model {name!r}: choose {', '.join(GPT2_CONFIGS)} or hf://user/model{hint}")


def read_weights(
    name_or_path: str | os.PathLike[str], dtype: torch.dtype | None = None, parts: Parts | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the config and the state dict of a model by name or path (see `find_model`).

    All weights are converted to `dtype`. Default: the dtypes in the file. `parts` are the custom parts of the model, if any.
    """
    path = find_model(name_or_path)
    with reading(path):
        return open_checkpoint(path, parts).read(dtype)


def load_weights_into_gpt(model: nn.Module, params: Mapping[str, Any]) -> None:
    """Copy the weights of a GPT-2 into a `GPTModel`. The model keeps its dtype and device.

    If only the weights have qkv biases, such biases are added to the model and its config; create the optimizer later.
    If the model has a shorter context than the weights, only the first position embeddings are copied. Raises
    ValueError with a list of all mismatches if the weights do not fit; the model is then unchanged. If the model is sharded,
    all ranks must call this function with the same weights.

    Args:
        model: a GPTModel.
        params: the weights that `download_and_load_gpt2` returns; a state dict from Hugging Face, Raschka's book, nanoGPT or
            MyGPT; or a checkpoint with one under "model", "state_dict" or "model_state_dict".
    """
    reshard(model)
    config, parameters = getattr(model, "config", None), dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(config, GPTConfig) or WTE not in parameters:
        raise ValueError(f"weights can only be loaded into a GPTModel, got {type(model).__name__}")
    if not isinstance(params, Mapping):
        raise ValueError(f"weights must be a dict of tensors or arrays, got {type(params).__name__}")
    weights, theirs = split_checkpoint(params)
    for field in ("n_heads", "activation") if theirs else ():
        ours, saved = getattr(config, field), getattr(theirs, field)
        if ours != saved:
            raise ValueError(f"the weights were trained with {field}={saved!r}, but the model has {ours!r}")
    tensors, config = align(to_ours(flatten(weights))[0], config)
    # Load every tensor before writing the first, so that an error cannot leave the model half changed. Most are views.
    loaded = {name: tensor.load() for name, tensor in fit(tensors, config).items()}
    like = parameters[WTE]
    with torch.no_grad():
        for name, tensor in loaded.items():
            if name in parameters:
                copy_whole(parameters[name], tensor)
            else:
                layer = model.get_submodule(name.removesuffix(".bias"))
                layer.bias = nn.Parameter(tensor.to(like.device, like.dtype, copy=True))
    model.config = config  # type: ignore[assignment]


def _repository(name: str) -> str | None:
    """Return the hub repository that `name` means, such as user/model for "hf://user/model".

    Names that start with openai-community/ are repositories too. The result is None for any other name.
    """
    match = re.fullmatch(r"(?:hf://|(?=openai-community/))([\w.-]+/[\w.-]+)", name)
    if match is None and name.startswith("hf://"):
        raise ValueError(f"a repository on the Hugging Face hub must be written as hf://user/model, got {name!r}")
    return match[1] if match else None
