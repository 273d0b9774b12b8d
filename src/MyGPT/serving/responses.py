"""The responses of the HTTP API, in OpenAI's formats; those of /tokenize and /detokenize are vLLM's.

`as_json` leaves out a field that was not set. A field that was set to None is null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

FinishReason = Literal["stop", "length"]


class ResponseModel(BaseModel):
    """A JSON object in a response."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def as_json(self) -> str:
        """Return the JSON of the fields that were set."""
        return self.model_dump_json(exclude_unset=True)


def json_response(content: ResponseModel, headers: dict[str, str] | None = None) -> Response:
    """Return the HTTP response with this content."""
    return Response(content.as_json(), headers=headers, media_type="application/json")


class CachedTokens(ResponseModel):
    cached_tokens: int
    """Tokens of the prompts whose keys and values were still in the cache."""


class Usage(ResponseModel):
    """The token counts. Each prompt counts once. Every generated text counts, including texts that best_of discards."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Logprobs(ResponseModel):
    """The tokens of a text completion. All lists have the same length."""

    tokens: list[str]
    """The text of each token; "bytes:" and escapes for a token that is only a part of a character."""
    token_logprobs: list[float | None]
    """The log-probability of each token; null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The most likely tokens at each position, and the token itself, with their log-probabilities."""
    text_offset: list[int]
    """The position of each token, in characters from the start of the prompt."""


class CompletionChoice(ResponseModel):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    """Why the text ended: a stop text or an end-of-text token, or the maximum length. Null in a stream before the end."""


class Answer(ResponseModel):
    """The fields that all answers and all chunks of a stream have in common."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    """A hash that changes when the weights, their precision or the version of MyGPT change, which can change answers."""


class Completion(Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(ResponseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(ResponseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResponseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(ResponseModel):
    """The part of a message in one chunk. The first chunk of a choice has the role, and the last one is empty."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    refusal: None = None


class ChatChunkChoice(ResponseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """The context length of the model in tokens."""


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(ResponseModel):
    count: int
    max_model_len: int
    """The context length of the model in tokens."""
    tokens: list[int]
    token_strs: list[str] | None
    """The text of each token, with escapes for a token that is only a part of a character. Null unless asked for."""


class Detokenized(ResponseModel):
    prompt: str


class ErrorDetails(ResponseModel):
    message: str
    type: str
    param: str | None
    """The field of the request that was wrong."""
    code: str | None


class Error(ResponseModel):
    error: ErrorDetails
