"""The cross-entropy losses of the library, in nats, and the tied output head.

Losses and counts are returned as separate sums, because a mean of means is wrong when batches differ in length: sum both over
batches, then divide once. B batch size, T tokens, N = B * T positions, C embedding width, V vocabulary size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

IGNORED = -100
"""Target value of positions that the losses ignore, as in torch and transformers."""

MAX_LOGITS = 1 << 26
"""Largest number of logits that `linear_token_loss` computes at one time on a CPU (256 MB in float32).

With a quarter as many, the products have fewer rows, and the loss takes a tenth longer."""

MAX_GPU_LOGITS = 1 << 27
"""Largest number of logits that `linear_token_loss` computes at one time on a GPU (0.5 GB in float32).

After each chunk of positions, the gradient of the output head (155 MB for GPT-2) is read and written. In chunks as small as a
CPU's this would take a GPU longer than the matrix products."""

VOCAB_CHUNK = 2048
"""Number of vocabulary entries whose logits a CPU computes at a time: few enough that the logits fit in the CPU's cache."""


class TiedHead(nn.Module):
    """An output head that shares the weight (V, C) of the token embedding.

    It is not an nn.Linear, because PEFT and quantizers change every nn.Linear, and would change the shared embedding too.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # (B, T, V)


@contextmanager
def untied(embedding: nn.Embedding, head: nn.Module) -> Iterator[None]:
    """Remove a shared weight from the head within the `with` block; afterwards the head has the embedding's weight.

    Methods such as `nn.Module.to_empty` replace every parameter of every module. A parameter of two modules would become two.
    """
    if not _are_tied(embedding, head):
        yield
        return
    head.register_parameter("weight", None)
    try:
        yield
    finally:
        head.weight = embedding.weight


def one_tied_entry(embedding: nn.Embedding, head: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Make the entries of a shared weight in a GPTModel's state dict one parameter. One of the two entries is enough.

    `load_state_dict(assign=True)` then gives the same parameter to both modules. If the entries differ, the head's counts,
    as it does without `assign`. `prefix` is that of the model's names.
    """
    names = (f"{prefix}lm_head.weight", f"{prefix}transformer.wte.weight")
    given = next((state_dict[name] for name in names if name in state_dict), None)
    if given is not None and _are_tied(embedding, head):
        is_trained = embedding.weight.requires_grad
        shared = given if isinstance(given, nn.Parameter) else nn.Parameter(given, requires_grad=is_trained)
        state_dict.update(dict.fromkeys(names, shared))


def _are_tied(embedding: nn.Embedding, head: nn.Module) -> bool:
    """Return True if the head itself, and not a layer inside an adapter, has the weight of the embedding."""
    own = dict(head.named_parameters(recurse=False)).get("weight")
    return own is not None and own is getattr(embedding, "weight", None)


class CausalLMOutput(NamedTuple):
    """The result of GPTModel.forward with labels: the loss and the logits.

    Each is an attribute, a position and a key: `output.loss`, `output[0]` and `output["loss"]`. `loss, logits = output` and
    `dict(output)` also work. As a tuple, the result is known to pytree, DistributedDataParallel and Accelerate.
    """

    loss: Tensor
    """Mean cross-entropy in nats over the labels that are not -100; NaN if all labels are -100."""
    logits: Tensor
    """Logits of the next token at every position, (B, T, V)."""

    def __getitem__(self, key: Any) -> Any:
        return self._asdict()[key] if isinstance(key, str) else tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def keys(self) -> tuple[str, ...]:
        """Return the names of the fields."""
        return self._fields

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Return the names of the fields with their values."""
        return zip(self._fields, self, strict=True)


# Without this name, torch.export cannot save a program that returns the class.
pytree._register_namedtuple(CausalLMOutput, serialized_type_name="MyGPT.CausalLMOutput")


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats and the number of targets that were counted.

    logits is a float tensor (..., V), and targets an int64 tensor (...) in which -100 is not counted. 16-bit logits are
    converted to float32 first.
    """
    logits = logits.flatten(0, -2)  # (N, V)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    total = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return total, (targets != IGNORED).sum()


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy in nats and the number of targets that were counted.

    The logits are head(hidden), where hidden (..., C) is the input of the output head. targets is an int64 tensor (...) in
    which -100 is not counted. If the head is a linear layer without bias, this function uses `linear_token_loss`, which needs
    less memory than computing all logits.
    """
    own_loss: Any = getattr(head, "token_loss", None)
    if own_loss is not None:  # a head with frozen weights in bf16 or int8
        result: tuple[Tensor, Tensor] = own_loss(hidden, targets)
        return result
    # A head with an adapter or a bias computes more than that product.
    if type(head) is TiedHead or (type(head) is nn.Linear and getattr(head, "bias", None) is None):
        return linear_token_loss(hidden, head.weight, targets)
    return token_loss(head(hidden), targets)


def linear_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the logits hidden @ weight.T and the number of targets that were counted.

    hidden is (..., C), weight is (V, C), and targets is an int64 tensor (...) in which -100 is not counted. For GPT-2's
    vocabulary of 50,257 tokens the logits would take most of the memory of a training step. If there are many
    logits, they are therefore computed for some of the positions at a time. The forward pass already computes the gradients,
    and the backward pass changes them in place, so a second backward pass raises an error.
    """
    hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    if _is_compiled and torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = _compiled(_whole_loss)(hidden, weight, flat_targets)
        return result
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and any(torch.func.debug_unwrap(tensor) is not tensor for tensor in (hidden, weight, targets)):
        # torch.func (vmap, grad and others) cannot transform _ChunkedLinearLoss.
        return token_loss(F.linear(hidden, weight), flat_targets)
    # On a GPU the number of counted targets is not known without waiting for the GPU.
    if hidden.device.type == "cpu" and not is_compiling:
        counted = flat_targets != IGNORED
        if not counted.all():  # prompts and padding need no logits
            hidden, flat_targets = hidden[counted], flat_targets[counted]
    if len(weight) <= VOCAB_CHUNK and len(hidden) * len(weight) <= MAX_LOGITS:
        return token_loss(F.linear(hidden, weight), flat_targets)
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = _ChunkedLinearLoss.apply(hidden, weight, flat_targets, torch.is_grad_enabled())
    return total, (targets != IGNORED).sum()


