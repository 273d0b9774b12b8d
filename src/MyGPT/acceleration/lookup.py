"""Prompt-lookup decoding (Saxena, 2023): guess the next tokens from what followed the same tokens earlier in the text.

A forward pass over a few tokens takes hardly longer than one over a single token, because reading the weights takes most of
the time. The decoding loop still asks for the logits of one position after another. As long as it picks the guessed tokens, it
gets the logits that were computed ahead; after a wrong guess the remaining logits are dropped. Greedy text is unchanged, and
sampled text has the same distribution, because this is speculative sampling (Leviathan et al., 2023) with a draft model that
is certain of its guess. B batch size, T new tokens, V vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from MyGPT.config import require_positive


class LookupCache:
    """The model's KV cache together with the token ids so far, the current guesses and the logits computed ahead."""

    def __init__(self, inner: Any, n_match: int) -> None:
        self.inner, self.n_match = inner, n_match
        self.ids: list[int] = []
        self.continuations: dict[tuple[int, ...], int] = {}
        """Map from n_match consecutive ids to the index in `ids` of the id that followed their last occurrence."""
        self.source: int | None = None
        """Index in `ids` of the id that followed an earlier occurrence of the last n_match ids. None if they are new."""
        self.guesses: list[int] = []
        self.logits: list[Tensor] = []
        """One tensor (1, 1, V) per guess: the logits for the token that follows the guess."""

    @property
    def length(self) -> int:
        """Number of tokens in the text so far, without guesses. The cache of the wrapped model may also contain guesses."""
        return len(self.ids)

    def add(self, id_: int) -> None:
        """Append a token id to `ids`, and look up where the last n_match ids occurred before.

        The answer, the index after that occurrence or None, is stored in `source`, from which `guess` copies.
        """
        self.ids.append(id_)
        if len(self.ids) >= self.n_match:
            run = tuple(self.ids[-self.n_match :])
            self.source, self.continuations[run] = self.continuations.get(run), len(self.ids)

    def guess(self, n: int) -> list[int]:
        """Return n guesses for the next token ids, copied from the ids after an earlier occurrence of the last n_match ids.

        If the last n_match ids have not occurred before, return an empty list.
        """
        if self.source is None:
            return []
        text = list(self.ids)
        for index in range(self.source, self.source + n):
            text.append(text[index])
        return text[len(self.ids) :]


class PromptLookup(nn.Module):
    """A wrapper that makes generation with `model`, a GPTModel or an accelerated model, faster by prompt lookup.

    If the last n_match tokens have occurred before in the text, the next tokens are guessed to be the same as after that
    occurrence. One forward pass then computes the logits for up to n_guesses guesses. Pass the wrapper to `generate` instead
    of `model`. A call with several sequences or
    without a cache gives the same result, but is not faster.
    """

    def __init__(self, model: Any, n_guesses: int = 7, n_match: int = 3) -> None:
        super().__init__()
        require_positive(n_guesses=n_guesses, n_match=n_match)
        self.model, self.config = model, model.config
        self.n_guesses, self.n_match = n_guesses, n_match
        if hasattr(model, "pick_next"):
            self.pick_next = model.pick_next
        self.train(model.training)

    def new_cache(self, batch_size: int, length: int | None = None) -> Any:
        """Return an empty KV cache for batch_size sequences of up to `length` tokens (default: the model's context length)."""
        inner = self.model.new_cache(batch_size, length)
        return LookupCache(inner, self.n_match) if batch_size == 1 else inner

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, cache: Any = None, last_only: bool = False
    ) -> Tensor:
        """Return the logits: (B, T, V), or (B, 1, V) with last_only=True. For the arguments, see GPTModel.forward."""
        if not isinstance(cache, LookupCache):
            return self.model(input_ids, attention_mask=attention_mask, cache=cache, last_only=last_only)
        new = input_ids[0].tolist()
        if len(new) == 1 and cache.guesses and cache.guesses[0] == new[0]:
            cache.add(cache.guesses.pop(0))
            return cache.logits.pop(0)
        cache.inner.length = cache.length  # drops the guesses that were wrong
        for id_ in new:
            cache.add(id_)
        # Guesses after a prompt would require the logits of all of the prompt's tokens, so only single tokens get guesses.
        room = cache.inner.capacity - cache.length
        cache.guesses = cache.guess(min(self.n_guesses, room)) if len(new) == 1 else []
        if not cache.guesses:
            cache.logits = []
            return self.model(input_ids, attention_mask=attention_mask, cache=cache.inner, last_only=last_only)
        ids = torch.cat([input_ids, input_ids.new_tensor([cache.guesses])], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(1, len(cache.guesses))], dim=1)
        logits = self.model(ids, attention_mask=attention_mask, cache=cache.inner)
        now, *cache.logits = logits.split(1, dim=1)
        return now
