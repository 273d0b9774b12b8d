"""The handlers of OpenAI's API: models, text completions and chat completions, and vLLM's /tokenize and /detokenize.

A handler reads and checks a request (schema.py), submits it to the engine (choices.py), and sends the answer (answers.py),
complete or as a stream. wire.py defines the errors and handles clients that leave.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from MyGPT.serving import choices
from MyGPT.serving.answers import ChatAnswer, CompletionAnswer, GeneratedAnswer
from MyGPT.serving.models import ServedModel
from MyGPT.serving.openapi import openapi
from MyGPT.serving.responses import Detokenized, ModelCard, ModelList, Tokens, json_response
from MyGPT.serving.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    ignored_header,
    parse,
)
from MyGPT.serving.wire import (
    APIError,
    encode,
    event_stream,
    find_model,
    read_json,
    require_finished,
    settings_of,
    submit,
    while_connected,
)


async def list_models(request: HTTPRequest) -> Response:
    """Return all models."""
    return json_response(ModelList(object="list", data=[_card(served) for served in request.app.state.models.values()]))


async def get_model(request: HTTPRequest) -> Response:
    """Return one model."""
    return json_response(_card(find_model(request, request.path_params["model"])))


async def completions(request: HTTPRequest) -> Response:
    """Continue one or several texts."""
    body = parse(CompletionRequest, await read_json(request))
    served = find_model(request, body.model)
    choices.require_few_texts(len(body.prompts), body.n_texts, settings_of(request).max_prompts)
    prompts = [await _prompt_ids(served, prompt) for prompt in body.prompts]
    submissions = choices.completion_submissions(body, prompts, served)
    requests = [await submit(request, served, **submission) for submission in submissions]
    return await _respond(request, body, CompletionAnswer(served, requests, body))


async def chat_completions(request: HTTPRequest) -> Response:
    """Write the assistant's next message in a conversation."""
    body = parse(ChatRequest, await read_json(request))
    served = find_model(request, body.model)
    choices.require_few_texts(1, body.n, settings_of(request).max_prompts)
    ids = await asyncio.to_thread(choices.chat_prompt, body.messages, served)
    submissions = choices.chat_submissions(body, ids, served)
    requests = [await submit(request, served, **submission) for submission in submissions]
    return await _respond(request, body, ChatAnswer(served, requests, body))


async def tokenize(request: HTTPRequest) -> Response:
    """Return the token ids of a text, or of the prompt that the chat template makes from a conversation."""
    body = parse(TokenizeRequest, await read_json(request))
    served = find_model(request, body.model)
    if body.messages is None:
        ids = await _encode(served, body.prompt or "")
    else:
        ids = await asyncio.to_thread(choices.chat_prompt, body.messages, served)
    texts = [choices.token_text(served.tokenizer, id_) for id_ in ids] if body.return_token_strs else None
    content = Tokens(count=len(ids), max_model_len=served.engine.context, tokens=ids, token_strs=texts)
    return json_response(content, ignored_header(body))


async def detokenize(request: HTTPRequest) -> Response:
    """Return the text of token ids."""
    body = parse(DetokenizeRequest, await read_json(request))
    served = find_model(request, body.model)
    choices.require_ids(body.tokens, served, "tokens")
    return json_response(Detokenized(prompt=served.tokenizer.decode(body.tokens)), ignored_header(body))


async def openapi_json(request: HTTPRequest) -> Response:
    """Return the OpenAPI description of the API."""
    return JSONResponse(openapi())


ROUTES = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/openapi.json", openapi_json, methods=["GET"]),
]


async def _respond(request: HTTPRequest, body: GenerationRequest, answer: GeneratedAnswer) -> Response:
    """Return the answer as a stream, or wait until it is complete."""
    if body.stream:
        return event_stream(request, answer.events(), ignored_header(body))
    await while_connected(request, _ended(answer))
    return json_response(answer.whole(), ignored_header(body))


async def _ended(answer: GeneratedAnswer) -> None:
    """Wait until all requests of an answer have ended. Raises APIError if a request ended before its text was complete."""
    for generation in answer.requests:
        await generation.wait()
        require_finished(generation)


async def _prompt_ids(served: ServedModel, prompt: str | list[int]) -> list[int]:
    """Return the token ids of a prompt. An empty text stands for the token with which a document starts."""
    if not isinstance(prompt, str):
        choices.require_ids(prompt, served, "prompt")
        return prompt
    ids = await _encode(served, prompt)
    if ids:
        return ids
    start = served.tokenizer.bos_token
    if start is None:
        raise APIError(400, f"prompt is empty, and {served.name} has no token that starts a document", "prompt")
    return [start]


async def _encode(served: ServedModel, text: str) -> list[int]:
    """Return the token ids of the text in the field "prompt". Raises APIError that names this field."""
    try:
        return await encode(served, text)
    except APIError as error:
        error.param, error.code = "prompt", "invalid_value"
        raise


def _card(served: ServedModel) -> ModelCard:
    return ModelCard(
        id=served.name, object="model", created=served.created, owned_by="mygpt", max_model_len=served.engine.context
    )
