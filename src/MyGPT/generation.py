"""From a prompt to its continuation, token by token. `generate_stream` is the only decoding loop of the library.

B batch, T time, V vocabulary. How a token is chosen is in sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from MyGPT.sampling import SamplingConfig, pick_next

Stop = str | Sequence[int]


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Stop | Sequence[Stop] | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    tokenizer: Any = None,
) -> Tensor:
    """The prompts idx (B, T) with up to max_new_tokens new tokens each: (B, T + new) int64.

    temperature 0 is greedy; what the other sampling options do is told by `SamplingConfig`. Prompts of unequal length
    are padded, on either side, and told apart by attention_mask (B, T), 1 for tokens; each row continues as it would
    alone. Past the context length (or context_size, if smaller) the model sees the last tokens only.

    A row that produces eos_id is filled with it from there on, and the columns at the end in which every row has
    finished are dropped. `stop` is a text or ids, or several, at which a row ends; they are kept, since a text can begin
    in the middle of a token. Texts need `tokenizer`. Rows that a stop has ended are filled with eos_id, or the
    tokenizer's `<|endoftext|>`, or 0.

    `seed` makes the draw repeatable whatever torch's global state. The result is the same with and without the cache.
    """
    steps = generate_stream(
        model,
        idx,
        max_new_tokens,
        context_size,
        temperature,
        top_k,
        eos_id,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
        attention_mask=attention_mask,
        use_cache=use_cache,
        tokenizer=tokenizer,
    )
    return torch.cat([idx, *(new[:, None] for new in steps)], dim=1)


def generate_stream(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Stop | Sequence[Stop] | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    tokenizer: Any = None,
) -> Iterator[Tensor]:
    """What `generate` appends, a step at a time: yields (B,) int64, one new token a row."""
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"the prompts must be (batch, time) with at least one token, got shape {tuple(idx.shape)}")
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {max_new_tokens!r}")
    ends = _stop_check(stop, tokenizer)
    fill = next((id_ for id_ in (eos_id, getattr(tokenizer, "eot_token", None)) if id_ is not None), 0)
    generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    window = _context(model, context_size)
    ids, mask = _pad_left(idx, attention_mask)
    return _decode(model, ids, mask, max_new_tokens, window, sampling, eos_id, ends, fill, generator, use_cache)


@torch.no_grad()
def _decode(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    window: int | None,
    sampling: SamplingConfig,
    eos_id: int | None,
    ends: Callable[[list[int]], bool] | None,
    fill: int,
    generator: torch.Generator | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    B, T = ids.shape
    finished = torch.zeros(B, dtype=torch.bool, device=ids.device)
    new_ids: list[list[int]] = [[] for _ in range(B)]
    logits_of = _Window(model, window, use_cache, T + max_new_tokens)
    seen: Tensor | None = None
    for _ in range(max_new_tokens):
        with evaluation_mode(model):
            logits = logits_of(ids, mask)  # (B, V)
        if sampling.repetition_penalty is not None:
            seen = _mark_seen(seen, ids, mask, logits)
        new = pick_next(logits, sampling, generator, seen).masked_fill(finished, fill)
        if eos_id is not None:
            finished = finished | (new == eos_id)
            if finished.all():
                return
        yield new
        if ends is not None:
            for row, id_ in enumerate(new.tolist()):
                new_ids[row].append(id_)
                if not finished[row] and ends(new_ids[row]):
                    finished[row] = True
            if finished.all():
                return
        ids = torch.cat([ids, new[:, None]], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)


class _Window:
    """The last position's logits, from the cache as long as the sequence fits the window, from the window after that."""

    def __init__(self, model: Any, window: int | None, use_cache: bool, longest: int) -> None:
        self.model = model
        self.window = window
        self.is_ours = hasattr(model, "new_cache")
        self.cache_length = min(longest, window) if window is not None and use_cache and self.is_ours else 0
        self.cache: Any = None

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if self.window is not None and ids.shape[1] > self.window:
            # Learned positions shift with the window, so nothing cached stays valid: recompute.
            self.cache, self.cache_length = None, 0
            ids, mask = ids[:, -self.window :], None if mask is None else mask[:, -self.window :]
        if not self.is_ours:
            if mask is None:
                return self.model(ids)[:, -1]
            return self.model(ids, attention_mask=mask)[:, -1]
        if self.cache_length and self.cache is None:
            self.cache = self.model.new_cache(len(ids), self.cache_length)
        if self.cache is not None:
            ids = ids[:, self.cache.length :]
        return self.model(ids, attention_mask=mask, cache=self.cache, last_only=True)[:, -1]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; afterwards every module is in the mode in which it was found."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class TextStream:
    """Text from ids that come one by one: whole characters only, and nothing from a stop text on.

    Every call decodes all ids again, since a token's text can depend on those before it; against a forward pass that is
    nothing.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids)
        self.stop = list(stop)
        self.prompt = tokenizer.decode(self.ids)
        self.shown = 0

    def add(self, id_: int) -> str:
        """The text that has become certain with this id, often empty."""
        self.ids.append(id_)
        # Half a character may become whole, and the beginning of a stop text a stop text.
        text = self._text().rstrip("\ufffd")
        held = max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        return self._show(text[: len(text) - held])

    def end(self) -> str:
        """What was held back."""
        return self._show(self._text())

    def _text(self) -> str:
        text: str = self.tokenizer.decode(self.ids)
        # A prompt's last character can become another when its last bytes arrive.
        pairs = enumerate(zip(self.prompt, text, strict=False))
        text = text[next((i for i, (old, new) in pairs if old != new), len(self.prompt)) :]
        places = [place for place in map(text.find, self.stop) if place >= 0]
        return text[: min(places, default=len(text))]

    def _show(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def _context(model: Any, context_size: int | None) -> int | None:
    """The longest sequence to show the model; None if neither the caller nor a config says."""
    if context_size is not None and (type(context_size) is not int or context_size < 1):
        raise ValueError(f"context_size must be a whole number of at least 1, got {context_size!r}")
    own = getattr(getattr(model, "config", None), "context_length", None)
    return min((length for length in (context_size, own) if length is not None), default=None)


def _pad_left(idx: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The prompts moved to the right edge, where new tokens are appended, and their mask; None if nothing is padded."""
    if attention_mask is None:
        return idx, None
    if attention_mask.shape != idx.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, the prompts {tuple(idx.shape)}")
    mask = attention_mask.to(torch.bool)
    if not mask.any(dim=1).all():
        raise ValueError(f"prompt {int(mask.any(dim=1).logical_not().nonzero()[0])} is empty: its mask has no 1")
    if mask.all():
        return idx, None
    order = mask.long().argsort(dim=1, stable=True)  # padding first, tokens after it in their order
    ids, mask = idx.gather(1, order), mask.gather(1, order)
    empty = int(mask.any(dim=0).long().argmax())  # columns in which every row is padding
    return ids[:, empty:], mask[:, empty:]


