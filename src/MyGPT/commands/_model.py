"""From what a user names to what a command needs: a device, a model with its tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.config import Precision

if TYPE_CHECKING:
    import torch
    from torch import nn

    from MyGPT.acceleration.kernel import Build
    from MyGPT.data.templates import Template
    from MyGPT.model import GPTModel
    from MyGPT.sampling import SamplingConfig
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


def open_model(name_or_path: str, device: str, adapter: str | None = None) -> tuple[GPTModel, Tokenizer, torch.device]:
    """A model by its name, directory, run or file, in evaluation mode on the device, and its tokenizer.

    An adapter is put on it; an adapter alone, or a run of finetune that kept no more, is opened with the model that it was
    trained on.
    """
    from MyGPT.model import GPTModel
    from MyGPT.weights.pretrained import find_model

    place = pick_device(device)
    if adapter is None and adapter_of(name_or_path) is not None:
        from MyGPT.finetuning.lora import base_of_adapter

        adapter = str(adapter_of(name_or_path))
        name_or_path = base_of_adapter(adapter)
        if Path(name_or_path).is_absolute() and not Path(name_or_path).exists():
            raise FileNotFoundError(
                f"{adapter} was trained on {name_or_path}, which is not there: say where it is now with --model MODEL "
                f"--adapter {adapter}"
            )
    path = find_model(name_or_path)
    model = GPTModel.from_pretrained(path)
    if adapter is not None:
        from MyGPT.finetuning.lora import merge, open_adapter

        model = merge(open_adapter(model, _adapter_in(adapter) or adapter)).eval()
    return model.to(place), find_tokenizer(path, model.config.vocab_size), place


def start_build(device: str) -> Build | None:
    """Begins to compile the processor's kernel, where one will be used and there is none yet, while torch is being imported."""
    from MyGPT.acceleration.kernel import Build

    may_use_gpu = device == "auto" and (sys.platform == "darwin" or shutil.which("nvidia-smi") is not None)
    if device in ("auto", "cpu") and not may_use_gpu:
        with contextlib.suppress(OSError):  # make_fast tries again, and says what is wrong
            return Build()
    return None


def make_fast(model: GPTModel, precision: Precision, lookup: bool, build: Build | None) -> nn.Module:
    """The model as it generates fastest where it is; "auto" keeps the precision in which its weights are stored."""
    import torch

    from MyGPT.acceleration.lookup import PromptLookup
    from MyGPT.acceleration.step import accelerate

    weight = model.transformer.wte.weight
    fast: nn.Module = model
    if weight.device.type == "cpu":
        fast = accelerate(model, precision, build=build)
    elif precision == "int8":
        raise ValueError(f"precision int8 is for a processor; on {weight.device.type} there are fp32 and bf16")
    elif precision != "auto":
        fast = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return PromptLookup(fast) if lookup else fast


def adapter_of(name_or_path: str) -> Path | None:
    """The adapter, where there is no whole model: a directory itself, or `adapter/` in a run of finetune."""
    path = Path(name_or_path)
    has_model = (path / "config.json").is_file() or (path / "model" / "config.json").is_file()
    return None if has_model else _adapter_in(name_or_path)


def _adapter_in(directory: str) -> Path | None:
    candidates = (Path(directory), Path(directory) / "adapter")
    return next((path for path in candidates if (path / "adapter_config.json").is_file()), None)


def find_template(name_or_path: str, adapter: str | None = None) -> Template | None:
    """The template that was saved with a tuned model or its adapter, if there is one."""
    from MyGPT.data.templates import TEMPLATE_FILE, load_template

    for place in filter(None, (adapter, name_or_path)):
        for directory in (Path(place), Path(place) / "model", Path(place) / "adapter"):
            if (directory / TEMPLATE_FILE).is_file():
                return load_template(directory)
    return None


def find_tokenizer(model_path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies with a model; where there is none and the vocabulary is as large as GPT-2's, GPT-2's."""
    from MyGPT.tokenizers import get_tokenizer
    from MyGPT.weights.directory import model_directory

    directory = model_path.parent if model_path.is_file() else model_path
    with contextlib.suppress(FileNotFoundError):
        directory = model_directory(directory)
    files = ("tokenizer.json", "encoder.json")
    # nanoGPT rounds the vocabulary up to a multiple of 64.
    if not any((directory / name).is_file() for name in files) and vocab_size in (50257, 50304):
        return get_tokenizer("gpt2")
    return get_tokenizer(directory)


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: list[str] | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """The text that a model adds to a prompt's ids, in pieces, up to a stop text or the end of the text."""
    import torch

    from MyGPT.generation import TextStream, generate_stream

    stream = TextStream(tokenizer, ids, stop or [])
    device = next((parameter.device for parameter in model.parameters()), "cpu")  # an accelerated model has none
    for new in generate_stream(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        **dataclasses.asdict(sampling),
        eos_id=tokenizer.eot_token,
        stop=stop or None,
        seed=seed,
        tokenizer=tokenizer,
    ):
        yield stream.add(int(new))
    yield stream.end()


def encode_for(model: GPTModel, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """The ids of a text that is to be looked at whole, (1, T); a ValueError unless it fits the context and is not empty."""
    import torch

    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty; give at least one token")
    if len(ids) > model.config.context_length:
        raise ValueError(f"the text has {len(ids)} tokens, the model's context is {model.config.context_length}")
    return torch.tensor([ids])
