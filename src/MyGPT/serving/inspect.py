"""The page at / and its endpoints: the probabilities of a text, its continuation with alternatives, and a view inside the model.

OpenAI's format has the texts of tokens but not their ids. The page needs the ids to cut a text at a token and to continue it
with another token. These endpoints exchange token ids.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import anyio
import torch
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from MyGPT.files import json_text
from MyGPT.generation import TextStream, end_ids, evaluation_mode
from MyGPT.inside.page import MAX_TOKENS, content_policy, fill_template, next_token_data, page_data
from MyGPT.inside.tracing import ablate_heads
from MyGPT.inside.walk import walk_data
from MyGPT.messages import error_message
from MyGPT.sampling import SamplingConfig, require_finite
from MyGPT.serving.models import ServedModel
from MyGPT.serving.prefixes import n_common
from MyGPT.serving.request import Token
from MyGPT.serving.wire import (
    APIError,
    encode,
    event_stream,
    find_model,
    read_json,
    require_finished,
    submit,
    while_connected,
)
from MyGPT.tokenizers.base import ids_without_token
from MyGPT.tokenizers.display import token_labels

N_ALTERNATIVES = 10
"""Number of most likely tokens that are sent with each token."""
MAX_CONTEXTS = 4
"""Longest text whose tokens are shown, in multiples of the model's context. Decoding takes quadratic time."""
N_KEPT_LOGITS = 32
"""Number of texts per model whose logits are kept, so that a change of the sampling options needs no forward pass."""

T = TypeVar("T")
Heads = tuple[tuple[int, int], ...]
"""Attention heads as pairs (layer, head)."""


@cache
def page_html() -> str:
    """Return the page as one HTML document, which loads nothing else."""
    return fill_template(Path(__file__).parent / "web" / "index.html", {})


@cache
def page_headers() -> dict[str, str]:
    """Return the HTTP headers of the page. They allow only its own script and style, and requests to its own server."""
    policy = [content_policy(page_html()), "connect-src 'self'", "frame-ancestors 'none'"]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }


async def page(request: HTTPRequest) -> Response:
    """Send the page."""
    return HTMLResponse(page_html(), headers=page_headers())


