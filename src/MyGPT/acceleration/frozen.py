"""Frozen weights in training: linear layers with LoRA in fewer operations, and weights that are stored in bf16 or int8.

A frozen layer needs the gradient of its input, but not that of its weights: two products with the same matrix W, x Wᵀ and dy W.
`LoRALinear` computes them together with the layer's LoRA adapter, whose thin products are added to the outputs in place.

`freeze` replaces the layers of a model by copies with weights in bf16, or in int8 with one scale per row. Activations and
gradients stay in float32. On a CPU, frozen.cpp multiplies int8 weights with rows rounded to 16 bits, which changes a number by at
most 2^-16 of the largest of 128 numbers. Everywhere else a part of W at a time is converted to the dtype of the activations.

M rows (tokens), N outputs, K inputs, r rank of an adapter, C embedding width, V vocabulary size.
"""

from __future__ import annotations

import functools
import sys
from ctypes import CDLL, c_int32, c_int64
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.acceleration import compiler, linear
from MyGPT.acceleration.kernel import address
from MyGPT.acceleration.packed import row_scales
from MyGPT.loss import IGNORED, chunk_sizes, softmax_in_place
from MyGPT.messages import error_message
from MyGPT.model import GPTModel

FrozenDtype = Literal["fp32", "bf16", "int8"]
"""The names of the dtypes in which frozen weights can be stored."""
MAX_CONVERTED = 1 << 21
"""Largest number of weights that are converted at one time: few enough that they fit in the CPU's cache."""
SOURCE = Path(__file__).with_name("frozen.cpp")


