"""Test the page at / and its endpoints: their numbers against transformers, and the whole page in a real browser."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch

from browser import open_browser
from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, SamplingConfig, generate, get_tokenizer
from MyGPT.acceleration.step import accelerate
from MyGPT.data.templates import Template
from MyGPT.generation import TextStream
from MyGPT.inside import ablate_heads
from MyGPT.inside.page import MAX_TOKENS, page_data
from MyGPT.inside.walk import walk_data
from MyGPT.sampling import filter_logits
from oracles_model import transformers_twin

pytest.importorskip("uvicorn")

from api_server import running
from MyGPT.serving import Engine
from MyGPT.serving.inspect import Inspector, page_headers, page_html, token_pieces
from MyGPT.serving.models import ServedModel, Settings

SECONDS = 10
"""The longest time that a test waits for the page or for the server."""
TOKENIZER = CharTokenizer([*(chr(32 + i) for i in range(95)), "\n", "é"])
TEXT = "The <b>Cat</b> & "


def served(name: str, context: int, template: Template | None = None) -> ServedModel:
    config = GPTConfig(
        vocab_size=97, context_length=context, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True
    )
    model = lively_model(config)
    return ServedModel(name, Engine(model, TOKENIZER, slots=4), TOKENIZER, model, template)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, ServedModel]]:
    template = Template("{instruction}\n", "{instruction}\n{input}\n", asks="messages", turn_end="\n")
    found = {"first": served("first", 240), "second": served("second", 60, template)}
    yield found
    for one in found.values():
        one.engine.close()


@pytest.fixture(scope="module")
def address(models: dict[str, ServedModel]) -> Iterator[str]:
    with running(models, Settings()) as address:
        yield address


@pytest.fixture(scope="module")
def post(address: str) -> Iterator[Callable[..., Any]]:
    with httpx.Client(base_url=address, trust_env=False) as client:

        def post(path: str, **body: Any) -> Any:
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            if response.headers["content-type"].startswith("text/event-stream"):
                return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            return response.json()

        yield post


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait until the condition returns something true, and return that."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not become true within {SECONDS} seconds")


@torch.no_grad()
def logits_after(model: ServedModel, ids: list[int]) -> torch.Tensor:
    """Return the logits (V,) of the token that follows the ids, as transformers computes them."""
    logits: torch.Tensor = transformers_twin(model.gpt)(torch.tensor([ids])).logits[0, -1]
    return logits


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "top_k": 60, "top_p": 0.99, "min_p": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_of_the_next_token_is_that_of_the_filtered_logits(
    post: Callable[..., Any], models: dict[str, ServedModel], settings: dict[str, Any]
) -> None:
    logits = logits_after(models["first"], TOKENIZER.encode(TEXT))
    of_model = logits.softmax(-1)
    filtered = filter_logits(logits[None], SamplingConfig(**settings))[0]
    if settings["temperature"] == 0:
        filtered = logits.masked_fill(logits < logits.max(), -math.inf)
    sampled, is_kept = filtered.softmax(-1), filtered > -math.inf
    answer = post("/page/next", text=TEXT, **settings)
    ids = [id_ for id_, *_ in answer["tokens"]]
    assert ids == of_model.topk(20).indices.tolist()
    assert [label for _, label, *_ in answer["tokens"]] == [
        TOKENIZER.decode([i]).replace(" ", "·").replace("\n", "↵") for i in ids
    ]
    # float32 rounding of logits up to 10 changes probabilities by at most 1e-5.
    assert [p for *_, p, _, _ in answer["tokens"]] == pytest.approx(of_model[ids].tolist(), abs=1e-5)
    assert [p for *_, p, _ in answer["tokens"]] == pytest.approx(sampled[ids].tolist(), abs=1e-5)
    assert [kept for *_, kept in answer["tokens"]] == is_kept[ids].tolist()
    hidden = [id_ for id_ in range(97) if id_ not in ids]
    assert answer["n_kept"] == int(is_kept.sum()) and answer["n_hidden"] == int(is_kept[hidden].sum())
    assert answer["hidden"] == pytest.approx(float(sampled[hidden].sum()), abs=1e-5)
    assert answer["removed"] == pytest.approx(float(of_model[~is_kept].sum()), abs=1e-5)
    assert (answer["n_tokens"], answer["prompt"], answer["vocab_size"]) == (len(TEXT), TEXT, 97)


def test_new_settings_need_no_forward_pass_and_a_longer_text_only_its_new_tokens(
    models: dict[str, ServedModel],
) -> None:
    inspector = Inspector(models["first"])
    hook = inspector.model.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[1]))
    ids, computed = TOKENIZER.encode("a longer text, and then another"), list[int]()
    first = inspector.distribution(ids[:10], SamplingConfig(1.0))
    second = inspector.distribution(ids[:10], SamplingConfig(0.5, top_k=3))
    assert first != second and computed == [10]
    assert [inspector.next_logits(ids[:n]).shape for n in (12, 11, 12, 31)] == [(97,)] * 4
    assert computed == [10, 2, 1, 20]  # 11 tokens begin like 12, whose last key is computed again
    hook.remove()
    torch.testing.assert_close(inspector.next_logits(ids), logits_after(models["first"], ids), atol=1e-4, rtol=0)


def test_distribution_is_that_of_the_model_that_generates(models: dict[str, ServedModel]) -> None:
    """In int8, the engine's model has other probabilities than the model whose weights were quantized."""
    gpt, ids = models["first"].gpt, TOKENIZER.encode(TEXT)
    with Engine(accelerate(gpt, "int8", compiled=False), TOKENIZER, slots=1) as engine:
        found = Inspector(ServedModel("int8", engine, TOKENIZER, gpt)).distribution(ids, SamplingConfig(1.0))
        (token,) = engine.submit(ids, max_new_tokens=1, logprobs=10)
    shown = [(id_, p) for id_, _, p, _, _ in found["tokens"][:10]]
    assert [id_ for id_, _ in shown] == [id_ for id_, _ in token.top]
    of_engine = [math.exp(logprob) for _, logprob in token.top]
    assert [p for _, p in shown] == pytest.approx(of_engine, abs=1e-5)
    of_gpt = logits_after(models["first"], ids).softmax(-1)[[id_ for id_, _ in shown]].tolist()
    assert max(abs(one - other) for one, other in zip(of_engine, of_gpt, strict=True)) > 1e-4


