"""Opening a model by name or path, with its tokenizer, prompt template and LoRA adapter.

`find_model_files` finds the parts. Released models and repositories are downloaded (weights/pretrained.py), a run's
directory contains `model/` or `adapter/`, and an adapter names the model that it was trained on. `open_model` builds the
model (weights/formats reads its config and weights), merges the adapter, and opens the tokenizer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from MyGPT.data.templates import TEMPLATE_FILE, Template, load_template
from MyGPT.devices import pick_device
from MyGPT.finetuning.foreign_adapters import base_of_adapter, open_adapter
from MyGPT.finetuning.lora import merge
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer, get_tokenizer
from MyGPT.weights.formats import find_format
from MyGPT.weights.formats.huggingface import find_directory
from MyGPT.weights.pretrained import find_model

_GPT2_VOCABULARY_SIZES = (50257, 50304)  # nanoGPT rounds 50,257 up to a multiple of 64
_TOKENIZER_FILES = ("tokenizer.json", "encoder.json")


def open_model(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[GPTModel, Tokenizer]:
    """Return a model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: a released model ("gpt2", "hf://user/model"), which is downloaded once; the directory of a model, a
            run, an adapter or OpenAI's files; or a file in safetensors or written by torch.save. An adapter is opened
            with the model that it was trained on.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".
        adapter: the directory of a LoRA adapter, or of a run of `mygpt finetune`; it is merged into the weights.

    Raises:
        FileNotFoundError: there is no model, or the model of an adapter is missing.
        ValueError: a file is damaged, the parts do not fit together, or there is no tokenizer or no such device.
    """
    place = pick_device(device)
    files = find_model_files(name_or_path, adapter)
    model = GPTModel.from_pretrained(files.path)
    if files.adapter is not None:
        model = merge(open_adapter(model, files.adapter)).eval()
    return model.to(place), files.tokenizer(model.config.vocab_size)


@dataclass(frozen=True)
class ModelFiles:
    """The local paths of a model's parts."""

    path: Path
    """The directory or file with the weights."""
    adapter: Path | None = None
    """The directory of the LoRA adapter, if there is one."""

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """Return the tokenizer saved with the model, or GPT-2's if there is none and the vocabulary size fits."""
        directory = self._directory()
        if vocab_size in _GPT2_VOCABULARY_SIZES and not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            return get_tokenizer("gpt2")
        return get_tokenizer(directory)

    def template(self) -> Template | None:
        """Return the prompt template saved with the adapter or else with the model; None if neither has one."""
        for directory in filter(None, (self.adapter, self._directory())):
            if (directory / TEMPLATE_FILE).is_file():
                return load_template(directory)
        return None

    def _directory(self) -> Path:
        """Return the directory that contains the tokenizer and the template."""
        directory = self.path.parent if self.path.is_file() else self.path
        return find_directory(directory) or directory


def find_model_files(name_or_path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None) -> ModelFiles:
    """Return the parts of a model (arguments as for `open_model`), after downloading what is missing.

    Raises FileNotFoundError if the model that an adapter was trained on is not where the adapter's config says.
    """
    if adapter is not None:
        return ModelFiles(find_model(name_or_path), find_adapter(adapter) or Path(adapter))
    found = adapter_without_model(name_or_path)
    if found is None:
        return ModelFiles(find_model(name_or_path))
    base = base_of_adapter(found)
    if Path(base).is_absolute() and not Path(base).exists():
        way_out = f"name the model's present path with --model MODEL --adapter {found}"
        raise FileNotFoundError(f"{found} was trained on {base}, which does not exist: {way_out}")
    return ModelFiles(find_model(base), found)


def find_adapter(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of a LoRA adapter: `path` itself, or `path`/adapter for a run; None if there is none."""
    candidates = (Path(path), Path(path, "adapter"))
    return next((directory for directory in candidates if (directory / "adapter_config.json").is_file()), None)


def adapter_without_model(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of the LoRA adapter at a path that has no complete model; otherwise None."""
    return find_adapter(path) if find_format(Path(path)) is None else None
