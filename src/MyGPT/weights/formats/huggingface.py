"""Model directories in Hugging Face's GPT-2 layout: config.json, weights, the tokenizer's files and a model card.

MyGPT writes models only in this format. transformers opens the same directory, so no export is needed.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from MyGPT.config import GPT2_CONFIGS, GPTConfig, read_config_json
from MyGPT.files import atomic_directory, json_text, present_directory, read_json
from MyGPT.messages import MODEL_SYNONYMS, did_you_mean, near_path
from MyGPT.parts import PARTS_FILE, Parts, read_record, require_parts
from MyGPT.ranks import is_sharded, on_first_rank, rank
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.formats.safetensors import read_safetensors, write_safetensors
from MyGPT.weights.formats.torch_file import read_torch_file
from MyGPT.weights.layout import to_hugging_face, to_own
from MyGPT.weights.lazy import LazyTensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The possible names of a file with all weights, the preferred name first. MyGPT never writes `pytorch_model.bin`."""
INDEX_SUFFIX = ".index.json"
"""If the weights are in several files, the index that lists them is called `model.safetensors` plus this suffix."""
MAX_SHARD_BYTES = 5_000_000_000
"""If the weights have more bytes than this, they are split into several files. transformers splits them likewise."""
_REPLACED_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*.packed",
    PARTS_FILE,
)
_CARD_MARK = "<!-- Written by MyGPT. A card without this line is yours, and stays. -->"


def matches(path: Path) -> bool:
    """Return whether `path` is a model directory, a training run's directory with a model, or a file that stands for one.

    Such a file is the directory's config.json, the index of several weights files, or one of the files that an index lists.
    """
    is_config = path.name == "config.json" and path.is_file()
    return is_config or find_directory(path) is not None or _index_of(path) is not None


def read(path: Path, parts: Parts | None = None) -> Checkpoint:
    """Return the checkpoint in a model directory, or in the subdirectory `model` of a training run's directory.

    If `path` is a file that stands for a model directory (see `matches`), the whole model is returned. `parts` are the own
    parts of the model. Without them, a model that was trained with custom parts raises PartsError.
    """
    directory = path.parent if path.is_file() else _model_directory(path)
    record = read_record(directory / "config.json")
    if record is not None:
        require_parts(record, directory, parts)
    config, index = read_config_json(directory / "config.json", record is not None), _index_of(path)
    weights = find_weights(directory) if index is None else _with_shards(index)
    if record is not None:
        name = f"a model directory of MyGPT with its own {' and '.join(record.names)}"
        return Checkpoint(name, weights, config, _read_tensors(weights), has_custom_parts=True)
    return Checkpoint.of(weights, _read_tensors(weights), config, "a model directory in Hugging Face's layout")


