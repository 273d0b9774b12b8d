"""The requests of the HTTP API: which values are valid, and the errors for others.

The formats are OpenAI's; those of /tokenize and /detokenize are vLLM's. Unknown fields are accepted. A field whose value is
null has its default. The OpenAPI description (openapi.py) is made from these pydantic models, and from those of the responses
(responses.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from MyGPT.serving.engine import MAX_LOGPROBS
from MyGPT.serving.wire import APIError

IGNORED_FIELDS = "X-MyGPT-Ignored-Fields"
"""The response header that lists the fields of the request that have no effect."""
MAX_STOPS = 16
"""Largest number of stop texts. OpenAI allows 4, but some tasks of lm_eval have more."""


@dataclass(frozen=True)
class Allowed:
    """The allowed values of a field, for error messages: the rest of a sentence that begins with "n must be"."""

    values: str


def _accept_null(schema: dict[str, Any], model: type[RequestModel]) -> None:
    """Let the schema of a request allow null for each field that has a default."""
    for name, field in model.model_fields.items():
        if not field.is_required():
            own = schema["properties"][name]
            words = {key: own.pop(key) for key in ("title", "description", "default") if key in own}
            schema["properties"][name] = {**words, "anyOf": [own, {"type": "null"}]}


class RequestModel(BaseModel):
    """A JSON object in a request. Values are not converted: "5" is not a number, and true is not 1."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_accept_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {key: item for key, item in value.items() if item is not None or key in required}


Flag = Annotated[bool, Allowed("true or false")]
Text = Annotated[str, Allowed("a text")]
ModelName = Annotated[str, Allowed("the name of a model, as in /v1/models")]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[
    str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
    Allowed("a text, a list of token ids, or a list of texts or of lists of token ids, and no list may be empty"),
]
StopText = Annotated[str, Field(min_length=1)]
Penalty = Annotated[
    float,
    Field(ge=0, le=0),
    Allowed("0 (this server has repetition_penalty instead, where values above 1 reduce repetition)"),
]
Biases = dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]]


class StreamOptions(RequestModel):
    include_usage: Flag = Field(False, description="Send the token counts in a last chunk without choices.")


