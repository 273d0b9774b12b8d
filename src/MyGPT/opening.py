"""Opening a model by name or path, with its tokenizer, prompt template and LoRA adapter.

`find_model_files` finds the files and downloads them if necessary (weights/pretrained.py). The directory of a training
run contains `model/` or `adapter/`, and an adapter names the model that it was trained on. `open_model` builds the
model (weights/formats reads its config and weights), merges the adapter into it, and opens the tokenizer.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from MyGPT.data.templates import TEMPLATE_FILE, Template, load_template
from MyGPT.devices import pick_device
from MyGPT.finetuning.foreign_adapters import base_of_adapter, open_adapter
from MyGPT.finetuning.lora import merge
from MyGPT.messages import quote
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer, get_tokenizer
from MyGPT.weights.formats import find_format
from MyGPT.weights.formats.huggingface import find_directory
from MyGPT.weights.pretrained import find_downloaded, find_model, is_name

_GPT2_VOCABULARY_SIZES = (50257, 50304)  # nanoGPT rounds 50,257 up to a multiple of 64
_TOKENIZER_FILES = ("tokenizer.json", "encoder.json")


def open_model(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[GPTModel, Tokenizer]:
    """Open a saved or released model, and return the model (in evaluation mode) and its tokenizer.

    Args:
        name_or_path: the name of a released model ("gpt2", "hf://user/model"), which is downloaded once; the directory
            of a model, a training run, a LoRA adapter or OpenAI's files; or a file in safetensors format or written by
            torch.save. An adapter is opened with the model that it was trained on.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".
        adapter: the directory of a LoRA adapter or of a run of `mygpt finetune`. The adapter is merged into the model.

    Raises:
        FileNotFoundError: there is no model, or the model that an adapter was trained on is missing.
        ValueError: a file is damaged, the model's files do not fit together, the tokenizer is missing, or the device is
            not available.
    """
    place = pick_device(device)
    files = find_model_files(name_or_path, adapter)
    model = files.model()
    return model.to(place), files.tokenizer(model.config.vocab_size)


@dataclass(frozen=True)
class ModelFiles:
    """The paths of a model and its LoRA adapter, with methods that open them, the tokenizer and the prompt template."""

    path: Path
    """The directory or file with the weights."""
    adapter: Path | None = None
    """The directory of the LoRA adapter, or None."""

    def model(self) -> GPTModel:
        """Return the model on the CPU in evaluation mode, with the adapter merged into it."""
        model = GPTModel.from_pretrained(self.path)
        return model if self.adapter is None else merge(open_adapter(model, self.adapter)).eval()

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """Return the tokenizer that is saved with the model. `vocab_size` is the number of tokens of the model.

        If no tokenizer is saved and `vocab_size` is that of GPT-2, GPT-2's tokenizer is returned.
        """
        directory = self._directory()
        if vocab_size in _GPT2_VOCABULARY_SIZES and not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            return get_tokenizer("gpt2")
        return get_tokenizer(directory)

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


def find_model_files(name_or_path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> ModelFiles:
    """Return the paths of a model's files and adapter. Download a named model that is not in the cache.

    The arguments are those of `open_model`. The model that an adapter was trained on is never downloaded, because an
    adapter from a stranger names it, not the user.

    Raises FileNotFoundError if there is no model, or if the model that an adapter was trained on is not on this machine.
    """
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
    candidates = (Path(path), Path(path, "adapter"))
    return next((directory for directory in candidates if (directory / "adapter_config.json").is_file()), None)


def adapter_without_model(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of the LoRA adapter at `path`, or None if `path` has no adapter or is a complete model."""
    return find_adapter(path) if find_format(Path(path)) is None else None
