"""The HTTP API through the `openai` client: every field, streamed and complete, in threads and with asyncio.

Tokens are compared with `generate`, and log-probabilities with transformers' GPT-2, both in float64. The engine takes the
log-softmax in float32, whose rounding is below 1e-6 for logits of this size, so 1e-5 leaves no room for a mistake.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from api_server import serving
from conftest import lively_model
from MyGPT.config import GPTConfig
from MyGPT.data.instructions import InstructionDataset
from MyGPT.data.templates import ALPACA, Template
from MyGPT.generation import generate
from MyGPT.model import GPTModel
from MyGPT.serving import Engine
from MyGPT.serving.models import ServedModel
from MyGPT.tokenizers import BPETokenizer
from oracles_model import transformers_twin
from places import ALICE

BPE = BPETokenizer.train(ALICE[:20_000], 256 + 1 + 60, progress=False)
TALK = Template(
    "Q: {instruction}\nA:",
    "Q: {instruction} ({input})\nA:",
    user="Q: {content}\n",
    assistant="A:{content}",
    asks="messages",
)
CONTEXT = 96
PROMPT = "Alice was beginning"
NO_END = {str(BPE.eot_token): -100}
"""A logit_bias for texts that must not end early."""


@pytest.fixture(scope="module")
def gpt() -> GPTModel:
    config = GPTConfig(
        vocab_size=BPE.n_vocab,
        context_length=CONTEXT,
        emb_dim=24,
        n_heads=3,
        n_layers=2,
        drop_rate=0.0,
        tie_weights=False,
    )
    return lively_model(config).double()


@pytest.fixture(scope="module")
def url(gpt: GPTModel) -> Iterator[str]:
    def served(name: str, template: Template | None) -> ServedModel:
        return ServedModel(name, Engine(gpt, BPE, slots=4), BPE, gpt, template)

    with serving(served("plain", None), served("talk", TALK), served("alpaca", ALPACA)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model="plain", prompt=prompt, **options)


def joined(stream: Any) -> dict[int, dict[str, Any]]:
    """Return the choices that the chunks of a stream add up to."""
    found: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "finish_reason": None, "tokens": []})
    for chunk in stream:
        for choice in chunk.choices:
            whole = found[choice.index]
            assert whole["finish_reason"] is None  # nothing follows the last chunk of a choice
            is_chat = hasattr(choice, "delta")
            whole["text"] += (choice.delta.content or "") if is_chat else choice.text
            whole["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                whole["tokens"] += choice.logprobs.content if is_chat else as_rows(choice.logprobs)
    return dict(found)


def as_rows(logprobs: Any) -> list[tuple[Any, ...]]:
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    return list(zip(*lists, strict=True))


def continuations(gpt: GPTModel, prompt: str, n_new: int, n: int = 1, **options: Any) -> list[list[int]]:
    ids = torch.tensor([BPE.encode(prompt)] * n)
    return generate(gpt, ids, n_new, **options)[:, ids.shape[1] :].tolist()


def twin_logprobs(gpt: GPTModel, ids: list[int]) -> torch.Tensor:
    """Return transformers' log-probabilities (T, V) of the token after each of the T ids."""
    with torch.no_grad():
        return transformers_twin(gpt)(torch.tensor([ids])).logits[0].log_softmax(-1)


# --- models


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["plain", "talk", "alpaca"]
    model = client.models.retrieve("talk")
    assert (model.object, model.owned_by, model.max_model_len) == ("model", "mygpt", CONTEXT)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="there is no model 'x/y'; the models are plain, talk, alpaca"):
        client.models.retrieve("x/y")


# --- text completions


def test_greedy_text_is_that_of_generate(client: openai.OpenAI, gpt: GPTModel) -> None:
    answer = complete(client, temperature=0, max_tokens=20)
    (new,) = continuations(gpt, PROMPT, 20)
    assert answer.choices[0].text == BPE.decode(new)
    assert (answer.choices[0].finish_reason, answer.choices[0].index, answer.choices[0].logprobs) == ("length", 0, None)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "plain"
    n = len(BPE.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (n, 20, n + 20)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.5},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
    ],
)  # fmt: skip
def test_sampled_texts_have_the_tokens_of_generate(
    client: openai.OpenAI, gpt: GPTModel, options: dict[str, Any]
) -> None:
    known = {name: options[name] for name in ("temperature", "top_p") if name in options}
    extra = {name: value for name, value in options.items() if name not in known}
    answer = complete(client, n=3, seed=5, max_tokens=12, extra_body=extra, **known)
    expected = continuations(gpt, PROMPT, 12, 3, seed=5, **{"temperature": 1.0, **options})
    assert [choice.text for choice in answer.choices] == [BPE.decode(ids) for ids in expected]


