"""Four-bit weights: how a weight matrix is rounded, optionally with error feedback, and how its codes are stored.

The inputs of each output are divided into groups of 32. A weight is scale * (step * (code - 8) + offset): `scale` is a float
per output, `step` and `offset` are 8-bit integers per group, and `code` is a number from 0 to 15. That is 4.5 bits per
weight. llama.cpp's q4_0 also needs 4.5 bits: it stores a 16-bit scale per group and has no offset. N outputs, K inputs,
G = K / 32 groups, rounded up.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.generation import evaluation_mode

GROUP = 32
"""Number of inputs that share a step and an offset."""
LARGEST = 127
"""The largest step, and the largest absolute value of an offset."""
CANDIDATES = (1.0, 0.94, 0.88, 0.82, 0.76)
"""For each group, the step that gives the smallest error is chosen among these multiples of (largest - smallest weight) / 15.

A step below 1 clips the outermost weights, and rounds all others less.
"""
DAMPING = 0.01
"""A fraction of the mean of the moments' diagonal. Error feedback adds it to the diagonal, so that the inverse exists."""
HEADROOM = 1.1
"""Error feedback changes the weights, so the scale of a row leaves room for larger steps and offsets."""
CHUNK = 1 << 18
"""Number of weights that are rounded together, so that intermediate results stay in the cache of the CPU."""


@dataclass
class Int4Weight:
    """A weight matrix (N, K) in four bits."""

    codes: Tensor
    """uint8 (N, G, 32), from 0 to 15. The codes after the last input mean nothing, because the kernel multiplies them by 0."""
    steps: Tensor
    """int8 (N, G), from 1 to 127."""
    offsets: Tensor
    """int8 (N, G), from -127 to 127."""
    scale: Tensor
    """float32 (N)."""
    K: int
    """Number of inputs."""

    def values(self) -> Tensor:
        """Return the weights as a float32 tensor (N, K)."""
        numbers = self.steps[..., None].float() * (self.codes.float() - 8) + self.offsets[..., None]
        return (self.scale[:, None, None] * numbers).flatten(1)[:, : self.K]

    def panels(self, P: int) -> Tensor:
        """Return the codes, steps and offsets in the order in which int4.h reads them, uint8 (N / P, G, 18 P)."""
        N, G, _ = self.codes.shape
        n = -(-N // P)

        def padded(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, n * P - N)).view(n, P, *tensor.shape[1:])

        # A group of an output is stored as 4 chunks of 2 halves of 4 inputs.
        chunks = padded(self.codes).view(n, P, G, 4, 2, 4).permute(4, 0, 2, 3, 1, 5)  # (2, n, G, 4, P, 4)
        pairs = (chunks[0] | chunks[1] << 4).reshape(n, G, 16 * P)
        numbers = padded(torch.stack([self.steps, self.offsets], dim=-1)).transpose(1, 2).reshape(n, G, 2 * P)
        return torch.cat([numbers.view(torch.uint8), pairs], dim=-1)


