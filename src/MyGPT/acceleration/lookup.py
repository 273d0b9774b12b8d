"""Prompt-lookup decoding (Saxena, 2023): guess what comes next from what came after the same words before.

A forward pass over a few guessed tokens costs little more than over one, since it is the weights that take the time. Whoever
chooses the next token asks for one position's logits after the other; as long as his choices are the guessed ones, the
logits that were computed ahead serve. The choice is made from the model's own logits every time, so greedy text is the same,
and so is the distribution of sampled text: accepting a guess with the model's probability for it is speculative sampling
(Leviathan et al., 2023) when the guess is certain of itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LookupCache:
    """A model's own cache, and beside it the ids that it was given and what was computed ahead of them."""

    def __init__(self, inner: Any, n_match: int) -> None:
        self.inner = inner
        self.n_match = n_match
        self.ids: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}
        """Where the text went on after each run of n_match ids, the last time."""
        self.source: int | None = None
        """Where it went on after the run that stands at the end now."""
        self.guesses: list[int] = []
        self.logits: list[Tensor] = []
        """After each of the guesses that may still come true: (1, 1, V)."""

    @property
    def length(self) -> int:
        """How many tokens it was given; the model's own cache may be ahead."""
        return len(self.ids)

    def add(self, id_: int) -> None:
        self.ids.append(id_)
        if len(self.ids) >= self.n_match:
            run = tuple(self.ids[-self.n_match :])
            self.source, self.places[run] = self.places.get(run), len(self.ids)

    def guess(self, n: int) -> list[int]:
        """What came after the same run before; where that reaches the end, it goes on with the guesses themselves."""
        if self.source is None:
            return []
        text = list(self.ids)
        for place in range(self.source, self.source + n):
            text.append(text[place])
        return text[len(self.ids) :]


class PromptLookup(nn.Module):
    """A model that computes up to n_guesses positions ahead where the last n_match ids have stood before.

    Give it to `generate` in the place of the model in it, a GPTModel or an accelerated one. One sequence at a time is made
    faster; batches, and calls without a cache, go to the model as they are.
    """

    def __init__(self, model: Any, n_guesses: int = 7, n_match: int = 3) -> None:
        super().__init__()
        for name, value in (("n_guesses", n_guesses), ("n_match", n_match)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.model = model
        self.config = model.config
        self.n_guesses = n_guesses
        self.n_match = n_match
        self.train(model.training)

    def new_cache(self, batch_size: int, length: int | None = None) -> Any:
        """A cache for batch_size sequences of up to `length` tokens (default: the context)."""
        inner = self.model.new_cache(batch_size, length)
        return LookupCache(inner, self.n_match) if batch_size == 1 else inner

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: Any = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V), or the last position's (B, 1, V), as of the model."""
        if not isinstance(cache, LookupCache):
            return self.model(input_ids, attention_mask=attention_mask, cache=cache, last_only=last_only)
        new = input_ids[0].tolist()
        if len(new) == 1 and cache.guesses and cache.guesses[0] == new[0]:
            cache.add(cache.guesses.pop(0))
            return cache.logits.pop(0)
        cache.inner.length = cache.length  # guesses that have not come true are forgotten
        for id_ in new:
            cache.add(id_)
        # A prompt goes to the model alone: with guesses behind it, the logits of all of it would have to be computed.
        n_room = cache.inner.room - cache.length
        cache.guesses = cache.guess(min(self.n_guesses, n_room)) if len(new) == 1 else []
        if not cache.guesses:
            cache.logits = []
            return self.model(input_ids, attention_mask=attention_mask, cache=cache.inner, last_only=last_only)
        ids = torch.cat([input_ids, input_ids.new_tensor([cache.guesses])], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(1, len(cache.guesses))], dim=1)
        logits = self.model(ids, attention_mask=attention_mask, cache=cache.inner)
        now, *cache.logits = logits.split(1, dim=1)
        return now
