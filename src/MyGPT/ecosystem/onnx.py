"""ONNX files with a KV cache, for ONNX Runtime and the clients that use the names of Hugging Face's Optimum.

B batch size, T new tokens, P earlier tokens, whose keys and values are inputs, S = P + T, H heads, D width of a head,
V vocabulary size. `write_onnx` lists the inputs and outputs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from MyGPT.cache import positions_and_mask
from MyGPT.files import check_output_file
from MyGPT.model import GPTModel, model_of
from MyGPT.parts import refuse_parts

_DTYPES = {"f32": torch.float32, "f16": torch.float16}
_TOLERANCES = {"f32": 1e-4, "f16": 2e-2}
"""Largest difference of a logit between ONNX Runtime and the model, as a share of the model's largest logit.

Rounding is about a tenth of this. Float16 has 11 bits, and its errors add up over the layers."""
_LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights above which they are stored in a second file. Protocol buffers are limited to 2 GiB."""


def write_onnx(model: GPTModel, path: str | os.PathLike[str], dtype: Literal["f32", "f16"] = "f32") -> None:
    """Write a model with a KV cache as an ONNX file, and compare its logits in ONNX Runtime with the model's.

    An existing file is replaced only if the logits agree. Weights of 2 GB or more are written to a second file, with
    ".data" appended to the name. Names and shapes are those of Optimum's exports, for N from 0 to n_layers - 1:

    - inputs: input_ids (B, T), attention_mask (B, S) and position_ids (B, T) in int64, and past_key_values.N.key and
      past_key_values.N.value (B, H, P, D) in the dtype of the weights. P is 0 for a prompt.
    - outputs: logits (B, T, V), and present.N.key and present.N.value (B, H, S, D), the next call's inputs.

    All of B, T and P may change from call to call. attention_mask has the meaning of `GPTModel.forward`.

    Args:
        model: a GPTModel without an unmerged adapter.
        path: the file to write.
        dtype: number format of weights, keys, values and logits: f32 (float32) or f16 (float16).

    Raises:
        ValueError: another dtype, a model with custom parts, different logits, or one of the packages onnx, onnxscript and
            onnxruntime is not installed.
        OSError: the file cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"the dtype of an ONNX file must be {' or '.join(_DTYPES)}, got {dtype!r}")
    refuse_parts(model, "an ONNX file")
    path = Path(os.path.realpath(path))
    check_output_file(path)
    _require_packages()
    # A copy without dropout. The same tensors are used where they have the right dtype.
    weights = {name: tensor.to("cpu", _DTYPES[dtype]) for name, tensor in model.state_dict().items()}
    model = model_of(model.config, weights)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
        file = Path(directory, path.name)
        _export(model, file)
        _compare(file, model.float(), _TOLERANCES[dtype])
        for written in sorted(Path(directory).iterdir()):
            os.replace(written, path.parent / written.name)


def _require_packages() -> None:
    """Raise ValueError if a package is missing that exports or runs ONNX files."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError:
            raise ValueError(f"writing ONNX files needs the package {name}: pip install 'mygpt[onnx]'") from None


class _PastKeys:
    """Keys and values that are inputs of a graph, behind the interface of `KVCache` as `Transformer.forward` uses it.

    `past` and `present` are lists of tensors: the key and the value of the first layer, of the second layer, and so on.
    """

    def __init__(self, past: list[Tensor], position_ids: Tensor) -> None:
        self.past, self.position_ids = past, position_ids
        self.present: list[Tensor] = []

    def positions_and_mask(self, attention_mask: Tensor, T: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return self.position_ids, positions_and_mask(attention_mask, T, self.past[0].shape[2] + T, device)[1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.past[2 * layer : 2 * layer + 2]
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        self.present += [k, v]
        return k, v

    def advance(self, T: int) -> None:
        """Do nothing: the shape of the keys is their number."""


class _Graph(nn.Module):
    """A GPTModel whose cache consists of inputs and outputs."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache: Any = _PastKeys(past_key_values, position_ids)
        hidden = self.model.transformer(input_ids, attention_mask, None, cache)
        return self.model.lm_head(hidden), *cache.present


def _cache_names(prefix: str, n_layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{kind}" for layer in range(n_layers) for kind in ("key", "value")]


def _export(model: GPTModel, file: Path) -> None:
    """Write the ONNX file without checking it."""
    config = model.config
    # Any sizes but 0 and 1, which torch.export would take for constants.
    B, T, P = 2, 3, 4
    past_shape = (B, config.n_heads, P, config.emb_dim // config.n_heads)
    past = [torch.zeros(past_shape, dtype=model.lm_head.weight.dtype) for _ in range(2 * config.n_layers)]
    ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.ones(B, P + T, dtype=torch.int64)
    tokens = {0: "batch_size", 1: "sequence_length"}
    shapes = {
        "input_ids": tokens,
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": tokens,
        "past_key_values": [{0: "batch_size", 2: "past_sequence_length"}] * len(past),
    }
    with _quiet():
        program = torch.onnx.export(
            _Graph(model),
            (ids, mask, torch.zeros_like(ids), past),
            verbose=False,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *_cache_names("past_key_values", config.n_layers),
            ],
            output_names=["logits", *_cache_names("present", config.n_layers)],
            dynamic_shapes=shapes,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of the user's files
    program.save(file, external_data=sum(parameter.nbytes for parameter in model.parameters()) > _LARGEST_FILE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter prints, logs and warns about within the `with` block. Errors are raised as usual."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(file: Path, model: GPTModel, tolerance: float) -> None:
    """Raise ValueError unless ONNX Runtime computes the logits of `model` from the ONNX file.

    Three texts, two of them with padding, and then one text are computed: first a prompt, then single tokens and, at the
    end, two tokens with the cache. tolerance is the largest difference as a share of the largest logit.
    """
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    S = min(12, model.config.context_length)
    ids = torch.randint(model.config.vocab_size, (3, S), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : S // 4] = 0
    mask[2, : S // 3] = 0
    ends = [*range(max(1, S // 2), S - 1), S]
    for rows in (3, 1):
        with torch.no_grad():
            expected = model(ids[:rows], mask[:rows])
        logits = np.concatenate(list(_in_pieces(session, ids[:rows].numpy(), mask[:rows].numpy(), ends)), axis=1)
        are_tokens = mask[:rows] == 1
        difference = (torch.from_numpy(logits).float() - expected)[are_tokens].abs().max().item()
        largest = expected.abs().max().item()
        if not difference <= tolerance * largest:
            raise ValueError(
                f"ONNX Runtime's logits differ from the model's by up to {difference:.2g}, and the largest logit is "
                f"{largest:.2g}: no file was written"
            )


def _in_pieces(session: Any, ids: np.ndarray, mask: np.ndarray, ends: list[int]) -> Iterator[np.ndarray]:
    """Compute the logits of the ids (B, S) up to each of the `ends` in turn, with the cache of the earlier ones."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    past = {
        it.name: np.zeros((len(ids), it.shape[1], 0, it.shape[3]), np.float16 if "16" in it.type else np.float32)
        for it in session.get_inputs()[3:]
    }
    start = 0
    for end in ends:
        new = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits, *present = session.run(None, {**new, **past})
        past = dict(zip(past, present, strict=True))
        start = end
        yield logits