@contextmanager
def compiled_loss() -> Iterator[None]:
    """Compute `linear_token_loss` with compiled code for all positions at once, where gradients are enabled.

    On a GPU this is twice as fast as `_ChunkedLinearLoss`, because softmax, sums and conversions are one kernel. It keeps the
    logits in the dtype of the matrix product, which takes 3 GB for 32,768 positions of GPT-2 in bfloat16.
    """
    global _is_compiled
    before, _is_compiled = _is_compiled, True
    try:
        yield
    finally:
        _is_compiled = before


_is_compiled = False


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _whole_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of `linear_token_loss` for hidden (N, C) and targets (N,), from all logits at once."""
    V = len(weight)
    # Products with unaligned rows take up to 50% longer, so 50,257 outputs are computed as 50,304.
    return token_loss(F.linear(hidden, F.pad(weight, (0, 0, 0, -V % 64)))[:, :V], targets)


def chunk_sizes(device: str) -> tuple[int | None, int]:
    """Return the largest numbers of vocabulary entries (None: all) and of logits to compute at one time on a type of device."""
    return (VOCAB_CHUNK, MAX_LOGITS) if device == "cpu" else (None, MAX_GPU_LOGITS)


def softmax_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """Replace logits (N, V) by their softmax, and return the cross-entropy of each row in nats, (N, 1).

    targets is an int64 tensor (N, 1).
    """
    target_logits, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    # In place, because allocating memory for millions of numbers takes longer than computing them.
    probabilities = torch.softmax(logits, 1, out=logits)
    # The largest probability is exp(largest) / sum(exp(logits)).
    return largest - probabilities.amax(1, keepdim=True).log() - target_logits


class _ChunkedLinearLoss(torch.autograd.Function):
    """The summed cross-entropy of the logits hidden @ weight.T, computed chunk by chunk together with its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, is_grad_enabled: bool) -> Tensor:
        (N, C), V = hidden.shape, len(weight)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=sum_dtype)
        needs_hidden, needs_weight = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = hidden.new_empty(N, C) if needs_hidden else None
        counted = (targets != IGNORED)[:, None]  # (N, 1)
        index = targets[:, None].where(counted, 0)
        # Products with unaligned rows take up to 50% longer, so 50,257 outputs are stored in rows of 50,304.
        width = -(-V // 64) * 64
        chunk_size, max_logits = chunk_sizes(hidden.device.type)
        if chunk_size is None and width > V:  # on a GPU this is also true of the weight's rows
            weight = F.pad(weight, (0, 0, 0, width - V))
        n_outputs = len(weight)  # V, or `width` with padding
        weight_gradient = weight.new_zeros(n_outputs, C, dtype=sum_dtype) if needs_weight else None
        n_rows = max(1, min(N, max_logits // width))
        buffer = hidden.new_empty(n_rows, width, dtype=sum_dtype)
        chunk_size = chunk_size or n_outputs
        chunks = [slice(start, min(start + chunk_size, n_outputs)) for start in range(0, n_outputs, chunk_size)]
        for start in range(0, N, n_rows):
            rows = slice(start, start + n_rows)
            x = hidden[rows]
            padded = buffer[: len(x)]  # (rows, width)
            for chunk in chunks:
                padded[:, chunk] = F.linear(x, weight[chunk])
            padded[:, V:] = -math.inf
            total += (softmax_in_place(padded, index[rows]) * counted[rows]).sum()
            if not (needs_hidden or needs_weight):
                continue
            # softmax minus one-hot, in the memory of the logits
            padded.scatter_add_(1, index[rows], padded.new_full((len(x), 1), -1.0))
            gradient = padded.to(weight.dtype)[:, :n_outputs]  # 0 in the padding
            if hidden_gradient is not None:
                hidden_gradient[rows] = F.linear(gradient, weight.T) * counted[rows]
            if weight_gradient is not None:
                x = x * counted[rows]
                for chunk in chunks:
                    weight_gradient[chunk] += F.linear(gradient[:, chunk].T, x.T)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient[:V])
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In float32, because grad_output rounded to bf16 would change all gradients by up to 0.4%. Float32 gradients, which
        # may take 150 MB, are scaled in place; autograd detects this in a second backward pass.
        hidden_gradient, weight_gradient = (
            None if saved is None else saved.to(grad_output.dtype).mul_(grad_output).to(ctx.dtype)
            for saved in ctx.saved_tensors
        )
        return hidden_gradient, weight_gradient, None, None
