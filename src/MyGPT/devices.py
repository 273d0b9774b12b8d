"""The choice of the device on which a model runs."""

from __future__ import annotations

import torch


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return the torch device called `name`. "auto" means a CUDA GPU if there is one, else an MPS GPU, else the CPU.

    Raises ValueError if the device is not available on this machine.
    """
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in is_available if is_available[kind]]
    if name == "auto":
        return torch.device(available[0])
    if str(name).partition(":")[0] not in available:
        raise ValueError(f"device {str(name)!r} is not available on this machine: choose {' or '.join(available)}")
    return torch.device(name)
