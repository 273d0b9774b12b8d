"""Faster training on a CPU: a transformer block as one autograd function, with C++ kernels between its matrix products.

torch runs a block as some thirty operations, and most of them wait for memory. It has no fused attention with dropout on a CPU,
draws the random numbers of dropout with one thread, and stores masks, attention weights and normalised rows for the backward
pass. Here the matrix products remain torch's, and training.cpp computes everything between them. The backward pass computes again
whatever is cheap to compute.

Only blocks as model.py defines them are replaced: in float32, without adapters, hooks, masks or a cache. All others run as they
are, and so does everything on a machine without a C++ compiler. N = B * T tokens, C embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_float, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from MyGPT.acceleration import compiler
from MyGPT.acceleration.linear import product
from MyGPT.cache import KVCache
from MyGPT.model import MLP, Block, CausalSelfAttention

SOURCE = Path(__file__).with_name("training.cpp")

MIN_NUMBERS = 1 << 14
"""Smallest size of a block's input, N * C, that the kernels compute. Smaller models are not worth the time of a compilation."""

_POINTER, _DROPOUT = c_void_p, (c_uint64, c_uint32, c_float)
_ARGUMENTS = {
    "train_dropout_factors": (*_DROPOUT, c_int, c_int, _POINTER),
    "train_residual_norm": (
        *[_POINTER] * 3, *_DROPOUT, *[_POINTER] * 2, c_float, c_int, c_int, *[_POINTER] * 3, c_int
    ),
    "train_norm_again": (*[_POINTER] * 4, c_int, c_int, _POINTER, c_int),
    "train_norm_backward": (*[_POINTER] * 5, c_int, c_int, _POINTER, _POINTER, c_int),
    "train_dropout_backward": (_POINTER, *_DROPOUT, c_int, c_int, _POINTER, _POINTER, c_int),
    "train_gelu": (_POINTER, _POINTER, c_int, c_int, c_int, _POINTER, c_int),
    "train_gelu_backward": (*[_POINTER] * 3, c_int, c_int, c_int, _POINTER, c_int),
    "train_attend": (_POINTER, *[c_int] * 4, *_DROPOUT, _POINTER, _POINTER, c_int),
    "train_attend_backward": (*[_POINTER] * 4, *[c_int] * 4, *_DROPOUT, _POINTER, c_int),
}  # fmt: skip
"""The types of the arguments of each function in training.cpp."""


class Buffers:
    """Memory for intermediate results, which all blocks and all steps of a training run share."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """Return a float32 tensor of any content. It is valid until the next call with this name."""
        found = self._tensors.get(name)
        if found is None or found.shape != shape:
            found = self._tensors[name] = torch.empty(shape)
        return found


@contextmanager
def fused_blocks(model: nn.Module, buffers: Buffers) -> Iterator[None]:
    """Compute the blocks of `model.transformer` with the C++ kernels within the `with` block, if they can be used.

    The results equal those of the model's own code up to rounding, except that dropout draws other numbers: they depend on a
    seed that is drawn from torch's generator, so runs with the same seed are reproducible. The backward pass may happen later,
    but only once.
    """
    blocks = [block for block in model.transformer.h if is_plain(block)]  # type: ignore[union-attr]
    for block in blocks:
        block.forward = functools.partial(_forward, block, buffers)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def is_plain(block: nn.Module) -> bool:
    """Return True if a block has only the modules, dtypes and options that the kernels compute."""
    if type(block) is not Block or type(block.attn) is not CausalSelfAttention or type(block.mlp) is not MLP:
        return False
    norms, layers = (block.ln_1, block.ln_2), (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    if any(type(norm) is not nn.LayerNorm for norm in norms) or any(type(layer) is not nn.Linear for layer in layers):
        return False
    if any(has_hooks(module) for module in (block, block.attn, block.mlp, *norms, *layers)):
        return False
    weights = _weights(block)
    return (
        "forward" not in block.__dict__
        and all(type(weight) is nn.Parameter and _is_plain_tensor(weight) for weight in weights if weight is not None)
        and all(weight is not None and weight.is_contiguous() for weight in weights[:2] + weights[4:])
        and max(block.attn.drop_rate, block.mlp.drop_rate) < 1
    )


def has_hooks(module: nn.Module) -> bool:
    """Return True if a function is called before or after the module's forward or backward pass, or the module is compiled."""
    # torch's own module calls look at these attributes.
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    return any(getattr(module, name, None) for name in names)


