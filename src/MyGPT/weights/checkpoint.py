"""The class Checkpoint, which every file format's reader returns: a config, and tensors under MyGPT's names."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.messages import FileWarning
from MyGPT.ranks import is_one_of_several
from MyGPT.weights.layout import HEAD, WTE, config_of, fit, reconcile, to_ours
from MyGPT.weights.lazy import LazyTensor, LazyTensors

COPY_WEIGHTS = os.name == "nt"
"""True on Windows, where opened weights are copied into memory, because it cannot replace or delete a mapped file."""


@dataclass(frozen=True)
class Checkpoint:
    """The config and weights of a saved model. The values of the weights are read only when they are needed."""

    format: str
    """A description of the file format, such as "nanoGPT's checkpoint"."""
    path: Path
    """The file with the weights, or the index of several such files, or the common prefix of OpenAI's files."""
    config: GPTConfig | None
    """The model's config, or None if the files do not contain one (as in files of nn.Module.state_dict)."""
    tensors: dict[str, LazyTensor]
    """The weights under MyGPT's names. The matrices of linear layers have the shape (out_features, in_features)."""
    notes: tuple[str, ...] = ()
    """The contradictions between the config in the files and the tensors, and how they were resolved. `read` reports them."""
    has_custom_parts: bool = False
    """True if the model was trained with custom parts (see parts.py). Its tensors may differ from GPT-2's."""

    @classmethod
    def of(cls, path: Path, tensors: LazyTensors, config: GPTConfig | None, format: str | None = None) -> Checkpoint:
        """Return a checkpoint, with `tensors` renamed and transposed from any known layout to MyGPT's layout.

        If the config and the tensors contradict each other, the tensors decide, and a note says so.

        Args:
            path: the file from which the tensors come. It is stored in the checkpoint and named in errors.
            tensors: the weights under the names that they have in the file.
            config: the model's config, or None if the file does not contain one.
            format: a description of the file format. Default: a text with the name of the layout.

        Raises:
            ValueError: the layout is unknown.
        """
        try:
            ours, layout = to_ours(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        notes: list[str] = []
        if config is not None:
            ours, config, notes = reconcile(ours, config)
        return cls(format or f"a state dict in {layout} layout", path, config, ours, tuple(notes))

    def guess_config(self) -> GPTConfig:
        """Return the config. If there is none, infer it from the tensor shapes.

        The shapes do not show the number of heads, so heads of size 64 are assumed, as in GPT-2, or one head if the
        embedding width is not a multiple of 64.
        """
        if self.config is not None:
            return self.config
        emb_dim = config_of(self.tensors, n_heads=1).emb_dim
        return config_of(self.tensors, n_heads=emb_dim // 64 if emb_dim % 64 == 0 else 1)

    def known_config(self) -> GPTConfig:
        """Return the config. Raises ValueError if the files do not contain one."""
        if self.config is None:
            raise ValueError(
                f"{self.path} does not say how many heads the model has: create it with GPTModel(config), then pass what "
                "torch.load(..., weights_only=True) or safetensors.torch.load_file returns to load_weights_into_gpt"
            )
        return self.config

    def lazy(self) -> tuple[GPTConfig, dict[str, LazyTensor]]:
        """Return the config and the lazy tensors of the state dict. If the output head is tied, it is left out.

        Raises ValueError if the config is missing or does not fit the tensors. Each note is reported as a FileWarning.
        """
        config = self.known_config()
        try:
            tensors = dict(self.tensors) if self.has_custom_parts else fit(self.tensors, config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        for note in self.notes:
            warnings.warn(f"{self.path}: {note}", FileWarning, stacklevel=5)  # the caller of GPTModel.from_pretrained
        if config.tie_weights:
            tensors.pop(HEAD, None)
        return config, tensors

    def read(self, dtype: torch.dtype | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
        """Return the config and the state dict, with all weights in `dtype`. Default: the dtypes in the file.

        Weights that need no conversion are views of the memory-mapped file (see `MappedFile`). Other weights are
        converted one at a time. Errors and warnings are those of `lazy`.
        """
        config, tensors = self.lazy()
        state_dict = {name: _convert(tensor.load(), dtype) for name, tensor in tensors.items()}
        if config.tie_weights:
            state_dict[HEAD] = state_dict[WTE]
        return config, state_dict


def _convert(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the weight in `dtype` (None: unchanged), as a view of the mapped file if no conversion is needed.

    A transposed view costs nothing in float32 and float64. In bfloat16 and float16 some CPUs multiply a transposed
    matrix ten times more slowly, so transposed views in these dtypes are copied into contiguous memory. So are all
    transposed views on several ranks, because `fully_shard` accepts only contiguous parameters.
    """
    tensor = tensor.to(dtype or tensor.dtype, copy=COPY_WEIGHTS)
    return tensor.contiguous() if tensor.dtype.itemsize < 4 or is_one_of_several() else tensor