class Inspector:
    """A model that computes next-token logits, attention weights and the predictions after each layer for the page.

    The engine's model computes the logits, so they are those that the engine samples from. The inspector keeps the logits of
    the last texts, and the keys and values of the last one. Attention and predictions come from hooks on a GPTModel. The
    inspector copies the modules but shares their weights, because hooks on the original modules would also see the
    computations of the engine in another thread.
    """

    def __init__(self, served: ServedModel) -> None:
        tensors: Any = {id(tensor): tensor for tensor in chain(served.gpt.parameters(), served.gpt.buffers())}
        self.gpt = copy.deepcopy(served.gpt, tensors)
        self.model, self.tokenizer = served.engine.model, served.tokenizer
        self._logits: OrderedDict[tuple[tuple[int, ...], Heads], Tensor] = OrderedDict()
        self._cached: list[int] = []
        with torch.inference_mode():
            self._cache = self.model.new_cache(1)
        excluded = ids_without_token(self.tokenizer, self.gpt.config.vocab_size)
        ends = end_ids(self.gpt, self.tokenizer)
        self._excluded = torch.tensor([id_ for id_ in excluded if id_ not in ends], dtype=torch.int64)

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int], heads_off: Heads = ()) -> Tensor:
        """Return the logits (V,) of the token that follows `ids`, in float32 on the CPU.

        If there are more ids than the context has room for, the model sees only the last ones. The logits of ids without a
        token are minus infinity, because such ids are never generated, unless they end a text. With heads switched off, the
        logits are those of the GPTModel, because hooks cannot change the engine's model.
        """
        key = (tuple(ids[-self.gpt.config.context_length :]), tuple(sorted({*heads_off})))
        if key not in self._logits:
            computed = self._computed_without(*key) if heads_off else self._computed(key[0])
            self._logits[key] = computed.index_fill(0, self._excluded, -math.inf)
        self._logits.move_to_end(key)
        if len(self._logits) > N_KEPT_LOGITS:
            self._logits.popitem(last=False)
        return self._logits[key]

    def _computed(self, ids: Sequence[int]) -> Tensor:
        """Compute the logits (V,) after the ids. The beginning that they share with the last call's ids is reused."""
        n = min(n_common(list(ids), self._cached), len(ids) - 1)
        self._cached, self._cache.length = [], n  # nothing is cached if the model fails
        with evaluation_mode(self.model):
            logits = self.model(self._batch(ids[n:]), cache=self._cache, last_only=True)[0, -1].float().cpu()
        require_finite("a logit of the model", logits)
        self._cached = list(ids)
        return logits

    def _computed_without(self, ids: Sequence[int], heads_off: Heads) -> Tensor:
        """Compute the logits (V,) after the ids with these heads switched off."""
        with evaluation_mode(self.gpt), ablate_heads(self.gpt, heads_off):
            logits = self.gpt(self._batch(ids), last_only=True)[0, -1].float().cpu()
        require_finite("a logit of the model", logits)
        return logits

    @torch.inference_mode()
    def distribution(self, ids: Sequence[int], sampling: SamplingConfig, heads_off: Heads = ()) -> dict[str, Any]:
        """Return the probabilities of the token that follows `ids`, as a dict for JSON (see `next_token_data`)."""
        return next_token_data(self.next_logits(ids, heads_off), self.tokenizer, sampling)

    def look(self, ids: Sequence[int], heads_off: Heads = ()) -> dict[str, Any]:
        """Return the attention weights and the predictions after each layer for the ids (see `page_data`)."""
        return page_data(self.gpt, self.tokenizer, self._batch(ids), heads_off)

    def walk(self, ids: Sequence[int], layer: int, head: int, token: int, heads_off: Heads = ()) -> dict[str, Any]:
        """Return the numbers of each step of one forward pass (see `walk_data`)."""
        return walk_data(self.gpt, self.tokenizer, self._batch(ids), layer, head, token, heads_off)

    def _batch(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self._cache.storage.device)


async def list_models(request: HTTPRequest) -> Response:
    """Send the name, the size and other facts about each model for the page."""
    models: dict[str, ServedModel] = request.app.state.models
    described = []
    for served in models.values():
        config = served.gpt.config
        described.append(
            {
                "name": served.name,
                "context": config.context_length,
                "vocab_size": config.vocab_size,
                "layers": config.n_layers,
                "heads": config.n_heads,
                "parameters": served.gpt.num_parameters(),
                "has_template": served.template is not None,
            }
        )
    return JSONResponse({"models": described, "max_inside": MAX_TOKENS})


async def read_text(request: HTTPRequest) -> Response:
    """Send the tokens of a text, each with its probability and the most likely alternatives.

    The tokens of a text that is longer than the model's context have no probabilities.
    """
    body = await read_json(request)
    served = find_model(request, _name(body))
    ids, context = await _ids(served, body), served.gpt.config.context_length
    if len(ids) > MAX_CONTEXTS * context:
        message = (
            f"the text has {len(ids)} tokens, but the page shows at most {MAX_CONTEXTS * context}: shorten the text"
        )
        raise APIError(400, message, "text", "context_length_exceeded")
    tokens = [Token(id_) for id_ in ids]
    if 0 < len(ids) <= context:
        options: dict[str, Any] = {"logprobs": N_ALTERNATIVES, "prompt_logprobs": True}
        generation = await submit(request, served, ids, None, 0, **options)
        await while_connected(request, generation.wait())
        require_finished(generation)
        tokens = generation.prompt_tokens

    def answer() -> dict[str, Any]:
        texts = token_pieces(served.tokenizer, ids)
        described = [_described(served, token, text) for token, text in zip(tokens, texts, strict=True)]
        return {"tokens": described, "prompt": _as_prompt(served.tokenizer, ids)}

    return _json(await asyncio.to_thread(answer))


