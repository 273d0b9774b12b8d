"""Text generation, token by token. `generate_stream` is the only decoding loop of the library.

B batch size, T tokens, V vocabulary size. sampling.py picks the next token from the logits.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from MyGPT.config import require_positive
from MyGPT.sampling import SamplingConfig, pick_next, seeded_generators
from MyGPT.tokenizers.base import end_of_text, ids_without_token

Stop = str | Sequence[int]
"""A text, or a sequence of token ids, at which generation ends."""


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | Sequence[int] | None = None,
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
    """Return the prompts followed by up to max_new_tokens new tokens, as int64 ids (B, T + number of new tokens).

    Generation ends early when all sequences have finished. Until then, a finished sequence is filled with eos_id (the first
    of several ids), or else with the tokenizer's end-of-text token, or else with 0. The model's training or evaluation mode
    is left unchanged.

    Args:
        model: a GPTModel, an accelerated model, or any module that maps ids (B, T) to logits (B, T, V).
        idx: the token ids of the prompts, (B, T) int64.
        context_size: number of most recent tokens that the model sees (default and maximum: its context length).
        temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingConfig`. Temperature 0 is greedy.
        eos_id: the id that finishes a sequence, or several such ids. `end_ids` returns those of an opened model.
        stop: one or several texts or sequences of ids that finish a sequence. The stop itself stays in the result, because a
            text can begin in the middle of a token. Texts need `tokenizer`.
        seed: makes the sampled tokens reproducible, independently of torch's global seed. Row r (from 0) of a batch is
            sampled with seed + r, so row 0 has the same tokens as its prompt alone with this seed, up to rounding.
        attention_mask: (B, T), 1 for tokens and 0 for padding, for prompts of unequal length padded on either side. Each
            prompt is continued as if it were alone.
        use_cache: True computes only the newest token in every step. False recomputes all tokens, which gives the same
            result more slowly.
        tokenizer: decodes the new tokens to find stop texts. An id without a token, such as the ids by which a vocabulary
            was rounded up, is then never generated, unless it is an eos_id.

    Raises:
        ValueError: an argument out of range, an empty prompt, or a stop text without a tokenizer.
        FloatingPointError: the model computes logits that are NaN or infinite.
    """
    steps = generate_stream(
        model, idx, max_new_tokens, context_size, temperature, top_k, eos_id, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=stop, seed=seed, attention_mask=attention_mask,
        use_cache=use_cache, tokenizer=tokenizer,
    )  # fmt: skip
    return torch.cat([idx, *(new[:, None] for new in steps)], dim=1)


def generate_stream(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | Sequence[int] | None = None,
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
    """Yield the new token of every sequence, step by step, as int64 tensors (B,). For the arguments, see `generate`."""
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"the prompts must be (batch, time) with at least one token, got shape {tuple(idx.shape)}")
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {max_new_tokens!r}")
    has_stopped = stop_check(stop, tokenizer)
    ends = checked_ends(eos_id)
    fill = next((id_ for id_ in (*ends, end_of_text(tokenizer)) if id_ is not None), 0)
    generators = None if seed is None else seeded_generators(seed, len(idx), idx.device)
    window = _context(model, context_size)

    @torch.no_grad()
    def steps(ids: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        B, T = ids.shape
        finished = [False] * B
        new_ids: list[list[int]] = [[] for _ in range(B)]
        seen: Tensor | None = None
        excluded: Tensor | None = None
        cache: Any = None
        new_cache = getattr(model, "new_cache", None)
        pick = getattr(model, "pick_next", pick_next)  # an accelerated model chooses the same token in less time
        if use_cache and new_cache is not None and window is not None and window >= T:
            cache = new_cache(B, min(T + max_new_tokens, window))
        for _ in range(max_new_tokens):
            if window is not None and ids.shape[1] > window:
                cache = None  # Learned positions shift with the window, so nothing cached stays valid: recompute.
            logits = _last_logits(model, ids, mask, window, cache)  # (B, V)
            if excluded is None:
                without_token = ids_without_token(tokenizer, logits.shape[-1])
                excluded = torch.tensor([id_ for id_ in without_token if id_ not in ends], device=ids.device)
            if excluded.numel():
                logits = logits.index_fill(1, excluded, -math.inf)
            if sampling.repetition_penalty is not None:
                seen = _mark_seen(seen, ids, mask, logits)
            new = pick(logits, sampling, generators, seen)
            if any(finished):
                new = new.masked_fill(torch.tensor(finished, device=ids.device), fill)
            if ends or has_stopped is not None:
                values = new.tolist()
                finished = [is_done or id_ in ends for is_done, id_ in zip(finished, values, strict=True)]
                if all(finished):
                    return
            yield new
            if has_stopped is not None:
                for row, id_ in enumerate(values):
                    new_ids[row].append(id_)
                    finished[row] = finished[row] or has_stopped(new_ids[row])
                if all(finished):
                    return
            ids = torch.cat([ids, new[:, None]], dim=1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)

    # A generator function runs nothing before its first step, but wrong arguments must raise errors at once.
    return steps(*_pad_left(idx, attention_mask))


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids at which the texts of a model end, for `generate(eos_id=...)`: those that its files name.

    If the files of the model name none, the result is the tokenizer's end-of-text token. It is empty if there is none.
    """
    own = getattr(getattr(model, "config", None), "end_ids", ())
    return list(own) or [id_ for id_ in [end_of_text(tokenizer)] if id_ is not None]


def checked_ends(eos_id: Any) -> list[int]:
    """Return the ids that `eos_id`, one id or a sequence of ids, contains, or an empty list for None."""
    if eos_id is None:
        return []
    several = isinstance(eos_id, Iterable) and not (isinstance(eos_id, Tensor) and eos_id.dim() == 0)
    given = list(eos_id) if several else [eos_id]
    try:
        ids = [operator.index(id_) for id_ in given if not isinstance(id_, bool)]
    except TypeError:
        ids = []
    if not ids or len(ids) < len(given) or not all(0 <= id_ < 2**63 for id_ in ids):
        raise ValueError(f"eos_id must be a token id of at least 0, or a sequence of such ids, got {eos_id!r:.80}")
    return ids


def _last_logits(model: Any, ids: Tensor, mask: Tensor | None, window: int | None, cache: Any) -> Tensor:
    """Return the logits (B, V) of the token that follows `ids` (B, T).

    The model sees only the last `window` ids, or all of them if `window` is None. `mask` (B, T) is False for padding. None
    means that there is no padding. With a cache, the model computes only the ids that are not yet in the cache.
    """
    if window is not None:
        ids, mask = ids[:, -window:], None if mask is None else mask[:, -window:]
    with evaluation_mode(model):
        if not hasattr(model, "new_cache"):  # a model of other code, which knows neither cache= nor last_only=
            return (model(ids) if mask is None else model(ids, attention_mask=mask))[:, -1]
        new = ids if cache is None else ids[:, cache.length :]
        return model(new, attention_mask=mask, cache=cache, last_only=True)[:, -1]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode within a `with` block, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class TextStream:
    """A decoder for token ids that arrive one by one. `add` returns the new text after each id, and `end` returns the rest.

    Only whole characters are returned, without the text of the prompt and without any of the `stop` texts. Every call decodes
    the whole text again, because the text of a token can depend on the tokens before it. Decoding takes almost
    no time compared with the model's forward pass.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids, self.stop = list(prompt_ids), list(stop)
        self._bytes, self._n_decoded = bytearray(), 0
        self.prompt = self._decoded()
        self.start = len(self.prompt)
        """The position of the new text in the text of all ids."""
        self.shown = 0

    def add(self, id_: int) -> str:
        """Append a token id and return the new text, which is often an empty string.

        An incomplete character, or the possible beginning of a stop text, is held back until later ids complete it.
        """
        self.ids.append(id_)
        # The next id may complete a character or a stop text, so incomplete ones are held back.
        text = self._text().rstrip("\ufffd")
        held = max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        return self._show(text[: len(text) - held])

    def end(self) -> str:
        """Return the rest of the text, which `add` held back because it was incomplete or could become a stop text."""
        return self._show(self._text())

    def _text(self) -> str:
        """Decode all ids and return the text after the prompt, up to the first stop text."""
        text = self._decoded()
        self.start = len(self.prompt)
        if not text.startswith(self.prompt):
            # New bytes complete the last character of the prompt, so the new text begins at the first difference.
            pairs = enumerate(zip(self.prompt, text, strict=False))
            self.start = next((i for i, (old, new) in pairs if old != new), len(text))
        text = text[self.start :]
        places = [place for place in map(text.find, self.stop) if place >= 0]
        return text[: min(places, default=len(text))]

    def _decoded(self) -> str:
        """Return the text of all ids. Bytes of earlier ids are kept, because looking up the tokens takes most of the time."""
        if not hasattr(self.tokenizer, "decode_tokens_bytes"):
            text: str = self.tokenizer.decode(self.ids)
            return text
        self._bytes += b"".join(self.tokenizer.decode_tokens_bytes(self.ids[self._n_decoded :]))
        self._n_decoded = len(self.ids)
        return self._bytes.decode(errors="replace")

    def _show(self, text: str) -> str:
        """Return the part of `text` that earlier calls did not return."""
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new


def stream_text(
    model: nn.Module,
    tokenizer: Any,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of the prompt `ids` as short strings, until a stop text or an end-of-text token (`end_ids`).

    The stop text itself is not yielded. `sampling` contains the temperature and the other sampling options. For the other
    arguments, see `generate`.
    """
    stream = TextStream(tokenizer, ids, stop)
    device = next((parameter.device for parameter in model.parameters()), "cpu")  # an accelerated model has none
    prompt = torch.tensor([ids], device=device)
    options = {**dataclasses.asdict(sampling), "stop": stop or None, "seed": seed, "tokenizer": tokenizer}
    for new in generate_stream(model, prompt, max_new_tokens, eos_id=end_ids(model, tokenizer) or None, **options):
        yield stream.add(int(new))
    yield stream.end()


def _context(model: Any, context_size: int | None) -> int | None:
    """Return the smaller of context_size and the model's own context length, or None if both are missing."""
    require_positive(context_size=context_size, optional=True)
    own = getattr(getattr(model, "config", None), "context_length", None)
    return min((length for length in (context_size, own) if length is not None), default=None)


def _pad_left(idx: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the prompts `idx` (B, T) with all padding moved to the left, and a bool mask that is False for padding.

    The padding is moved because new tokens are appended on the right. Without padding, the mask is None.
    """
    if attention_mask is None:
        return idx, None
    if attention_mask.shape != idx.shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, the prompts {tuple(idx.shape)}")
    mask = attention_mask.to(torch.bool)
    if not mask.any(dim=1).all():
        raise ValueError(f"prompt {int(mask.any(dim=1).logical_not().nonzero()[0])} is empty: its mask has no 1")
    if mask.all():
        return idx, None
    order = mask.long().argsort(dim=1, stable=True)  # padding first, then the tokens in their order
    ids, mask = idx.gather(1, order), mask.gather(1, order)
    empty = int(mask.any(dim=0).long().argmax())  # number of positions that are padding in every prompt
    return ids[:, empty:], mask[:, empty:]


def _mark_seen(seen: Tensor | None, ids: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    """Return a bool tensor (B, V) that is True where a sequence already contains the token. Padding does not count.

    `seen` is the result of the previous step, to which only the last column of `ids` is added. In the first step `seen` is
    None, and all ids are added. `mask` is False for padding. The result has the shape and the device of `logits`.
    """
    if seen is not None:
        return seen.scatter(1, ids[:, -1:], True)
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    counts = torch.zeros_like(logits, dtype=torch.int32)
    return counts.scatter_add(1, ids, counted.int()) > 0


def stop_check(stop: Stop | Sequence[Stop] | None, tokenizer: Any) -> Callable[[list[int]], bool] | None:
    """Return a function that takes the new ids of a sequence and returns True if they have reached one of the stops.

    If `stop` is None, return None. Stops that are texts need the tokenizer, which decodes the new ids.
    """
    stops = as_stops(stop)
    if not stops:
        return None
    texts = [one for one in stops if isinstance(one, str)]
    runs = [list(one) for one in stops if not isinstance(one, str)]
    if texts and tokenizer is None:
        raise ValueError(
            f"the stop text {texts[0]!r} needs the tokenizer: generate(..., stop=..., tokenizer=tokenizer)"
        )
    longest = max((len(text.encode()) for text in texts), default=0)

    def has_stopped(ids: list[int]) -> bool:
        if any(ids[-len(run) :] == run for run in runs):
            return True
        # Every token is at least one byte, so the last `longest` ids would do; some tokenizers drop spaces, hence more.
        recent = tokenizer.decode(ids[-(2 * longest + 8) :]) if texts else ""
        return any(text in recent for text in texts)

    return has_stopped


def as_stops(stop: Stop | Sequence[Stop] | None) -> list[Stop]:
    """Return the stops that `stop` contains, as a list. Raises ValueError if one is empty, or neither a text nor ids."""
    if stop is None:
        return []
    stops: Any = [stop] if isinstance(stop, str) or _are_ids(stop) else stop
    if not isinstance(stops, (list, tuple)) or not stops or not all(_is_stop(one) for one in stops):
        raise ValueError(f"stop must be a text or a list of ids, or a list of these, none of them empty; got {stop!r}")
    return list(stops)


def _is_stop(one: object) -> bool:
    return (isinstance(one, str) and one != "") or _are_ids(one)


def _are_ids(one: object) -> bool:
    return isinstance(one, (list, tuple)) and len(one) > 0 and all(type(id_) is int for id_ in one)