def test_without_a_seed_texts_differ_and_have_16_tokens(client: openai.OpenAI) -> None:
    texts = {complete(client, logit_bias=NO_END).choices[0].text for _ in range(3)}
    assert len(texts) == 3  # the odds of two equal texts of 16 tokens are far below 1e-9
    assert complete(client, logit_bias=NO_END).usage.completion_tokens == 16


def test_a_prompt_may_be_a_text_or_ids_or_several_of_either(client: openai.OpenAI) -> None:
    ids = BPE.encode(PROMPT)
    alone = [complete(client, prompt, seed=3, max_tokens=5).choices[0].text for prompt in (PROMPT, ids)]
    assert alone[0] == alone[1]
    for prompts in ([PROMPT, "The"], [ids, BPE.encode("The")]):
        answer = complete(client, prompts, seed=3, max_tokens=5, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].text == alone[0]
        assert answer.choices[3].text == complete(client, "The", seed=6, max_tokens=5).choices[0].text
        assert answer.usage.prompt_tokens == len(ids) + len(BPE.encode("The"))
        assert answer.usage.completion_tokens == 20


def test_an_empty_prompt_starts_a_document(client: openai.OpenAI) -> None:
    whole = complete(client, "<|endoftext|>", seed=1, max_tokens=9).choices[0].text
    assert complete(client, "", seed=1, max_tokens=9).choices[0].text == whole