def round_weight(weight: Tensor, moments: Tensor | None = None) -> Int4Weight:
    """Return the finite matrix `weight` (N, K) in four bits.

    Without `moments`, the squared error of the weights is small. With `moments` (K, K), the sum of xᵀx over inputs x of the
    layer, the squared error of its outputs x Wᵀ is small (see `_round_with_feedback`).
    """
    if moments is not None:
        return _round_with_feedback(weight, moments)
    parts = []
    for rows in weight.detach().split(max(1, CHUNK // weight.shape[1])):
        groups = _in_groups(rows.float())
        scale = _row_scale(groups)
        steps, offsets = _fit(groups, scale)
        parts.append((_codes(groups / scale[:, None, None], steps, offsets), steps, offsets, scale))
    codes, steps, offsets, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Int4Weight(codes.byte(), steps.char(), offsets.char(), scale, weight.shape[1])


@torch.no_grad()
def input_moments(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the sum of xᵀx, (K, K), over the inputs x of each linear layer in the blocks of a GPTModel, by the layer's name.

    ids is a text of the kind that the model will see, (B, T) int64. A few thousand tokens are enough.
    """
    moments: dict[str, Tensor] = {}

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        moments[name] = moments.get(name, 0) + x.T @ x

    blocks = [
        (name, module) for name, module in model.named_modules() if ".h." in name and isinstance(module, nn.Linear)
    ]
    with ExitStack() as hooks, evaluation_mode(model):
        for name, module in blocks:
            hook = module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs))
            hooks.callback(hook.remove)
        for rows in ids.split(1):  # one sequence at a time needs little memory
            model(rows, last_only=True)
    return moments


def _in_groups(weight: Tensor) -> Tensor:
    """Return a weight matrix (N, K) as (N, G, 32). The last group is filled up with copies of the row's last weight."""
    missing = -weight.shape[1] % GROUP
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)
    return weight.unflatten(1, (-1, GROUP))


def _row_scale(groups: Tensor) -> Tensor:
    """Return the scale (N) of each row of `groups` (N, G, 32), with which no step and no offset exceeds 127."""
    low, high = torch.aminmax(groups, dim=-1)
    width = high / 15 - low / 15
    scale = torch.maximum(width, (low / 2 + high / 2).abs() + width / 2).amax(-1) / LARGEST
    return torch.where(scale < 1e-35, torch.ones_like(scale), scale)  # so small a row becomes 0


def _fit(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps and offsets (N, G), as whole float32 numbers, that round `groups` (N, G, 32) with the least error."""
    groups = groups / scale[:, None, None]
    low, high = torch.aminmax(groups, dim=-1)
    width, middle = (high - low) / 15, (high + low) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in CANDIDATES:
        steps = (width * factor).round_().clamp_(1, LARGEST)
        offsets = (middle + steps / 2).round_().clamp_(-LARGEST, LARGEST)
        rounded = _codes(groups, steps, offsets).sub_(8).mul_(steps[..., None]).add_(offsets[..., None])
        error = rounded.sub_(groups).square_().sum(-1)
        found = error, steps, offsets
        if best is None:
            best = found
        else:
            is_better = error < best[0]
            best = tuple(torch.where(is_better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1:]


def _codes(groups: Tensor, steps: Tensor, offsets: Tensor) -> Tensor:
    """Return the codes (N, G, 32), as whole float32 numbers, of `groups`, which are divided by their rows' scales."""
    return (groups - offsets[..., None]).div_(steps[..., None]).round_().add_(8).clamp_(0, 15)


def _round_with_feedback(weight: Tensor, moments: Tensor) -> Int4Weight:
    """Round a matrix (N, K) with error feedback.

    This is GPTQ (Frantar et al., 2022, arXiv:2210.17323). The columns of the matrix are rounded one after another, and the
    columns that are not rounded yet change so that they compensate for the error of each column. The squared error of
    the outputs x Wᵀ is a quadratic function of the weights, and its second derivative is twice the matrix of moments.
    """
    K = weight.shape[1]
    weight, scale = weight.detach().float().clone(), _row_scale(_in_groups(weight.detach().float())) * HEADROOM
    moments = moments.double()
    diagonal = moments.diagonal()
    moments = moments + torch.diag(torch.where(diagonal == 0, 1.0, DAMPING * diagonal.mean()))
    # Row k of the upper Cholesky factor of the inverse says how the columns after k compensate for the error of column k.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    feedback = torch.linalg.cholesky(inverse, upper=True).float()
    rounded = []
    for first in range(0, K, GROUP):
        end = min(first + GROUP, K)
        group = _in_groups(weight[:, first:end])
        steps, offsets = _fit(group, scale)
        codes, errors = torch.full_like(group, 8), torch.empty(len(weight), end - first)
        for k in range(first, end):
            column = weight[:, k]
            code = _codes((column / scale)[:, None, None], steps, offsets)
            value = scale * (steps[:, 0] * (code[:, 0, 0] - 8) + offsets[:, 0])
            codes[:, 0, k - first] = code[:, 0, 0]
            error = errors[:, k - first] = (column - value) / feedback[k, k]
            weight[:, k + 1 : end].addr_(error, feedback[k, k + 1 : end], alpha=-1)
        weight[:, end:].addmm_(errors, feedback[first:end, end:], alpha=-1)
        rounded.append((codes, steps, offsets))
    codes, steps, offsets = (torch.cat(tensors, dim=1) for tensors in zip(*rounded, strict=True))
    return Int4Weight(codes.byte(), steps.char(), offsets.char(), scale, K)
