"""`accelerate`: a copy of a trained model that generates faster on a CPU and gives the same logits.

The weights are copied once into the order in which the C++ kernel reads them (packed.py), or read from a file that contains
them in this order (packed_file.py). A forward pass with a cache is one
call of kernel.cpp. Calls without a cache, masks other than left padding, and machines without a C++ compiler use torch, layer
by layer. B batch size, T new tokens, S all tokens so far, C embedding width, H heads, D = C // H, V vocabulary size.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.acceleration import int4
from MyGPT.acceleration import kernel as c
from MyGPT.acceleration.packed import AnyLinear, PanelLinear, PlainLinear, float_array
from MyGPT.acceleration.packed_file import (
    describe_source,
    find_packed,
    is_unchanged,
    packed_path,
    report_unused,
    write_packed,
)
from MyGPT.acceleration.sampling import pick_next
from MyGPT.acceleration.storage import Arrays, HugePages
from MyGPT.cache import KVCache, Piece, SlotCache, check_inputs, positions_and_mask, slot_hidden_states
from MyGPT.config import GPTConfig, Precision
from MyGPT.files import check_output_file, reading
from MyGPT.loss import TiedHead
from MyGPT.messages import error_message
from MyGPT.model import GPTModel
from MyGPT.parts import refuse_parts
from MyGPT.ranks import is_sharded
from MyGPT.sampling import SamplingConfig, require_finite
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.formats import open_checkpoint
from MyGPT.weights.layout import HEAD, WPE, WTE
from MyGPT.weights.lazy import LazyTensor, LazyTensors
from MyGPT.weights.pretrained import find_model


def accelerate(
    model: GPTModel | Checkpoint | str | os.PathLike[str],
    precision: Precision = "fp32",
    *,
    build: c.Build | None = None,
    compiled: bool | None = None,
    calibration: Tensor | None = None,
) -> FastModel:
    """Return a copy of a model that generates faster on this CPU. Pass the copy to `generate` instead of the model.

    All weights are copied, so later changes of the model or its files do not affect the result. A model that is given by
    its name or path is read one matrix at a time, so that its weights are in memory only once. If `mygpt pack` has stored
    the packed weights beside the model, they are read instead, which is faster.

    Args:
        model: a GPTModel on the CPU in float32, bfloat16 or float16; or the name or path of a model, as for
            `GPTModel.from_pretrained`. Merge adapters first.
        precision: "fp32" reproduces the model's logits up to rounding. "bf16" needs half the memory of "fp32", "int8" a
            quarter, and "int4" a sixth. They are faster, because less memory is read for each token, but the logits are less
            exact.
            "auto" is "bf16" for a model in bfloat16 and "fp32" for any other.
        build: a compilation of the C++ kernel that is already running or finished (default: start one if needed).
        compiled: True requires the C++ kernel, and False avoids it. None uses the kernel if a C++ compiler is available. The
            first call on a machine takes about 3 seconds longer, because it compiles the kernel.
        calibration: for "int4", token ids (B, T) of a text of the kind that the model will see. The weights are then rounded
            so that the outputs of the layers on this text change least (GPTQ), which takes longer. 4,096 tokens are enough.

    Raises:
        ValueError: the model is on a GPU, in float64, or has an unmerged adapter; its files are damaged; or `calibration` is
            given with another precision than "int4".
        FileNotFoundError: there is no model with this name or path.
        FloatingPointError: precision is "int8" or "int4", and a weight is NaN or infinite. Other precisions keep such a weight.
        OSError: compiled=True, and no C++ compiler works.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if calibration is not None and precision != "int4":
        raise ValueError(f"calibration is for the precision int4, got {precision!r}: leave it out")
    if isinstance(model, (str, os.PathLike)):
        with reading(model):
            checkpoint = open_checkpoint(find_model(model))
            return accelerate(checkpoint, precision, build=build, compiled=compiled, calibration=calibration)
    if isinstance(model, Checkpoint):
        config, tensors = _lazy(model)
    else:
        _check_model(model)
        config = model.config
        tensors = {name: LazyTensor.of(parameter.detach()) for name, parameter in model.named_parameters()}
    precision = resolve_precision(precision, tensors)
    kernel: c.Kernel | None = None
    if compiled is not False:
        try:
            kernel = (build or c.Build()).wait()
        except OSError as error:
            if compiled:
                raise
            print(f"{error_message(error)}; generating with torch's operators, which is slower", file=sys.stderr)
    if calibration is not None:
        return FastModel(config, tensors, precision, kernel, moments=_moments(model, calibration))
    if kernel is not None and isinstance(model, Checkpoint):
        stored = find_packed(model.path, precision, kernel.panel)
        if stored is not None:
            try:
                return FastModel(config, tensors, precision, kernel, Arrays(stored))
            except ValueError as error:
                report_unused(packed_path(model.path, precision, kernel.panel), error)
    return FastModel(config, tensors, precision, kernel)


