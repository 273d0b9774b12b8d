"""The key-value cache, positions and attention masks, and the checks of a model's inputs.

`GPTModel` (model.py) and the accelerated models (acceleration/) share this code. B batch size, T new tokens, S all tokens so
far (cached and new), C embedding width, H heads, D = C // H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.loss import IGNORED


class KVCache:
    """A key-value cache: the keys and values of all tokens so far, so that a forward pass computes only the new tokens.

    Every forward pass with the cache appends the keys and values of the new tokens. Gradients cannot flow through the cache,
    so it must be used under `torch.no_grad()`.
    """

    def __init__(self, config: GPTConfig, batch_size: int, length: int | None, like: Tensor) -> None:
        """Allocate memory for batch_size sequences of up to `length` tokens (None: the model's context length).

        The memory has the dtype and the device of the tensor `like`, until keys of another dtype are appended. Raises
        ValueError if `length` is below 1 or above the model's context length.
        """
        shape = _storage_shape(config, batch_size, length)
        self.storage = torch.empty(shape, dtype=like.dtype, device=like.device)  # plain, even if `like` is sharded
        self.length = 0
        """Number of tokens per sequence in the cache."""

    @property
    def capacity(self) -> int:
        """Largest number of tokens per sequence that the cache can hold."""
        return self.storage.shape[4]

    def check(self, B: int, S: int) -> None:
        """Raise ValueError if B sequences of S tokens do not fit into the cache, or if gradients are enabled."""
        batch_size = self.storage.shape[2]
        if batch_size != B:
            raise ValueError(f"the cache is for {batch_size} sequences, the input has {B}")
        if self.capacity < S:
            raise ValueError(f"the sequence has {S} tokens, the cache has room for {self.capacity}")
        if torch.is_grad_enabled():
            raise ValueError("a cache keeps no gradients: call the model under torch.no_grad()")

    def positions_and_mask(
        self, attention_mask: Tensor | None, T: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return the positions of T new tokens and a mask of the tokens that each may attend to (see `positions_and_mask`)."""
        return positions_and_mask(attention_mask, T, self.length + T, device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys k and values v of T new tokens, each (B, H, T, D), to those of a layer.

        Return the keys and the values of all S tokens so far in this layer, each (B, H, S, D).
        """
        S = self.length + k.shape[2]
        self.storage = self.storage.to(k)  # with autocast or mixed precision, the model computes in another dtype
        keys, values = self.storage[layer]
        keys[:, :, self.length : S] = k
        values[:, :, self.length : S] = v
        return keys[:, :, :S], values[:, :, :S]

    def advance(self, T: int) -> None:
        """Count T new tokens, after their keys and values were appended to all layers."""
        self.length += T


class Piece(NamedTuple):
    """Consecutive new tokens of the sequence in one slot of a `SlotCache`."""

    slot: int
    ids: list[int]
    n_logits: int
    """Number of last positions whose logits are wanted: from 0 to len(ids)."""


class SlotCache:
    """A key-value cache with one sequence per slot. The sequences can differ in length, and each can be replaced alone."""

    def __init__(self, config: GPTConfig, slots: int, length: int | None, like: Tensor) -> None:
        """Allocate memory for sequences of up to `length` tokens (None: the model's context length) in `slots` slots.

        The memory has the dtype and the device of the tensor `like`. Raises ValueError if `slots` or `length` is below 1, or
        if `length` is above the model's context length.
        """
        if type(slots) is not int or slots < 1:
            raise ValueError(f"the number of slots must be a whole number of at least 1, got {slots!r}")
        # Zeros, because attention multiplies masked entries by 0, and 0 times NaN would be NaN.
        self.storage = torch.zeros(_storage_shape(config, slots, length), dtype=like.dtype, device=like.device)
        self.vocab_size = config.vocab_size
        self.lengths = [0] * slots
        """Number of tokens in each slot."""

    @property
    def capacity(self) -> int:
        """Largest number of tokens that a slot can hold."""
        return self.storage.shape[4]

    @property
    def n_bytes(self) -> int:
        """Bytes of memory for the keys and values of all slots, whether or not the slots are in use."""
        return self.storage.nbytes

    def truncate(self, slot: int, n: int) -> None:
        """Keep only the first n tokens of a slot. Raises ValueError if the slot has fewer."""
        self._check_prefix(slot, n)
        self.storage[:, :, slot, :, n : self.lengths[slot]] = 0  # see __init__
        self.lengths[slot] = n

    def copy_prefix(self, source: int, target: int, n: int) -> None:
        """Replace the tokens of the slot `target` by the first n tokens of the slot `source`, without computing them again.

        Raises ValueError if `source` has fewer than n tokens.
        """
        self._check_prefix(source, n)
        self._check_slot(target)
        if source != target:
            self.storage[:, :, target, :, :n] = self.storage[:, :, source, :, :n]
            self.lengths[target] = max(self.lengths[target], n)
        self.truncate(target, n)

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raise ValueError if a piece does not fit into its slot or a slot has two pieces, or VocabularyError for a wrong id."""
        if not pieces:
            raise ValueError("there are no pieces: give at least one")
        seen = set()
        for slot, ids, n_logits in pieces:
            self._check_slot(slot)
            if slot in seen:
                raise ValueError(f"slot {slot} has several pieces: give each slot at most one")
            seen.add(slot)
            if not ids or not 0 <= n_logits <= len(ids):
                raise ValueError(
                    f"a piece needs at least one id, and n_logits from 0 to their number, got {len(ids)} and {n_logits}"
                )
            if self.lengths[slot] + len(ids) > self.capacity:
                raise ValueError(
                    f"slot {slot} has room for {self.capacity - self.lengths[slot]} more tokens, got {len(ids)}"
                )
            wrong = [id_ for id_ in (min(ids), max(ids)) if not 0 <= id_ < self.vocab_size]
            if wrong:
                raise VocabularyError(f"id {wrong[0]} is outside the vocabulary, ids are 0 to {self.vocab_size - 1}")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self.lengths):
            raise ValueError(f"the cache has the slots 0 to {len(self.lengths) - 1}, got {slot}")

    def _check_prefix(self, slot: int, n: int) -> None:
        self._check_slot(slot)
        if not 0 <= n <= self.lengths[slot]:
            raise ValueError(f"slot {slot} has {self.lengths[slot]} tokens, got a prefix of {n}")


class SlotView(KVCache):
    """A range of slots of a `SlotCache` as the cache of one forward pass, in which all pieces have the same number of tokens.

    The view is a range, so that keys and values need not be copied. Slots in the range without a piece are computed with id 0.
    Their results are dropped, and their stored keys and values are left unchanged.
    """

    def __init__(self, cache: SlotCache, pieces: Sequence[Piece]) -> None:
        self.cache, self.pieces = cache, pieces
        self.slots = range(min(piece.slot for piece in pieces), max(piece.slot for piece in pieces) + 1)
        self.storage = cache.storage[:, :, self.slots.start : self.slots.stop]
        device, ids = cache.storage.device, {piece.slot: piece.ids for piece in pieces}
        self.past = [cache.lengths[slot] if slot in ids else 0 for slot in self.slots]
        """Number of earlier tokens in each slot; 0 for slots without a piece."""
        self.length = max(self.past)
        T = len(pieces[0].ids)
        self.ids = torch.tensor([ids.get(slot, [0] * T) for slot in self.slots], device=device)
        """The new ids, (B, T)."""
        self.rows = torch.tensor([[piece.slot - self.slots.start] for piece in pieces], device=device)  # (n, 1)
        past = torch.tensor([[cache.lengths[piece.slot]] for piece in pieces], device=device)
        self.columns = past + torch.arange(T, device=device)  # (n, T)

    def positions_and_mask(
        self, attention_mask: Tensor | None, T: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the T new tokens in each slot and a mask of the entries that each may attend to."""
        if len(self.slots) == 1:
            return super().positions_and_mask(attention_mask, T, device)
        positions = torch.tensor(self.past, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        mask = torch.arange(self.length + T, device=device) <= positions[:, :, None]  # (B, T, S)
        return positions, mask[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys k and values v of the new tokens, each (B, H, T, D), to those of the pieces' slots in a layer.

        Return the first S keys and values of all slots of the view, each (B, H, S, D). S is the number of tokens, cached and
        new, of the longest sequence.
        """
        keys, values = self.storage[layer]
        for stored, new in ((keys, k), (values, v)):
            stored[self.rows, :, self.columns] = new[self.rows[:, 0]].transpose(1, 2).to(stored.dtype)  # (n, T, H, D)
        S = self.length + k.shape[2]
        return keys[:, :, :S].to(k), values[:, :, :S].to(v)  # another dtype only under autocast

    def advance(self, T: int) -> None:
        """Count the T new tokens of each piece in the `SlotCache`."""
        for piece in self.pieces:
            self.cache.lengths[piece.slot] += T


def slot_hidden_states(transformer: Callable[..., Tensor], pieces: Sequence[Piece], cache: SlotCache) -> Tensor:
    """Compute the pieces, and return the last n_logits hidden states of each piece, (sum of n_logits, C), in their order.

    `transformer` maps ids (B, T), given with a KVCache, to hidden states (B, T, C). It computes all pieces of one token
    together, and each longer piece alone.
    """
    groups = [[piece] for piece in pieces if len(piece.ids) > 1]
    groups.append([piece for piece in pieces if len(piece.ids) == 1])
    states = {}
    for group in filter(None, groups):
        view = SlotView(cache, group)
        hidden = transformer(view.ids, cache=view)
        for slot, ids, n_logits in group:
            states[slot] = hidden[slot - view.slots.start, len(ids) - n_logits :]
    return torch.cat([states[piece.slot] for piece in pieces])


def _storage_shape(config: GPTConfig, rows: int, length: int | None) -> tuple[int, ...]:
    """Return the shape of the keys and values of `rows` sequences of up to `length` tokens in all layers."""
    context = config.context_length
    length = context if length is None else length
    if type(length) is not int or not 1 <= length <= context:
        raise ValueError(
            f"the cache's length must be a whole number from 1 to {context} (the model's context length), got {length!r}"
        )
    return config.n_layers, 2, rows, config.n_heads, length, config.emb_dim // config.n_heads


def positions_and_mask(
    attention_mask: Tensor | None, T: int, S: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return the positions of the last T of S tokens, and a mask of the tokens that each of them may attend to.

    The positions are an int64 tensor, (T,) if attention_mask is None and otherwise (B, T). The mask is a bool tensor
    (B or 1, 1, T, S) that is True where a query may see a key. It is None if attention_mask is None and T is 1 or S, because
    causal attention then needs no mask. attention_mask (B, S) has 0 for padding, 1 for the tokens of a sequence's first text,
    2 for the second text, and so on. If attention_mask is None, all S tokens are one text and the results are on `device`.
    Otherwise the results are on the device of attention_mask.
    """
    if attention_mask is None:
        positions = torch.arange(S - T, S, device=device)
        if T in (S, 1):  # in this order, because torch.export would fix T at the first comparison with a number
            return positions, None
        return positions, torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril(S - T)
    # A token sees the earlier tokens of its own text, which are those with the same number in attention_mask.
    same_text = attention_mask[:, S - T :, None] == attention_mask[:, None]  # (B, T, S)
    mask = same_text.tril(S - T) & (attention_mask != 0)[:, None]
    # The n-th token of a text sees n tokens, itself included, and has position n - 1.
    positions = (mask.sum(2) - 1).clamp_min(0)  # (B, T)
    # Padding sees itself, because the softmax over no keys is NaN, and the NaN would spread to the other tokens.
    mask |= torch.eye(S, dtype=torch.bool, device=attention_mask.device)[S - T :]
    return positions, mask[:, None]


class VocabularyError(IndexError, ValueError):
    """Error raised for an id or a label outside the model's vocabulary.

    torch's embeddings raise IndexError too. The command `mygpt` reports a ValueError in one line.
    """


def check_inputs(
    config: GPTConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    cache: KVCache | None = None,
) -> None:
    """Check the arguments of `GPTModel.forward` before any layer runs and before the cache changes.

    Raises:
        ValueError: a wrong shape or dtype, or more tokens than the model or the cache can hold.
        VocabularyError: an id or a label outside the vocabulary. Only ids and labels on the CPU are checked.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        # The traced program contains no checks, and torch would warn about each of them.
        return
    if input_ids is not None and inputs_embeds is None:
        B, T = _check_ids(input_ids, config.vocab_size)
    elif inputs_embeds is not None and input_ids is None:
        B, T = _check_embeddings(inputs_embeds, config.emb_dim)
    else:
        raise ValueError("give either input_ids or inputs_embeds")
    if labels is not None:
        _check_labels(labels, (B, T), config.vocab_size)
    S = T if cache is None else cache.length + T
    if config.context_length < S:
        raise ValueError(f"the sequence has {S} tokens, the model's context_length is {config.context_length}")
    if attention_mask is not None and attention_mask.shape != (B, S):
        raise ValueError(f"attention_mask must be (batch, time seen) = {(B, S)}, got {tuple(attention_mask.shape)}")
    if cache is not None:
        cache.check(B, S)


def _check_ids(input_ids: Tensor, vocab_size: int) -> tuple[int, int]:
    """Raise an error unless input_ids is int64 (B, T) with ids in the vocabulary. Return B and T."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be (batch, time) with at least one token, got {tuple(input_ids.shape)}")
    if input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids must be int64, got {input_ids.dtype}")
    # aminmax is faster than comparing every id, but fails for an empty batch.
    if _can_read(input_ids) and len(input_ids):
        ids = torch.func.debug_unwrap(input_ids)  # torch.func.vmap hides the values
        smallest, largest = map(int, ids.aminmax())
        if smallest < 0 or largest >= vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            raise VocabularyError(f"id {int(wrong[0])} is outside the vocabulary, ids are 0 to {vocab_size - 1}")
    return input_ids.shape[0], input_ids.shape[1]


def _check_embeddings(inputs_embeds: Tensor, C: int) -> tuple[int, int]:
    """Raise ValueError unless inputs_embeds has the shape (B, T, C). Return B and T."""
    shape = tuple(inputs_embeds.shape)
    if len(shape) != 3 or shape[1] == 0 or shape[2] != C:
        raise ValueError(f"inputs_embeds must be (batch, time, {C}) with at least one token, got {shape}")
    return shape[0], shape[1]


def _check_labels(labels: Tensor, shape: tuple[int, int], vocab_size: int) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the input is {shape}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if _can_read(labels):
        labels = torch.func.debug_unwrap(labels)  # torch.func.vmap hides the values
        wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= vocab_size)]
        if len(wrong):
            allowed = f"0 to {vocab_size - 1}, or {IGNORED} for positions that the loss ignores"
            raise VocabularyError(f"label {int(wrong[0])} is outside the vocabulary; labels are {allowed}")


def _can_read(ids: Tensor) -> bool:
    """Return True if the values of `ids` can be checked without delay.

    Return False if they are on a GPU, because the CPU would wait for the GPU, or while torch.compile traces the model.
    """
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()
