"""Faster generation on a GPU: the forward pass of one token is captured as a CUDA graph and replayed for every new token.

The forward pass of one token starts about two hundred small GPU kernels, and starting a kernel takes longer than running it. A
CUDA graph starts all kernels with one call, but always with the same memory addresses and tensor sizes. A captured forward pass
can therefore not use a cache that grows. It attends to a cache of full size, with a mask that hides the unused entries, and
reads the position of its token from a tensor. Without a GPU the same code runs without a graph, so that tests can check it.

B batch size, T new tokens, C embedding width, H heads, D = C // H, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from MyGPT.cache import KVCache, check_inputs, positions_and_mask
from MyGPT.model import GPTModel


class StaticCache(KVCache):
    """A KVCache that also holds the inputs and the logits of the captured CUDA graph.

    They are stored in tensors with fixed addresses, because a CUDA graph always reads and writes the same addresses.
    """

    def __init__(self, model: GPTModel, batch_size: int, length: int | None) -> None:
        weight = model.transformer.wte.weight.detach()
        super().__init__(model.config, batch_size, length, like=weight)
        self.storage.zero_()  # masked entries are multiplied by 0, and 0 times an uninitialised NaN would be NaN
        self.ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=weight.device)
        self.column = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.positions = torch.zeros(batch_size, 1, dtype=torch.int64, device=weight.device)
        self.mask = torch.zeros(batch_size, 1, 1, self.capacity, dtype=torch.bool, device=weight.device)
        self.logits = weight.new_empty(batch_size, 1, model.config.vocab_size)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_stepping = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, each (B, H, T, D), in a layer, and return the keys and values to attend to.

        Usually these are the layer's keys and values of all tokens so far. Inside the captured CUDA graph, which needs fixed
        shapes, they have the shape (B, H, capacity, D), and `self.mask` excludes the unused entries from attention.
        """
        if not self.is_stepping:
            return super().append(layer, k, v)
        keys, values = self.storage[layer]
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        return keys, values


class CapturedModel(nn.Module):
    """A wrapper that makes generation with `model`, a GPTModel on a GPU, faster. Pass it to `generate` instead of `model`.

    The forward pass of one new token is captured as a CUDA graph and replayed. The logits have no gradients.
    """

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.train(False)

    def new_cache(self, batch_size: int, length: int | None = None) -> StaticCache:
        """Return an empty KV cache for batch_size sequences of up to `length` tokens (default: the model's context length)."""
        return StaticCache(self.model, batch_size, length)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: StaticCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return the logits: (B, T, V), or (B, 1, V) with last_only=True. For the arguments, see GPTModel.forward."""
        # Only a single new token after others uses the captured step.
        if input_ids.shape[-1] != 1 or cache is None or cache.length == 0:
            return self.model(input_ids, attention_mask=attention_mask, cache=cache, last_only=last_only)
        check_inputs(self.config, input_ids, attention_mask, cache=cache)
        S = cache.length + 1
        positions, mask = positions_and_mask(attention_mask, 1, S, input_ids.device)
        cache.ids.copy_(input_ids)
        cache.column.fill_(S - 1)
        cache.positions.copy_(positions.expand_as(cache.positions))
        cache.mask[..., :S] = True if mask is None else mask
        cache.mask[..., S:] = False
        cache.is_stepping = True
        try:
            self._run(cache)
        finally:
            cache.is_stepping = False
        cache.length = S
        return cache.logits.clone()  # the next step overwrites cache.logits

    def _run(self, cache: StaticCache) -> None:
        """Compute the logits from the inputs in the cache, and write them into cache.logits.

        On a GPU, the first call captures the CUDA graph, and every call replays it. On a CPU, the model runs directly.
        """
        if cache.ids.device.type != "cuda":
            self._step(cache)
            return
        if cache.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries initialise themselves in their first calls, which cannot be captured
                    self._step(cache)  # every run of the step writes the same values to the same places
            torch.cuda.current_stream().wait_stream(stream)
            cache.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(cache.graph):
                self._step(cache)
        cache.graph.replay()

    def _step(self, cache: StaticCache) -> None:
        """Run the model on the newest token of each sequence, cache.ids (B, 1). Write the logits into cache.logits (B, 1, V)."""
        transformer = self.model.transformer
        x = transformer.wte(cache.ids) + transformer.wpe(cache.positions)  # (B, 1, C)
        for block in transformer.h:
            x = block(x, cache.mask, cache)
        cache.logits.copy_(self.model.lm_head(transformer.ln_f(x)))
