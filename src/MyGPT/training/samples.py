"""Live samples: text that the model writes during training, so that a reader sees it learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from MyGPT.generation import generate
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.arithmetic import uncompiled
from MyGPT.training.config import TrainConfig


class LiveSamples:
    """Continues prompts with the model, one prompt per sample, in turn.

    Args:
        model: the model that writes.
        tokenizer: encodes config.sample_prompt and decodes samples. Without a tokenizer there are no samples.
        prompts: token ids of the prompts. config.sample_prompt takes precedence.
        config: how often samples are due, their length, temperature and seed.
    """

    def __init__(
        self, model: GPTModel, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]], config: TrainConfig
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = [list(prompt) for prompt in prompts]
        self.config = config
        if tokenizer is not None and config.sample_every and config.sample_prompt:
            self.prompts = [tokenizer.encode(config.sample_prompt)]

    def is_due(self, step: int) -> bool:
        """Return True if a sample is wanted after this step and can be made."""
        every = self.config.sample_every
        return every > 0 and step % every == 0 and self.tokenizer is not None and len(self.prompts) > 0

    def text(self, step: int) -> str:
        """Return a continuation of the prompt whose turn it is. The same weights and step give the same text."""
        if self.tokenizer is None:
            raise ValueError("a sample needs a tokenizer: give the Trainer tokenizer=")
        prompt = self.prompts[step // max(1, self.config.sample_every) % len(self.prompts)]
        with uncompiled(self.config):
            ids = generate(
                self.model,
                torch.tensor([prompt], device=next(self.model.parameters()).device),
                self.config.sample_tokens,
                temperature=self.config.sample_temperature,
                top_k=200,
                seed=self.config.seed,
                eos_id=self.tokenizer.eot_token if self.config.sample_to_end else None,
            )
        return self.tokenizer.decode(ids[0].tolist())
