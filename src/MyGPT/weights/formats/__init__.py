"""The file formats from which a GPT-2 model can be opened. Each format is a module with the functions of `Format`.

To add a format, write its module and add it to FORMATS.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from MyGPT.parts import Parts
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.formats import gguf, huggingface, llmc, openai, safetensors, torch_file


class Format(Protocol):
    """The functions that every format's module defines."""

    def matches(self, path: Path) -> bool:
        """Return whether the directory or file at `path` seems to have this format. No tensors are read."""
        ...

    def read(self, path: Path) -> Checkpoint:
        """Return the checkpoint at `path`. Raises ValueError, naming the path, if the files are damaged."""
        ...


FORMATS: tuple[Format, ...] = (openai, huggingface, safetensors, gguf, llmc, torch_file)
"""All formats, in the order in which they are tried. `torch_file` is last because it accepts any file."""


def find_format(path: Path) -> Format | None:
    """Return the first format that matches the directory or file at `path`, or None if there is no model."""
    return next((candidate for candidate in FORMATS if candidate.matches(path)), None)


def open_checkpoint(path: str | os.PathLike[str], parts: Parts | None = None) -> Checkpoint:
    """Open the model at `path`, a directory or file in any known format. Tensors are read only when they are needed.

    `parts` are the custom parts of the model, without which a model that was trained with them raises PartsError.

    Raises FileNotFoundError if there is no model at `path`, and ValueError if its files are damaged or are not a GPT-2.
    """
    path = Path(path)
    found = find_format(path) or huggingface  # raises FileNotFoundError if no format matches
    return huggingface.read(path, parts) if found is huggingface else found.read(path)