def find_directory(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory with config.json: `path`, or `path`/model if `path` is the directory of a training run.

    Return None if neither directory contains config.json.
    """
    for directory in map(present_directory, (path, Path(path, "model"))):
        if (directory / "config.json").is_file():
            return directory
    return None


def find_weights(directory: Path) -> Path:
    """Return the path of the file with all weights, or of the index if the weights are in several files.

    Raises FileNotFoundError if a file is missing.
    """
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
        index = directory / f"{name}{INDEX_SUFFIX}"
        if index.is_file():
            return _with_shards(index)
    raise FileNotFoundError(f"{directory / WEIGHTS[0]} is missing")


def write_directory(
    directory: str | os.PathLike[str],
    config: GPTConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: Any = None,
    *,
    more_config: Mapping[str, Any] | None = None,
    more_tensors: Mapping[str, Tensor] | None = None,
    parts: Parts | None = None,
) -> None:
    """Write config, weights, tokenizer and model card to a directory. If an error occurs, no file changes.

    Other files in the directory are kept. The ids of special tokens are those of the config; the tokenizer gives the ids
    that the config lacks. `more_config` is added to config.json, and `more_tensors` to the weights, both unchanged. A
    classifier needs them for its head. `parts` are the custom parts of the model; a copy of their file is written too.

    If weights are sharded, all ranks must call this function. They gather one weight at a time, and rank 0 writes. When the
    directory is complete, all ranks return; if an error occurs on rank 0, all ranks raise it.
    """
    special = _special_ids(config, tokenizer)
    given = {key: value for key, value in config.generation_config.items() if value is not None or key not in special}
    generation = {**special, **given}
    tensors = to_hugging_face(state_dict, config) if parts is None else to_own(state_dict, config)
    entries = {**(more_config or {}), **({} if parts is None else parts.config_entries())}
    tensors |= {name: LazyTensor.of(tensor.detach()) for name, tensor in (more_tensors or {}).items()}
    replaces = (*_REPLACED_FILES, *getattr(tokenizer, "replaced_files", ()))
    values = (tensor.load() for tensor in tensors.values())

    def write() -> None:
        with atomic_directory(directory, replaces=replaces) as temporary:
            _write_json(temporary / "config.json", {**config.to_dict(), **special, **entries})
            _write_json(temporary / "generation_config.json", generation)
            _write_weights(Path(directory), temporary, tensors, values)
            if parts is not None and parts.source is not None:
                (temporary / PARTS_FILE).write_bytes(parts.source)
            if tokenizer is not None:
                tokenizer.save(temporary)
                _set_max_length(temporary / "tokenizer_config.json", config.context_length)
            card = Path(directory) / "README.md"
            if not card.is_file() or _CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
                (temporary / "README.md").write_text(_model_card(config, state_dict), encoding="utf-8")

    if not any(map(is_sharded, [*state_dict.values(), *(more_tensors or {}).values()])):
        write()
        return

    def write_and_gather() -> None:
        try:
            write()
        finally:
            # After an error too, the other ranks wait for this rank in every remaining gather.
            deque(values, maxlen=0)

    if rank() > 0:
        deque(values, maxlen=0)
    on_first_rank(write_and_gather)


def _set_max_length(path: Path, context_length: int) -> None:
    """Write the context length to a tokenizer_config.json, if there is one, so that transformers can cut long texts."""
    if path.is_file():
        _write_json(path, {**read_json(path), "model_max_length": context_length})


def _special_ids(config: GPTConfig, tokenizer: Any) -> dict[str, Any]:
    """Return the ids of special tokens for config.json: those of the config, or else those of the tokenizer, or else null.

    They are in config.json even if they are null, because transformers replaces missing ids with GPT-2's. A tokenizer that
    was opened from a directory without a bos_token gives none, although MyGPT then starts texts with the end-of-text token.
    """
    tokens = {"bos_token_id": "bos_token", "eos_token_id": "eot_token", "pad_token_id": "pad_token"}
    settings = getattr(tokenizer, "settings", {})
    if settings and not settings.get("bos_token"):
        del tokens["bos_token_id"]
    given = {name: getattr(tokenizer, token, None) for name, token in tokens.items()}
    own = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: given.get(name) if id_ is None else id_ for name, id_ in own.items()}


def _model_directory(path: str | os.PathLike[str]) -> Path:
    """Return the result of `find_directory`. Raises FileNotFoundError instead of returning None."""
    directory = find_directory(path)
    if directory is None:
        if Path(path).exists():
            raise FileNotFoundError(f"no model at {path}: neither it nor {Path(path, 'model')} has a config.json")
        hint = did_you_mean(str(path), GPT2_CONFIGS, MODEL_SYNONYMS) or near_path(path)
        raise FileNotFoundError(f"no model at {path}: there is no such file or directory{hint}")
    return directory


def _index_of(path: Path) -> Path | None:
    """Return the index of a model in several files, if `path` is this index or a file that it lists; otherwise None."""
    if path.name.endswith(INDEX_SUFFIX):
        return path if path.is_file() else None
    for index in (path.with_name(f"{weights}{INDEX_SUFFIX}") for weights in WEIGHTS):
        if path.suffix in index.suffixes and index.is_file() and path.name in _weight_map(index).values():
            return index
    return None


def _with_shards(index: Path) -> Path:
    """Return the index. Raises FileNotFoundError if a file that it lists is missing."""
    for shard in sorted(set(_weight_map(index).values())):
        if not index.with_name(shard).is_file():
            raise FileNotFoundError(f"{index.with_name(shard)} is missing, but {index.name} lists it")
    return index


def _read_tensors(weights: Path) -> dict[str, LazyTensor]:
    """Return the tensors by name from a weights file, or from all files that an index lists. Names are unchanged."""
    if weights.suffix == ".safetensors":
        return read_safetensors(weights)
    if not weights.name.endswith(INDEX_SUFFIX):
        return read_torch_file(weights)[0]
    file_of = _weight_map(weights)
    shards = {file: _read_tensors(weights.parent / file) for file in sorted(set(file_of.values()))}
    return {name: shards[file][name] for name, file in file_of.items() if name in shards[file]}


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index file and return a dict from tensor names to file names.

    Raises ValueError if the index is damaged or lists a file outside its own directory.
    """
    try:
        file_of: dict[str, str] = read_json(index)["weight_map"]
        files = set(file_of.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {type(error).__name__}: {error}") from None
    suffix = re.escape(Path(index.name.removesuffix(INDEX_SUFFIX)).suffix)
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(rf"[\w.-]+{suffix}", file):
            raise ValueError(f"{index} lists {file!r}, which is not a weights file in its directory")
    return file_of


def _write_weights(
    directory: Path, temporary: Path, tensors: Mapping[str, LazyTensor], values: Iterator[Tensor]
) -> None:
    """Write the weights to the directory `temporary`. `values` loads the tensors in order.

    They are written as one file, or as several files and an index if they are larger than MAX_SHARD_BYTES. The files will
    be moved to `directory` later, so error messages name `directory`. At most one file's tensors are copied into memory at
    a time.
    """
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(sizes[other] for other in [*shards[-1], name]) > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    n = len(shards)
    files = [WEIGHTS[0]] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file, names in zip(files, shards, strict=True):
        shard = {name: next(values).cpu().contiguous() for name in names}
        write_safetensors(temporary / file, shard, shown_as=directory / file)
    if n > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(temporary / f"{WEIGHTS[0]}{INDEX_SUFFIX}", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")


def _model_card(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> str:
    names = [name for name in state_dict if not (config.tie_weights and name == "lm_head.weight")]
    n_parameters = sum(state_dict[name].numel() for name in names)
    dtype = str(state_dict[names[0]].dtype).removeprefix("torch.")
    head = "the token embedding (tied)" if config.tie_weights else "its own"
    card = (Path(__file__).parents[2] / "assets" / "model_card.md").read_text(encoding="utf-8")
    return card.format(config=config, n_parameters=n_parameters, dtype=dtype, head=head)
