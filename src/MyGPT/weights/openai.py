"""OpenAI's GPT-2 checkpoints as arrays, the way "Build a Large Language Model (From Scratch)" has them.

The names, the nesting and the squeezed shapes are those of the book's `gpt_download.py`, which reads the same files with
TensorFlow. Kernels stay (in, out); turning them is layout.py's.
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
from MyGPT.weights.gpt2_files import download_gpt2
from MyGPT.weights.layout import Lazy, float_type, openai_shapes, to_ours
from MyGPT.weights.tf_checkpoint import Checkpoint, CheckpointError, latest_checkpoint, read_checkpoint

_SETTINGS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The sizes in `directory`/hparams.json: n_vocab, n_ctx, n_embd, n_head, n_layer. A damaged file is a CheckpointError."""
    path = Path(directory) / "hparams.json"
    try:
        settings = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    problems = _settings_problems(settings) if isinstance(settings, dict) else ["it is no JSON object"]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return settings


def load_gpt2_params_from_tf_ckpt(ckpt_path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a GPT-2 as nested dicts: wte, wpe, g, b, and of each block attn, mlp, ln_1, ln_2.

    ckpt_path is the prefix, as `latest_checkpoint` gives it: "gpt2/124M/model.ckpt"; settings is hparams.json's dict.
    params["wte"] is (n_vocab, n_embd), params["blocks"][0]["attn"]["c_attn"]["w"] (n_embd, 3 * n_embd): axes of length 1 are
    dropped, as the book does. The arrays are views of the mapped file (see `Checkpoint.read`). If the checkpoint is not of
    such a model, one CheckpointError lists all that differs.
    """
    checkpoint = _open(ckpt_path, settings)
    params: dict[str, Any] = {"blocks": [{} for _ in range(settings["n_layer"])]}
    for name in checkpoint.names():
        _, first, *path = name.split("/")  # model/h0/attn/c_attn/w, model/ln_f/g, model/wte
        block = re.fullmatch(r"h(\d+)", first)
        target = params["blocks"][int(block[1])] if block else params
        *outer, last = path or [first]
        for key in outer:
            target = target.setdefault(key, {})
        target[last] = np.squeeze(checkpoint.read(name))
    return params


def download_and_load_gpt2(
    model_size: str, models_dir: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the weights of a released model, downloaded to `models_dir`/124M where they are not there yet.

    model_size is 124M, 355M, 774M or 1558M, or gpt2, gpt2-medium, gpt2-large, gpt2-xl. The settings are hparams.json's,
    the weights those of `load_gpt2_params_from_tf_ckpt`, ready for `load_weights_into_gpt`.
    """
    directory = download_gpt2(model_size, models_dir)
    settings = read_settings(directory)
    return settings, load_gpt2_params_from_tf_ckpt(latest_checkpoint(directory), settings)


def read_openai_directory(directory: str | os.PathLike[str]) -> tuple[Path, GPTConfig, dict[str, Lazy]]:
    """The checkpoint's prefix, the config and the tensors, under our names, of a directory with OpenAI's files."""
    settings, prefix = read_settings(directory), latest_checkpoint(directory)
    checkpoint = _open(prefix, settings)
    tensors = {
        name.removeprefix("model/"): Lazy(
            checkpoint.shape(name),
            float_type(checkpoint.dtype(name)),
            lambda name=name: torch.from_numpy(checkpoint.read(name)),  # type: ignore[misc]
        )
        for name in checkpoint.names()
    }
    return prefix, config_from_settings(settings), to_ours(tensors)[0]


def config_from_settings(settings: Mapping[str, Any]) -> GPTConfig:
    """The model that hparams.json's sizes describe; OpenAI's have biases everywhere and a tied head."""
    return GPTConfig(
        vocab_size=settings["n_vocab"],
        context_length=settings["n_ctx"],
        emb_dim=settings["n_embd"],
        n_heads=settings["n_head"],
        n_layers=settings["n_layer"],
        qkv_bias=True,
    )


def _open(ckpt_path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint, if it is of a model with these settings."""
    problems = _settings_problems(settings)
    if problems:
        raise CheckpointError(f"the settings are not a GPT-2's: {'; '.join(problems)}")
    checkpoint = read_checkpoint(ckpt_path)
    problems = _differences(checkpoint, settings)
    if problems:
        raise CheckpointError(
            f"{os.fspath(ckpt_path)} and the settings differ in {len(problems)} points: {'; '.join(problems)}"
        )
    return checkpoint


def _settings_problems(settings: Mapping[str, Any]) -> list[str]:
    problems = [f"{key} is missing" for key in _SETTINGS if key not in settings]
    sizes = {key: settings[key] for key in _SETTINGS if key in settings}
    problems += [
        f"{key} must be a whole number of at least 1, got {size!r}"
        for key, size in sizes.items()
        if type(size) is not int or size < 1
    ]
    if not problems and sizes["n_embd"] % sizes["n_head"]:
        problems.append(f"n_embd must be divisible by n_head, got {sizes['n_embd']} and {sizes['n_head']}")
    return problems


def _differences(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> list[str]:
    """What keeps the checkpoint from being that of a model with these settings, a line each."""
    names = checkpoint.names()
    n_blocks = len({match[1] for match in map(re.compile(r"model/h(\d+)/").match, names) if match})
    if n_blocks != settings["n_layer"]:
        return [f"n_layer is {settings['n_layer']}, the checkpoint has {n_blocks} blocks"]
    expected = openai_shapes(config_from_settings(settings))
    problems = [f"{name} is missing" for name in sorted(expected.keys() - set(names))]
    for name in names:
        shape = checkpoint.shape(name)
        if name not in expected:
            problems.append(f"{name} {shape} is unknown")
        elif [size for size in shape if size != 1] != [size for size in expected[name] if size != 1]:
            problems.append(f"{name} is {shape}, expected {expected[name]}")
        elif checkpoint.dtype(name).kind != "f":
            problems.append(f"{name} holds {checkpoint.dtype(name)}, weights are floating-point numbers")
    return problems