class GenerationRequest(RequestModel):
    """The fields that text completions and chat completions have in common."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0, le=2), Allowed("a number from 0 to 2")] = Field(
        1.0, description="Divisor of the logits. 0 always takes the most likely token."
    )
    top_p: Annotated[float, Field(ge=0, le=1), Allowed("a number from 0 to 1")] = Field(
        1.0,
        description="Sample only from the smallest set of most likely tokens with a total probability of at least top_p.",
    )
    top_k: Annotated[int, Field(ge=-1), Allowed("a whole number of at least 1, or 0 or -1 for no limit")] = Field(
        0, description="Sample only from the top_k most likely tokens. 0 or -1: from all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1), Allowed("a number from 0 to 1")] = Field(
        0.0,
        description="Sample only from tokens that have at least min_p times the probability of the most likely token.",
    )
    repetition_penalty: Annotated[float, Field(gt=0), Allowed("a number above 0")] = Field(
        1.0, description="Values above 1 make tokens that already occurred less likely."
    )
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[
        Biases, Allowed('an object with token ids as names ("50256") and numbers from -100 to 100')
    ] = Field({}, description="Numbers that are added to the logits of some token ids before sampling.")
    n: Annotated[int, Field(ge=1, le=128), Allowed("a whole number from 1 to 128")] = Field(
        1, description="Number of choices per prompt."
    )
    seed: (
        Annotated[int, Field(ge=-(2**63), lt=2**63), Allowed("a whole number of 64 bits, from -2**63 to 2**63 - 1")]
        | None
    ) = Field(None, description="Makes the answer reproducible. Choice i uses seed + i.")
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)],
        Allowed(f"a text or a list of at most {MAX_STOPS} texts, none of them empty"),
    ] = Field([], description="Texts that end a choice. They are not part of the answer.")
    stream: Flag = Field(False, description="Send the answer as server-sent events while it is generated.")
    stream_options: Annotated[StreamOptions, Allowed('an object, such as {"include_usage": true}')] | None = None
    ignore_eos: Flag = Field(False, description="Continue after an end-of-text token.")
    user: Text = Field("", description="A name for the user. It has no effect.")

    def check(self) -> None:
        """Raise APIError if fields that are valid alone do not fit together."""
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options is only allowed with stream=true", "stream_options")

    @property
    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    prompt: Prompts = Field("", description="The texts to continue. An empty text starts a new document.")
    max_tokens: Annotated[int, Field(ge=0), Allowed("a whole number of at least 0")] | None = Field(
        None,
        description="Maximum number of new tokens per choice. Default: 16, or fewer if the context has no room for more.",
    )
    best_of: Annotated[int, Field(ge=1, le=128), Allowed("a whole number from 1 to 128")] | None = Field(
        None,
        description="Generate this number of texts per prompt, and return the n with the highest mean log-probability per token.",
    )
    echo: Flag = Field(False, description="Return the prompt before its continuation.")
    logprobs: (
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Allowed(f"a whole number from 0 to {MAX_LOGPROBS}")] | None
    ) = Field(
        None,
        description="Return the log-probability of each token, and this number of most likely tokens at its position.",
    )
    suffix: Annotated[
        str, Field(max_length=0), Allowed("empty, because these models only write from left to right")
    ] = ""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def n_texts(self) -> int:
        """Number of texts to generate for each prompt."""
        return self.best_of or self.n

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of < self.n:
            raise APIError(400, f"best_of must be at least n, got best_of={self.best_of} and n={self.n}", "best_of")
        if self.stream and self.best_of is not None and self.best_of > self.n:
            message = (
                f"best_of={self.best_of} with n={self.n} cannot be streamed: the best texts are known only at the end"
            )
            raise APIError(400, message, "best_of")


class TextPart(RequestModel):
    type: Annotated[Literal["text"], Allowed('"text", because these models read only text')]
    text: Text


class Message(RequestModel):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"], Allowed("system, developer, user or assistant")
    ]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)],
        Allowed('a text or a list of parts such as {"type": "text", "text": "Hello"}'),
    ]

    def as_record(self) -> dict[str, str]:
        """Return the message as in training data: the role "developer" becomes "system", and the parts of a text are joined."""
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


Messages = Annotated[
    list[Message], Field(min_length=1, fail_fast=True), Allowed("a list of at least one message with role and content")
]
NoTools = Annotated[list[Any], Field(max_length=0), Allowed("empty, because these models call no tools")]


class ResponseFormat(RequestModel):
    type: Annotated[Literal["text"], Allowed('"text", because this server does not enforce other formats')]


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1), Allowed("a whole number of at least 1")] | None = Field(
        None, description="Maximum number of new tokens per choice. Default: as many as the context has room for."
    )
    max_tokens: Annotated[int, Field(ge=1), Allowed("a whole number of at least 1")] | None = Field(
        None, description="The older name of max_completion_tokens. If both are given, max_completion_tokens is used."
    )
    logprobs: Flag = Field(False, description="Return the log-probability of each token.")
    top_logprobs: (
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Allowed(f"a whole number from 0 to {MAX_LOGPROBS}")] | None
    ) = Field(None, description="Return this number of most likely tokens at each position. Needs logprobs=true.")
    response_format: Annotated[ResponseFormat, Allowed('{"type": "text"}')] | None = None
    tools: NoTools = []
    functions: NoTools = []

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs is only allowed with logprobs=true", "top_logprobs")


class TokenizeRequest(RequestModel):
    """A text or the messages of a conversation. Exactly one of the two must be given."""

    model: ModelName | None = Field(None, description="Default: the first model.")
    prompt: Text | None = None
    messages: Messages | None = None
    return_token_strs: Flag = Field(False, description="Return the text of each token too.")

    def check(self) -> None:
        """Raise APIError unless the request has either a prompt or messages."""
        if (self.prompt is None) == (self.messages is None):
            raise APIError(400, "the request must have either prompt or messages", "prompt")


class DetokenizeRequest(RequestModel):
    model: ModelName | None = Field(None, description="Default: the first model.")
    tokens: Annotated[
        list[Annotated[int, Field(ge=0)]],
        Field(fail_fast=True),
        Allowed("a list of token ids, whole numbers of at least 0"),
    ]


R = TypeVar("R", bound=RequestModel)


def parse(kind: type[R], body: dict[str, Any]) -> R:
    """Return the request in the body. Raises an APIError that names the first field with a wrong value."""
    try:
        parsed = kind.model_validate(body)
    except ValidationError as error:
        places = [
            problem["loc"] for problem in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        # A field with alternative types has one error per alternative. The longest location is the most precise one.
        raise _error(kind, body, max((place for place in places if place[0] == places[0][0]), key=len)) from None
    check = getattr(parsed, "check", None)
    if check is not None:
        check()
    return parsed


def _error(kind: type[RequestModel], body: Any, place: tuple[int | str, ...]) -> APIError:
    """Return the error about the value at a location, such as ("messages", 0, "role"), in a request of this kind."""
    model: type[RequestModel] | None = kind
    param, allowed, value = "", "", body
    for step in place:
        if isinstance(step, int):
            if model is None or not isinstance(value, list):  # the error is about the whole field, not about one item
                break
            param, value = f"{param}[{step}]", value[step]
            allowed = "a JSON object"
        elif model is not None and step in model.model_fields and isinstance(value, dict):
            field = model.model_fields[step]
            param = f"{param}.{step}" if param else step
            allowed = next(iter(_allowed(field.metadata) or _allowed(field.annotation)))
            if step not in value:
                return APIError(400, f"{param} is missing; it must be {allowed}", param, "missing_required_parameter")
            value, model = value[step], _model_in(field.annotation)
        elif model is None or step in getattr(model, "model_fields", ()):
            break
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return APIError(400, f"{param} must be {allowed}, got {shown}", param, "invalid_value")


def _allowed(annotation: Any) -> list[str]:
    """Return the texts of the `Allowed` in an annotation or in a list of metadata, the outermost first."""
    if isinstance(annotation, Allowed):
        return [annotation.values]
    inner = (
        annotation
        if isinstance(annotation, list)
        else [*getattr(annotation, "__metadata__", ()), *get_args(annotation)]
    )
    return [text for part in inner for text in _allowed(part)]


def _model_in(annotation: Any) -> type[RequestModel] | None:
    """Return the request model in an annotation, such as Message in list[Message], or None."""
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def ignored_fields(request: RequestModel) -> list[str]:
    """Return the names of a request's fields that are not in its schema, such as "messages[0].name"."""
    names = list(request.model_extra or ())
    for name in type(request).model_fields:
        value = getattr(request, name)
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for i, item in items:
            if isinstance(item, RequestModel):
                where = name if i is None else f"{name}[{i}]"
                names += [f"{where}.{inner}" for inner in ignored_fields(item)]
    return names


def ignored_header(request: RequestModel) -> dict[str, str]:
    """Return the header that lists the ignored fields of a request, percent-encoded and of limited length."""
    names = [quote(name[:100], safe="[].") or '""' for name in ignored_fields(request)]
    shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
    return {IGNORED_FIELDS: shown} if names else {}
