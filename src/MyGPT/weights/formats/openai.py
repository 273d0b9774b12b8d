"""OpenAI's GPT-2 models: a TensorFlow checkpoint and hparams.json, opened as numpy arrays or as a `Checkpoint`.

`load_gpt2_params_from_tf_ckpt` returns the names, nesting and squeezed shapes of `gpt_download.py` in "Build a Large
Language Model (From Scratch)", which reads the same files with TensorFlow. Matrices keep OpenAI's order (in, out).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from MyGPT.config import GPTConfig
from MyGPT.files import read_json
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.layout import openai_shapes
from MyGPT.weights.lazy import LazyTensor, torch_float_type
from MyGPT.weights.tensorflow.bundle import BundleTensor, CheckpointError, latest_checkpoint, open_bundle

_SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


def matches(path: Path) -> bool:
    """Return whether `path` is a directory with OpenAI's files hparams.json and checkpoint."""
    return (path / "hparams.json").is_file() and (path / "checkpoint").is_file()


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory with OpenAI's files."""
    settings, prefix = read_settings(path), latest_checkpoint(path)
    tensors = {
        name.removeprefix("model/"): LazyTensor(
            tensor.shape,
            torch_float_type(tensor.dtype()),
            lambda tensor=tensor: torch.from_numpy(tensor.read()),  # type: ignore[misc]
        )
        for name, tensor in _open_model(prefix, settings).items()
    }
    return Checkpoint.of(prefix, tensors, _config(settings), "OpenAI's TensorFlow checkpoint")


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the model's sizes from `directory`/hparams.json: n_vocab, n_ctx, n_embd, n_head, n_layer.

    Raises CheckpointError if the file is damaged or a size is missing or invalid.
    """
    path = Path(directory) / "hparams.json"
    try:
        settings = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    problems = _settings_problems(settings) if isinstance(settings, dict) else ["it is not a JSON object"]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return settings


def load_gpt2_params_from_tf_ckpt(ckpt_path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a GPT-2 as nested dicts of arrays, as the function of this name in Raschka's book does.

    The keys are wte, wpe, g, b and blocks; each block has attn, mlp, ln_1 and ln_2. params["wte"] is (n_vocab, n_embd)
    and params["blocks"][0]["attn"]["c_attn"]["w"] is (n_embd, 3 * n_embd), because axes of length 1 are removed. The
    arrays are views of the memory-mapped file. Writing to an array does not change the file. Do not truncate the file
    while the arrays exist.

    Args:
        ckpt_path: the prefix of the checkpoint's files, such as "gpt2/124M/model.ckpt"; `latest_checkpoint` returns it.
        settings: the contents of hparams.json, as `read_settings` returns them.

    Raises:
        CheckpointError: the files are damaged, or do not contain a model with these settings.
    """
    tensors = _open_model(ckpt_path, settings)
    params: dict[str, Any] = {"blocks": [{} for _ in range(settings["n_layer"])]}
    for name, tensor in tensors.items():
        _, first, *path = name.split("/")  # model/h0/attn/c_attn/w, model/ln_f/g, model/wte
        block = re.fullmatch(r"h(\d+)", first)
        target = params["blocks"][int(block[1])] if block else params
        *outer, last = path or [first]
        for key in outer:
            target = target.setdefault(key, {})
        target[last] = np.squeeze(tensor.read())
    return params


def _config(settings: Mapping[str, Any]) -> GPTConfig:
    """Return the config of OpenAI's model with the sizes in `settings`, the content of hparams.json.

    The config has qkv biases and a tied output head, as all of OpenAI's GPT-2 models do.
    """
    vocab, context, width, heads, layers = (settings[name] for name in _SIZES)
    return GPTConfig(vocab, context, width, heads, layers, qkv_bias=True)


def _open_model(ckpt_path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, BundleTensor]:
    """Return the tensors of a TensorFlow checkpoint by their names in the checkpoint.

    `ckpt_path` is the prefix of the checkpoint's files, and `settings` is the content of hparams.json.

    Raises CheckpointError unless the tensors are exactly the weights of a model with these settings.
    """
    problems = _settings_problems(settings)
    if problems:
        raise CheckpointError(f"the settings do not describe a GPT-2 model: {'; '.join(problems)}")
    tensors = open_bundle(ckpt_path)
    problems = _differences(tensors, settings)
    if problems:
        raise CheckpointError(
            f"{ckpt_path} does not match the settings in {len(problems)} points: {'; '.join(problems)}"
        )
    return tensors


def _settings_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return one error message for each size in `settings` that is missing or invalid."""
    problems = [
        f"{key} must be a whole number of at least 1, got {settings[key]!r}" if key in settings else f"{key} is missing"
        for key in _SIZES
        if type(settings.get(key)) is not int or settings[key] < 1
    ]
    if not problems and settings["n_embd"] % settings["n_head"]:
        problems.append(f"n_embd must be divisible by n_head, got {settings['n_embd']} and {settings['n_head']}")
    return problems


def _differences(tensors: Mapping[str, BundleTensor], settings: Mapping[str, Any]) -> list[str]:
    """Return one error message for each tensor that is missing, unknown or wrong in a model with these settings.

    If the number of blocks is wrong, return only one message about it.
    """
    n_blocks = len({match[1] for match in map(re.compile(r"model/h(\d+)/").match, tensors) if match})
    if n_blocks != settings["n_layer"]:
        return [f"n_layer is {settings['n_layer']}, the checkpoint has {n_blocks} blocks"]
    expected = openai_shapes(_config(settings))
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    for name, tensor in tensors.items():
        shape = tensor.shape
        if name not in expected:
            problems.append(f"{name} {shape} is unknown")
        elif [size for size in shape if size != 1] != [size for size in expected[name] if size != 1]:
            problems.append(f"{name} is {shape}, expected {expected[name]}")
        elif tensor.dtype().kind != "f":
            problems.append(f"{name} holds {tensor.dtype()}, but weights must be floating-point numbers")
    return problems
