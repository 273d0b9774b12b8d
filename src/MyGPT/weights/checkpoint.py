"""The class Checkpoint, into which every file format is read: a config and tensors by MyGPT's names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.weights.layout import HEAD, WTE, config_of, drop_zero_biases, fit, to_ours
from MyGPT.weights.lazy import LazyTensor, LazyTensors

COPY_WEIGHTS = os.name == "nt"
"""True to copy opened weights into memory. Windows can neither replace nor delete a file that is mapped."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint; its tensors are read when they are needed."""

    format: str
    """A description of the file format, such as "nanoGPT's checkpoint"."""
    path: Path
    """The file that holds the weights, their index, or the common prefix of OpenAI's files."""
    config: GPTConfig | None
    """None if the file does not contain it. The tensor shapes determine everything except the number of heads."""
    tensors: dict[str, LazyTensor]
    """The weights by MyGPT's names. The matrices of linear layers are (out, in)."""

    @classmethod
    def of(cls, path: Path, tensors: LazyTensors, config: GPTConfig | None, format: str | None = None) -> Checkpoint:
        """Return the checkpoint for the tensors of a file in any known layout; by default, `format` names the layout.

        Raises ValueError if the layout is unknown.
        """
        try:
            ours, layout = to_ours(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if config is not None:
            ours = drop_zero_biases(ours, config)
        return cls(format or f"a state dict in {layout} layout", path, config, ours)

    def guess_config(self) -> GPTConfig:
        """Return the config; if the file has none, infer it from the shapes and assume heads of width 64, as in GPT-2."""
        if self.config is not None:
            return self.config
        emb_dim = config_of(self.tensors, n_heads=1).emb_dim
        return config_of(self.tensors, n_heads=emb_dim // 64 if emb_dim % 64 == 0 else 1)

    def read(self, dtype: torch.dtype | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
        """Return the config and the state dict, in `dtype` or in the stored type.

        Weights that need no conversion are views of the mapped file (see `MappedFile`). Weights that need one are
        converted one at a time. Raises ValueError if the config is unknown or does not fit the tensors.
        """
        if self.config is None:
            raise ValueError(
                f"{self.path} does not say how many heads the model has: create it with GPTModel(config), then pass what "
                "torch.load(..., weights_only=True) or safetensors.torch.load_file returns to load_weights_into_gpt"
            )
        try:
            tensors = fit(self.tensors, self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if self.config.tie_weights:
            del tensors[HEAD]
        state_dict = {name: _convert(tensor.load(), dtype) for name, tensor in tensors.items()}
        if self.config.tie_weights:
            state_dict[HEAD] = state_dict[WTE]
        return self.config, state_dict


def _convert(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the weight in `dtype`, as a view of the file if no conversion is needed.

    A transposed view costs nothing in float32 and float64. In bfloat16 and float16 some CPUs multiply a transposed
    matrix ten times more slowly, so those are copied into contiguous memory.
    """
    tensor = tensor.to(dtype or tensor.dtype, copy=COPY_WEIGHTS)
    return tensor if tensor.dtype.itemsize >= 4 else tensor.contiguous()