def test_distribution_of_a_text_beyond_the_context_is_that_of_its_last_tokens(
    post: Callable[..., Any], models: dict[str, ServedModel]
) -> None:
    ids = [i % 97 for i in range(70)]
    expected = logits_after(models["second"], ids[-60:]).softmax(-1)
    answer = post("/page/next", model="second", ids=ids, temperature=1)
    assert [p for *_, p, _, _ in answer["tokens"]] == pytest.approx(expected.topk(20).values.tolist(), abs=1e-5)
    assert answer["n_tokens"] == 70


def test_inspector_shares_the_weights_but_not_the_modules(models: dict[str, ServedModel]) -> None:
    """Hooks on shared modules would record, and change, what the engine computes in its thread."""
    model, inspector = models["first"], Inspector(models["first"])
    for (name, mine), theirs in zip(inspector.gpt.named_parameters(), model.gpt.parameters(), strict=True):
        assert mine is theirs, name
    assert not {id(module) for module in inspector.gpt.modules()} & {id(module) for module in model.gpt.modules()}


@torch.no_grad()
def test_tokens_of_a_text_have_the_probabilities_of_transformers(
    post: Callable[..., Any], models: dict[str, ServedModel]
) -> None:
    ids = TOKENIZER.encode(TEXT)
    logprobs = transformers_twin(models["first"].gpt)(torch.tensor([ids])).logits[0].log_softmax(-1)
    tokens = post("/page/read", text=TEXT)["tokens"]
    assert [token["id"] for token in tokens] == ids
    assert "".join(token["text"] for token in tokens) == TEXT
    assert (tokens[0]["logprob"], tokens[0]["top"]) == (None, [])
    for before, token in enumerate(tokens[1:]):
        assert token["logprob"] == pytest.approx(float(logprobs[before, token["id"]]), abs=1e-4)
        assert [id_ for id_, _, _ in token["top"]] == logprobs[before].topk(10).indices.tolist()


def test_tokens_of_a_text_beyond_the_context_have_no_probabilities(post: Callable[..., Any]) -> None:
    tokens = post("/page/read", model="second", text="x" * 61)["tokens"]
    assert [(token["text"], token["logprob"], token["top"]) for token in tokens] == [("x", None, [])] * 61
    assert post("/page/read", model="second", text="") == {"tokens": [], "prompt": ""}


def test_texts_of_tokens_keep_incomplete_characters_back() -> None:
    tokenizer = get_tokenizer("gpt2")
    text = "naïve 🙂 Ελλάδα 日本"
    ids = tokenizer.encode(text)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text and "" in pieces
    assert token_pieces(tokenizer, ids[:-1])[-1] == ""  # a part of 本
    # A continuation after a part of a character begins with the whole character.
    stream = TextStream(tokenizer, ids[:-2])
    assert [stream.add(id_) for id_ in ids[-2:]] == pieces[-2:]


@pytest.mark.parametrize("settings", SETTINGS[1:4], ids=str)
def test_stream_has_the_tokens_of_generate_and_the_text_of_the_completions(
    post: Callable[..., Any], models: dict[str, ServedModel], settings: dict[str, Any]
) -> None:
    ids = TOKENIZER.encode(TEXT)
    new = generate(models["first"].gpt, torch.tensor([ids]), 12, seed=5, tokenizer=TOKENIZER, **settings)[0, len(ids) :]
    first, *tokens, last = post("/page/generate", ids=ids, max_tokens=12, seed=5, **settings)
    assert (first, last) == ({"prompt": TEXT, "last_text": " "}, {"finish_reason": "length"})
    assert [token["id"] for token in tokens] == new.tolist()
    logits = logits_after(models["first"], ids).log_softmax(-1)
    assert [
        [id_, TOKENIZER.encode(label.replace("·", " ").replace("↵", "\n"))] for id_, label, _ in tokens[0]["top"]
    ] == [[id_, [id_]] for id_ in logits.topk(10).indices.tolist()]
    assert [logprob for *_, logprob in tokens[0]["top"]] == pytest.approx(logits.topk(10).values.tolist(), abs=1e-4)
    completion = post("/v1/completions", model="first", prompt=TEXT, max_tokens=12, seed=5, **settings)
    assert "".join(token["text"] for token in tokens) == completion["choices"][0]["text"]


OFF = [[0, 1], [1, 2]]


