"""A model directory in Hugging Face's GPT-2 layout: config.json, model.safetensors, the tokenizer's files, a model card.

There is no other model format and no export step: transformers opens the same directory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT.config import GPTConfig, read_config_json
from MyGPT.files import atomic_directory, read_json, restore_directory
from MyGPT.weights.layout import Lazy, drop_zero_biases, to_hugging_face, to_ours
from MyGPT.weights.mapped import MappedFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Weights beyond this are written in several files, as transformers does."""
_OURS_TO_REPLACE = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
_CARD_MARK = "<!-- Written by MyGPT. A card without this line is yours, and stays. -->"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_directory(
    directory: str | os.PathLike[str],
    config: GPTConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: Any = None,
    *,
    more_config: Mapping[str, Any] | None = None,
    more_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model directory as a whole or not at all; other files that it held stay in it.

    What a head of another kind needs is added to config.json and to the weights as it is.
    """
    eot_token = getattr(tokenizer, "eot_token", None)
    special = {"bos_token_id": eot_token, "eos_token_id": eot_token}
    tensors = to_hugging_face(state_dict, config)
    tensors |= {name: Lazy.of(tensor.detach()) for name, tensor in (more_tensors or {}).items()}
    with atomic_directory(directory, replaces=_OURS_TO_REPLACE) as temporary:
        _write_json(temporary / "config.json", {**config.to_dict(), **special, **(more_config or {})})
        _write_json(temporary / "generation_config.json", special if eot_token is not None else {})
        _write_weights(Path(directory), temporary, tensors)
        if tokenizer is not None:
            tokenizer.save(temporary)
        card = Path(directory) / "README.md"
        if not card.is_file() or _CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
            (temporary / "README.md").write_text(_model_card(config, state_dict), encoding="utf-8")


def read_directory(directory: str | os.PathLike[str]) -> tuple[Path, GPTConfig, dict[str, Lazy]]:
    """The weights' file, the config and the tensors, under our names, of a model directory or of a run (its `model/`)."""
    config, path = read_config(directory), model_directory(directory)
    weights = next((path / name for name in (WEIGHTS, INDEX) if (path / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{path / WEIGHTS} is missing")
    tensors = dict(_read_shards(weights) if weights.name == INDEX else read_safetensors(weights))
    try:
        return weights, config, drop_zero_biases(to_ours(tensors)[0], config)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None


def read_config(directory: str | os.PathLike[str]) -> GPTConfig:
    """The config of a model directory or of a run."""
    return read_config_json(model_directory(directory) / "config.json")


def model_directory(name_or_dir: str | os.PathLike[str]) -> Path:
    """The directory that holds the model: itself, or `model/` in a run's directory."""
    path = Path(name_or_dir)
    for candidate in (path, path / "model"):
        restore_directory(candidate)
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"no model at {path}: neither it nor {path / 'model'} has a config.json")


def read_safetensors(path: Path) -> Iterator[tuple[str, Lazy]]:
    """The tensors of a file, as views of the mapped file (see `MappedFile`)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # checks that what the header says is possible, and the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    with open(path, "rb") as file:
        n_header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header_bytes))
    mapped = MappedFile(path)
    for name, described in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(described["shape"]), _DTYPES.get(described["dtype"])
            begin, end = (8 + n_header_bytes + place for place in described["data_offsets"])
            yield name, Lazy(shape, dtype, partial(_read_tensor, mapped, name, shape, dtype, begin, end))


def _read_tensor(
    file: MappedFile, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, begin: int, end: int
) -> Tensor:
    if dtype is None:
        raise ValueError(f"{file.path}: {name} does not hold floating-point numbers")
    try:
        return torch.from_numpy(file.read(begin, end - begin)).view(dtype).reshape(shape)
    except ValueError as error:  # shorter than it was
        raise ValueError(f"{file.path} is damaged: {name} cannot be read: {error}") from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], shown_as: Path | None = None) -> None:
    """Writes contiguous tensors on the CPU to a file; what goes wrong is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in safetensors' own words
        raise OSError(f"cannot write {shown_as or path}: {error}") from error


def _read_shards(index: Path) -> Iterator[tuple[str, Lazy]]:
    """The tensors of all the files that an index names; a name that leads elsewhere is refused."""
    try:
        files = read_json(index)["weight_map"]
        names = set(files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: {type(error).__name__}: {error}") from None
    for name in sorted(names, key=str):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index} names {name!r}, which is no file of its directory")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing, {index.name} names it")
        for tensor_name, tensor in read_safetensors(index.parent / name):
            if files.get(tensor_name) == name:
                yield tensor_name, tensor


def _write_weights(directory: Path, temporary: Path, tensors: Mapping[str, Lazy]) -> None:
    """One file, or several and their index; of the tensors that have to be turned no more than one file's exist at a time."""
    shards: list[list[str]] = [[]]
    total = in_shard = 0
    for name, tensor in tensors.items():
        n_bytes = _n_bytes(tensor)
        if shards[-1] and in_shard + n_bytes > MAX_SHARD_BYTES:
            shards.append([])
            in_shard = 0
        shards[-1].append(name)
        in_shard, total = in_shard + n_bytes, total + n_bytes
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file, names in zip(files, shards, strict=True):
        shard = {name: tensors[name].load().cpu().contiguous() for name in names}
        write_safetensors(temporary / file, shard, shown_as=directory / file)
    if n > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _n_bytes(tensor: Lazy) -> int:
    assert tensor.dtype is not None  # a parameter
    n = tensor.dtype.itemsize
    for size in tensor.shape:
        n *= size
    return n


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _model_card(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> str:
    names = [name for name in state_dict if not (config.tie_weights and name == "lm_head.weight")]
    n_parameters = sum(state_dict[name].numel() for name in names)
    dtype = str(state_dict[names[0]].dtype).removeprefix("torch.")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, mygpt]
---
{_CARD_MARK}
# A GPT-2 model

| | |
|---|---|
| parameters | {n_parameters:,} ({dtype}) |
| layers, heads, width | {config.n_layers}, {config.n_heads}, {config.emb_dim} |
| vocabulary, context | {config.vocab_size:,}, {config.context_length:,} |
| output head | {"the token embedding (tied)" if config.tie_weights else "its own"} |

It opens as it is, with equal logits, in MyGPT and in transformers:

```python
from MyGPT import GPTModel
model = GPTModel.from_pretrained("this-directory")

from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this-directory")
```

What it was trained on, and what it is good for, is for you to say here.
"""
