"""Faster generation on a GPU: the forward pass of one token is captured as a CUDA graph and replayed for every new token.

The forward pass of one token starts about two hundred small GPU kernels, and starting a kernel takes longer than running it. A
CUDA graph starts all kernels with one call, but always with the same memory addresses and tensor sizes. A captured forward pass
can therefore not use a cache that grows. It attends to the first n entries of a cache of fixed size, with a mask that hides the
unused entries, and reads the index of its token from a tensor. n is a multiple of LENGTH_STEP, and each n has its own graph.
Capturing takes longer than a few tokens, so the memory and the graphs of a finished generation serve the next one. Without a
GPU the same code runs without a graph, so that tests can check it.

B batch size, T new tokens, S all tokens so far, n attended entries, C embedding width, H heads, D = C // H, V vocabulary size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from MyGPT.cache import KVCache, Piece, SlotCache, check_inputs, positions_and_mask
from MyGPT.model import GPTModel
from MyGPT.parts import refuse_parts

LENGTH_STEP = 128
"""Number of cache entries by which the captured graphs differ. Fewer entries read less memory, but need more graphs."""


class CapturedStep:
    """The memory that the captured CUDA graphs of B sequences read and write, and the graphs themselves.

    The addresses of these tensors never change, because a CUDA graph always uses the same addresses.
    """

    # Tensors that are created in inference mode could not be written to in a later generation outside of it.
    @torch.inference_mode(False)
    def __init__(self, model: GPTModel, batch_size: int, capacity: int) -> None:
        config, weight, device = (
            model.config,
            model.transformer.wte.weight.detach(),
            model.transformer.wte.weight.device,
        )
        capacity = min(config.context_length, -(-capacity // LENGTH_STEP) * LENGTH_STEP)
        self.storage = KVCache(config, batch_size, capacity, like=weight).storage
        self.ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.columns = torch.arange(capacity, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        """Index of the new token in the cache."""
        self.shift = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        """Position of each sequence's new token minus its index in the cache; below 0 after left padding."""
        self.is_visible = torch.ones(batch_size, 1, 1, capacity, dtype=torch.bool, device=device)
        """False for the entries that the new token may not attend to, such as padding. Later entries may be True."""
        self.is_masked = False
        """True if a mask changed `shift` and `is_visible`."""
        self.logits = weight.new_empty(batch_size, 1, config.vocab_size)
        self.weights = _addresses(model)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        """The captured graphs by the number of attended entries."""
        if device.type == "cuda":
            # torch's default stream for capturing is on the GPU that was current when torch first captured a graph.
            self.stream = torch.cuda.Stream(device)
            # The graphs never run at the same time, so they can share the memory of their intermediate results.
            self.pool = torch.cuda.graph_pool_handle()

    def fits(self, model: GPTModel, batch_size: int, capacity: int) -> bool:
        """Return True if the memory is large enough and the weights of `model` are still where the graphs read them."""
        return len(self.ids) == batch_size and len(self.columns) >= capacity and self.weights == _addresses(model)

    def reset(self) -> None:
        """Forget all keys, values and masks."""
        self.storage.zero_()  # hidden entries are multiplied by 0, and 0 times NaN would be NaN
        self.set_mask(None)

    def set_mask(self, mask: Tensor | None, position: Tensor | None = None) -> None:
        """Set the entries that the new token may attend to, (B, 1, 1, S), and its positions (B, 1). None: all, in order."""
        if mask is not None and position is not None:
            self.is_visible[..., : mask.shape[-1]] = mask
            self.shift.copy_(position - mask.shape[-1] + 1)
        elif self.is_masked:
            self.is_visible.fill_(True)
            self.shift.zero_()
        self.is_masked = mask is not None


def _addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


class StaticCache(KVCache):
    """A KVCache in the fixed memory of a `CapturedStep`, which goes back to its CapturedModel when the cache is deleted."""

    def __init__(self, captured: CapturedModel, batch_size: int, length: int | None) -> None:
        super().__init__(captured.config, batch_size, length, like=torch.empty(0, device="meta"))  # checks the length
        self.step = captured.take_step(batch_size, self.capacity)
        weakref.finalize(self, captured.give_back, self.step).atexit = False
        self.storage = self.step.storage[..., : self.capacity, :]
        self.n_attended: int | None = None
        """Number of entries to which the captured step attends, or None outside of it."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, each (B, H, T, D), in a layer, and return the keys and values to attend to.

        Usually these are the layer's keys and values of all tokens so far. Inside the captured CUDA graph, which needs fixed
        shapes, they have the shape (B, H, n, D), and a mask excludes the unused entries from attention.
        """
        n = self.n_attended
        if n is None:
            return super().append(layer, k, v)
        keys, values = self.step.storage[layer]
        keys.index_copy_(2, self.step.column, k)
        values.index_copy_(2, self.step.column, v)
        return keys[:, :, :n], values[:, :, :n]


