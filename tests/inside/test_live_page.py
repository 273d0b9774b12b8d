"""Test what a reader does and sees on the page of `mygpt explain --live`, in Chromium."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from browser import open_browser
from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, GPTModel, SamplingConfig
from MyGPT.inside import ablate_heads
from MyGPT.inside.live import LivePage
from MyGPT.inside.page import next_token_data, page_data
from MyGPT.inside.walk import walk_data

pytestmark = pytest.mark.slow
SECONDS = 10
"""The longest time that a test waits for the page."""
TOKENIZER = CharTokenizer([*(chr(32 + i) for i in range(95)), "\n"])
TEXT = "The Cat"
LEFT, RIGHT, SPACE, CONTROL, ENTER, NULL = "\ue012", "\ue014", " ", "\ue009", "\ue007", "\ue000"


@pytest.fixture(scope="module")
def model() -> GPTModel:
    """A small model whose weights are exact in float16, so that the page computes with the same weights as Python."""
    config = GPTConfig(
        vocab_size=96, context_length=24, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True
    )
    return lively_model(config).half().float()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser("--window-size=1280,900", logs=("browser", "performance")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(model: GPTModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("live") / "live.html"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(LivePage(model, TOKENIZER, TEXT, "<b>mine</b>").pieces())
    return path.as_uri()


class Page:
    """The live page, and what a reader does and sees."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector))

    def set(self, id_: str, value: Any) -> None:
        self.run(
            "const e = $(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input', {bubbles: true}));"
            "e.dispatchEvent(new Event('change', {bubbles: true}))",
            id_, str(value),
        )  # fmt: skip

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def field(self) -> str:
        return str(self.run("return $('text').value"))

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not become true within {SECONDS} seconds"
            time.sleep(0.02)

    def shows(
        self, model: GPTModel, text: str, heads_off: list[tuple[int, int]] | None = None, **sampling: float
    ) -> None:
        """Wait until all parts of the page show the text with these settings, and compare them with Python."""
        off, ids = heads_off or [], torch.tensor([TOKENIZER.encode(text)])
        data = page_data(model, TOKENIZER, ids, off)
        with torch.no_grad(), ablate_heads(model, off):
            logits = model(ids)[0, -1]
        options = {"temperature": 0.8, "top_p": 0.95, **sampling}
        expected = next_token_data(logits, TOKENIZER, SamplingConfig(**options))["tokens"][:12]  # type: ignore[arg-type]
        rows = [[label, now] for _, label, _, now, is_kept in expected if is_kept]
        self.until(lambda: self.texts("#tokens .mono") == [token["label"] for token in data["tokens"]], "the tokens")
        self.until(lambda: self.texts("#next .mono")[: len(rows)] == [label for label, _ in rows], "the next tokens")
        self.until(lambda: self.run("return look.walk.walk?.config.T") == ids.shape[1], "the walk")
        kept = [float(note.strip("<% ")) for note in self.texts("#next .note") if note != "removed"]
        assert kept == pytest.approx([100 * p for _, p in rows], abs=0.6)
        assert self.texts("#lens tr:first-child td") == [top[0][0] for top in data["lens"][-1]]


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    browser.get("about:blank")
    browser.get(address)
    opened = Page(browser)
    opened.until(lambda: opened.texts("#walk-tensors .cell"), "the page being ready")
    yield opened
    assert browser.get_log("browser") == []


def test_every_part_follows_the_text(page: Page, model: GPTModel) -> None:
    assert page.browser.title == "Watch <b>mine</b> read and write"
    page.shows(model, TEXT)
    page.one("#text").send_keys("s")
    page.shows(model, "The Cats")
    page.one("#text").send_keys(" & <b>")
    page.shows(model, "The Cats & <b>")
    assert page.text("#status") == "14 tokens of at most 24."
    page.set("temperature", 1.5)
    page.shows(model, "The Cats & <b>", temperature=1.5)
    page.set("top_p", 0.5)
    page.set("top_k", 5)
    page.shows(model, "The Cats & <b>", temperature=1.5, top_p=0.5, top_k=5)
    # The last answer stays while a text cannot be read, and a sentence near the field says why.
    page.one("#text").send_keys("é")
    page.until(lambda: "é" in page.text("#error"), "the error")
    assert page.text("#error") == (
        "Character 'é' at position 14 is not in the vocabulary of 96 characters. "
        "The page below still shows the last text that the model could read."
    )
    assert len(page.texts("#tokens .mono")) == 14
    page.one("#text").send_keys("\ue003")  # Backspace
    page.until(lambda: page.text("#error") == "", "the error being gone")
    page.one("#clear").click()
    page.until(lambda: page.text("#status").startswith("Write a text"), "the hint")


