"""Opening a model by name or path, with its tokenizer, prompt template and LoRA adapter.

`find_model_files` finds the files and downloads them if necessary (weights/pretrained.py). The directory of a training
run contains `model/` or `adapter/`, and an adapter names the model that it was trained on. `open_model` builds the
model (weights/formats reads its config and weights), merges the adapter into it, and opens the tokenizer.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from MyGPT.config import GPTConfig
from MyGPT.data.templates import TEMPLATE_FILE, Template, load_template
from MyGPT.devices import pick_device
from MyGPT.files import present_directory, reading
from MyGPT.finetuning.foreign_adapters import base_of_adapter, open_adapter
from MyGPT.finetuning.lora import merge
from MyGPT.messages import FileWarning, quote
from MyGPT.model import GPTModel
from MyGPT.tokenizers import BPETokenizer, Tokenizer, get_tokenizer, load_tokenizer
from MyGPT.tokenizers.directory import READABLE_FILES, find_files
from MyGPT.tokenizers.nanogpt import META
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.formats import find_format, gguf, llmc, open_checkpoint
from MyGPT.weights.formats.huggingface import find_directory
from MyGPT.weights.formats.torch_file import read_dataset
from MyGPT.weights.pretrained import find_downloaded, find_model, is_name, stored_name

_GPT2_VOCABULARY_SIZES = (50257, 50304)  # nanoGPT rounds 50,257 up to a multiple of 64


def open_model(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    adapter: str | os.PathLike[str] | None = None,
    parts: Any = None,
) -> tuple[GPTModel, Tokenizer]:
    """Open a saved or released model, and return the model (in evaluation mode) and its tokenizer.

    Args:
        name_or_path: the name of a released model ("gpt2", "hf://user/model"), which is downloaded once; the directory
            of a model, a training run, a LoRA adapter or OpenAI's files; or a file in safetensors format or written by
            torch.save. An adapter is opened with the model that it was trained on.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".
        adapter: the directory of a LoRA adapter or of a run of `mygpt finetune`. The adapter is merged into the model.
        parts: a Python file whose attention, MLP or block replaces GPT-2's. The file is run. A model that was trained with
            custom parts is never opened without them.

    Raises:
        FileNotFoundError: there is no model, or the model that an adapter was trained on is missing.
        ValueError: a file is damaged, the model's files do not fit together, the tokenizer is missing, or the device is
            not available.
    """
    place = pick_device(device)
    with reading(name_or_path):
        files = find_model_files(name_or_path, adapter)
        model = files.model(parts)
        if files.adapter is None:
            model.name_or_path = stored_name(name_or_path)  # files.path is a directory of the cache for "gpt2"
        tokenizer = files.tokenizer(model.config.vocab_size)
        if files.adapter is not None:
            # The adapter was trained to end its texts with the tokenizer's token.
            model.config = model.config.ending_with(tokenizer.eot_token)
        return model.to(place), tokenizer


def open_lazily(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    adapter: str | os.PathLike[str] | None = None,
    parts: Any = None,
) -> tuple[GPTModel | Checkpoint, GPTConfig, Tokenizer]:
    """Open a model to generate with it, and return it with its config and tokenizer. For arguments and errors, see `open_model`.

    On a CPU, without an adapter and without custom parts, a Checkpoint is returned instead of a model. `accelerate` reads its
    weights one after another, or reads packed weights instead. The caller must be within `reading(name_or_path)` until then.
    """
    files = find_model_files(name_or_path, adapter)
    if pick_device(device).type != "cpu" or files.adapter is not None or parts is not None:
        model, tokenizer = open_model(name_or_path, device, adapter, parts)
        return model, model.config, tokenizer
    checkpoint = open_checkpoint(files.path)
    config = checkpoint.known_config()
    return checkpoint, config, files.tokenizer(config.vocab_size)


@dataclass(frozen=True)
class ModelFiles:
    """The paths of a model and its LoRA adapter, with methods that open them, the tokenizer and the prompt template."""

    path: Path
    """The directory or file with the weights."""
    adapter: Path | None = None
    """The directory of the LoRA adapter, or None."""

    def model(self, parts: Any = None) -> GPTModel:
        """Return the model on the CPU in evaluation mode, with the adapter merged into it. For `parts`, see `open_model`."""
        model = GPTModel.from_pretrained(self.path, parts=parts)
        return model if self.adapter is None else merge(open_adapter(model, self.adapter)).eval()

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """Return the tokenizer that is saved with the adapter or with the model; its `source` names the files.

        `vocab_size` is the number of tokens of the model. If no tokenizer is saved and `vocab_size` is that of GPT-2, the
        result is GPT-2's tokenizer, and its `is_assumed` is True.

        Raises ValueError if the tokenizer is missing, damaged or not supported.
        """
        inside = gguf.read_tokenizer(self.path) if self.adapter is None and gguf.matches(self.path) else None
        if inside is not None:
            return _fit(inside, vocab_size)
        found = next((place for place in self._tokenizer_directories() if find_files(place)), None)
        if found is not None:
            return _fit(load_tokenizer(found), vocab_size)
        directory = self._directory()
        if vocab_size not in _GPT2_VOCABULARY_SIZES:
            reason = f"and the vocabulary of {vocab_size:,} tokens is not GPT-2's"
            dataset = read_dataset(self.path)
            missing = "its files" if dataset is None else f"nanoGPT's data/{dataset}/{META}"
            raise ValueError(f"{directory} has no tokenizer ({READABLE_FILES}), {reason}: copy {missing} there")
        tokenizer = copy.copy(get_tokenizer("gpt2"))
        tokenizer.source = f"GPT-2's, because {directory} has no tokenizer and the vocabulary has {vocab_size:,} tokens"
        tokenizer.is_assumed = True
        return tokenizer

    def _tokenizer_directories(self) -> Iterator[Path]:
        """Yield the directories that can contain the tokenizer, in the order in which they are searched.

        nanoGPT keeps its table of characters in data/<dataset>/meta.pkl, where `dataset` is in the checkpoint's config. The
        path is relative to the directory from which nanoGPT was started, which contains the directory of the checkpoint.
        """
        if self.adapter is not None:
            yield self.adapter
        if not (llmc.matches(self.path) and (self.path.parent / llmc.GPT2_VOCABULARY).is_file()):
            yield self._directory()
        dataset = read_dataset(self.path)
        if dataset is not None:
            places = [root / "data" / dataset for root in (self.path.absolute().parent.parent, Path.cwd())]
            yield from (place for place in places if (place / META).is_file())

    def template(self) -> Template | None:
        """Return the prompt template saved with the adapter, else the one saved with the model, else None."""
        for directory in filter(None, (self.adapter, self._directory())):
            if (directory / TEMPLATE_FILE).is_file():
                return load_template(directory)
        return None

    def _directory(self) -> Path:
        """Return the directory that contains the tokenizer and the template."""
        directory = self.path.parent if self.path.is_file() else self.path
        return find_directory(directory) or directory


def _fit(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Return the tokenizer, without a padding token and optional tokens for which the model has no row.

    If the tokenizer has other tokens that the model lacks, a FileWarning says so. A text with such a token is an error later.
    """
    if tokenizer.n_vocab <= vocab_size:
        return tokenizer
    beyond = {token.content for token in tokenizer.added_tokens if token.id >= vocab_size}
    padding = {
        token.content for token in tokenizer.added_tokens if token.id == tokenizer.pad_token != tokenizer.eot_token
    }
    if isinstance(tokenizer, BPETokenizer) and beyond <= tokenizer.optional_tokens | padding:
        tokenizer = tokenizer.without_added(beyond)
    if tokenizer.n_vocab > vocab_size:
        sizes = f"ids up to {tokenizer.n_vocab - 1:,}, but the model's ids end at {vocab_size - 1:,}"
        effect = "a text with one of the other tokens will be an error"
        message = f"the tokenizer does not fit the model: {tokenizer.source} has {sizes}: {effect}"
        warnings.warn(message, FileWarning, stacklevel=3)
    return tokenizer


