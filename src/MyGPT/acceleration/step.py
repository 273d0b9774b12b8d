"""`accelerate`: a copy of a trained model that generates faster on a CPU and gives the same logits.

The weights are copied once into the order in which the C++ kernel reads them (packed.py). A forward pass with a cache is one
call of kernel.cpp. Calls without a cache, masks other than left padding, and machines without a C++ compiler use torch, layer
by layer. B batch size, T new tokens, S all tokens so far, C embedding width, H heads, D = C // H, V vocabulary size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.acceleration import kernel as c
from MyGPT.acceleration.packed import AnyLinear, HugePages, PanelLinear, PlainLinear, copied, panel_bytes
from MyGPT.cache import KVCache, Piece, SlotCache, check_inputs, positions_and_mask, slot_hidden_states
from MyGPT.config import Precision
from MyGPT.loss import TiedHead
from MyGPT.messages import error_message
from MyGPT.model import Block, GPTModel
from MyGPT.ranks import is_sharded
from MyGPT.sampling import require_finite


def accelerate(
    model: GPTModel, precision: Precision = "fp32", *, build: c.Build | None = None, compiled: bool | None = None
) -> FastModel:
    """Return a copy of `model` that generates faster on this CPU. Pass the copy to `generate` instead of `model`.

    All weights are copied, so later changes of `model` do not affect the result.

    Args:
        model: a GPTModel on the CPU in float32, bfloat16 or float16. Merge adapters first.
        precision: "fp32" reproduces the model's logits up to rounding. "bf16" needs half the memory of "fp32", and "int8" a
            quarter. Both are faster, because less memory is read for each token, but the logits are less exact.
            "auto" is "bf16" for a model in bfloat16 and "fp32" for any other.
        build: a compilation of the C++ kernel that is already running or finished (default: start one if needed).
        compiled: True requires the C++ kernel, and False avoids it. None uses the kernel if a C++ compiler is available. The
            first call on a machine takes about 3 seconds longer, because it compiles the kernel.

    Raises:
        ValueError: the model is on a GPU, in float64, or has an unmerged adapter.
        FloatingPointError: precision is "int8", and a weight is NaN or infinite. Other precisions keep such a weight.
        OSError: compiled=True, and no C++ compiler works.
    """
    _check_model(model, precision)
    if precision in ("int8", "int4"):
        for name, parameter in model.named_parameters():
            # The norm is the largest absolute value, or NaN. It reads each weight once, without another tensor.
            require_finite(f"a weight of {name}", torch.linalg.vector_norm(parameter.detach(), torch.inf))
    if precision == "auto":
        precision = "bf16" if model.transformer.wte.weight.dtype == torch.bfloat16 else "fp32"
    kernel: c.Kernel | None = None
    if compiled is not False:
        try:
            kernel = (build or c.Build()).wait()
        except OSError as error:
            if compiled:
                raise
            print(f"{error_message(error)}; generating with torch's operators, which is slower", file=sys.stderr)
    return FastModel(model, precision, kernel)


def _check_model(model: GPTModel, precision: str) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if not isinstance(model, GPTModel):
        raise ValueError(f"accelerate takes a GPTModel, got a {type(model).__name__}: merge an adapter first")
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


def _linears(block: Block) -> tuple[nn.Linear, ...]:
    """Return the four linear layers of a transformer block, in the order of `struct Block` in kernel.cpp."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


class _Norm:
    """A copy of a LayerNorm in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = copied(norm.weight), copied(norm.bias), norm.eps
        self.ctypes_struct = c.NormStruct(c.address(self.weight), c.address(self.bias))

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FastModel(nn.Module):
    """The accelerated copy of a GPTModel that `accelerate` returns. It has no trainable parameters and computes no gradients."""

    def __init__(self, model: GPTModel, precision: str, kernel: c.Kernel | None) -> None:
        super().__init__()
        self.config = model.config
        self.precision = precision
        self.kernel = kernel
        head, transformer = model.lm_head, model.transformer
        layers: Any = transformer.h
        weights = [linear.weight for linear in (head, *(linear for layer in layers for linear in _linears(layer)))]
        self._memory = HugePages(panel_bytes(weights, precision, kernel)) if kernel is not None else None
        self.head = self._pack(head)
        # A tied embedding is read from the packed head; None stands for it.
        self.wte = None if head.weight is transformer.wte.weight else copied(transformer.wte.weight)
        self.wpe = copied(transformer.wpe.weight)
        self.norms = [(_Norm(layer.ln_1), _Norm(layer.ln_2)) for layer in layers]
        self.linears = [[self._pack(linear) for linear in _linears(layer)] for layer in layers]
        self.ln_f = _Norm(transformer.ln_f)
        self.ctypes_struct = self._make_struct()
        self.train(False)

    def _pack(self, linear: nn.Linear | TiedHead) -> AnyLinear:
        """Return a copy of a linear layer with its weight in this model's precision.

        The copy is a PanelLinear if kernel.cpp is compiled, and otherwise a PlainLinear.
        """
        bias = getattr(linear, "bias", None)
        if self.kernel is None or self._memory is None:
            return PlainLinear(linear.weight, bias, self.precision)
        return PanelLinear(linear.weight, bias, self.precision, self.kernel, self._memory)

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
        sequences = torch.empty(B, 4, dtype=torch.int32)
        sequences[:, 0], sequences[:, 1], sequences[:, 2], sequences[:, 3] = T, cache.length, first, torch.arange(B)
        rows = torch.arange(B * T, dtype=torch.int32).view(B, T)
        wanted = rows[:, -1:] if last_only else rows
        logits = self._kernel_forward(sequences, input_ids, cache.storage, wanted)
        cache.advance(T)
        return logits.view(*wanted.shape, -1)

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
        logits = self._kernel_forward(
            torch.tensor(sequences, dtype=torch.int32),
            torch.tensor(ids),
            cache.storage,
            torch.tensor(wanted, dtype=torch.int32),
        )
        for slot, new, _ in pieces:
            cache.lengths[slot] += len(new)
        return logits

    def _kernel_forward(self, sequences: Tensor, ids: Tensor, storage: Tensor, wanted: Tensor) -> Tensor:
        """Return the logits (n, V) of the rows with the n indices `wanted`. For the arguments, see Kernel.forward."""
        assert self.kernel is not None and self.ctypes_struct is not None
        wanted = wanted.flatten().contiguous()
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


def _first_tokens(attention_mask: Tensor | None, B: int) -> Tensor | None:
    """Return the index of the first token after the left padding of each of B sequences, (B,) int64.

    Without a mask, all indices are 0. If the mask is anything other than left padding, return None.
    """
    if attention_mask is None:
        return torch.zeros(B, dtype=torch.int64)
    mask = attention_mask.long()
    first = mask.shape[1] - mask.sum(1)
    is_left_padded = torch.equal(mask, (torch.arange(mask.shape[1]) >= first[:, None]).long())
    return first if is_left_padded else None