def _is_plain_tensor(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _weights(block: Block) -> tuple[Tensor | None, ...]:
    """Return the weight and the bias of each layer, in the order of the forward pass."""
    layers = (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
    return tuple(tensor for layer in layers for tensor in (layer.weight, layer.bias))


def _forward(block: Block, buffers: Buffers, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """Return the result of block.forward(x, mask, cache)."""
    is_covered = mask is None and cache is None and type(x) is Tensor and _is_plain_tensor(x) and x.dim() == 3
    if is_covered and x.numel() >= MIN_NUMBERS and not torch.is_autocast_enabled("cpu"):
        kernels = load_kernels()
        if kernels is not None:
            y: Tensor = _FusedBlock.apply(kernels, buffers, block, x, *_weights(block))
            return y
    return type(block).forward(block, x, mask, cache)


class Kernels:
    """The functions of training.cpp. Their arguments are numbers and contiguous float32 tensors on the CPU, or None."""

    def __init__(self, library: CDLL) -> None:
        for name, types in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
            setattr(self, name.removeprefix("train_"), functools.partial(_call, function))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _call(function: Any, *arguments: Any) -> None:
    function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


@functools.cache
def load_kernels() -> Kernels | None:
    """Return the functions of training.cpp, or None if they cannot be compiled. The first call on a machine takes seconds."""
    try:
        return compiler.Build(SOURCE, tuple(_ARGUMENTS), Kernels).wait()
    except OSError:
        return None


def dropout_options(seed: int, rate: float) -> tuple[int, int, float]:
    """Return the arguments of the kernels that describe dropout: the seed, a threshold of 16 random bits, and a factor.

    The kernels drop numbers with a probability that is a multiple of 1/65,536, and multiply the others by the inverse of the
    probability of keeping a number, so that the expectation is exact.
    """
    threshold = min(round(rate * 65536), 65535)
    return seed, threshold, 65536 / (65536 - threshold)


class _FusedBlock(torch.autograd.Function):
    """A transformer block. The names of its intermediate results follow model.py."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, buffers: Buffers, block: Block, x: Tensor, *weights: Any) -> Tensor:
        norm_1, norm_1_bias, w_qkv, b_qkv, w_proj, b_proj, norm_2, norm_2_bias, w_fc, b_fc, w_out, b_out = weights
        attn, mlp = block.attn, block.mlp
        (B, T, C), threads = x.shape, torch.get_num_threads()
        N, H = B * T, attn.n_heads
        rates = attn.drop_rate if attn.training else 0.0, mlp.drop_rate if mlp.training else 0.0
        seed = int(torch.randint(1 << 62, ())) if any(rates) else 0
        # Different seeds for attention weights, attention's output and the MLP's output.
        drop_weights, drop_attn = dropout_options(seed, rates[0]), dropout_options(seed + 1, rates[0])
        drop_mlp = dropout_options(seed + 2, rates[1])
        is_exact = mlp.approximate == "none"

        x = x.contiguous()
        stats_1, stats_2, log_sums = x.new_empty(N, 2), x.new_empty(N, 2), x.new_empty(B, H, T)
        y, h = x.new_empty(N, C), x.new_empty(N, C)
        normal, g = buffers.get("normal", N, C), buffers.get("g", N, w_fc.shape[0])
        no_dropout = dropout_options(0, 0.0)
        kernels.residual_norm(
            None, None, x, *no_dropout, norm_1, norm_1_bias, block.ln_1.eps, N, C, None, normal, stats_1, threads
        )
        qkv = product(normal, w_qkv, b_qkv)  # (N, 3 C)
        kernels.attend(qkv, B, T, H, C // H, *drop_weights, y, log_sums, threads)
        product(y, w_proj, out=h)
        kernels.residual_norm(
            h, b_proj, x, *drop_attn, norm_2, norm_2_bias, block.ln_2.eps, N, C, h, normal, stats_2, threads
        )
        f = product(normal, w_fc)  # (N, 4 C)
        kernels.gelu(f, b_fc, is_exact, N, f.shape[1], g, threads)
        result = product(g, w_out)  # (N, C)
        kernels.residual_norm(result, b_out, h, *drop_mlp, None, None, 0.0, N, C, result, None, None, threads)

        ctx.save_for_backward(x, stats_1, qkv, y, log_sums, h, stats_2, f, *weights)
        ctx.kernels, ctx.buffers, ctx.n_heads, ctx.is_exact = kernels, buffers, H, is_exact
        ctx.dropouts = drop_weights, drop_attn, drop_mlp
        return result.view(B, T, C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, result_grad: Tensor) -> tuple[Any, ...]:
        x, stats_1, qkv, y, log_sums, h, stats_2, f, *weights = ctx.saved_tensors
        norm_1, norm_1_bias, w_qkv, b_qkv, w_proj, _, norm_2, norm_2_bias, w_fc, b_fc, w_out, _ = weights
        needs = dict(zip(("x", *range(12)), ctx.needs_input_grad[3:], strict=True))
        kernels, buffers, H = ctx.kernels, ctx.buffers, ctx.n_heads
        drop_weights, drop_attn, drop_mlp = ctx.dropouts
        (B, T, C), threads = x.shape, torch.get_num_threads()
        N, hidden = B * T, f.shape[1]
        result_grad = result_grad.contiguous()
        normal, grad = buffers.get("normal", N, C), buffers.get("grad", N, C)
        f_grad = buffers.get("g", N, hidden)
        gradients: list[Tensor | None] = [None] * 12

        def weight_gradient(index: int, y_grad: Tensor, x: Tensor) -> None:
            if needs[index]:
                gradients[index] = product(y_grad.T, x.T)

        # The MLP. The memory of f receives GELU(f), so a second backward pass raises an error.
        torch.autograd.graph.increment_version(f)
        gradients[11], gradients[9], norm_grads = x.new_empty(C), x.new_empty(hidden), x.new_empty(2, C)
        out_grad = grad if drop_mlp[1] else result_grad.view(N, C)
        kernels.dropout_backward(result_grad, *drop_mlp, N, C, grad, gradients[11], threads)
        product(out_grad, w_out.T, out=f_grad)
        kernels.gelu_backward(f, b_fc, f_grad, ctx.is_exact, N, hidden, gradients[9], threads)
        weight_gradient(10, out_grad, f)
        if needs[8]:
            kernels.norm_again(h, stats_2, norm_2, norm_2_bias, N, C, normal, threads)
        weight_gradient(8, f_grad, normal)
        product(f_grad, w_fc.T, out=normal)
        h_grad = x.new_empty(N, C)
        kernels.norm_backward(normal, h, stats_2, norm_2, result_grad, N, C, h_grad, norm_grads, threads)
        gradients[6], gradients[7] = norm_grads

        # Attention.
        gradients[5], norm_grads = x.new_empty(C), x.new_empty(2, C)
        qkv_grad = buffers.get("qkv_grad", N, 3 * C)
        out_grad = grad if drop_attn[1] else h_grad
        kernels.dropout_backward(h_grad, *drop_attn, N, C, grad, gradients[5], threads)
        weight_gradient(4, out_grad, y)
        product(out_grad, w_proj.T, out=normal)
        kernels.attend_backward(qkv, y, normal, log_sums, B, T, H, C // H, *drop_weights, qkv_grad, threads)
        if needs[2]:
            kernels.norm_again(x, stats_1, norm_1, norm_1_bias, N, C, normal, threads)
        weight_gradient(2, qkv_grad, normal)
        if b_qkv is not None:
            gradients[3] = x.new_empty(3 * C)
            kernels.dropout_backward(qkv_grad, *dropout_options(0, 0.0), N, 3 * C, None, gradients[3], threads)
        product(qkv_grad, w_qkv.T, out=normal)
        kernels.norm_backward(normal, x, stats_1, norm_1, h_grad, N, C, h_grad, norm_grads, threads)
        gradients[0], gradients[1] = norm_grads
        wanted: Sequence[Tensor | None] = [g if needs[i] else None for i, g in enumerate(gradients)]
        return None, None, None, h_grad.view(B, T, C) if needs["x"] else None, *wanted