async def next_token(request: HTTPRequest) -> Response:
    """Send the probabilities of the token that follows a text or token ids, before and after the sampling options."""
    body = await read_json(request)
    served = find_model(request, _name(body))
    sampling, heads_off, ids = _sampling(body), _heads_off(served, body), await _some_ids(served, body)

    def answer(inspector: Inspector) -> dict[str, Any]:
        found = inspector.distribution(ids, sampling, heads_off)
        return {**found, "n_tokens": len(ids), "prompt": _as_prompt(served.tokenizer, ids)}

    return _json(await _compute(request, served, answer))


async def generate(request: HTTPRequest) -> Response:
    """Stream the tokens that continue token ids. /v1/completions gives the same tokens for the same options and seed."""
    body = await read_json(request)
    served = find_model(request, _name(body))
    ids, seed = await _ids(served, body), _whole(body, "seed", None)
    generation = await submit(
        request, served, ids, _sampling(body), _whole(body, "max_tokens", 16), seed=seed, logprobs=N_ALTERNATIVES
    )
    stream = TextStream(served.tokenizer, ids[:-1])
    last_text = stream.add(ids[-1])  # if the last token is an alternative, the page knows only its label

    async def events() -> AsyncGenerator[str]:
        yield json_text({"prompt": _as_prompt(served.tokenizer, ids), "last_text": last_text})
        async for token in generation:
            yield json_text(_described(served, token, stream.add(token.id)))
        require_finished(generation)
        yield json_text({"finish_reason": generation.finish_reason})

    return event_stream(request, events())


async def look_inside(request: HTTPRequest) -> Response:
    """Send the attention weights and the predictions after each layer for the last tokens of a text."""
    body = await read_json(request)
    served = find_model(request, _name(body))
    heads_off, ids = _heads_off(served, body), await _some_ids(served, body)
    last = ids[-_longest_look(served) :]
    data = await _compute(request, served, lambda inspector: inspector.look(last, heads_off))
    return _json({**data, "n_left_out": len(ids) - len(last)})


async def walk(request: HTTPRequest) -> Response:
    """Send the numbers of each step of one forward pass for one token and one attention head of a text."""
    body = await read_json(request)
    served = find_model(request, _name(body))
    heads_off, ids = _heads_off(served, body), await _some_ids(served, body)
    if len(ids) > _longest_look(served):
        raise APIError(400, f"the text has {len(ids)} tokens, a walk can have at most {_longest_look(served)}", "text")
    config = served.gpt.config
    counts = {"layer": config.n_layers, "head": config.n_heads, "token": len(ids)}
    for name, count in counts.items():
        if _whole(body, name, 0) not in range(count):
            raise APIError(400, f"{name} must be a whole number from 0 to {count - 1}, got {body[name]!r:.80}", name)
    layer, head, token = (body.get(name, 0) for name in counts)
    return _json(await _compute(request, served, lambda inspector: inspector.walk(ids, layer, head, token, heads_off)))