def test_a_long_text_shows_its_last_tokens(page: Page, model: GPTModel) -> None:
    text = "abcdefghij" * 3
    page.set("text", text)
    page.shows(model, text[-24:])
    assert page.text("#status") == "The page shows the last 24 tokens; 6 earlier ones are left out."


def test_heads_that_are_off_change_every_part_as_python_does(page: Page, model: GPTModel) -> None:
    page.set("layer", 1)
    page.set("head", 2)
    page.one("#switch").click()
    page.shows(model, TEXT, [(1, 2)])
    before = page_data(model, TOKENIZER, torch.tensor([TOKENIZER.encode(TEXT)]))["next"][-1]["top"][0]
    page.until(lambda: page.text("#effect"), "the effect")
    assert f"With all heads on, it is {before[0]} ({100 * before[1]:.0f} %)." in page.text("#effect")
    page.run("look.walk.go(6)")
    assert page.text("#walk-text").startswith("Head 2 of layer 1 is switched off")
    page.one("#heads button[data-place='0.1']").click()
    page.one("#switch").click()
    page.one("#text").send_keys("s")
    page.shows(model, "The Cats", [(0, 1), (1, 2)])
    assert page.texts("#off button") == ["layer 0, head 1 ×", "layer 1, head 2 ×", "Switch all on"]
    page.one("#all-on").click()
    page.shows(model, "The Cats")
    assert not page.one("#off").is_displayed()


def test_walk_shows_the_numbers_of_python(page: Page, model: GPTModel) -> None:
    page.set("layer", 1)
    page.set("head", 2)
    page.run("document.querySelectorAll('#tokens button')[4].click()")
    page.until(
        lambda: page.run("const w = look.walk.walk; return `${w.layer} ${w.head} ${w.token}`") == "1 2 4", "the walk"
    )
    steps = walk_data(model, TOKENIZER, torch.tensor([TOKENIZER.encode(TEXT)]), 1, 2, 4)["steps"]
    page.run("$('walk-step').focus()")
    for i, step in enumerate(steps):
        shown = page.run("return [...document.querySelectorAll('#walk-tensors .cell')].map(cell => Number(cell.title))")
        expected = [
            number
            for tensor in step["tensors"]
            for number in tensor.get("row", [value for _, value, _ in tensor.get("top", [])])
        ]
        assert shown == pytest.approx(expected, abs=1e-4), step["name"]
        assert page.text("#walk-count") == f"Step {i + 1} of 13"
        page.press(RIGHT)
    assert page.text("#walk-name") == "Probabilities"


def test_tokens_are_generated_appended_and_stopped(page: Page, model: GPTModel) -> None:
    page.set("temperature", 0)  # greedy, so that Python gives the same text
    page.one("#go").click()
    page.until(lambda: len(page.field()) >= 20, "the text growing")
    page.one("#go").click()
    page.until(lambda: page.text("#go") == "Generate", "the end")
    text = page.field()
    ids, expected = TOKENIZER.encode(TEXT), TEXT
    with torch.no_grad():
        while len(expected) < len(text):
            ids.append(int(model(torch.tensor([ids[-24:]]))[0, -1].argmax()))
            expected += TOKENIZER.decode(ids[-1:])
    assert text == expected and re.fullmatch(r"\d+ new tokens(; stopped)?\.", page.text("#status"))
    page.set("text", TEXT)
    page.shows(model, TEXT, temperature=0)
    page.set("temperature", 1)
    page.shows(model, TEXT, temperature=1)
    label = page.texts("#next .mono")[2]
    page.run("document.querySelectorAll('#next button')[2].click()")
    longer = TEXT + label.replace("·", " ").replace("↵", "\n")
    page.until(lambda: page.field() == longer, "the token being appended")
    page.shows(model, longer, temperature=1)
    # In the middle of the text, the token replaces the rest.
    page.run("document.querySelectorAll('#tokens button')[2].click()")
    page.until(lambda: page.text("#next-hint").startswith("After e (token 2), "), "the next tokens of token 2")
    label = page.texts("#next .mono")[1]
    page.run("document.querySelectorAll('#next button')[1].click()")
    page.until(lambda: page.field() == "The" + label.replace("·", " ").replace("↵", "\n"), "the rest being replaced")


