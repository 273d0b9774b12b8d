"""The OpenAPI description of the HTTP API, made from the pydantic models of its requests and responses."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from MyGPT import __version__
from MyGPT.serving.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    Error,
    ModelCard,
    ModelList,
    Tokens,
)
from MyGPT.serving.schema import IGNORED_FIELDS, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

ERRORS = {
    400: "The request is not JSON, or a field has a wrong value. `param` names the field.",
    401: "The server needs an API key.",
    403: "The Host header or the Origin header is not allowed.",
    404: "The model or the path does not exist.",
    408: "The body was not complete in time.",
    413: "The body is too large.",
    429: "Too many requests are waiting. Try again after the time in the header Retry-After.",
    500: "The server failed. `message` has the id under which the server's log describes the error.",
    503: "The server is stopping.",
    504: "The answer was not complete in time.",
}
"""The statuses of errors and their descriptions."""
_GET_ERRORS, _POST_ERRORS = (400, 401, 403, 404, 503), tuple(ERRORS)
_REF = "#/components/schemas/{model}"

Operation = tuple[str, str, str, type[BaseModel] | None, type[BaseModel], type[BaseModel] | None]
OPERATIONS: list[Operation] = [
    ("get", "/v1/models", "Return all models", None, ModelList, None),
    ("get", "/v1/models/{model}", "Return one model", None, ModelCard, None),
    ("post", "/v1/completions", "Continue one or several texts", CompletionRequest, Completion, Completion),
    (
        "post",
        "/v1/chat/completions",
        "Write the next message of a conversation",
        ChatRequest,
        ChatCompletion,
        ChatChunk,
    ),
    ("post", "/tokenize", "Return the tokens of a text or conversation", TokenizeRequest, Tokens, None),
    ("post", "/detokenize", "Return the text of tokens", DetokenizeRequest, Detokenized, None),
]
"""The method, path and summary of each operation, and the pydantic models of its request, response and stream chunks."""


@cache
def openapi() -> dict[str, Any]:
    """Return the description of the API in OpenAPI 3.1."""
    requests = {request for _, _, _, request, _, _ in OPERATIONS if request is not None}
    answers = {answer for *_, whole, chunk in OPERATIONS for answer in (whole, chunk) if answer is not None} | {Error}
    inputs = [(model, "validation") for model in sorted(requests, key=_name)]
    outputs = [(model, "serialization") for model in sorted(answers, key=_name)]
    schemas = models_json_schema([*inputs, *outputs], ref_template=_REF)[1]["$defs"]  # type: ignore[list-item]
    paths: dict[str, Any] = {}
    for method, path, summary, request, answer, chunk in OPERATIONS:
        paths.setdefault(path, {})[method] = _operation(path, summary, request, answer, chunk)
    return {
        "openapi": "3.1.0",
        "info": {"title": "MyGPT", "version": __version__, "description": "OpenAI's API for models of MyGPT."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(
    path: str, summary: str, request: type[BaseModel] | None, answer: type[BaseModel], chunk: type[BaseModel] | None
) -> dict[str, Any]:
    """Return the description of one operation."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    if chunk is not None:
        chunks = {"anyOf": [_ref(chunk), _ref(Error)]}
        data = {"anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": chunks}]}
        words = "Server-sent events. The data of each is JSON, and of the last one [DONE]."
        content["text/event-stream"] = {"schema": {"description": words, "properties": {"data": data}}}
    success: dict[str, Any] = {"description": "The answer", "content": content}
    operation: dict[str, Any] = {"summary": summary}
    if "{model}" in path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
        header = {"description": "Fields of the request that have no effect", "schema": {"type": "string"}}
        success["headers"] = {IGNORED_FIELDS: header}
    statuses = _GET_ERRORS if request is None else _POST_ERRORS
    error = {"application/json": {"schema": _ref(Error)}}
    errors = {str(status): {"description": ERRORS[status], "content": error} for status in statuses}
    return {**operation, "responses": {"200": success, **errors}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _name(model: type[BaseModel]) -> str:
    return model.__name__