class CapturedModel(nn.Module):
    """A wrapper that makes generation with `model`, a GPTModel on a GPU, faster. Pass it to `generate` instead of `model`.

    The forward pass of one new token is captured as a CUDA graph and replayed. The logits have no gradients, and are computed
    in the dtype of the weights, also under autocast. Training steps, which change weights in place, and new weights take
    effect in the next generation. If the computation changes in another way, for example because an adapter is switched
    off, make a new CapturedModel. The memory of the last finished generation is kept for the next one.
    """

    def __init__(self, model: GPTModel) -> None:
        refuse_parts(model, "a captured model")
        super().__init__()
        self.model, self.config = model, model.config
        self._idle: CapturedStep | None = None
        self.train(False)

    def new_cache(self, batch_size: int, length: int | None = None) -> StaticCache:
        """Return an empty KV cache for batch_size sequences of up to `length` tokens (default: the model's context length)."""
        return StaticCache(self, batch_size, length)

    def new_slot_cache(self, slots: int, length: int | None = None) -> SlotCache:
        """Return an empty cache with `slots` slots of up to `length` tokens each (default: the model's context length)."""
        return self.model.new_slot_cache(slots, length)

    def forward_slots(self, pieces: Sequence[Piece], cache: SlotCache) -> Tensor:
        """Return the result of GPTModel.forward_slots, which is not captured."""
        with torch.autocast(cache.storage.device.type, enabled=False):
            return self.model.forward_slots(pieces, cache)

    def take_step(self, batch_size: int, capacity: int) -> CapturedStep:
        """Return the memory and graphs of an earlier generation if they fit B sequences of `capacity` tokens, or new ones."""
        step, self._idle = self._idle, None
        if step is None or not step.fits(self.model, batch_size, capacity):
            step = None  # frees the memory before new memory is allocated
            step = CapturedStep(self.model, batch_size, capacity)
        step.reset()
        return step

    def give_back(self, step: CapturedStep) -> None:
        """Keep the memory and graphs of a finished generation for the next one, instead of those kept before."""
        self._idle = step

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
        # A graph would read the weights that autocast has converted after autocast has freed them.
        with torch.autocast(input_ids.device.type, enabled=False):
            # Only a single new token after others uses the captured step.
            if input_ids.shape[-1] != 1 or cache is None or cache.length == 0:
                return self.model(input_ids, attention_mask=attention_mask, cache=cache, last_only=last_only)
            check_inputs(self.config, input_ids, attention_mask, cache=cache)
            step, S = cache.step, cache.length + 1
            if attention_mask is None:
                step.set_mask(None)
            else:
                positions, mask = positions_and_mask(attention_mask, 1, S, input_ids.device)
                step.set_mask(mask, positions)
            step.ids.copy_(input_ids)
            step.column.fill_(S - 1)
            cache.n_attended = min(-(-S // LENGTH_STEP) * LENGTH_STEP, len(step.columns))
            try:
                self._run(cache, cache.n_attended)
            finally:
                cache.n_attended = None
            cache.advance(1)
            return step.logits.clone()  # the next step overwrites step.logits

    def _run(self, cache: StaticCache, n: int) -> None:
        """Compute the logits of the new token, which attends to the first n entries of the cache, and store them.

        On a GPU, the first call for each n captures the CUDA graph, and every call replays it. On a CPU, the model runs
        directly.
        """
        step = cache.step
        if step.ids.device.type != "cuda":
            self._compute(cache, n)
            return
        with torch.cuda.device(step.ids.device):
            if n not in step.graphs:
                step.graphs[n] = self._capture(cache, n)
            step.graphs[n].replay()

    def _capture(self, cache: StaticCache, n: int) -> torch.cuda.CUDAGraph:
        step, graph = cache.step, torch.cuda.CUDAGraph()
        step.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(step.stream):
            for _ in range(2):  # libraries initialise themselves in their first calls, which cannot be captured
                self._compute(cache, n)  # every run of the step writes the same values to the same places
        torch.cuda.current_stream().wait_stream(step.stream)
        # Other threads, such as the writer of a checkpoint, may use the GPU during the capture.
        with torch.cuda.graph(graph, pool=step.pool, stream=step.stream, capture_error_mode="thread_local"):
            self._compute(cache, n)
        return graph

    def _compute(self, cache: StaticCache, n: int) -> None:
        """Run the model on the newest token of each sequence, step.ids (B, 1). Write the logits into step.logits (B, 1, V)."""
        transformer, step = self.model.transformer, cache.step
        is_hidden = (step.is_visible[..., :n] & (step.columns[:n] <= step.column)).logical_not()  # (B, 1, 1, n)
        x = transformer.wte(step.ids) + transformer.wpe(step.column + step.shift)  # (B, 1, C)
        # Attention would convert a bool mask into these numbers once in every layer.
        mask = torch.zeros_like(is_hidden, dtype=x.dtype).masked_fill_(is_hidden, -math.inf)
        for block in transformer.h:
            x = block(x, mask, cache)
        step.logits.copy_(self.model.lm_head(transformer.ln_f(x)))