@torch.no_grad()
def test_heads_that_are_off_change_the_distribution_as_ablate_heads_does(
    post: Callable[..., Any], models: dict[str, ServedModel]
) -> None:
    ids = TOKENIZER.encode(TEXT)
    with ablate_heads(models["first"].gpt, [(0, 1), (1, 2)]):
        of_model = models["first"].gpt(torch.tensor([ids]))[0, -1].softmax(-1)
    on = post("/page/next", ids=ids, temperature=1)
    off = post("/page/next", ids=ids, temperature=1, heads_off=OFF)
    assert [p for *_, p, _, _ in off["tokens"]] == pytest.approx(of_model.topk(20).values.tolist(), abs=1e-5)
    assert off != on and post("/page/next", ids=ids, temperature=1, heads_off=[]) == on


def test_walk_is_that_of_python(post: Callable[..., Any], models: dict[str, ServedModel]) -> None:
    ids = TOKENIZER.encode(TEXT)
    for off in ([], OFF):
        expected = walk_data(models["first"].gpt, TOKENIZER, torch.tensor([ids]), 1, 2, 5, [(i, j) for i, j in off])
        assert post("/page/walk", ids=ids, layer=1, head=2, token=5, heads_off=off) == expected
        assert post("/page/walk", text=TEXT, layer=1, head=2, token=5, heads_off=off) == expected


def test_look_inside_shows_the_last_tokens(post: Callable[..., Any], models: dict[str, ServedModel]) -> None:
    ids = [(7 * i) % 97 for i in range(MAX_TOKENS + 3)]
    assert post("/page/inside", ids=ids) == {
        **json.loads(json.dumps(page_data(models["first"].gpt, TOKENIZER, torch.tensor([ids[3:]])))), "n_left_out": 3,
    }  # fmt: skip
    off = post("/page/inside", ids=ids[3:], heads_off=OFF)
    expected = page_data(models["first"].gpt, TOKENIZER, torch.tensor([ids[3:]]), [(0, 1), (1, 2)])
    assert off == {**json.loads(json.dumps(expected)), "n_left_out": 0}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("next", {"text": ""}, 400, "the text is empty"),
        ("next", {"text": 3}, 400, "text must be a string, got 3"),
        ("next", {"text": "a", "top_p": 2}, 400, "top_p must be a number above 0 and at most 1, got 2"),
        ("next", {"text": "a", "model": "third"}, 404, "there is no model 'third'; the models are first, second"),
        ("next", {"text": "a", "model": 3}, 400, "model must be the name of a model, got 3"),
        ("read", {"text": "日"}, 400, "'日'"),
        ("read", {"ids": [1, 97]}, 400, "ids must be a list of token ids from 0 to 96"),
        ("read", {"text": "a" * 961}, 400, "the text has 961 tokens, but the page shows at most 960: shorten the text"),
        ("read", {"ids": "12"}, 400, "ids must be a list of token ids"),
        ("generate", {"ids": []}, 400, "the prompt is empty"),
        ("generate", {"ids": [1], "max_tokens": "many"}, 400, "max_tokens must be a whole number, got 'many'"),
        ("generate", {"ids": [1], "max_tokens": -1}, 400, "max_new_tokens must be a whole number of at least 0, got -1"),
        ("generate", {"ids": [1], "seed": 1.5}, 400, "seed must be a whole number, got 1.5"),
        ("generate", {"ids": [1] * 241}, 400, "the prompt has 241 tokens, but the model's context is 240"),
        ("inside", {"ids": []}, 400, "the text is empty"),
        ("inside", {"ids": [1], "heads_off": [[0, 3]]}, 400, "with layers from 0 to 1 and heads from 0 to 2, got [[0, 3]]"),
        ("next", {"ids": [1], "heads_off": [0, 1]}, 400, "heads_off must be a list of pairs [layer, head]"),
        ("next", {"ids": [1], "heads_off": [[0, True]]}, 400, "got [[0, True]]"),
        ("walk", {"ids": [1], "heads_off": {}}, 400, "heads_off must be a list of pairs [layer, head]"),
        ("walk", {"ids": []}, 400, "the text is empty"),
        ("walk", {"ids": [1], "layer": 2}, 400, "layer must be a whole number from 0 to 1, got 2"),
        ("walk", {"ids": [1], "head": -1}, 400, "head must be a whole number from 0 to 2, got -1"),
        ("walk", {"ids": [1], "token": 1.0}, 400, "token must be a whole number, got 1.0"),
        ("walk", {"ids": [1], "token": 1}, 400, "token must be a whole number from 0 to 0, got 1"),
        ("walk", {"ids": [1] * 129}, 400, "the text has 129 tokens, a walk can have at most 128"),
    ],
)  # fmt: skip
def test_wrong_values_are_errors_of_one_sentence(
    address: str, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = httpx.post(f"{address}/page/{path}", json=body, trust_env=False)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert words in message and "\n" not in message


def test_page_is_one_document_that_allows_only_its_own_code(address: str) -> None:
    response = httpx.get(address, trust_env=False)
    assert (response.status_code, response.text) == (200, page_html())
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy == page_headers()["Content-Security-Policy"]
    assert (
        policy.startswith("default-src 'none'; img-src data:")
        and "connect-src 'self'" in policy
        and "unsafe" not in policy
    )
    assert not re.search(
        r"<link[^>]+stylesheet|<script[^>]+src|@import|url\(|\{\{|innerHTML|insertAdjacent", page_html()
    )
    ids = re.findall(r'\bid="([^"]+)"', page_html())
    assert len(ids) == len(set(ids)) > 50
    addresses = re.findall(r"https?://[^\s'\"`$]*", page_html())
    assert addresses == ["http://www.w3.org/2000/svg"]  # a namespace in the icon


# The page in a browser. All tests share one browser, and each opens the page anew.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser("--window-size=1280,900", logs=("browser", "performance")) as opened:
        yield opened


class Page:
    """The page, and what a user does and sees."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.address = browser, address

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector))

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def chord(self, *keys: str) -> None:
        """Press keys together."""
        self.press("".join(keys) + "\ue000")

    def set(self, id_: str, value: Any) -> None:
        """Give a slider, a list or a field a value, as a user would."""
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true}))",
            id_, str(value),
        )  # fmt: skip

    def settle(self) -> None:
        """Wait until the page awaits no answer of the server."""
        is_idle = "return !running && !isAsking && !$('inside-hint').textContent.endsWith('…')"
        until(lambda: self.run(is_idle), "the page being idle")

    def write(self, text: str, **settings: Any) -> str:
        """Write a text, let the model continue it, and return the new text."""
        for name, value in settings.items():
            self.set(name, value)
        self.one("#text").send_keys(text)
        self.one("#go").click()
        self.settle()
        assert self.text("#error") == ""
        return self.story().removeprefix(text)

    def story(self) -> str:
        return "".join(self.texts("#story .token"))

    def focus(self) -> Any:
        return self.browser.switch_to.active_element


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    opened = Page(browser, address)
    browser.set_window_size(1280, 900)
    browser.get(address)
    until(lambda: opened.text("#about"), "the models being listed")
    opened.run("sessionStorage.clear()")
    yield opened
    assert browser.get_log("browser") == []


def run_curl(page: Page, before: str = "") -> Any:
    """Run the curl command that the page shows, and return the server's answer."""
    command = f"{before}{page.text('#curl')} -s --noproxy '*'"
    return json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout)


