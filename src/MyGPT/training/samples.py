"""Live samples: text that the model writes during training, so that a reader sees it learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from MyGPT.generation import generate
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.arithmetic import uncompiled
from MyGPT.training.config import TrainConfig


@dataclass
class LiveSamples:
    """Continues prompts (token ids) with the model, one prompt per sample, in turn.

    config.sample_prompt replaces the prompts. Without a tokenizer there are no samples.
    """

    model: GPTModel
    tokenizer: Tokenizer | None
    prompts: Sequence[Sequence[int]]
    config: TrainConfig

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.config.sample_every and self.config.sample_prompt:
            self.prompts = [self.tokenizer.encode(self.config.sample_prompt)]

    def text(self, step: int) -> str | None:
        """Return a continuation of the prompt whose turn it is; None if no sample is due after this step."""
        config, tokenizer = self.config, self.tokenizer
        if tokenizer is None or len(self.prompts) == 0 or not config.sample_every or step % config.sample_every:
            return None
        prompt = self.prompts[step // config.sample_every % len(self.prompts)]
        with uncompiled(config):
            ids = generate(
                self.model,
                torch.tensor([list(prompt)], device=next(self.model.parameters()).device),
                config.sample_tokens,
                temperature=config.sample_temperature,
                top_k=200,
                seed=config.seed,
                eos_id=tokenizer.eot_token if config.sample_to_end else None,
            )
        return tokenizer.decode(ids[0].tolist())