def _mark_seen(seen: Tensor | None, ids: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    """(B, V), True for the tokens of each row, padding not counted; after the first call only the newest is added."""
    if seen is not None:
        return seen.scatter(1, ids[:, -1:], True)
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    counts = torch.zeros_like(logits, dtype=torch.int32)
    return counts.scatter_add(1, ids, counted.int()) > 0


def _stop_check(stop: Stop | Sequence[Stop] | None, tokenizer: Any) -> Callable[[list[int]], bool] | None:
    """A function of a row's new ids that says whether the row has reached a stop."""
    if stop is None:
        return None
    stops: Sequence[Any] = [stop] if isinstance(stop, str) or _are_ids(stop) else stop
    if not isinstance(stops, (list, tuple)) or not stops or not all(_is_stop(one) for one in stops):
        raise ValueError(f"stop must be a text or ids, or several, none of them empty, got {stop!r}")
    texts = [one for one in stops if isinstance(one, str)]
    runs = [list(one) for one in stops if not isinstance(one, str)]
    if texts and tokenizer is None:
        raise ValueError(
            f"the stop text {texts[0]!r} needs the tokenizer: generate(..., stop=..., tokenizer=tokenizer)"
        )
    longest = max((len(text.encode()) for text in texts), default=0)

    def ends(ids: list[int]) -> bool:
        if any(ids[-len(run) :] == run for run in runs):
            return True
        # A token is at least one byte, but can lose the white space around it when it is decoded: look a little further.
        recent = tokenizer.decode(ids[-(2 * longest + 8) :]) if texts else ""
        return any(text in recent for text in texts)

    return ends


def _is_stop(one: object) -> bool:
    return (isinstance(one, str) and one != "") or _are_ids(one)


def _are_ids(one: object) -> bool:
    return isinstance(one, (list, tuple)) and len(one) > 0 and all(type(id_) is int for id_ in one)