@pytest.mark.slow
def test_text_is_written_stopped_continued_and_undone(
    page: Page, models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    page.run(
        "window.said = []; new MutationObserver(() => said.push($('live').textContent)).observe($('live'), {childList: true})"
    )
    new = page.write(TEXT, temperature=0.9, max_tokens=12, seed=7)
    # A screen reader hears the text in portions, not token by token.
    assert "".join(page.run("return said")) == f"{new} {page.text('#status')}" and len(page.run("return said")) <= 2
    ids = TOKENIZER.encode(TEXT)
    expected = generate(
        models["first"].gpt, torch.tensor([ids]), 12, seed=7, temperature=0.9, top_p=0.95, tokenizer=TOKENIZER
    )
    assert new == TOKENIZER.decode(expected[0, len(ids) :].tolist())
    assert page.story() == TEXT + new and not page.all("#story b")  # markup is text
    assert page.texts("#story .written") == list(TEXT)
    assert re.fullmatch(r"Wrote 12 tokens in \d+\.\d s, with the seed 7\.", page.text("#status"))
    assert page.text("#meter") == f"{len(ids) + 12} tokens of at most 240."
    # Continue, and stop at once. At full speed, 200 tokens could be complete before the click.
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda *arguments: (time.sleep(0.02), step(*arguments)))
    page.set("max_tokens", 200)
    page.one("#go").click()
    until(lambda: len(page.story()) > len(TEXT + new) + 3, "the text growing")
    assert page.text("#go") == "Stop"
    page.one("#go").click()
    page.settle()
    stopped = page.story()
    assert stopped.startswith(TEXT + new) and len(stopped) < 240
    assert page.text("#status") == f"Stopped after {len(stopped) - len(TEXT + new)} tokens."
    until(lambda: models["first"].engine.stats()["running"] == 0, "the slot being free")
    # Undo twice, redo, and edit.
    page.one("#undo").click()
    assert page.story() == TEXT + new
    page.one("#undo").click()
    assert page.story() == TEXT
    page.one("#undo").click()
    assert page.story() == "" and page.one("#text").is_displayed()
    page.one("#redo").click()
    page.one("#redo").click()
    assert page.story() == TEXT + new
    page.one("#edit").click()
    assert page.one("#text").get_attribute("value") == TEXT + new
    page.press(" and")
    page.one("#edit").click()
    until(lambda: page.story() == TEXT + new + " and", "the tokens being shown")
    page.one("#undo").click()
    assert page.story() == TEXT + new
    # The whole text up to the context, and no more.
    page.one("#redo").click()
    page.set("max_tokens", 500)
    page.one("#go").click()
    page.settle()
    assert page.text("#status") == "The text now fills the context of 240 tokens, so it cannot be continued."
    assert run_curl(page)["choices"][0]["text"] == page.story().removeprefix(TEXT + new + " and")
    page.set("temperature", 1)
    assert (
        page.text("#request-hint").startswith("The text is longer than the context")
        and not page.one("#curl").is_displayed()
    )
    page.one("#go").click()
    page.settle()
    assert page.text("#error") == "The text has 241 tokens, but this model reads at most 240 tokens. Shorten the text."


