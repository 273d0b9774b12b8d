"""Generation on a GPU without the price of starting its kernels: one token's step is captured once and replayed.

A decode step of GPT-2 is some two hundred small kernels, and starting each costs more than running it. A CUDA graph starts all of
them at once, but does the same on the same memory every time: so the cache has its full length from the beginning, a mask says
how much of it counts, and the position is a number in memory. The blocks are the model's own. Where there is no GPU the same
step runs without being captured, which is how it is tested.
B batch, T new tokens, L the cache's length, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from MyGPT.model import GPTModel, KVCache, _positions_and_mask


class StaticCache(KVCache):
    """A cache that gives all of its memory to every step, and the step that was captured on it."""

    def __init__(self, model: GPTModel, batch_size: int, length: int) -> None:
        weight = model.transformer.wte.weight.detach()
        super().__init__(model.config, batch_size, length, like=weight)
        self.storage.zero_()  # what does not count is multiplied with 0, which does not make a number of nan
        self.ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=weight.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.positions = torch.zeros(batch_size, 1, dtype=torch.int64, device=weight.device)
        self.mask = torch.zeros(batch_size, 1, 1, length, dtype=torch.bool, device=weight.device)
        self.logits = weight.new_empty(batch_size, 1, model.config.vocab_size)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_prepared = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As of a KVCache for a prompt; for one token, written to where `place` says, all of the memory, (B, H, L, D)."""
        if k.shape[2] > 1:
            return super().append(layer, k, v)
        keys, values = self.storage[layer]
        keys.index_copy_(2, self.place, k)
        values.index_copy_(2, self.place, v)
        return keys, values


class CapturedModel(nn.Module):
    """A GPTModel on a GPU, to give to `generate` in its place: input_ids to logits, without gradients."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.train(False)

    def new_cache(self, batch_size: int, length: int | None = None) -> StaticCache:
        """An empty cache for batch_size sequences of up to `length` tokens (default: the context)."""
        self.model.new_cache(batch_size, 1 if length is None else length)  # refuses a length out of range
        return StaticCache(self.model, batch_size, self.config.context_length if length is None else length)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: StaticCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or the last position's (B, 1, V); the logits of one token are written over by the next."""
        B, T = input_ids.shape
        if T > 1 or cache is None or cache.length == 0:
            return self.model(input_ids, attention_mask=attention_mask, cache=cache, last_only=last_only)
        cache.check(B, cache.length + 1)
        if not cache.is_prepared:
            self._prepare(cache, attention_mask)
        cache.ids.copy_(input_ids)
        if cache.graph is not None:
            cache.graph.replay()
        else:
            self._step(cache)
        cache.length += 1
        return cache.logits

    def _step(self, cache: StaticCache) -> None:
        """One token of each row, from the cache's `ids` to its `logits`; then everything stands for the next."""
        cache.mask.index_fill_(3, cache.place, True)
        transformer = self.model.transformer
        x = transformer.wte(cache.ids) + transformer.wpe(cache.positions)  # (B, 1, C)
        for block in transformer.h:
            x = block(x, cache.mask, cache)
        cache.logits.copy_(self.model.lm_head(transformer.ln_f(x)))
        cache.place += 1
        cache.positions += 1

    def _prepare(self, cache: StaticCache, attention_mask: Tensor | None) -> None:
        """Where the first token stands and what it may look at; on a GPU the step is captured."""
        B, S = len(cache.ids), cache.length + 1
        positions, mask = _positions_and_mask(attention_mask, B, 1, S, cache.ids.device)

        def begin() -> None:
            cache.place.fill_(cache.length)
            cache.positions.copy_(positions.expand(B, 1))
            cache.mask.zero_()
            cache.mask[..., : S - 1] = True if mask is None else mask[..., : S - 1]

        begin()
        cache.is_prepared = True
        if cache.ids.device.type != "cuda":
            return
        # What a step writes, it writes again from `begin`: to run it while capturing leaves nothing behind.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up at their first call, which cannot be captured
                begin()
                self._step(cache)
            begin()
        torch.cuda.current_stream().wait_stream(stream)
        cache.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cache.graph):
            self._step(cache)
        begin()