def _moments(model: GPTModel | Checkpoint, calibration: Tensor) -> dict[str, Tensor]:
    if isinstance(model, Checkpoint):
        model = GPTModel.from_pretrained(model.path)
    return int4.input_moments(model, calibration)


def write_packed_model(
    checkpoint: Checkpoint, precision: Precision, build: c.Build, calibration: Tensor | None = None
) -> Path:
    """Pack the weights of a saved model, write them to a file beside it for `accelerate`, and return the file's path.

    For `calibration`, see `accelerate`.

    Raises:
        OSError: there is no C++ compiler, or the file cannot be written.
        FloatingPointError: precision is "int8" or "int4", and a weight is NaN or infinite.
    """
    config, tensors = _lazy(checkpoint)
    precision = resolve_precision(precision, tensors)
    kernel = build.wait()
    path = packed_path(checkpoint.path, precision, kernel.panel)
    check_output_file(path)
    source = describe_source(checkpoint.path)
    moments = None if calibration is None else _moments(checkpoint, calibration)
    packed = FastModel(config, tensors, precision, kernel, moments=moments)
    if not is_unchanged(source, checkpoint.path):
        raise ValueError(f"{checkpoint.path} was changed while it was read: pack it again")
    write_packed(path, packed.arrays.named, precision, kernel.panel, source)
    return path


def _lazy(checkpoint: Checkpoint) -> tuple[GPTConfig, dict[str, LazyTensor]]:
    """Return the config and the tensors of a saved model. Raises ValueError for a model with custom parts."""
    if checkpoint.has_custom_parts:
        raise ValueError(
            f"accelerate computes only GPT-2's parts, but {checkpoint.path} belongs to {checkpoint.format}"
        )
    return checkpoint.lazy()


def resolve_precision(precision: Precision, tensors: LazyTensors) -> Precision:
    """Return the precision for weights in the dtypes of `tensors`, which the precision "auto" keeps.

    Raises ValueError for weights in float64, or in another dtype that no precision keeps.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"accelerate takes a model in float32, bfloat16 or float16; {name} is {tensor.dtype}")
    if precision != "auto":
        return precision
    return "bf16" if tensors[WTE].dtype == torch.bfloat16 else "fp32"


def _check_model(model: GPTModel) -> None:
    if not isinstance(model, GPTModel):
        raise ValueError(f"accelerate takes a GPTModel, got a {type(model).__name__}: merge an adapter first")
    refuse_parts(model, "accelerate")
    names = ("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f", "wte", "wpe", "lm_head")
    for name, module in model.named_modules():
        if name.endswith(names) and type(module) not in (nn.Linear, nn.Embedding, nn.LayerNorm, TiedHead):
            raise ValueError(f"{name} is a {type(module).__name__}, not GPT-2's own layer: merge an adapter first")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"accelerate takes a whole model, but {name} is sharded: save the model and open it again")
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                "accelerate takes a model on the CPU, in float32, bfloat16 or float16; "
                f"{name} is {parameter.dtype} on {parameter.device.type}"
            )


HEAD_PRECISIONS = {"int4": "int8"}
"""The precision of the output head, if it differs from that of the model. The head's error reaches the logits directly."""
_LINEARS = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
"""The linear layers of a transformer block, in the order of `struct Block` in kernel.cpp."""