@pytest.mark.slow
def test_another_token_starts_a_branch_and_the_tree_can_be_walked(page: Page, models: dict[str, ServedModel]) -> None:
    first = TEXT + page.write(TEXT, temperature=0, max_tokens=10)
    at = len(TEXT) + 4
    # The mouse shows the alternatives while it is over the token, and a click keeps them.
    move = importlib.import_module("selenium.webdriver").ActionChains(page.browser)
    move.move_to_element(page.all("#story .token")[at]).perform()
    until(lambda: page.one("#popover").is_displayed(), "the alternatives being shown")
    assert len(page.all("#popover-list button")) == 10 and not page.one("#popover-close").is_displayed()
    move.move_to_element(page.one("h1")).perform()
    until(lambda: not page.one("#popover").is_displayed(), "the alternatives being hidden")
    page.all("#story .token")[at].click()
    assert page.one("#popover-close").is_displayed()
    top = logits_after(models["first"], TOKENIZER.encode(first[:at])).softmax(-1).topk(10)
    labels = [TOKENIZER.decode([i]).replace(" ", "·").replace("\n", "↵") for i in top.indices.tolist()]
    assert page.texts("#popover-list .mono") == labels
    shown = [float(text.strip("<% ")) for text in page.texts("#popover-list .note")]
    assert shown == pytest.approx([100 * p for p in top.values.tolist()], abs=0.51)
    assert page.text("#popover-title") == labels[0]  # greedy
    page.all("#popover-list button")[3].click()
    page.settle()
    second = page.story()
    assert second[: at + 1] == first[:at] + TOKENIZER.decode([int(top.indices[3])])
    ids = TOKENIZER.encode(second[: at + 1])
    expected = generate(models["first"].gpt, torch.tensor([ids]), 10, tokenizer=TOKENIZER)[0].tolist()
    assert second == TOKENIZER.decode(expected)
    assert page.text("#story .token.chosen") == second[at]
    # The tree: the text, its continuation up to the branching, and the two branches.
    assert [row.get_attribute("aria-level") for row in page.all("#branches .branch")] == ["1", "1", "2", "2"]
    assert page.one("#branches [aria-selected=true]").get_attribute("aria-level") == "2"
    for row, text in [(2, first), (0, TEXT), (3, second), (1, first[:at])]:
        page.all("#branches .branch")[row].click()
        assert page.story() == text
        assert page.all("#branches .branch")[row].get_attribute("aria-selected") == "true"
    # A token of the list beside the text starts a branch too, and so does another continuation.
    page.settle()
    page.all("#next button")[2].click()
    page.settle()
    assert page.story().startswith(first[:at]) and page.story()[: at + 1] not in (first[: at + 1], second[: at + 1])
    n_branches = len(page.all("#branches [aria-level='2']"))
    page.set("temperature", 1.5)
    page.one("#another").click()
    page.settle()
    assert len(page.all("#branches .branch")) > n_branches


@pytest.mark.slow
def test_sliders_redraw_the_distribution_at_the_cursor(page: Page, models: dict[str, ServedModel]) -> None:
    def check(text: str, **settings: Any) -> None:
        for name, value in settings.items():
            page.set(name, value)
        page.settle()
        logits = logits_after(models["first"], TOKENIZER.encode(text))
        off = {"top_k": 0, "top_p": 1, "min_p": 0}
        options = {name: value for name, value in settings.items() if off.get(name) != value}
        sampled = filter_logits(logits[None], SamplingConfig(**options))[0].softmax(-1)
        order = logits.topk(12).indices.tolist()
        shown = page.texts("#next .note")
        assert [text == "removed" for text in shown] == [float(sampled[i]) == 0 for i in order]
        numbers = [0.0 if text == "removed" else float(text.strip("<% ")) for text in shown]
        assert numbers == pytest.approx([100 * float(sampled[i]) for i in order], abs=0.51)
        kept = int((sampled > 0).sum())
        assert f"keep {kept} token{'s' * (kept != 1)} of 97" in page.text("#next-hint")

    page.one("#text").send_keys(TEXT)
    until(lambda: page.all("#next button"), "the distribution being shown")
    check(TEXT, temperature=1, top_k=0, top_p=1, min_p=0)
    check(TEXT, temperature=0.5, top_k=0, top_p=1, min_p=0)
    check(TEXT, temperature=1, top_k=4, top_p=1, min_p=0)
    check(TEXT, temperature=1, top_k=0, top_p=0.5, min_p=0)
    check(TEXT, temperature=1.5, top_k=0, top_p=1, min_p=0.3)
    page.press("\ue011\ue014\ue014\ue014")  # Home, and three characters to the right
    until(lambda: page.run("return next.asked.text") == TEXT[:3], "the cursor being noticed")
    check(TEXT[:3], temperature=1, top_k=0, top_p=1, min_p=0)
    page.one("#edit").click()
    until(lambda: page.story() == TEXT, "the tokens being shown")
    page.all("#story .token")[5].click()
    page.settle()
    check(TEXT[:5], temperature=1, top_k=3, top_p=1, min_p=0)
    assert page.text("#next-hint").startswith(f"In place of {TEXT[5]},")


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [TEXT, 'It\'s "quoted" \\n $HOME `x`\nnew é'])
def test_curl_and_python_lines_give_the_text_on_the_page(page: Page, prompt: str) -> None:
    new = page.write(prompt, temperature=1.1, top_k=30, top_p=0.9, min_p=0.01, max_tokens=15, seed=11)
    assert page.text("#request-hint") == "This request wrote the last 15 tokens. It gives the same text again."
    assert run_curl(page)["choices"][0]["text"] == new
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(page.text("#python"), {})
    assert printed.getvalue() == new + "\n"
    page.set("temperature", 0.3)
    assert '"temperature": 0.3' in page.text("#curl") and "temperature=0.3" in page.text("#python")
    assert page.text("#request-hint") == "The next continuation uses this request, with a new seed."
    page.run("navigator.clipboard.writeText = async text => { window.copied = text; }")
    for name in ("curl", "python"):
        page.one(f"[data-copy={name}]").click()
        assert until(lambda: page.run("return window.copied")) and page.run("return window.copied") == page.text(
            f"#{name}"
        )