class Kernel:
    """The functions of frozen.cpp. The tensors must be on the CPU and, except for the int8 weights, in float32."""

    def __init__(self, library: CDLL) -> None:
        self._product = library.frozen_product
        self._segment, self._blocks = library.frozen_segment(), library.frozen_blocks()

    def product(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        """Return x Wᵀ + bias for x (M, K), or x W for x (M, N) if is_transposed, where W (N, K) is weight * scale[:, None]."""
        (N, K), M = weight.shape, len(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        y = x.new_empty(M, K if is_transposed else N)
        rounded, scales = x.new_empty(M, self._segment, dtype=torch.int16), x.new_empty(M, self._blocks)
        self._product(
            address(weight), address(scale), address(bias), N, K, int(is_transposed), address(x), c_int64(x.stride(0)), M,
            address(y), c_int64(y.stride(0)), address(rounded), address(scales), c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return y


@functools.cache
def compiled_kernel() -> Kernel | None:
    """Return the functions of frozen.cpp, compiled at the first call, or None without a compiler, which is reported once."""
    try:
        return compiler.Build(SOURCE, ("frozen_product", "frozen_segment", "frozen_blocks"), Kernel).wait()
    except OSError as error:
        print(f"{error_message(error)}; multiplying int8 weights with torch, which is slower", file=sys.stderr)
        return None


def product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """Return x Wᵀ + bias for x (M, K), or x W for x (M, N) if is_transposed, with W (N, K) stored as `weight`.

    W is weight * scale[:, None], or `weight` itself if `scale` is None.
    """
    if scale is None and weight.dtype == x.dtype:
        return linear.product(x, weight.T if is_transposed else weight, bias)
    if scale is not None and x.dtype == torch.float32 and x.device.type == "cpu":
        kernel = compiled_kernel()
        if kernel is not None:
            return kernel.product(x, weight, scale, bias, is_transposed)
    N, K = weight.shape
    y = x.new_zeros(len(x), K) if is_transposed else x.new_empty(len(x), N)
    for rows in _slices(N, max(1, MAX_CONVERTED // K)):
        part = dequantized(weight[rows], None if scale is None else scale[rows], x.dtype)
        if is_transposed:
            y.addmm_(x[:, rows], part)
        else:
            y[:, rows] = F.linear(x, part, None if bias is None else bias[rows].to(x.dtype))
    return y


def dequantized(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the matrix W (N, K) that is stored as `weight` and the scales of its rows (N), or None for no scales."""
    if scale is None:
        return weight.to(dtype)
    return weight.to(dtype) * scale[:, None].to(dtype)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


class _Product(torch.autograd.Function):
    """The function `product` with its gradient for x, which is the other product with the same matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, is_transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.is_transposed = is_transposed
        return product(x, weight, scale, bias, is_transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return _Product.apply(dy, weight, scale, None, not ctx.is_transposed), None, None, None, None


class LoRALinear(torch.autograd.Function):
    """A frozen linear layer with a LoRA adapter: y = x Wᵀ + bias + factor * z Aᵀ Bᵀ, where z is x or x after dropout.

    The arguments of `apply` are x (..., K); z (..., K), or None for x; W (N, K) as weight and scale (see `product`); bias (N) or
    None; A (r, K), B (N, r) and the factor. W and the bias get no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        factor: float,
    ) -> Tensor:
        rows = x.flatten(0, -2)  # (M, K)
        y = product(rows, weight, scale, bias, False)  # (M, N)
        u = F.linear(rows if z is None else z.flatten(0, -2), A)  # (M, r)
        y.addmm_(u, B.T, alpha=factor)
        # An input itself is saved, and not a view of it, so that a second derivative finds its graph.
        ctx.save_for_backward(x if z is None else z, u, weight, scale, A, B)
        ctx.factor, ctx.shape, ctx.is_separate = factor, x.shape, z is not None
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        adapted, u, weight, scale, A, B = ctx.saved_tensors
        adapted = adapted.flatten(0, -2)  # (M, K)
        if torch.is_grad_enabled():  # a second derivative needs the graph of u
            u = F.linear(adapted, A)
        needs_x, needs_z, _, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        dy = y_grad.flatten(0, -2)  # (M, N)
        # MKL multiplies with the thin matrix on the left up to four times as fast.
        du = (B.T @ dy.T) * ctx.factor  # (r, M)
        dA = du @ adapted if needs_A else None  # (r, K)
        dB = ((u.T @ dy) * ctx.factor).T if needs_B else None  # (N, r)
        dx = _Product.apply(dy, weight, scale, None, True) if needs_x else None  # (M, K)
        dz = None
        if ctx.is_separate:
            dz = (du.T @ A).view(ctx.shape) if needs_z else None
        elif dx is not None:
            dx = dx.addmm_(du.T, A)
        return None if dx is None else dx.view(ctx.shape), dz, None, None, None, dA, dB, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weights are frozen and stored in bf16, or in int8 with one scale per row."""

    def __init__(self, weight: nn.Parameter, scale: Tensor | None, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw random weights
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_buffer("scale", scale)
        self.scale: Tensor | None
        self.bias = None if bias is None else _frozen_copy(bias)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _Product.apply(x.flatten(0, -2), self.weight, self.scale, self.bias, False)
        return y.view(*x.shape[:-1], self.out_features)


class FrozenHead(FrozenLinear):
    """An output head with frozen weights in bf16 or int8."""

    def token_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats and the number of counted targets. See `linear_token_loss`."""
        counted = targets.flatten() != IGNORED
        rows, index = hidden.flatten(0, -2)[counted], targets.flatten()[counted]
        return _FrozenLoss.apply(rows, self.weight, self.scale, index, torch.is_grad_enabled()), counted.sum()


class FrozenEmbedding(nn.Embedding):
    """A token embedding whose weights are frozen and stored in bf16, or in int8 with one scale per row."""

    def __init__(self, weight: nn.Parameter, scale: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = weight
        self.register_buffer("scale", scale)
        self.scale: Tensor | None

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids].float()  # (B, T, C)
        return rows if self.scale is None else rows * self.scale[ids][..., None]


class _FrozenLoss(torch.autograd.Function):
    """The summed cross-entropy of the logits hidden @ Wᵀ, computed for some of the rows at a time together with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, is_grad_enabled: bool
    ) -> Tensor:
        x_all = hidden.detach().float()
        needs_hidden = is_grad_enabled and ctx.needs_input_grad[0]
        gradient = torch.empty_like(x_all) if needs_hidden else None
        total = x_all.new_zeros(())
        for rows in _slices(len(x_all), max(1, chunk_sizes(hidden.device.type)[1] // len(weight))):
            logits = product(x_all[rows], weight, scale, None, False)  # (rows, V)
            index = targets[rows, None]
            total += softmax_in_place(logits, index).sum()
            if gradient is not None:
                logits.scatter_add_(1, index, logits.new_full((len(index), 1), -1.0))  # softmax minus one-hot
                gradient[rows] = product(logits, weight, scale, None, True)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In place, so that a second backward pass is an error that autograd detects.
        (gradient,) = ctx.saved_tensors
        scaled = None if gradient is None else gradient.mul_(grad_output).to(ctx.dtype)
        return scaled, None, None, None, None


@torch.no_grad()
def freeze(model: GPTModel, dtype: FrozenDtype) -> None:
    """Freeze a model in place, and store the weights of its linear layers, token embedding and output head in `dtype`.

    Add an adapter with `add_lora` afterwards. The weights are replaced one after the other, so only one of them is in memory
    twice. Biases, the LayerNorms and the position embedding become float32. "fp32" only freezes. A bf16 weight differs from the
    original by at most 2^-8 of its value, and an int8 weight by at most 1/254 of the largest weight of its row.

    Raises ValueError if `dtype` is unknown, or the model has adapters or layers that `freeze` cannot replace.
    """
    if dtype not in get_args(FrozenDtype):
        raise ValueError(f"the dtype of frozen weights must be {', '.join(get_args(FrozenDtype))}, got {dtype!r}")
    model.requires_grad_(False)
    if dtype == "fp32":
        return
    is_tied = model.config.tie_weights
    embedding, head = model.transformer.wte, model.lm_head
    table = _stored(embedding.weight, dtype)
    model.transformer.wte = FrozenEmbedding(*table)
    model.lm_head = FrozenHead(*(table if is_tied else _stored(head.weight, dtype)), None)
    del embedding, head
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        layer: Any = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FrozenLinear(*_stored(layer.weight, dtype), layer.bias))
        del layer
    stored = [module for module in model.modules() if isinstance(module, (FrozenLinear, FrozenEmbedding))]
    for module in model.modules():
        if module not in stored:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, _frozen_copy(parameter))
    if dtype == "int8":
        compiled_kernel()


def is_frozen_copy(model: nn.Module) -> bool:
    """Return True if `freeze` stored the weights of the model in bf16 or int8, so that they cannot be trained or merged."""
    return any(isinstance(module, (FrozenLinear, FrozenEmbedding)) for module in model.modules())


def _stored(weight: Tensor, dtype: FrozenDtype) -> tuple[nn.Parameter, Tensor | None]:
    """Return a weight matrix in bf16 without scales, or in int8 with the scales of its rows."""
    if dtype == "bf16":
        return _frozen_copy(weight, torch.bfloat16), None
    scale = row_scales(weight)
    result = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _slices(len(weight), max(1, MAX_CONVERTED // weight.shape[1])):
        result[rows] = (weight[rows].float() / scale[rows, None]).round_()
    return nn.Parameter(result, requires_grad=False), scale


def _frozen_copy(tensor: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a contiguous copy of the tensor, which does not keep a memory-mapped file open, as a frozen parameter."""
    copy = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=False)