class _Norm:
    """A LayerNorm in float32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps
        self.ctypes_struct = c.NormStruct(c.address(weight), c.address(bias))

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FastModel(nn.Module):
    """The accelerated copy of a model that `accelerate` returns. It has no trainable parameters and computes no gradients."""

    def __init__(
        self,
        config: GPTConfig,
        tensors: LazyTensors,
        precision: str,
        kernel: c.Kernel | None,
        arrays: Arrays | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Pack the weights, one after another.

        Args:
            config: the config of the model.
            tensors: the weights, under the names of the model's state dict. If the output head is tied, it is left out.
            precision: the number format of the packed matrices.
            kernel: the compiled kernel.cpp, or None to use torch's operators.
            arrays: the packed weights from a file of packed weights. None: pack the `tensors`.
            moments: the moments of the inputs of each linear layer, for int4 with error feedback (see `int4.round_weight`).

        Raises:
            ValueError: `arrays` do not fit the model.
            FloatingPointError: precision is "int8" or "int4", and a weight is NaN or infinite.
        """
        super().__init__()
        self.config = config
        self.precision = precision
        self.kernel = kernel
        self.arrays = arrays or Arrays()
        """All weights, except for the matrices of a model that does not use kernel.cpp."""
        self._tensors, self._moments = tensors, moments or {}
        # A tied embedding is read from the packed head; None stands for it.
        self.head = self._pack("lm_head" if HEAD in tensors else "transformer.wte", HEAD_PRECISIONS.get(precision))
        self.wte = self._copy(WTE) if HEAD in tensors else None
        self.wpe = self._copy(WPE)
        blocks = [f"transformer.h.{layer}" for layer in range(config.n_layers)]
        self.norms = [(self._norm(f"{block}.ln_1"), self._norm(f"{block}.ln_2")) for block in blocks]
        self.linears = [[self._pack(f"{block}.{name}") for name in _LINEARS] for block in blocks]
        self.ln_f = self._norm("transformer.ln_f")
        del self._tensors, self._moments
        self.ctypes_struct = self._make_struct()
        self.train(False)

    def _pack(self, name: str, precision: str | None = None) -> AnyLinear:
        """Return the linear layer called `name` with its weight in `precision` (default: this model's precision).

        It is a PanelLinear if kernel.cpp is compiled, and otherwise a PlainLinear.
        """
        weight, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        moments = self._moments.get(name)
        precision = precision or self.precision
        if self.kernel is not None:
            return PanelLinear(name, weight, bias, precision, self.kernel, self.arrays, moments)
        if precision in ("int8", "int4"):
            require_finite(f"a weight of {name}.weight", weight.load())
        return PlainLinear(weight.load(), None if bias is None else self._copy(f"{name}.bias"), precision, moments)

    def _copy(self, name: str) -> Tensor:
        """Return a copy of the weight called `name` in float32."""
        return float_array(name, self._tensors[name], self.precision, self.arrays)

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._copy(f"{name}.weight"), self._copy(f"{name}.bias"), self.config.layer_norm_eps)

    def _make_struct(self) -> c.ModelStruct | None:
        """Return the `struct Model` of kernel.cpp with the addresses of this model's weights.

        Return None if the model does not use kernel.cpp.
        """
        if not isinstance(self.head, PanelLinear):
            return None
        blocks = (c.BlockStruct * self.config.n_layers)()
        for block, norms, linears in zip(blocks, self.norms, self.linears, strict=True):
            block.ln_1, block.ln_2 = (norm.ctypes_struct for norm in norms)
            block.c_attn, block.attn_proj, block.c_fc, block.mlp_proj = (
                linear.ctypes_struct for linear in linears if isinstance(linear, PanelLinear)
            )
        return c.ModelStruct(
            c.address(self.wte), c.address(self.wpe), blocks, self.ln_f.ctypes_struct, self.head.ctypes_struct,
            self.config.n_layers, self.config.n_heads, self.config.activation == "gelu",
            self.config.layer_norm_eps,
        )  # fmt: skip

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """Return an empty KV cache for batch_size sequences of up to `length` tokens (default: the model's context length)."""
        cache = KVCache(self.config, batch_size, length, like=_NO_MEMORY)
        cache.storage = _in_huge_pages(cache.storage)
        return cache

    def new_slot_cache(self, slots: int, length: int | None = None) -> SlotCache:
        """Return an empty cache with `slots` slots of up to `length` tokens each (default: the model's context length)."""
        cache = SlotCache(self.config, slots, length, like=_NO_MEMORY)
        cache.storage = _in_huge_pages(cache.storage)
        return cache

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return the float32 logits: (B, T, V), or (B, 1, V) with last_only=True. For the arguments, see GPTModel.forward."""
        if input_ids.device.type != "cpu":
            raise ValueError(f"an accelerated model runs on the CPU, input_ids are on {input_ids.device}")
        check_inputs(self.config, input_ids, attention_mask, cache=cache)
        B, T = input_ids.shape
        first = _first_tokens(attention_mask, B)
        if self.kernel is None or cache is None or first is None:
            hidden = self._hidden_states(input_ids, attention_mask, cache)
            return self.head(hidden[:, -1:] if last_only else hidden)
        sequences = [(T, cache.length, first_token, row) for row, first_token in enumerate(first)]
        wanted = range(T - 1, B * T, T) if last_only else range(B * T)
        logits = self._kernel_forward(sequences, input_ids, cache.storage, wanted)
        cache.advance(T)
        return logits.view(B, 1 if last_only else T, -1)

    @torch.no_grad()
    def forward_slots(self, pieces: Sequence[Piece], cache: SlotCache) -> Tensor:
        """Compute new tokens of several sequences, and return the wanted logits in float32 (see GPTModel.forward_slots).

        If the model uses kernel.cpp, the logits of a piece are bit-identical for any other pieces, and for any way of cutting
        its sequence into pieces.
        """
        cache.check(pieces)
        if self.kernel is None:
            logits: Tensor = self.head(slot_hidden_states(self._hidden_states, pieces, cache))
            return logits
        sequences, ids, wanted = [], list[int](), list[int]()
        for slot, new, n_logits in pieces:
            sequences.append((len(new), cache.lengths[slot], 0, slot))
            ids += new
            wanted += range(len(ids) - n_logits, len(ids))
        logits = self._kernel_forward(sequences, torch.tensor(ids), cache.storage, wanted)
        for slot, new, _ in pieces:
            cache.lengths[slot] += len(new)
        return logits

    def pick_next(
        self,
        logits: Tensor,
        config: SamplingConfig,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Return the next token of each sequence, as `sampling.pick_next` does, but in less time if kernel.cpp is compiled."""
        return pick_next(self.kernel, logits, config, generator, seen)

    def _kernel_forward(
        self, sequences: Sequence[tuple[int, int, int, int]], ids: Tensor, storage: Tensor, wanted: Sequence[int]
    ) -> Tensor:
        """Return the logits (n, V) of the rows with the n indices `wanted`. For the arguments, see Kernel.forward."""
        assert self.kernel is not None and self.ctypes_struct is not None
        logits = torch.empty(len(wanted), self.config.vocab_size)
        scratch = torch.empty(6 * ids.numel() * self.config.emb_dim)
        self.kernel.forward(self.ctypes_struct, sequences, ids.contiguous(), storage, wanted, logits, scratch)
        return logits

    def _hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the hidden states (B, T, C), computed layer by layer instead of in one call of kernel.cpp."""
        B, T = input_ids.shape
        if cache is None:
            positions, mask = positions_and_mask(attention_mask, T, T, input_ids.device)
        else:
            positions, mask = cache.positions_and_mask(attention_mask, T, input_ids.device)
        tokens = self.head.rows(input_ids) if self.wte is None else F.embedding(input_ids, self.wte)
        x = tokens + self.wpe[positions]  # (B, T, C)
        layers = zip(self.norms, self.linears, strict=True)
        for layer, ((ln_1, ln_2), (c_attn, attn_proj, c_fc, mlp_proj)) in enumerate(layers):
            q, k, v = c_attn(ln_1(x)).view(B, T, 3, self.config.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            if cache is not None:
                k, v = cache.append(layer, k, v)  # (B, H, S, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
            x = attn_proj(y.transpose(1, 2).reshape(B, T, -1), "add", x)
            x = mlp_proj(c_fc(ln_2(x), self.config.activation), "add", x)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)


_NO_MEMORY = torch.empty(0, device="meta")


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a float32 tensor of zeros with the shape of `tensor`. It is faster to read if it is large (see HugePages)."""
    return HugePages(4 * tensor.numel()).take(tuple(tensor.shape), torch.float32)


def _first_tokens(attention_mask: Tensor | None, B: int) -> list[int] | None:
    """Return the index of the first token after the left padding of each of B sequences.

    Without a mask, all indices are 0. If the mask is anything other than left padding, return None.
    """
    if attention_mask is None:
        return [0] * B
    mask = attention_mask.long()
    first = mask.shape[1] - mask.sum(1)
    is_left_padded = torch.equal(mask, (torch.arange(mask.shape[1]) >= first[:, None]).long())
    return first.tolist() if is_left_padded else None