def test_a_long_prompt_is_taken_from_the_cache(client: openai.OpenAI) -> None:
    prompt = "the same beginning of everything "
    complete(client, prompt, max_tokens=1)
    usage = complete(client, prompt, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


@pytest.mark.parametrize("k", [0, 1, 20])
def test_logprobs_are_those_of_transformers(client: openai.OpenAI, gpt: GPTModel, k: int) -> None:
    choice = complete(client, seed=2, max_tokens=20, logprobs=k).choices[0]
    prompt, logprobs = BPE.encode(PROMPT), choice.logprobs
    (new,) = continuations(gpt, PROMPT, 20, temperature=1.0, seed=2)
    expected = twin_logprobs(gpt, prompt + new)[len(prompt) - 1 : -1]  # (20, V)
    own = expected.gather(1, torch.tensor(new)[:, None])[:, 0]
    assert torch.tensor(logprobs.token_logprobs, dtype=torch.float64) == pytest.approx(own, abs=1e-5)
    for row, top, token in zip(expected, logprobs.top_logprobs, logprobs.tokens, strict=True):
        best = row.topk(k)
        shown = [legacy(id_) for id_ in best.indices.tolist()]
        assert list(top) == shown + [token] * (token not in shown)
        assert list(top.values())[:k] == pytest.approx(best.values.tolist(), abs=1e-5)


def legacy(id_: int) -> str:
    """Return the text of a token as OpenAI writes it: with an escape for each byte that is no whole character."""
    raw = BPE.decode_tokens_bytes([id_])[0]
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(chr(byte) if byte < 128 else f"\\x{byte:02x}" for byte in raw)


def test_tokens_offsets_and_text_agree(client: openai.OpenAI) -> None:
    """Offsets count from the beginning of the prompt, also without echo, as at OpenAI."""
    choice = complete(client, seed=4, max_tokens=40, logprobs=0, logit_bias=NO_END).choices[0]
    text, offsets = PROMPT + choice.text, choice.logprobs.text_offset
    assert offsets[0] == len(PROMPT) and offsets == sorted(offsets)
    assert any(token.startswith("bytes:") for token in choice.logprobs.tokens)
    for token, start in zip(choice.logprobs.tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text[start:].startswith(token)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_returns_the_prompt_with_its_logprobs(client: openai.OpenAI, gpt: GPTModel, max_tokens: int) -> None:
    ids = BPE.encode(PROMPT)
    answer = complete(client, ids, seed=2, max_tokens=max_tokens, logprobs=2, echo=True)
    without = complete(client, ids, seed=2, max_tokens=max_tokens)
    choice = answer.choices[0]
    assert choice.text == PROMPT + without.choices[0].text
    assert choice.finish_reason == "length" and answer.usage == without.usage.model_copy(
        update={"prompt_tokens_details": answer.usage.prompt_tokens_details}
    )
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(ids) + max_tokens and logprobs.text_offset[0] == 0
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    expected = twin_logprobs(gpt, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert "".join(logprobs.tokens[: len(ids)]) == PROMPT


def test_echo_without_logprobs(client: openai.OpenAI) -> None:
    choices = complete(client, [PROMPT, "The"], seed=2, max_tokens=3, echo=True).choices
    assert [choice.text.startswith(prompt) for choice, prompt in zip(choices, [PROMPT, "The"], strict=True)] == [
        True
    ] * 2
    assert choices[0].logprobs is None


def test_best_of_returns_the_texts_with_the_highest_logprob_per_token(client: openai.OpenAI) -> None:
    every = complete(client, seed=7, n=6, max_tokens=6, logprobs=0)
    means = {choice.text: sum(choice.logprobs.token_logprobs) / 6 for choice in every.choices}
    best = complete(client, seed=7, n=2, best_of=6, max_tokens=6)
    assert [choice.text for choice in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert [choice.index for choice in best.choices] == [0, 1] and best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 36
    same = complete(client, seed=7, n=2, best_of=2, max_tokens=6)
    assert [choice.text for choice in same.choices] == [choice.text for choice in every.choices[:2]]


def test_logit_bias_forces_and_forbids(client: openai.OpenAI) -> None:
    (id_,) = BPE.encode("e")
    assert complete(client, max_tokens=4, logit_bias={str(id_): 100}).choices[0].text == "eeee"
    greedy = complete(client, temperature=0, max_tokens=1, logprobs=2).choices[0].logprobs
    first, second = greedy.top_logprobs[0]
    (banned,) = [id_ for id_ in range(BPE.n_vocab) if legacy(id_) == first]
    biased = (
        complete(client, temperature=0, max_tokens=1, logit_bias={str(banned): -100}, logprobs=0).choices[0].logprobs
    )
    assert biased.tokens == [second]
    assert biased.token_logprobs == [greedy.top_logprobs[0][second]]  # the bias does not change log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_a_text_and_is_left_out_with_its_tokens(client: openai.OpenAI, stream: bool) -> None:
    whole = complete(client, seed=8, max_tokens=40, logprobs=1).choices[0]
    stop = whole.text[12:15]
    end = whole.text.index(stop)
    assert end > 0
    answer = complete(client, seed=8, max_tokens=40, logprobs=1, stop=["never", stop], stream=stream)
    if stream:
        choice = joined(answer)[0]
        text, reason, rows = choice["text"], choice["finish_reason"], choice["tokens"]
    else:
        choice = answer.choices[0]
        text, reason, rows = choice.text, choice.finish_reason, as_rows(choice.logprobs)
        assert 0 < answer.usage.completion_tokens < 40
    assert (text, reason) == (whole.text[:end], "stop")
    assert rows == [row for row in as_rows(whole.logprobs) if row[3] < len(PROMPT) + end]
    assert complete(client, seed=8, max_tokens=40, stop=stop).choices[0].text == text


def test_an_end_of_text_ends_a_text_and_is_among_the_tokens(client: openai.OpenAI) -> None:
    """lm_eval's scores of a prompt need as many tokens as were asked for, also if the new one is the end of text."""
    end = BPE.eot_token
    choice = complete(client, max_tokens=5, logit_bias={str(end): 100}, logprobs=1, echo=True).choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "stop")
    assert choice.logprobs.tokens == [*map(legacy, BPE.encode(PROMPT)), "<|endoftext|>"]
    answer = complete(client, max_tokens=3, logit_bias={str(end): 100}, extra_body={"ignore_eos": True})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("<|endoftext|>" * 3, "length")


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"logprobs": 3}, {"echo": True, "logprobs": 0}])
def test_a_stream_adds_up_to_the_complete_answer(client: openai.OpenAI, options: dict[str, Any]) -> None:
    common: dict[str, Any] = {"seed": 11, "n": 3, "max_tokens": 12, **options}
    whole = complete(client, [PROMPT, "The"], **common)
    chunks = list(complete(client, [PROMPT, "The"], stream=True, **common))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].object == "text_completion"
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)
    found = joined(chunks)
    for choice in whole.choices:
        tokens = [] if choice.logprobs is None else as_rows(choice.logprobs)
        expected = {"text": choice.text, "finish_reason": choice.finish_reason, "tokens": tokens}
        assert found[choice.index] == expected