def find_model_files(name_or_path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> ModelFiles:
    """Return the paths of a model's files and adapter. Download a named model that is not in the cache.

    The arguments are those of `open_model`. The model that an adapter was trained on is never downloaded, because an
    adapter from a stranger names it, not the user.

    Raises FileNotFoundError if there is no model, or if the model that an adapter was trained on is not on this machine.
    """
    if name_or_path == "":
        raise ValueError("the name of the model is empty: give the name or the path of a model")
    if adapter is not None:
        return ModelFiles(find_model(name_or_path), find_adapter(adapter) or Path(adapter))
    found = adapter_without_model(name_or_path)
    if found is None:
        return ModelFiles(find_model(name_or_path))
    return ModelFiles(_find_base(base_of_adapter(found), found), found)


def _find_base(base: str, adapter: Path) -> Path:
    """Return the directory or file of the model called `base`, on which the adapter in the directory `adapter` was trained.

    `base` is a path, or a name that MyGPT, PEFT or transformers writes. Raises FileNotFoundError if it is not on this
    machine.
    """
    path = Path(base)
    if find_format(path) is not None:
        return path
    is_repository = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not path.exists()
    name = f"hf://{base}" if is_repository and not is_name(base) else base
    trained_on = f"{adapter} was trained on {base}, which"
    choice = f"--model MODEL --adapter {quote(adapter)}"
    if is_name(name):
        downloaded = find_downloaded(name)
        if downloaded is None:
            way_out = f"download it with: mygpt download {name}, or name another copy with {choice}"
            raise FileNotFoundError(f"{trained_on} is not on this machine: {way_out}")
        return downloaded
    if not path.exists():
        raise FileNotFoundError(f"{trained_on} does not exist: name the model's present path with {choice}")
    return path


def find_adapter(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of the LoRA adapter at `path`, which is `path` or `path`/adapter; None if there is none."""
    candidates = map(present_directory, (path, Path(path, "adapter")))
    return next((directory for directory in candidates if (directory / "adapter_config.json").is_file()), None)


def adapter_without_model(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of the LoRA adapter at `path`, or None if `path` has no adapter or is a complete model."""
    return find_adapter(path) if find_format(Path(path)) is None else None