def _longest_look(served: ServedModel) -> int:
    return min(MAX_TOKENS, served.gpt.config.context_length)


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each id adds to the text of all ids. An id that does not complete a character adds nothing."""
    pieces: list[str] = [tokenizer.decode([id_]) for id_ in ids]
    text: str = tokenizer.decode(ids)
    if "".join(pieces) == text and "\ufffd" not in text:
        return pieces
    stream = TextStream(tokenizer)
    return [stream.add(id_) for id_ in ids]


def _as_prompt(tokenizer: Any, ids: list[int]) -> str | list[int]:
    """Return a prompt that means these ids in a request to /v1/completions.

    This is the text of the ids if the tokenizer encodes it as the same ids, and otherwise the ids themselves.
    """
    text: str = tokenizer.decode(ids)
    try:
        return text if tokenizer.encode(text) == ids else ids
    except ValueError:  # the tokenizer may not know the character �, which stands for an incomplete one
        return ids


def _described(served: ServedModel, token: Token, text: str) -> dict[str, Any]:
    ids = [token.id, *(id_ for id_, _ in token.top)]
    label, *labels = token_labels(served.tokenizer, ids)
    top = [[id_, label, logprob] for label, (id_, logprob) in zip(labels, token.top, strict=True)]
    return {"id": token.id, "text": text, "label": label, "logprob": token.logprob, "top": top}


async def _compute(request: HTTPRequest, served: ServedModel, function: Callable[[Inspector], T]) -> T:
    """Call `function` with the inspector of the model in another thread, and return the result. Calls run one at a time.

    If the client leaves while its call waits for its turn, nothing is computed.
    """
    state = request.app.state
    if not hasattr(state, "inspectors"):
        state.inspectors, state.inspection_limiter = {}, anyio.CapacityLimiter(1)

    def run() -> T:
        if served.name not in state.inspectors:
            state.inspectors[served.name] = Inspector(served)
        return function(state.inspectors[served.name])

    return await while_connected(request, anyio.to_thread.run_sync(run, limiter=state.inspection_limiter))


def _json(value: dict[str, Any]) -> Response:
    return Response(json_text(value), media_type="application/json")


def _name(body: dict[str, Any]) -> str | None:
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise APIError(400, f"model must be the name of a model, got {name!r:.80}", "model")
    return name


async def _ids(served: ServedModel, body: dict[str, Any]) -> list[int]:
    """Return the field "ids" of a request, or else the token ids of its field "text"."""
    if "ids" not in body:
        text = body.get("text")
        if not isinstance(text, str):
            raise APIError(400, f"text must be a string, got {text!r:.80}", "text")
        return await encode(served, text)
    ids, V = body["ids"], served.gpt.config.vocab_size
    if not isinstance(ids, list) or not all(type(id_) is int and 0 <= id_ < V for id_ in ids):
        raise APIError(400, f"ids must be a list of token ids from 0 to {V - 1}, got {ids!r:.80}", "ids")
    return ids


async def _some_ids(served: ServedModel, body: dict[str, Any]) -> list[int]:
    """Return the token ids of a request (see `_ids`), of which there must be at least one."""
    ids = await _ids(served, body)
    if not ids:
        raise APIError(400, "the text is empty; it must have at least one token", "text")
    return ids


def _heads_off(served: ServedModel, body: dict[str, Any]) -> Heads:
    """Return the attention heads that a request switches off."""
    heads, L, H = body.get("heads_off", []), served.gpt.config.n_layers, served.gpt.config.n_heads

    def is_head(pair: object) -> bool:
        return (
            isinstance(pair, list) and [type(i) for i in pair] == [int, int] and 0 <= pair[0] < L and 0 <= pair[1] < H
        )

    if not isinstance(heads, list) or not all(map(is_head, heads)):
        allowed = f"pairs [layer, head], with layers from 0 to {L - 1} and heads from 0 to {H - 1}"
        raise APIError(400, f"heads_off must be a list of {allowed}, got {heads!r:.80}", "heads_off")
    return tuple((layer, head) for layer, head in heads)


def _sampling(body: dict[str, Any]) -> SamplingConfig:
    names = ("temperature", "top_k", "top_p", "min_p")
    try:
        return SamplingConfig(**{name: body[name] for name in names if body.get(name) is not None})
    except ValueError as error:
        raise APIError(400, error_message(error)) from None


def _whole(body: dict[str, Any], name: str, default: int | None) -> int | None:
    value = body.get(name, default)
    if value is not None and type(value) is not int:
        raise APIError(400, f"{name} must be a whole number, got {value!r:.80}", name)
    return value


ROUTES = [
    Route("/", page),
    Route("/page/models", list_models),
    Route("/page/read", read_text, methods=["POST"]),
    Route("/page/next", next_token, methods=["POST"]),
    Route("/page/generate", generate, methods=["POST"]),
    Route("/page/inside", look_inside, methods=["POST"]),
    Route("/page/walk", walk, methods=["POST"]),
]
