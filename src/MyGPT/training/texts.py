"""The texts that a Trainer reads and writes: batches of token ids, and samples generated during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from MyGPT.data.sampler import WindowSampler, WindowValidation
from MyGPT.data.tokens import compact_ids
from MyGPT.generation import end_ids, generate
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.arithmetic import uncompiled
from MyGPT.training.config import TrainConfig


def make_batches(train: Any, val: Any, context_length: int, config: TrainConfig) -> tuple[Any, Any, list[list[int]]]:
    """Return the training batches, the validation batches (or None), and the default prompts of sample texts.

    Token ids are cut into sequences of context_length tokens; a `train` or `val` that already makes batches is returned
    unchanged. With fewer than two validation ids, the validation batches are None. The default prompt is the first 8
    tokens of the validation text or, without validation text, of the training text.
    """
    text: Any = []
    if not hasattr(train, "batch"):
        text = compact_ids(train)
        train = WindowSampler(text, context_length, config.batch_size, config.order, config.seed)
    if val is not None and not hasattr(val, "batches"):
        if len(val) < 2:
            val = None
        else:
            text = compact_ids(val)
            val = WindowValidation(text, context_length, config.eval_windows)
    return train, val, [[int(id_) for id_ in text[:8]]] if len(text) else []


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors of a batch on `device`. They are copied if they are on another device."""
    # A copy to a CUDA GPU from other memory than pinned memory waits until the GPU has finished all earlier work. On Apple's
    # GPUs a non-blocking copy may read the source tensor after its memory has been freed.
    is_cuda = device.type == "cuda"
    sources = (tensor.pin_memory() if is_cuda and tensor.device.type == "cpu" else tensor for tensor in batch)
    return tuple(tensor.to(device, non_blocking=is_cuda) for tensor in sources)


@dataclass
class LiveSamples:
    """Generates sample texts during training, so that a user can watch the model learn.

    Each sample continues the next of `prompts` (lists of token ids); config.sample_prompt, if set, replaces them. If
    `tokenizer` is None, there are no samples.
    """

    model: GPTModel
    tokenizer: Tokenizer | None
    prompts: Sequence[Sequence[int]]
    config: TrainConfig

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.config.sample_every and self.config.sample_prompt:
            self.prompts = [self.tokenizer.encode(self.config.sample_prompt)]

    def text(self, step: int) -> str | None:
        """Return the next prompt with its continuation by the model; None if no sample is due after `step` steps."""
        config, tokenizer = self.config, self.tokenizer
        if tokenizer is None or len(self.prompts) == 0 or not config.sample_every or step % config.sample_every:
            return None
        prompt = self.prompts[step // config.sample_every % len(self.prompts)]
        with uncompiled(config):
            return sample_text(self.model, tokenizer, prompt, config)


def sample_text(model: Any, tokenizer: Tokenizer, prompt: Sequence[int], config: TrainConfig) -> str:
    """Return a prompt with its continuation by a model or its accelerated copy, sampled with the options of a run."""
    device = next((parameter.device for parameter in model.parameters()), None)
    ids = generate(
        model,
        torch.tensor([list(prompt)], device=device),
        config.sample_tokens,
        temperature=config.sample_temperature,
        top_k=200,
        seed=config.seed,
        eos_id=end_ids(model, tokenizer) or None if config.sample_to_end else None,
        tokenizer=tokenizer,
    )
    return tokenizer.decode(ids[0].tolist())