def test_a_stream_can_end_with_the_usage(client: openai.OpenAI) -> None:
    *chunks, last = complete(
        client, max_tokens=3, stream=True, stream_options={"include_usage": True}, logit_bias=NO_END
    )
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == 3
    assert last.usage.prompt_tokens == len(BPE.encode(PROMPT))


def test_choices_are_streamed_at_the_same_time(client: openai.OpenAI) -> None:
    order = [
        chunk.choices[0].index for chunk in complete(client, n=4, max_tokens=40, seed=1, stream=True, logit_bias=NO_END)
    ]
    assert order.index(3) < len(order) - 1 - order[::-1].index(0)  # the last choice begins before the first one ends


def test_a_character_of_several_tokens_is_not_divided(client: openai.OpenAI, gpt: GPTModel) -> None:
    biases = {str(id_): 100 for id_ in BPE.encode("漢")}  # three tokens of one byte, in random order
    chunks = list(complete(client, max_tokens=40, seed=1, logit_bias=biases, stream=True))
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "漢" in "".join(texts) and "�" in "".join(texts)
    assert "".join(texts) == complete(client, max_tokens=40, seed=1, logit_bias=biases).choices[0].text


def test_unknown_fields_are_accepted_and_listed(client: openai.OpenAI) -> None:
    extra = {"min_tokens": 3, "stream_options": None, "ünknown\r\nfield": 1}
    raw = client.completions.with_raw_response.create(
        model="plain", prompt="a", max_tokens=1, user="me", extra_body=extra
    )
    assert raw.headers["X-MyGPT-Ignored-Fields"] == "min_tokens, %C3%BCnknown%0D%0Afield"
    message: Any = {"role": "user", "content": "a", "name": "Ann"}
    chat = client.chat.completions.with_raw_response.create(
        model="talk", messages=[message], max_tokens=1, store=True, stream=True
    )
    assert chat.headers["X-MyGPT-Ignored-Fields"] == "store, messages[0].name"
    plain = client.completions.with_raw_response.create(model="plain", prompt="a", max_tokens=1)
    assert "X-MyGPT-Ignored-Fields" not in plain.headers


# --- chat completions