@pytest.mark.slow
def test_a_new_seed_is_drawn_unless_it_is_kept(page: Page) -> None:
    seed = page.one("#seed").get_attribute("value")
    page.write("a", max_tokens=1)
    assert page.one("#seed").get_attribute("value") == seed  # the first text uses the seed on the page
    page.one("#go").click()
    page.settle()
    drawn = page.one("#seed").get_attribute("value")
    assert drawn != seed
    page.one("#keep-seed").click()
    page.one("#go").click()
    page.settle()
    assert page.one("#seed").get_attribute("value") == drawn
    page.one("#draw-seed").click()
    assert page.one("#seed").get_attribute("value") != drawn
    page.set("seed", "")
    page.one("#go").click()
    page.settle()
    assert page.text("#error") == "The seed must be a whole number from 0 to 9007199254740991."


@pytest.mark.slow
def test_two_models_continue_the_same_text_side_by_side(page: Page, models: dict[str, ServedModel]) -> None:
    page.one("#text").send_keys("Hello ")
    page.one("#tab-compare").click()
    assert page.one("#compare-text").get_attribute("value") == "Hello "
    for name, value in {"max_tokens": 8, "seed": 3, "temperature": 1.2}.items():
        page.set(name, value)
    page.one("#compare").click()
    page.settle()
    ids = torch.tensor([TOKENIZER.encode("Hello ")])
    for letter, model in zip("ab", models.values(), strict=True):
        expected = generate(model.gpt, ids, 8, seed=3, temperature=1.2, top_p=0.95, tokenizer=TOKENIZER)[0].tolist()
        assert "".join(page.texts(f"#story-{letter} .token")) == TOKENIZER.decode(expected)
    # An alternative continues only its own text.
    other = page.texts("#story-b .token")
    page.all("#story-a .token")[8].click()
    page.all("#popover-list button")[4].click()
    page.settle()
    assert len(page.all("#story-a .token")) == 8 + 1 + 8 and page.texts("#story-b .token") == other


@pytest.mark.slow
def test_chat_uses_the_template_of_the_model(page: Page, post: Callable[..., Any]) -> None:
    page.one("#tab-chat").click()
    assert "has no chat template" in page.text("#chat-hint") and not page.one("#message").is_displayed()
    page.set("model", "second")
    for name, value in {"max_tokens": 6, "seed": 3, "temperature": 1}.items():
        page.set(name, value)
    page.one("#message").send_keys("<i>Hi</i>")
    page.chord("\ue009", "\ue007")  # Control and Enter
    until(lambda: len(page.texts(".message.assistant p")) == 1, "an answer")
    page.settle()
    asked = [{"role": "user", "content": "<i>Hi</i>"}]
    expected = post(
        "/v1/chat/completions",
        model="second",
        messages=asked,
        max_completion_tokens=6,
        seed=3,
        temperature=1,
        top_p=0.95,
    )
    assert page.texts(".message p") == ["<i>Hi</i>", expected["choices"][0]["message"]["content"]]
    assert run_curl(page)["choices"][0]["message"]["content"] == page.texts(".message p")[1]
    assert page.text("#request-hint") == "This request wrote the last answer. It gives the same text again."
    page.one("#chat-undo").click()
    assert page.texts(".message p") == []
    page.set("message", "x" * 70)
    page.one("#send").click()
    page.settle()
    assert page.text("#error").startswith("The conversation is longer than the context of 60 tokens.")
    assert page.texts(".message p") == [] and page.one("#message").get_attribute("value") == "x" * 70
    page.browser.get_log("browser")  # Chromium logs the status 400


@pytest.mark.slow
def test_look_inside_shows_the_text_on_the_page(page: Page, models: dict[str, ServedModel]) -> None:
    page.one("#tab-inside").click()
    assert page.text("#inside-hint").startswith("Write a text first.")
    page.one("#tab-write").click()
    page.write("The Cat", temperature=0, max_tokens=4)
    ids = TOKENIZER.encode(page.story())
    page.one("#tab-inside").click()
    until(lambda: page.texts("#tokens .mono"), "the look inside")
    data = page_data(models["first"].gpt, TOKENIZER, torch.tensor([ids]))
    assert page.texts("#tokens .mono") == [token["label"] for token in data["tokens"]]
    assert page.texts("#lens tr:first-child td") == [top[0][0] for top in data["lens"][-1]]
    page.settle()
    assert page.text("#next-hint").startswith(
        f"After {data['tokens'][-1]['label']} (token {len(ids) - 1}), the settings keep"
    )
    page.one("#lens .chosen").click()
    page.press("\ue012")  # the left arrow
    assert page.texts("#tokens .chosen .mono") == [data["tokens"][-2]["label"]]
    assert page.run("return document.activeElement.tagName") == "TD"


