"""The steps that `mygpt finetune`, `mygpt dpo` and `mygpt classify` have in common."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from MyGPT.acceleration.frozen import FrozenDtype, freeze, is_frozen_copy
from MyGPT.commands._model import report_tokenizer
from MyGPT.commands.train import draw_losses
from MyGPT.data.records import Split
from MyGPT.files import reading
from MyGPT.finetuning.foreign_adapters import open_adapter
from MyGPT.finetuning.lora import KeptAdapter, LoraOptions, merge
from MyGPT.model import GPTModel
from MyGPT.opening import ModelFiles, adapter_without_model, find_model_files
from MyGPT.tokenizers import Tokenizer
from MyGPT.tokenizers.base import require_end_token
from MyGPT.training.config import TrainConfig
from MyGPT.training.trainer import Trainer

DEFAULTS = {
    "batch_size": 8, "min_learning_rate": 0.0, "warmup_steps": 20, "weight_decay": 0.0, "beta2": 0.999, "eval_every": 50,
    "log_every": 1,
}  # fmt: skip
"""The default values that the three commands have in common, and that differ from those of `mygpt train`."""
SAMPLE_DEFAULTS = {"sample_every": 50, "sample_tokens": 64, "sample_temperature": 0.0, "sample_to_end": True}
"""The default values of the options of sample texts, for the two of these commands that generate text."""
HIDDEN = ("max_steps", "order", "eval_windows", "compile")
"""The options of `mygpt train` that none of the three commands has."""


def require_epochs(epochs: float) -> None:
    """Raise ValueError if a number of epochs is not above 0 and finite."""
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be a number above 0, got {epochs}")


def open_base(
    model: str, seed: int, command: str, dtype: torch.dtype | None = torch.float32, needs_end_token: bool = True
) -> tuple[GPTModel, Tokenizer, ModelFiles]:
    """Seed torch, and open the model that is to be trained further, with its tokenizer and its files.

    Raises ValueError if `model` is only an adapter, or if `needs_end_token` is True and its tokenizer has no
    end-of-text token. `command`, such as "finetune", is for the message. The weights get the dtype `dtype`, or keep theirs.
    """
    if adapter_without_model(model) is not None:
        need = f"{command} needs a complete model, such as a run made with --merge"
        raise ValueError(f"{model} holds only an adapter, but {need}")
    files = find_model_files(model)
    torch.manual_seed(seed)
    with reading(files.path):
        gpt = GPTModel.from_pretrained(files.path, dtype=dtype)
        tokenizer = files.tokenizer(gpt.config.vocab_size)
    report_tokenizer(tokenizer)
    if not tokenizer.is_assumed:
        print(f"tokenizer: {tokenizer.source}")
    if needs_end_token:
        require_end_token(tokenizer, f"mygpt {command}", model)
        gpt.config = gpt.config.ending_with(tokenizer.eot_token)  # the token that ends every example
    return gpt, tokenizer, files


def open_frozen_base(
    model: str, training: TrainConfig, command: str, dtype: FrozenDtype, device: torch.device
) -> tuple[GPTModel, Tokenizer, ModelFiles]:
    """Open the model that gets a LoRA adapter, as `open_base` does, with frozen weights that are stored in `dtype`.

    Where bf16 is the dtype of the computation too, on a GPU and in sharded training, the whole model is opened in bf16.
    """
    is_sharded = training.parallel == "fsdp"
    if dtype == "int8" and is_sharded:
        raise ValueError("--frozen_dtype int8 cannot be used with --parallel fsdp: choose ddp, or --frozen_dtype bf16")
    if dtype == "bf16" and (device.type != "cpu" or is_sharded):
        return open_base(model, training.seed, command, torch.bfloat16)
    opened = open_base(model, training.seed, command, torch.float32 if dtype == "fp32" else None)
    if dtype != "fp32":
        freeze(opened[0], dtype)
    return opened


def refuse_rounded_dora(lora: LoraOptions, dtype: FrozenDtype) -> None:
    """Raise ValueError for DoRA on int8 weights, because DoRA needs the length of each row of the original weights."""
    if lora.dora and dtype == "int8":
        raise ValueError("--frozen_dtype int8 cannot be used with --lora.dora: choose --frozen_dtype bf16")


def merged_model(gpt: GPTModel, adapter: KeptAdapter, files: ModelFiles, run: Path) -> GPTModel:
    """Return the model with its trained adapter merged into the original weights, which may be changed in place.

    If `gpt` has rounded weights (see `freeze`), the original weights and the adapter of the run are opened again.
    """
    if not is_frozen_copy(gpt):
        return merge(adapter.peft_model)
    original = GPTModel.from_pretrained(files.path, dtype=torch.float32)
    original.config = gpt.config
    return merge(open_adapter(original, adapter.place(run)))


def count_steps(epochs: float, sampler: Any) -> int:
    """Return the number of optimizer steps in a number of epochs, at least 1."""
    return max(1, round(epochs * sampler.batches_per_epoch))


def run_and_draw(trainer: Trainer, split: Split, run: Path) -> float:
    """Train the model and return the validation loss, which is NaN without validation data.

    split.json is written to the run directory `run` before the training, and loss.png afterwards, also after an error.
    """
    with trainer:  # An error before the run's directory is locked must not change it.
        split.save(run / "split.json")
        try:
            return trainer.run()
        finally:
            draw_losses(run)


def report_training(model: nn.Module, max_steps: int, batch_size: int, unit: str) -> None:
    """Print how many parameters are trained, and the number and size of the steps. `unit` names what a batch contains."""
    n_trained, n_all = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not only_trained)
        for only_trained in (True, False)
    )
    print(f"training {n_trained:,} of {n_all:,} parameters: {max_steps} steps of at most {batch_size} {unit}")


def report_samples(prompts: list[list[int]], training: TrainConfig) -> None:
    """Print a line if no sample texts can be generated, although they are due, because there are no `prompts`."""
    if training.sample_every and not prompts:
        print(f"sample texts are off: every held-out prompt is too long to add sample_tokens={training.sample_tokens}")