def test_state_is_kept_in_the_address(page: Page, model: GPTModel, browser: Any) -> None:
    page.set("text", "a & b=c")
    page.set("layer", 1)
    page.set("temperature", 1.2)
    page.run("look.inside.choose({ head: 1, token: 3 }); $('switch').click(); look.walk.go(4)")
    page.until(lambda: "off=1.1" in page.run("return location.hash"), "the address")
    page.until(lambda: "temperature=1.2" in page.run("return location.hash"), "the address")
    browser.refresh()
    page.until(lambda: page.texts("#walk-tensors .cell"), "the page being ready")
    assert page.field() == "a & b=c" and page.text("#walk-name") == "Scores"
    assert page.run("return [$('layer').value, $('head').value, look.inside.token, $('temperature').value]") == [
        "1", "1", 3, "1.2",
    ]  # fmt: skip
    assert page.texts("#off button") == ["layer 1, head 1 ×", "Switch all on"]


def test_page_works_with_the_keyboard_alone(page: Page, model: GPTModel) -> None:
    assert page.run("return document.activeElement.id") == "text"
    page.press("s")
    page.shows(model, "The Cats")

    def tab_to(selector: str) -> None:
        for _ in range(60):
            if page.run("return document.activeElement.matches(arguments[0])", selector):
                return
            page.press("\ue004")
        raise AssertionError(f"the Tab key does not reach {selector}")

    tab_to("#temperature")
    page.press(RIGHT)
    page.shows(model, "The Cats", temperature=0.85)
    tab_to("#switch")
    page.press(SPACE)
    page.shows(model, "The Cats", [(0, 0)], temperature=0.85)
    tab_to("#heads button")
    page.press(RIGHT)
    assert page.run("return document.activeElement.dataset.place") == "0.1"
    tab_to("#lens td")
    page.press(LEFT)
    assert page.run("return look.inside.token") == 6
    tab_to("#walk-steps button")
    page.press(RIGHT, RIGHT)
    assert page.text("#walk-name") == "LayerNorm"
    assert page.run("return document.activeElement.textContent") == "LayerNorm"
    page.press(CONTROL + ENTER + NULL)
    page.until(lambda: len(page.field()) > 10, "the text growing")
    page.press("\ue00c")  # Escape
    page.until(lambda: page.text("#go") == "Generate", "the end")


def test_typing_moves_nothing_above_the_growing_parts(page: Page) -> None:
    """The field, the list of next tokens and the sliders keep their places while the text changes."""
    places = "return ['text', 'go', 'next', 'next-rest', 'temperature', 'tokens'].map(id => $(id).getBoundingClientRect().top)"
    before = page.run(places)
    for c in "s are":
        page.one("#text").send_keys(c)
        assert page.run(places) == before
    page.until(lambda: len(page.texts("#tokens .mono")) == 12, "the tokens")
    assert page.run(places) == before


WATCH = """
window.columns = new Set(), window.n_messages = 0, window.rows = [...$("next").children];
new MutationObserver(changes => {
  for (const { target } of changes) {
    const { cellIndex = "row" } = (target.closest ? target : target.parentElement).closest("td") ?? {};
    columns.add(cellIndex);
  }
}).observe($("lens").tBodies[0], { subtree: true, childList: true, attributes: true, characterData: true });
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (...values) { n_messages++; post.apply(this, values); };
"""
"""A script that collects the columns of the lens that change, and counts the messages to the worker."""


def test_typing_asks_the_worker_twice_and_changes_only_what_is_new(page: Page, model: GPTModel) -> None:
    """Unnecessary messages and changes cost frames."""
    page.run(WATCH)
    page.one("#text").send_keys("s")
    page.shows(model, "The Cats")
    assert page.run("return n_messages") == 2
    # The rows get a cell, which is the new choice, and the old choice changes.
    assert sorted(page.run("return [...columns]"), key=str) == [7, 8, "row"]
    assert page.run("return rows.every((row, i) => row === $('next').children[i])")  # so the keyboard focus stays


def test_nothing_is_fetched_and_narrow_screens_need_no_sideways_scrolling(page: Page, browser: Any) -> None:
    events = [entry["message"] for entry in browser.get_log("performance")]
    urls = {url for event in events for url in re.findall(r'"url":"([a-z]+:)', event) if "requestWillBeSent" in event}
    assert urls <= {"file:", "about:", "blob:"}
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.set("text", "a long text, abc, abc, " * 3)
        page.until(lambda: len(page.texts("#tokens .mono")) == 24, "the tokens")
        assert page.run("return document.documentElement.scrollWidth") == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