@torch.no_grad()
@pytest.mark.slow
def test_switching_heads_off_changes_every_view_as_python_does(page: Page, models: dict[str, ServedModel]) -> None:
    gpt = models["first"].gpt
    page.one("#text").send_keys("The Cat")
    page.set("temperature", 1)
    page.set("top_p", 1)
    page.one("#tab-inside").click()
    until(lambda: page.texts("#next .mono") and page.texts("#walk-tensors .cell"), "the numbers")
    ids = torch.tensor([TOKENIZER.encode("The Cat")])

    def check(*off: tuple[int, int]) -> None:
        until(lambda: page.run("return look.walk.walk?.off?.length") == len(off), "the walk")
        page.settle()
        data = page_data(gpt, TOKENIZER, ids, off)
        with ablate_heads(gpt, off):
            p = gpt(ids)[0, -1].softmax(-1)
        assert page.texts("#next .mono") == [top[0] for top in data["next"][-1]["top"]]
        shown = [float(text.strip("<% ")) for text in page.texts("#next .note")]
        assert shown == pytest.approx([100 * float(value) for value in p.topk(12).values], abs=0.51)
        assert page.texts("#lens tr:first-child td") == [top[0][0] for top in data["lens"][-1]]

    check()
    before = page.texts("#next .mono")[0]
    page.set("layer", 1)
    page.set("head", 2)
    page.one("#switch").send_keys(" ")
    check((1, 2))
    assert page.one("#switch").get_attribute("aria-checked") == "false"
    assert page.text("#effect").endswith(f"With all heads on, it is {before} ({page_percent(gpt, ids)}).")
    page.all("#heads button")[0].click()
    page.one("#switch").click()
    check((0, 0), (1, 2))
    assert [button.text for button in page.all("#off button")] == [
        "layer 0, head 0 ×",
        "layer 1, head 2 ×",
        "Switch all on",
    ]
    assert len(page.all("#heads .off")) == 2
    # The walk through the head that is off says so, with zeros.
    page.run("look.walk.go(6)")
    assert page.text("#walk-text").startswith("Head 0 of layer 0 is switched off")
    assert {float(text) for text in page.texts("#walk-tensors .cell")} == {0.0}
    page.all("#off button")[1].click()
    check((0, 0))
    page.one("#all-on").click()
    check()
    assert not page.one("#off").is_displayed() and page.focus().get_attribute("id") == "switch"


@torch.no_grad()
def page_percent(gpt: Any, ids: torch.Tensor) -> str:
    return f"{100 * float(gpt(ids)[0, -1].softmax(-1).max()):.0f} %"


@pytest.mark.slow
def test_walk_goes_through_all_steps_with_the_keyboard(page: Page, models: dict[str, ServedModel]) -> None:
    page.one("#text").send_keys("The Cat")
    page.one("#tab-inside").click()
    until(lambda: page.texts("#walk-tensors .cell"), "the walk")
    page.set("layer", 1)
    page.set("head", 1)
    page.all("#tokens button")[5].click()
    until(lambda: page.run("const w = look.walk.walk; return [w.layer, w.head, w.token].join()") == "1,1,5", "the walk")
    walk = walk_data(models["first"].gpt, TOKENIZER, torch.tensor([TOKENIZER.encode("The Cat")]), 1, 1, 5)
    page.one("#walk-step").click()
    for i, step in enumerate(walk["steps"]):
        count, current, title, numbers, sizes = page.run(SHOWN_STEP)
        assert count == f"Step {i + 1} of 13" and current == title
        assert numbers == [
            number
            for tensor in step["tensors"]
            for number in tensor.get("row", [value for _, value, _ in tensor.get("top", [])])
        ]
        for shown, tensor in zip(sizes, step["tensors"], strict=True):
            assert shown.endswith(" × ".join(map(str, tensor["shape"])) or "one number")
        page.press("\ue014")  # the right arrow
    assert page.text("#walk-count") == "Step 13 of 13"
    page.press("\ue012")
    assert page.text("#walk-name") == "Logits"
    page.one("#walk-next").click()
    assert (
        page.text("#walk-name") == "Probabilities" and page.one("#walk-next").get_attribute("aria-disabled") == "true"
    )
    page.all("#walk-steps button")[0].click()
    assert page.text("#walk-name") == "Token ids" and page.one("#walk-back").get_attribute("aria-disabled") == "true"


SHOWN_STEP = """
const texts = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
const numbers = [...document.querySelectorAll("#walk-tensors .cell")].map(e => Number(e.title));
const [count, current, title] = ["#walk-count", "#walk-steps [aria-current]", "#walk-name"].map(it => texts(it)[0]);
return [count, current, title, numbers, texts(".tensor-head small")];
"""
"""A script that returns the number, the title, the numbers and the shapes of the step that the walk shows."""


@pytest.mark.slow
def test_everything_works_with_the_keyboard(page: Page) -> None:
    assert page.focus().get_attribute("id") == "text"
    page.set("temperature", 0)
    page.set("max_tokens", 5)
    page.press("Keys ")
    page.chord("\ue009", "\ue007")  # Control and Enter
    until(lambda: len(page.story()) == 10, "the text growing")
    page.settle()
    before = page.story()
    # The Tab key reaches the text as one stop, the arrow keys move in it, and Enter opens the alternatives.
    page.run("document.getElementById('model').focus()")
    for _ in range(3):
        if page.focus().get_attribute("class").startswith("token"):
            break
        page.press("\ue004")
    page.press("\ue011")  # Home
    page.press("\ue014" * 6)  # right
    assert page.focus().text == before[6] and page.one("#popover").is_displayed()
    page.press("\ue007")  # Enter
    assert page.focus().tag_name == "button"
    page.press("\ue00c")  # Escape
    assert not page.one("#popover").is_displayed() and page.focus().text == before[6]
    page.press("\ue007")
    page.press("\ue015")  # down
    page.press("\ue007")
    until(lambda: page.story() != before, "the branch")
    page.settle()
    branch = page.story()
    assert branch[:6] == before[:6] and branch[6] != before[6]
    # The tree.
    page.run("document.querySelector('#branches [tabindex=\"0\"]').focus()")
    page.press("\ue011")
    page.press("\ue007")
    until(lambda: page.story() == "Keys ", "the beginning")
    assert page.focus().get_attribute("role") == "treeitem"
    page.chord("\ue009", "z")
    assert page.story() == branch
    page.chord("\ue009", "y")
    assert page.story() == "Keys "
    # The tabs.
    page.run("document.getElementById('tab-write').focus()")
    page.press("\ue012")
    assert page.focus().get_attribute("id") == "tab-inside" and page.one("#panel-inside").is_displayed()


