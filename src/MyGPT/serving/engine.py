"""The scheduler for many requests: one thread owns the model and generates for all of them at the same time.

Each request has a slot, which is a row of one key-value cache. A step computes one new token for every request that is
generating, and pieces of the prompts that are not yet in the cache (continuous batching; Yu et al., 2022, and chunked
prefill; Agrawal et al., 2023). Requests join and leave between steps. With the same options and seed, a request gets the
same tokens as from `generate`, up to rounding. A prompt that starts like an earlier prompt reuses its keys and values while
they are still in the cache.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from MyGPT.cache import Piece, VocabularyError
from MyGPT.config import check_seed, require_positive
from MyGPT.generation import Stop, as_stops, checked_ends, end_ids, evaluation_mode, stop_check
from MyGPT.sampling import SamplingConfig, largest, pick_next, require_finite, seeded_generators
from MyGPT.serving.prefixes import PrefixCache, n_common
from MyGPT.serving.request import EngineClosed, FinishReason, QueueFull, Request, Token
from MyGPT.tokenizers.base import ids_without_token

MAX_PROMPT_TOKENS = 256
"""Largest number of prompt tokens that one step computes."""
MAX_PROMPT_TOKENS_WHILE_GENERATING = 64
"""Largest number of prompt tokens per step while other requests generate. A longer step would delay their next tokens."""
MAX_LOGPROBS = 20
"""Largest number of most likely alternatives that can be returned with a token."""


@dataclass(eq=False)
class _Run:
    """A request in a slot."""

    request: Request
    slot: int
    ids: list[int]
    """The prompt and the new tokens. If the window slides, only the last tokens, which fit into the context."""
    has_stopped: Any
    """A function that takes the new ids and returns True if they have reached a stop. None if the request has no stops."""
    generators: list[torch.Generator]
    excluded: Tensor
    """The ids that are never generated: those without a token, except for those that end the request."""
    bias: Tensor | None
    seen: Tensor | None
    """True for the tokens that already occurred, (1, V). None without a repetition penalty."""
    source: _Run | None = None
    """A run whose prompt has the same beginning. This run waits until the source has computed it. None: no need to wait."""
    n_shared: int = 0
    """Number of tokens that this run and its source have in common at the beginning."""
    new_ids: list[int] = field(default_factory=list)


class Engine:
    """A model that generates for many requests at the same time. `submit` returns a request, whose tokens can be iterated.

    The tokens and log-probabilities of a request do not depend on other requests. With the C++ kernel (`accelerate`) they are
    the same to the last bit. Otherwise rounding can differ, as it does between batch sizes everywhere in torch. The engine
    is a context manager. `close` ends its thread.

    Args:
        model: a GPTModel or an accelerated model. Nothing else may change it while the engine is open.
        tokenizer: encodes prompts and decodes new tokens. None: prompts must be token ids, and stops must not be texts.
        slots: number of requests that run at the same time. Each slot holds the keys and values of one context; `cache_bytes`
            is the memory for all of them.
        max_queue: number of requests that may wait for a slot.
        lock: a lock that is held during each step, for several engines that take turns on one device.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        slots: int = 16,
        *,
        max_queue: int = 256,
        lock: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        require_positive(slots=slots, max_queue=max_queue)
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self.context: int = model.config.context_length
        self._pick_next = getattr(model, "pick_next", pick_next)
        self._lock = lock or contextlib.nullcontext()
        self._slots = PrefixCache(model.new_slot_cache(slots))
        excluded = ids_without_token(tokenizer, model.config.vocab_size)
        self._without_token = torch.tensor(excluded, dtype=torch.int64, device=self._device)
        self._waiting: deque[Request] = deque()
        self._running: list[_Run] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._counts = dict.fromkeys(("steps", "prompt_tokens", "reused_tokens", "generated_tokens", "requests"), 0)
        self._thread = threading.Thread(target=self._serve, name="MyGPT engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that still computes while Python exits can crash the process

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory for the keys and values of all slots."""
        return self._slots.cache.n_bytes

    @property
    def _device(self) -> torch.device:
        return self._slots.cache.storage.device

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingConfig | None = None,
        max_new_tokens: int | None = None,
        *,
        stop: Stop | Sequence[Stop] | None = None,
        seed: int | None = None,
        eos_id: int | Sequence[int] | Literal["model"] | None = "model",
        logprobs: int | None = 0,
        prompt_logprobs: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        slide: bool = False,
        timeout: float | None = None,
    ) -> Request:
        """Add a request to the queue and return it at once. Any thread may call this method.

        Args:
            prompt: the text or the token ids to continue.
            sampling: the sampling options (default: greedy).
            max_new_tokens: the maximum number of new tokens (default: as many as the model's context has room for). A larger
                number is lowered to this default, unless `slide` is true.
            stop: one or several texts or sequences of ids that end the request (see `generate`).
            seed: makes the sampled tokens reproducible. `generate` with this seed returns the same tokens, up to rounding.
                Default: a random seed.
            eos_id: the ids that end the request. "model" means the ids that the model's files name, or else the tokenizer's
                end-of-text token. None: no id ends the request.
            logprobs: number of most likely alternatives to return with each token, up to 20. 0 returns only the
                log-probability of the token itself, and None returns no log-probabilities.
            prompt_logprobs: compute the log-probabilities of the prompt's tokens too. Then the whole prompt is computed, even if
                a part of it is in the cache, and it must fit into the context.
            logit_bias: numbers that are added to the logits of some token ids before sampling.
            slide: allow the prompt and its continuation to exceed the context. The model then sees the last tokens, as in
                `generate`. Once the context is full, every new token takes as long as a whole prompt, because positions shift.
            timeout: seconds after this call at which the request ends with the reason "timeout" (default: no limit).

        Raises:
            ValueError: an argument out of range, an empty prompt, or a prompt beyond the context without `slide`.
            QueueFull: max_queue requests are waiting already.
            EngineClosed: the engine was closed.
        """
        ids = self._encode(prompt, may_slide=slide and not prompt_logprobs)
        bias = dict(logit_bias or {})
        self._check_ids(bias)
        if not all(math.isfinite(value) for value in bias.values()):
            raise ValueError(f"logit_bias must have finite numbers, got {bias!r:.80}")
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 0):
            raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {max_new_tokens!r}")
        if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MAX_LOGPROBS):
            raise ValueError(f"logprobs must be a whole number from 0 to {MAX_LOGPROBS}, or None, got {logprobs!r}")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        check_seed(seed)
        stop_check(stop, self.tokenizer)  # raises ValueError for a wrong stop
        room = max(0, self.context - len(ids) + 1)  # the last new token need not be in the context
        longest = room if max_new_tokens is None else max_new_tokens
        request = Request(
            ids,
            sampling or SamplingConfig(),
            longest if slide else min(longest, room),
            secrets.randbits(63) if seed is None else seed,
            end_ids(self.model, self.tokenizer) if eos_id == "model" else checked_ends(eos_id),
            as_stops(stop),
            logprobs,
            prompt_logprobs,
            bias,
            slide,
            None if timeout is None else time.monotonic() + timeout,
            self.tokenizer,
        )
        with self._changed:
            if self._is_closed:
                raise EngineClosed("the engine is closed, so it takes no more requests")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests are waiting already: try again later")
            self._waiting.append(request)
            self._counts["requests"] += 1
            self._changed.notify_all()
        return request

    def stream_text(
        self,
        ids: Sequence[int],
        max_new_tokens: int | None,
        sampling: SamplingConfig,
        stop: Sequence[str] = (),
        seed: int | None = None,
        slide: bool = False,
    ) -> Iterator[str]:
        """Submit a prompt, and return an iterator over pieces of new text. Closing the iterator cancels the request.

        This method replaces `generation.stream_text` when several texts are generated at the same time. The arguments are
        those of `submit`.
        """
        request = self.submit(ids, sampling, max_new_tokens, stop=stop or None, seed=seed, slide=slide, logprobs=None)

        def texts() -> Iterator[str]:
            try:
                yield from request.texts()
            finally:
                request.cancel()

        return texts()

    def stats(self) -> dict[str, int]:
        """Return the present numbers of requests, slots and cached tokens, and the totals of requests, steps and tokens."""
        with self._changed:
            return {
                **self._counts,
                "running": len(self._running),
                "waiting": len(self._waiting),
                "slots": len(self._slots),
                "cache_tokens": sum(map(len, self._slots.ids)),
                "cache_capacity": len(self._slots) * self._slots.cache.capacity,
            }

    def close(self, drain: bool = False) -> None:
        """Take no more requests and end the thread. Requests end as "cancelled", or are finished first if `drain` is true."""
        with self._changed:
            self._is_closed = True
            if not drain:
                for request in [*self._waiting, *(run.request for run in self._running)]:
                    request.cancel()
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, prompt: str | Sequence[int], may_slide: bool) -> list[int]:
        """Return the token ids of a prompt. Raises ValueError if it is empty, or beyond the context unless `may_slide`."""
        if isinstance(prompt, str) and self.tokenizer is None:
            raise ValueError("a prompt that is a text needs a tokenizer: give the prompt as token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        self._check_ids(ids)
        if len(ids) > self.context and not may_slide:
            raise ValueError(f"the prompt has {len(ids)} tokens, but the model's context is {self.context}: shorten it")
        return ids

    def _check_ids(self, ids: Iterable[int]) -> None:
        V = self.model.config.vocab_size
        for id_ in ids:
            if type(id_) is not int or not 0 <= id_ < V:
                raise VocabularyError(f"id {id_!r} is outside the vocabulary, ids are 0 to {V - 1}")

    # Everything below runs in the engine's thread.

    @torch.inference_mode()
    def _serve(self) -> None:
        """Run steps while there are requests, and wait for requests otherwise, until the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._is_closed)
                if self._is_closed and not self._waiting and not self._running:
                    return
                self._end_overdue()
                self._admit()
            pieces = self._plan()
            if pieces:
                self._step(pieces)

    def _n_cached(self, slot: int) -> int:
        return len(self._slots.ids[slot])

    def _end_overdue(self) -> None:
        """End the requests that were cancelled or whose deadline has passed."""
        now = time.monotonic()

        def reason(request: Request) -> FinishReason | None:
            if request.is_cancelled:
                return "cancelled"
            return "timeout" if request.deadline is not None and now >= request.deadline else None

        for run in [run for run in self._running if reason(run.request)]:
            self._finish(run, reason(run.request))
        for request in [request for request in self._waiting if reason(request)]:
            self._waiting.remove(request)
            request.end(reason(request))

    def _admit(self) -> None:
        """Give free slots to the requests that have waited longest."""
        while self._waiting and len(self._running) < len(self._slots):
            request = self._waiting.popleft()
            try:
                self._running.append(self._start(request))
            except Exception as error:
                request.end(error=error)

    def _start(self, request: Request) -> _Run:
        """Choose a slot for the request, and return the run in it."""
        ids = request.prompt_ids[-self.context :]
        limit = 0 if request.prompt_logprobs else len(ids) - 1  # at least the last token gives logits
        slot = self._slots.take(ids, limit, {run.slot for run in self._running})
        request.n_reused = self._n_cached(slot)
        V = self.model.config.vocab_size
        ends = self._without_token.new_tensor(request.end_ids)
        excluded = self._without_token[~torch.isin(self._without_token, ends)]
        bias = seen = None
        if request.logit_bias:
            bias = torch.zeros(1, V, device=self._device)
            bias[0, list(request.logit_bias)] = bias.new_tensor([*request.logit_bias.values()])
        if request.sampling.repetition_penalty is not None:
            seen = torch.zeros(1, V, dtype=torch.bool, device=self._device)
            seen[0, request.prompt_ids] = True
        run = _Run(
            request, slot, ids, stop_check(request.stop or None, self.tokenizer),
            seeded_generators(request.seed, 1, self._device), excluded, bias, seen,
        )  # fmt: skip
        if not request.prompt_logprobs:
            self._find_source(run)
        return run

    def _find_source(self, run: _Run) -> None:
        """Let a run wait for the one with the longest common beginning, if the run's own slot holds less of this beginning."""
        n_shared, n_mine = 0, self._n_cached(run.slot)
        for other in self._running:
            n = min(n_common(run.ids, other.ids), len(run.ids) - 1)
            if n > max(n_shared, n_mine):
                run.source, run.n_shared, n_shared = other, n, n

    def _plan(self) -> list[Piece]:
        """Return the tokens that the next step computes: the newest of each generating request, and pieces of prompts."""
        pieces, prompts = [], []
        for run in self._running:
            n_left = len(run.ids) - self._n_cached(run.slot)
            if n_left == 1 and run.new_ids:
                pieces.append(Piece(run.slot, run.ids[-1:], 1))
            else:
                prompts.append(run)
        room = MAX_PROMPT_TOKENS_WHILE_GENERATING if pieces else MAX_PROMPT_TOKENS
        for run in prompts:
            if room == 0:
                break
            if self._is_waiting_for_source(run):
                continue
            n_cached = self._n_cached(run.slot)
            new = run.ids[n_cached : n_cached + room]
            is_last = n_cached + len(new) == len(run.ids)
            wants_all = run.request.prompt_logprobs and not run.new_ids
            pieces.append(Piece(run.slot, new, len(new) if wants_all else int(is_last)))
            room -= len(new)
        return pieces

    def _is_waiting_for_source(self, run: _Run) -> bool:
        """Return True while the run's source computes their common beginning. Afterwards, copy it and return False."""
        source = run.source
        if source is None:
            return False
        n_cached = self._n_cached(source.slot)
        if source in self._running and n_cached < run.n_shared and n_cached < len(source.ids) and not source.new_ids:
            return True
        run.source = None
        n = min(n_common(run.ids, self._slots.ids[source.slot]), len(run.ids) - 1)
        if n > self._n_cached(run.slot):
            self._slots.copy(source.slot, run.slot, run.ids[:n])
            run.request.n_reused = n
        return False

    def _step(self, pieces: list[Piece]) -> None:
        """Compute the pieces, and pick the next token of each request whose ids are all computed."""
        runs = {run.slot: run for run in self._running}
        try:
            with self._lock, evaluation_mode(self.model):
                logits = self.model.forward_slots(pieces, self._slots.cache)
        except Exception as error:  # the requests of this step fail, and the engine continues with the others
            for piece in pieces:
                self._slots.clear(piece.slot)
                self._finish(runs[piece.slot], error=error)
            return
        self._counts["steps"] += 1
        rows = logits.split([piece.n_logits for piece in pieces])
        for piece, row in zip(pieces, rows, strict=True):
            run = runs[piece.slot]
            self._slots.extend(piece.slot, piece.ids)
            if not run.new_ids:
                self._counts["prompt_tokens"] += len(piece.ids)
            try:
                self._use(run, row)
            except Exception as error:  # such as logits that are NaN
                self._finish(run, error=error)

    def _use(self, run: _Run, logits: Tensor) -> None:
        """Use the logits (n, V) of a piece: store the prompt's log-probabilities if requested, and pick the next token."""
        request, n_cached = run.request, self._n_cached(run.slot)
        if request.prompt_logprobs and not run.new_ids:
            self._add_prompt_tokens(run, n_cached - len(logits), logits)
        if n_cached < len(run.ids):
            return
        if not run.new_ids and not run.request.max_new_tokens:
            self._finish(run, "length")
            return
        if not run.new_ids:
            self._counts["reused_tokens"] += request.n_reused
        self._pick(run, logits[-1:])

    def _pick(self, run: _Run, logits: Tensor) -> None:
        """Pick the next token of a request from the logits (1, V), and end the request if that is its last token."""
        request = run.request
        adjusted = logits.float() if logits.dtype.itemsize < 4 else logits
        if run.bias is not None:
            adjusted = adjusted + run.bias
        if len(run.excluded):
            adjusted = adjusted.index_fill(1, run.excluded, -math.inf)
        new = int(self._pick_next(adjusted, request.sampling, run.generators, run.seen))
        token = Token(new)
        if request.logprobs is not None:
            token = self._tokens([new], logits, request.logprobs)[0]
        if new in request.end_ids:
            request.end_token = token
            self._finish(run, "stop")
            return
        run.new_ids.append(new)
        run.ids.append(new)
        if run.seen is not None:
            run.seen[0, new] = True
        self._counts["generated_tokens"] += 1
        request.add(token)
        if run.has_stopped is not None and run.has_stopped(run.new_ids):
            self._finish(run, "stop")
        elif len(run.new_ids) == request.max_new_tokens:
            self._finish(run, "length")
        elif len(run.ids) > self.context:
            # Learned positions shift with the window, so nothing cached stays valid.
            run.ids = run.ids[-self.context :]
            self._slots.clear(run.slot)

    def _add_prompt_tokens(self, run: _Run, start: int, logits: Tensor) -> None:
        """Append the prompt's tokens after position `start`, given the logits (n, V) of the positions from `start` on."""
        if start == 0:
            run.request.prompt_tokens.append(Token(run.ids[0]))
        next_ids = run.ids[start + 1 : start + 1 + len(logits)]
        run.request.prompt_tokens += self._tokens(next_ids, logits[: len(next_ids)], run.request.logprobs or 0)

    def _tokens(self, ids: list[int], logits: Tensor, n_top: int) -> list[Token]:
        """Return the tokens with these n ids and their log-probabilities, given the logits (n, V) at their positions."""
        if not ids:
            return []
        require_finite("a logit of the model", largest(logits))
        logprobs = logits.float().log_softmax(-1)  # (n, V)
        own = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
        tops: list[list[tuple[int, float]]] = [[] for _ in ids]
        if n_top:
            best = logprobs.index_fill(1, self._without_token, -math.inf).topk(min(n_top, logits.shape[1]))
            for top, top_ids, values in zip(tops, best.indices.tolist(), best.values.tolist(), strict=True):
                top += zip(top_ids, values, strict=True)
        return [Token(*parts) for parts in zip(ids, own, tops, strict=True)]

    def _finish(self, run: _Run, reason: FinishReason | None = None, error: BaseException | None = None) -> None:
        """End a request and free its slot. The slot keeps its keys and values for prompts that begin in the same way."""
        self._running.remove(run)
        self._slots.release(run.slot)
        run.request.end(reason, error)
