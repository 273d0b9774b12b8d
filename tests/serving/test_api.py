"""The HTTP API without a client library: errors, limits, and the texts and tokens of any byte sequence."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_server import serving
from conftest import lively_model
from MyGPT.config import GPTConfig
from MyGPT.sampling import SamplingConfig
from MyGPT.serving import Engine, Request, Token
from MyGPT.serving.choices import ChoiceText, TokenPlaces, legacy_token_text, token_text
from MyGPT.serving.models import ServedModel, Settings
from MyGPT.serving.schema import ChatRequest, CompletionRequest, TokenizeRequest, ignored_header, parse
from MyGPT.serving.wire import APIError
from MyGPT.tokenizers import BPETokenizer, CharTokenizer, SimpleTokenizer
from places import ALICE

CHARS = CharTokenizer.from_text(ALICE[:2000])
BPE = BPETokenizer.train(ALICE[:5000], 256 + 1 + 20, progress=False)
WORDS = SimpleTokenizer.from_text(ALICE[:5000])
COMPLETION = {"model": "tiny", "prompt": "the"}
MESSAGES = [{"role": "user", "content": "the"}]
CHAT = {"model": "tiny", "messages": MESSAGES}
SECONDS = 30


def tiny(name: str = "tiny", slots: int = 4, **options: Any) -> ServedModel:
    config = GPTConfig(
        vocab_size=CHARS.n_vocab, context_length=64, emb_dim=12, n_heads=3, n_layers=1, drop_rate=0.0, tie_weights=False
    )
    gpt = lively_model(config)
    return ServedModel(name, Engine(gpt, CHARS, slots=slots, **options), CHARS, gpt)


class Pause(contextlib.AbstractContextManager[None]):
    """A lock for an engine, whose steps take at least so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        time.sleep(self.seconds)

    def __exit__(self, *_: object) -> None:
        pass


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- wrong values


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", 3, "model must be the name of a model, as in /v1/models, got 3"),
        ("model", None, "model must be the name of a model, as in /v1/models, got null"),
        ("n", 0, "n must be a whole number from 1 to 128, got 0"),
        ("n", "5", 'n must be a whole number from 1 to 128, got "5"'),
        ("n", True, "n must be a whole number from 1 to 128, got true"),
        ("n", 1.0, "n must be a whole number from 1 to 128, got 1.0"),
        ("temperature", -1, "temperature must be a number from 0 to 2, got -1"),
        ("temperature", 2.5, "temperature must be a number from 0 to 2, got 2.5"),
        ("temperature", False, "temperature must be a number from 0 to 2, got false"),
        ("top_p", 1.5, "top_p must be a number from 0 to 1, got 1.5"),
        ("top_k", -2, "top_k must be a whole number of at least 1, or 0 or -1 for no limit, got -2"),
        ("min_p", "a", 'min_p must be a number from 0 to 1, got "a"'),
        ("repetition_penalty", 0, "repetition_penalty must be a number above 0, got 0"),
        ("presence_penalty", 0.5, "presence_penalty must be 0 (this server has repetition_penalty instead"),
        ("frequency_penalty", -1, "frequency_penalty must be 0 (this server has repetition_penalty instead"),
        ("logit_bias", {"a": 1}, "logit_bias must be an object with token ids as names"),
        ("logit_bias", {"1": 101}, "logit_bias must be an object with token ids as names"),
        ("logit_bias", [1], "logit_bias must be an object with token ids as names"),
        ("seed", 2**63, "seed must be a whole number of 64 bits"),
        ("stop", "", "stop must be a text or a list of at most 16 texts, none of them empty"),
        ("stop", ["a"] * 17, "stop must be a text or a list of at most 16 texts, none of them empty"),
        ("stop", [1], "stop must be a text or a list of at most 16 texts, none of them empty"),
        ("stream", "yes", 'stream must be true or false, got "yes"'),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage must be true or false, got 1"),
        ("user", 3, "user must be a text, got 3"),
        ("prompt", [], "prompt must be a text, a list of token ids, or a list of texts"),
        ("prompt", [[]], "prompt must be a text, a list of token ids, or a list of texts"),
        ("prompt", [1, "a"], "prompt must be a text, a list of token ids, or a list of texts"),
        ("prompt", {"text": "a"}, "prompt must be a text, a list of token ids, or a list of texts"),
        ("max_tokens", -1, "max_tokens must be a whole number of at least 0, got -1"),
        ("best_of", 0, "best_of must be a whole number from 1 to 128, got 0"),
        ("echo", 1, "echo must be true or false, got 1"),
        ("logprobs", 21, "logprobs must be a whole number from 0 to 20, got 21"),
        ("logprobs", True, "logprobs must be a whole number from 0 to 20, got true"),
        ("suffix", "end", 'suffix must be empty, because these models only write from left to right, got "end"'),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(field: str, value: Any, words: str) -> None:
    with pytest.raises(APIError) as caught:
        parse(CompletionRequest, {**COMPLETION, field: value})
    error = caught.value
    assert error.message.startswith(words) and error.message.count(".") <= 2
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert error.param == words.split(" ")[0]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "must be a list of at least one message with role and content, got []"),
        ({"messages": "Hi"}, "messages", 'must be a list of at least one message with role and content, got "Hi"'),
        ({"messages": [*MESSAGES, "Hi"]}, "messages[1]", 'must be a JSON object, got "Hi"'),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing; it must be a text or a list of parts"),
        (
            {"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role",
            'must be system, developer, user or assistant, got "tool"',
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be a text or a list of parts"),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content[0].type",
            'must be "text", because these models read only text, got "image_url"',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content[0].text",
            "must be a text, got 3",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "must be empty, because these models call no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", 'must be "text", because this server'),
        ({"max_tokens": 0}, "max_tokens", "must be a whole number of at least 1, got 0"),
        ({"logprobs": 3}, "logprobs", "must be true or false, got 3"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be a whole number from 0 to 20, got 21"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_found_by_its_place(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(APIError) as caught:
        parse(ChatRequest, {**CHAT, **change})
    assert caught.value.param == param and caught.value.message.startswith(f"{param} {words}")


@pytest.mark.parametrize(
    ("kind", "body", "param", "words"),
    [
        (CompletionRequest, {"prompt": "a"}, "model", "model is missing; it must be the name of a model"),
        (CompletionRequest, {**COMPLETION, "best_of": 2, "n": 3}, "best_of", "best_of must be at least n, got"),
        (CompletionRequest, {**COMPLETION, "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        (CompletionRequest, {**COMPLETION, "stream_options": {}}, "stream_options", "only allowed with stream=true"),
        (ChatRequest, {"model": "tiny"}, "messages", "messages is missing; it must be a list"),
        (ChatRequest, {**CHAT, "top_logprobs": 1}, "top_logprobs", "only allowed with logprobs=true"),
        (TokenizeRequest, {}, "prompt", "must have either prompt or messages"),
        (TokenizeRequest, {"prompt": "a", "messages": MESSAGES}, "prompt", "must have either prompt or messages"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(kind: Any, body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(APIError, match=words) as caught:
        parse(kind, body)
    assert caught.value.param == param


def test_null_stands_for_the_default() -> None:
    names = [name for name in CompletionRequest.model_fields if name != "model"]
    assert parse(CompletionRequest, {"model": "tiny", **dict.fromkeys(names)}) == CompletionRequest(model="tiny")


def test_a_million_wrong_values_are_refused_quickly() -> None:
    begun = time.monotonic()
    with pytest.raises(APIError) as caught:
        parse(CompletionRequest, {**COMPLETION, "prompt": [1, None] * 500_000})
    assert len(caught.value.message) < 250
    assert time.monotonic() - begun < 5  # one error per value took minutes


def test_many_ignored_fields_make_a_short_header() -> None:
    (header,) = ignored_header(
        parse(CompletionRequest, {**COMPLETION, **{f"é{i}" * 200: 1 for i in range(100)}})
    ).values()
    assert header.isascii() and header.endswith(", and 80 more") and len(header) < 20_000


def test_a_field_without_a_name_makes_a_valid_header() -> None:
    """A header must not end with a space: the server closed the connection without an answer."""
    (header,) = ignored_header(parse(CompletionRequest, {**COMPLETION, "a": 1, "": 2})).values()
    assert header == 'a, ""'


# --- texts and tokens


def finished(tokenizer: Any, prompt: list[int], new: list[int], stop: list[str], reason: Any) -> Request:
    request = Request(prompt, SamplingConfig(), 99, 0, [], stop, 0, tokenizer=tokenizer)
    request.tokens = [Token(id_, -1.0) for id_ in new]
    request.prompt_tokens = [Token(id_, -1.0) for id_ in prompt]
    request.end(reason)
    return request


@given(st.lists(st.integers(0, 276), max_size=20), st.lists(st.integers(0, 276), max_size=20), st.booleans())
@settings(deadline=None, max_examples=100)
def test_pieces_of_any_bytes_add_up_to_the_text_with_its_tokens(prompt: list[int], new: list[int], echo: bool) -> None:
    request = finished(BPE, prompt, new, [], "length")
    running = ChoiceText(request, echo)
    request.finished = None
    pieces = [running.add(token) for token in request.tokens]
    request.end("length")
    pieces.append(running.end())
    whole = ChoiceText(request, echo).whole()
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [pair for piece in pieces for pair in piece.tokens] == whole.tokens
    assert [token.id for _, token in whole.tokens] == (prompt if echo else []) + new
    if echo:
        assert whole.text == BPE.decode(prompt + new)
    for piece, n in zip(pieces, range(1, len(new) + 1), strict=False):
        assert all(place < len(BPE.decode(prompt + new[:n])) for place, _ in piece.tokens)


@given(st.lists(st.integers(0, 276), min_size=1, max_size=30))
@settings(deadline=None, max_examples=100)
def test_a_token_begins_where_its_bytes_begin(ids: list[int]) -> None:
    places, text = TokenPlaces(BPE), BPE.decode(ids)
    found = [places.add(id_) for id_ in ids]
    raw = BPE.decode_tokens_bytes(ids)
    for i, place in enumerate(found):
        before = b"".join(raw[:i]).decode(errors="replace").rstrip("\ufffd")
        assert place >= len(before) and text[: len(before)] == before
        if raw[i].decode(errors="ignore").encode() == raw[i]:  # whole characters
            assert text[place:].startswith(raw[i].decode())


def test_words_begin_after_the_word_before() -> None:
    ids = WORDS.encode("Alice was beginning, very")
    places = TokenPlaces(WORDS)
    assert [places.add(id_) for id_ in ids] == [0, 5, 9, 19, 20]


def test_a_stop_text_within_a_token_keeps_this_token() -> None:
    ids = BPE.encode("tired of the")
    first = next(i for i in range(1, len(ids)) if len(BPE.decode([ids[i]])) > 1)
    stop = BPE.decode([ids[first]])[1:]
    text = ChoiceText(finished(BPE, [1], ids, [stop], "stop")).whole()
    assert text.text == BPE.decode(ids).partition(stop)[0]
    assert [token.id for _, token in text.tokens] == ids[: first + 1]


def test_token_texts_show_the_bytes_of_parts_of_characters() -> None:
    id_ = next(id_ for id_ in range(256) if BPE.decode_tokens_bytes([id_]) == [b"\xe2"])
    assert (token_text(BPE, id_), legacy_token_text(BPE, id_)) == ("\\xe2", "bytes:\\xe2")
    assert token_text(BPE, BPE.encode("e")[0]) == legacy_token_text(BPE, BPE.encode("e")[0]) == "e"


# --- over HTTP


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    slow = tiny("slow", lock=Pause(0.02))
    with (
        serving(tiny(), slow, settings=Settings(request_timeout=0.3, max_prompts=8)) as url,
        httpx.Client(base_url=url) as client,
    ):
        yield client


def post(client: httpx.Client, path: str, body: dict[str, Any], status: int = 200) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "words"),
    [
        ({"model": "x"}, 404, "model", "model_not_found", "there is no model 'x'; the models are tiny, slow"),
        ({"prompt": "漢"}, 400, "prompt", "invalid_value", "character '漢' at position 0 is not in the vocabulary"),
        ({"prompt": [999]}, 400, "prompt", "invalid_value", "prompt has the token id 999, but the ids of tiny are 0 to"),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias", "invalid_value", "logit_bias has the token id 999"),
        ({"prompt": ""}, 400, "prompt", None, "prompt is empty, and tiny has no token that starts a document"),
        (
            {"prompt": "the " * 17}, 400, "prompt", "context_length_exceeded",
            "prompt has 68 tokens, but the model's context is 64: shorten the text",
        ),
        (
            {"max_tokens": 63}, 400, "prompt", "context_length_exceeded",
            "prompt takes 3 of the 64 tokens of the model's context, so at most 62 can follow, but 63 were asked for",
        ),
        ({"n": 9}, 400, "n", "too_many_texts", "the request asks for 9 texts (9 per prompt), but at most 8"),
        ({"prompt": ["the"] * 9}, 400, "prompt", "too_many_texts", "the request asks for 9 texts (1 per prompt)"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused(
    server: httpx.Client, change: dict[str, Any], status: int, param: str, code: str | None, words: str
) -> None:
    error = post(server, "/v1/completions", {**COMPLETION, **change}, status)["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"].startswith(words)


def test_a_model_without_a_template_refuses_chats(server: httpx.Client) -> None:
    error = post(server, "/v1/chat/completions", CHAT, 400)["error"]
    words = "the model tiny has no chat template: use /v1/completions, or fine-tune it with mygpt finetune"
    assert (error["message"], error["code"]) == (words, "model_has_no_template")


def test_the_default_length_ends_at_the_context(server: httpx.Client) -> None:
    body = {**COMPLETION, "prompt": "the " * 15}
    assert post(server, "/v1/completions", body)["usage"]["completion_tokens"] == 5


def test_tokens_and_texts(server: httpx.Client) -> None:
    ids = CHARS.encode("the end")
    expected = {"count": 7, "max_model_len": 64, "tokens": ids, "token_strs": None}
    assert post(server, "/tokenize", {"prompt": "the end"}) == expected
    body = {"model": "slow", "prompt": "the end", "return_token_strs": True, "add_special_tokens": False}
    assert post(server, "/tokenize", body) == {**expected, "token_strs": list("the end")}
    assert post(server, "/detokenize", {"tokens": ids}) == {"prompt": "the end"}
    assert post(server, "/detokenize", {"tokens": []}) == {"prompt": ""}
    assert post(server, "/detokenize", {"tokens": [999]}, 400)["error"]["param"] == "tokens"
    assert post(server, "/detokenize", {"tokens": [-1]}, 400)["error"]["param"] == "tokens"


def test_an_answer_that_is_not_complete_in_time_is_an_error(server: httpx.Client) -> None:
    body = {**COMPLETION, "model": "slow", "max_tokens": 60}
    response = server.post("/v1/completions", json=body)
    assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert error["code"] == "timeout" and "the request reached its deadline after" in error["message"]
    events = server.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout" and events[-1] == ""


@pytest.mark.parametrize("stream", [True, False])
def test_all_choices_end_when_the_client_leaves(stream: bool) -> None:
    served = tiny(lock=Pause(0.02))
    body = {**COMPLETION, "max_tokens": 60, "n": 4, "stream": stream}
    with serving(served) as url:
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=0.5) as response,
        ):
            next(response.iter_lines())
        until(lambda: not served.engine.stats()["waiting"] + served.engine.stats()["running"])
        assert 0 < served.engine.stats()["generated_tokens"] < 4 * 60


def test_when_the_queue_is_full_no_choice_is_left_behind() -> None:
    lock = threading.Lock()
    served = tiny(slots=1, max_queue=2, lock=lock)
    with serving(served) as url, lock:
        first = served.engine.submit("the", max_new_tokens=3)
        until(lambda: served.engine.stats()["running"] == 1)
        response = httpx.post(f"{url}/v1/completions", json={**COMPLETION, "n": 4})
        assert response.status_code == 429 and response.headers["Retry-After"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        lock.release()
        try:
            assert len(list(first)) == 3
            until(lambda: not served.engine.stats()["waiting"] + served.engine.stats()["running"])
            assert served.engine.stats()["generated_tokens"] == 3
        finally:
            lock.acquire()


def test_a_model_that_fails_is_an_error_without_a_traceback() -> None:
    served = tiny()
    with serving(served) as url:
        served.gpt.transformer.ln_f.weight.data.fill_(float("nan"))
        response = httpx.post(f"{url}/v1/completions", json=COMPLETION)
        stream = httpx.post(f"{url}/v1/completions", json={**COMPLETION, "stream": True})
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert "Traceback" not in response.text and '"type": "server_error"' in stream.text


def test_the_fingerprint_changes_with_the_weights() -> None:
    one, two = tiny(), tiny()
    assert one.fingerprint == two.fingerprint
    changed = tiny()
    changed.gpt.transformer.wte.weight.data.add_(1e-3)
    assert changed.fingerprint != one.fingerprint
    for served in (one, two, changed):
        served.engine.close()


def test_the_description_names_every_route_and_field(server: httpx.Client) -> None:
    from MyGPT.serving.api import ROUTES

    description = server.get("/openapi.json").json()
    assert description["openapi"] == "3.1.0"
    assert {route.path.replace(":path", "") for route in ROUTES} - {"/openapi.json"} == description["paths"].keys()
    schemas = description["components"]["schemas"]
    assert schemas["CompletionRequest"]["properties"].keys() == CompletionRequest.model_fields.keys()
    n = schemas["CompletionRequest"]["properties"]["n"]
    assert n["anyOf"] == [{"maximum": 128, "minimum": 1, "type": "integer"}, {"type": "null"}]
    assert n["default"] == 1 and n["description"]