@pytest.mark.slow
def test_every_control_has_a_name_and_texts_have_contrast(page: Page) -> None:
    """Chromium computes the names, as a screen reader would hear them."""
    page.set("model", "second")
    page.write(TEXT, temperature=1.5, max_tokens=30)
    page.all("#story .token")[20].click()
    for dark in (False, True):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for tab in ("write", "chat", "compare", "inside"):
            page.run("document.getElementById(arguments[0]).click()", f"tab-{tab}")
            page.settle()
            assert unnamed(page) == [], tab
            assert page.run(LOW_CONTRAST) == [], (tab, dark)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def unnamed(page: Page) -> list[str]:
    """Return the roles of the controls on the page that have no name in Chromium's accessibility tree."""
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
    assert len(controls) >= 15
    return [node["role"]["value"] for node in controls if not node["name"]["value"].strip()]


CONTROLS = (
    "button", "textbox", "slider", "spinbutton", "combobox", "checkbox", "tab", "tablist", "tabpanel", "tree", "treeitem",
    "dialog", "toolbar", "log", "group", "region", "complementary",
)  # fmt: skip
LOW_CONTRAST = """
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
function background(element) {
  if (!element) return [255, 255, 255];
  return over(numbers(getComputedStyle(element).backgroundColor), background(element.parentElement));
}
const bad = [];
for (const element of document.querySelectorAll("body *")) {
  const isText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!isText || !element.checkVisibility() || ["OPTION", "SCRIPT", "STYLE"].includes(element.tagName)) continue;
  if (element.closest("[aria-disabled=true]")) continue;
  const back = background(element), a = light(over(numbers(getComputedStyle(element).color), back)), b = light(back);
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) bad.push([element.outerHTML.slice(0, 100), contrast]);
}
return bad;
"""


@pytest.mark.slow
def test_phone_width_has_no_horizontal_scrolling_and_targets_for_fingers(page: Page) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.write(TEXT + "x" * 100, temperature=1.5, max_tokens=30)
        page.all("#story .token")[20].click()
        assert page.one("#popover").is_displayed()
        for tab in ("write", "chat", "compare", "inside"):
            page.run("document.getElementById(arguments[0]).click()", f"tab-{tab}")
            page.settle()
            assert page.run("return document.documentElement.scrollWidth") == 390, tab
            small = page.run(
                "return [...document.querySelectorAll('button, select, input, .branch')].filter(e => e.checkVisibility())"
                ".map(e => [(e.closest('.check') ?? e).getBoundingClientRect().height, e.outerHTML.slice(0, 120)])"
                ".filter(([height]) => height < 39.5)"
            )
            assert small == [], tab
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(page: Page, address: str) -> None:
    page.write("a", max_tokens=3)
    for tab in ("chat", "compare", "inside", "write"):
        page.one(f"#tab-{tab}").click()
        page.settle()
    events = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert f"{address}/page/generate" in asked
    assert [url for url in asked if not url.startswith((address + "/", "data:"))] == []
    assert f"{address}/favicon.ico" not in asked


@pytest.mark.slow
def test_key_is_asked_for_and_kept_in_the_session_only(browser: Any, models: dict[str, ServedModel]) -> None:
    with running(models, Settings(api_key="secret-1")) as address:
        page = Page(browser, address)
        browser.get(address)
        until(lambda: page.one("#key-dialog").is_displayed(), "the dialog")
        page.one("#key").send_keys("wrong\ue007")
        until(lambda: "did not accept" in page.text("#key-hint"), "the refusal")
        page.one("#key").send_keys("secret-1\ue007")
        until(lambda: page.text("#about"), "the models being listed")
        new = page.write("a", temperature=0, max_tokens=5)
        assert page.run("return [localStorage.length, document.cookie, Object.values(sessionStorage)]") == [
            0,
            "",
            ["secret-1"],
        ]
        assert "secret" not in page.text("#curl") + page.text("#python")
        assert run_curl(page, "MYGPT_API_KEY=secret-1\n")["choices"][0]["text"] == new
        page.run("sessionStorage.clear()")
        refused = [entry for entry in browser.get_log("browser") if "401" not in entry["message"]]
        assert refused == []


@pytest.mark.slow
def test_errors_of_the_server_are_shown_in_a_sentence(page: Page) -> None:
    page.one("#go").click()
    page.settle()
    assert page.text("#error") == "Write the beginning of a text first."
    page.one("#text").send_keys("日")
    page.one("#go").click()
    page.settle()
    assert "'日'" in page.text("#error") and page.text("#error").endswith(".")
    assert page.one("#error").get_attribute("role") == "alert"
    page.browser.get_log("browser")  # Chromium logs each response with the status 400
    page.run("window.fetch = () => Promise.reject(new TypeError('failed'))")
    page.one("#go").click()
    page.settle()
    assert page.text("#error") == "The server does not answer. Check that it is still running."
