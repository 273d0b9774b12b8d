"""PEFT's LoRA layers with fewer operations: `fuse` makes them compute layer and adapter in one autograd function.

The layers stay PEFT's in all other respects: names, parameters, saving, merging and switching adapters. A layer whose settings
`LoRALinear` does not cover computes as PEFT does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from MyGPT.acceleration.frozen import FrozenLinear, LoRALinear


class Linear(lora.Linear):
    """PEFT's LoRA layer on a linear layer, computed by `LoRALinear` where it can."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._can_fuse(x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = self.active_adapters
        base: Any = self.base_layer
        dropout = self.lora_dropout[name]
        is_dropping = dropout.training and getattr(dropout, "p", 0.0) > 0
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        fused: Tensor = LoRALinear.apply(
            x, dropout(x) if is_dropping else None, base.weight, getattr(base, "scale", None), base.bias, A, B, self.scaling[name]
        )  # fmt: skip
        return fused

    def _can_fuse(self, x: Tensor) -> bool:
        """Return True for one plain adapter on a frozen layer whose adapter and input have the same dtype, outside autocast."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or torch.compiler.is_compiling():
            return False
        name, base = self.active_adapters[0], self.base_layer
        if type(base) not in (nn.Linear, FrozenLinear) or name not in self.lora_A or name in self.lora_variant:
            return False
        frozen = [base.weight] if base.bias is None else [base.weight, base.bias]
        A: Any = self.lora_A[name]
        if any(weight.requires_grad for weight in frozen) or self.lora_bias[name]:
            return False
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return False
        weights = [A.weight] if type(base) is FrozenLinear else [A.weight, *frozen]
        # torch.func cannot transform LoRALinear.
        is_transformed = any(torch.func.debug_unwrap(tensor) is not tensor for tensor in (x, *weights))
        return not is_transformed and all(weight.dtype == x.dtype for weight in weights)


def fuse(model: nn.Module) -> None:
    """Change the LoRA layers of a PEFT model into `Linear` of this module, in place."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = Linear