def chat(client: openai.OpenAI, *contents: str, model: str = "talk", **options: Any) -> Any:
    """Ask for the next message after a user's message, the assistant's, and so on."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return client.chat.completions.create(model=model, messages=options.pop("messages", messages), **options)


def test_a_chat_continues_the_templates_prompt(client: openai.OpenAI, gpt: GPTModel) -> None:
    answer = chat(client, "Hi", "Yes", "Why?", temperature=0, max_tokens=9)
    prompt = f"Q: Hi\nA:Yes{BPE.decode([BPE.eot_token])}Q: Why?\nA:"
    assert answer.usage.prompt_tokens == len(BPE.encode(prompt))
    ids = torch.tensor([BPE.encode(prompt)])
    expected = BPE.decode(generate(gpt, ids, 9)[0, ids.shape[1] :].tolist())
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", expected, None)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].logprobs is None


def test_a_single_question_has_the_tokens_of_the_training_data(url: str) -> None:
    """The first token that the model is asked for is the first token of the answer in training."""
    record = {"instruction": "Say owl.", "input": "Be brief.", "output": "owl"}
    example = InstructionDataset([record], BPE, ALPACA)[0]
    trained = [id_ for id_, is_answer in zip(example, example.is_answer, strict=True) if not is_answer]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say owl."}]
    response = httpx.post(f"{url}/tokenize", json={"model": "alpaca", "messages": messages})
    assert response.json()["tokens"] == trained


def test_roles_and_parts_of_text(client: openai.OpenAI) -> None:
    plain: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say owl."}]
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Say owl."}]},
    ]
    answers = [chat(client, messages=messages, seed=3, max_tokens=8) for messages in (plain, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_an_answer_ends_where_the_next_question_would_begin(client: openai.OpenAI) -> None:
    (q,) = BPE.encode("Q")
    newline, colon = BPE.encode("\n")[0], BPE.encode(":")[0]
    answer = chat(client, "Hi", seed=1, logit_bias={str(id_): 100 for id_ in (q, newline, colon)})
    content = answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop" and "\nQ:" not in content and set(content) <= set("Q:\n")


def test_chat_logprobs_are_those_of_transformers(client: openai.OpenAI, gpt: GPTModel) -> None:
    answer = chat(client, "Hi", seed=2, max_tokens=20, logprobs=True, top_logprobs=5, logit_bias=NO_END)
    prompt = BPE.encode("Q: Hi\nA:")
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 20
    raw = b"".join(bytes(token.bytes) for token in content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content
    ids = list(prompt)
    for token in content:
        row = twin_logprobs(gpt, ids)[-1]
        best = row.topk(5)
        for shown, id_, value in zip(token.top_logprobs, best.indices.tolist(), best.values.tolist(), strict=True):
            own = BPE.decode_tokens_bytes([id_])[0]
            assert bytes(shown.bytes) == own and shown.token == own.decode(errors="backslashreplace")
            assert shown.logprob == pytest.approx(value, abs=1e-5)
        (id_,) = [id_ for id_ in range(BPE.n_vocab) if BPE.decode_tokens_bytes([id_])[0] == bytes(token.bytes)]
        assert token.logprob == pytest.approx(float(row[id_]), abs=1e-5)
        ids.append(id_)
    assert chat(client, "Hi", max_tokens=1, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_streamed_chat_adds_up_to_the_complete_answer(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"seed": 4, "n": 2, "max_completion_tokens": 25, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, "Hi", **common)
    *chunks, last = chat(client, "Hi", stream=True, stream_options={"include_usage": True}, **common)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 50
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert not any(choice.delta.role for choice in own[1:])
        assert own[-1].delta.model_fields_set == set() and own[-1].finish_reason == "length"
    found = joined(chunks)
    for choice in whole.choices:
        tokens = choice.logprobs.content
        expected = {"text": choice.message.content, "finish_reason": choice.finish_reason, "tokens": tokens}
        assert found[choice.index] == expected


def test_max_completion_tokens_and_the_context_limit_an_answer(client: openai.OpenAI) -> None:
    assert chat(client, "Hi", max_tokens=4, max_completion_tokens=2).usage.completion_tokens == 2
    answer = chat(client, "Hi", logit_bias=NO_END, seed=1)
    assert answer.usage.total_tokens == CONTEXT + 1 and answer.choices[0].finish_reason == "length"


def test_the_clients_stream_helper_understands_the_chunks(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"seed": 1, "logit_bias": {str(BPE.eot_token): 5}}
    messages: Any = [{"role": "user", "content": "Hi"}]
    with client.chat.completions.stream(model="talk", messages=messages, **options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat(client, "Hi", **options).choices[0].message.content


def test_the_asynchronous_client_gets_the_same(url: str, client: openai.OpenAI) -> None:
    expected = [complete(client, seed=seed, max_tokens=20).choices[0].text for seed in range(8)]

    async def text(asynchronous: openai.AsyncOpenAI, seed: int) -> str:
        options: dict[str, Any] = {"model": "plain", "prompt": PROMPT, "seed": seed, "max_tokens": 20}
        if seed % 2:
            return (await asynchronous.completions.create(**options)).choices[0].text
        stream = await asynchronous.completions.create(stream=True, **options)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asynchronous:
            return list(await asyncio.gather(*(text(asynchronous, seed) for seed in range(8))))

    assert asyncio.run(texts()) == expected
