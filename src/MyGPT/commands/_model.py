"""From what a user names to what a command needs: a device, a model with its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import Tokenizer


def pick_device(name: str) -> torch.device:
    """ "auto" takes a GPU if there is one; one that is asked for and not there is a ValueError."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in available if available[kind]))
    kind = name.partition(":")[0]
    if not available.get(kind):
        there = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device {name!r} is not available here; there is {there}")
    return torch.device(name)


def open_model(name_or_dir: str, device: str) -> tuple[GPTModel, Tokenizer, torch.device]:
    """The model of a directory or a run, in evaluation mode on the device, and its tokenizer."""
    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import get_tokenizer
    from MyGPT.weights.directory import model_directory

    place = pick_device(device)
    model = GPTModel.from_pretrained(name_or_dir).to(place)
    return model, get_tokenizer(model_directory(name_or_dir)), place
