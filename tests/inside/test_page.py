"""Test the page of `mygpt explain`: its numbers, its safety against any text, and its behaviour in a browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from browser import open_browser
from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, GPTModel
from MyGPT.cli import main
from MyGPT.inside.page import MAX_TOKENS, explain_page, page_data
from MyGPT.inside.sae import train_autoencoder
from oracles_model import transformers_twin

TOKENIZER = CharTokenizer([*(chr(32 + i) for i in range(95)), "\n", "\u2028"])
TEXT = "</script>\n<b>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return lively_model(
        GPTConfig(vocab_size=97, context_length=160, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
    )


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor([TOKENIZER.encode("The Cat")])


class Page(HTMLParser):
    """Parse a page, check that its elements are closed in order, and collect the attributes and script contents."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@torch.no_grad()
def test_numbers_equal_those_of_transformers(model: GPTModel, ids: Tensor) -> None:
    data = page_data(model, TOKENIZER, ids)
    theirs = transformers_twin(model)(ids, output_attentions=True)
    T = ids.shape[1]
    packed = torch.frombuffer(bytearray(base64.b64decode(data["attention"])), dtype=torch.uint8)
    attention = torch.stack(theirs.attentions)[:, 0]
    assert (packed.view(2, 3, T, T) / 255 - attention).abs().max() <= 0.5 / 255 + 1e-5
    probabilities = theirs.logits[0].softmax(-1)
    for t, entry in enumerate(data["next"]):
        values, best = probabilities[t].topk(12)
        assert [id_ for _, _, id_ in entry["top"]] == best.tolist()
        assert [p for _, p, _ in entry["top"]] == pytest.approx(values.tolist(), abs=2e-5)
        assert entry["rest"] == pytest.approx(1 - float(values.sum()), abs=2e-4)
        assert [label for label, _, _ in entry["top"]] == [
            TOKENIZER.decode([i]).replace(" ", "·").replace("\n", "↵").replace("\u2028", "\\u2028")
            for i in best.tolist()
        ]
        if t + 1 < T:
            label, p, rank, id_ = entry["actual"]
            assert (id_, label) == (int(ids[0, t + 1]), TOKENIZER.decode([id_]).replace(" ", "·"))
            assert p == pytest.approx(float(probabilities[t, id_]), abs=2e-5)
            assert rank == probabilities[t].argsort(descending=True).tolist().index(id_) + 1
    assert data["next"][-1]["actual"] is None
    assert len(data["lens"]) == 3
    assert data["lens"][-1] == [[entry[:2] for entry in position["top"][:5]] for position in data["next"]]


def test_page_is_well_formed_and_loads_nothing(model: GPTModel) -> None:
    ids = torch.tensor([TOKENIZER.encode(TEXT)])
    page = Page(explain_page(model, TOKENIZER, ids, name="<i>mine</i> & {{data}}"))
    assert len(page.scripts) == 2
    data = json.loads(page.scripts[0])
    assert "".join(token["label"] for token in data["tokens"]) == TEXT.replace("\n", "↵")
    assert not [attribute for attribute in page.attributes if attribute[1] in ("src", "href", "action")]
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", page.scripts[1])
    (policy,) = [value for _, name, value in page.attributes if name == "content" and value.startswith("default-src")]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy


def test_too_many_tokens_or_rows_raise_an_error(model: GPTModel) -> None:
    long = torch.zeros(1, MAX_TOKENS + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="the text has 129 tokens, a page can hold 128"):
        explain_page(model, TOKENIZER, long)
    with pytest.raises(ValueError, match=r"one text, so ids must have the shape \(1, tokens\), got \(2, 3\)"):
        explain_page(model, TOKENIZER, long[:, :3].expand(2, 3))
    assert Page(explain_page(model, TOKENIZER, long[:, :MAX_TOKENS])).scripts


def test_command_writes_the_page_and_reports_errors_in_one_line(
    model: GPTModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model", TOKENIZER)
    on_the_model = ["explain", "--model", str(tmp_path / "model")]
    assert main([*on_the_model, "The Cat", "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page == explain_page(model, TOKENIZER, torch.tensor([TOKENIZER.encode("The Cat")]), "model")
    for arguments, words in [
        (["The Cat", "--out", str(tmp_path / "b.png")], "out must end in .html"),
        (["The é", "--out", str(tmp_path / "b.html")], "'é'"),
        (["a" * 129, "--out", str(tmp_path / "b.html")], "129 tokens, a page can hold 128"),
        (["a" * 161, "--out", str(tmp_path / "b.html")], "161 tokens, the model's context is 160"),
        (["", "--out", str(tmp_path / "b.html")], "the text is empty"),
    ]:
        assert main([*on_the_model, *arguments]) == 2
        errors = capsys.readouterr().err
        assert words in errors and len(errors.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "model"]


@pytest.mark.parametrize("options", ["", "--live", "--features --layer 0 --n_features 8 --k 2 --data {0}/text.txt"])
def test_every_page_takes_the_model_as_an_option_or_as_the_first_argument(
    options: str, model: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tests/inside/test_replay.py has the same test of --replay."""
    few_steps = lambda *values, **options: train_autoencoder(*values, **{**options, "steps": 2})  # noqa: E731
    monkeypatch.setattr("MyGPT.inside.features.train_autoencoder", few_steps)
    model.save_pretrained(tmp_path / "model", TOKENIZER)
    (tmp_path / "text.txt").write_text("The Cat" * 300)
    given = options.format(tmp_path).split()
    forms = [["--model", str(tmp_path / "model"), "The Cat", *given], [str(tmp_path / "model"), "The Cat", *given],
             [*given, str(tmp_path / "model"), "The Cat"], [str(tmp_path / "model"), *given, "The Cat"],
             [*given, str(tmp_path / "model"), "--", "The Cat"]]  # fmt: skip
    if given:  # the text is optional
        forms += [["--model", str(tmp_path / "model"), *given], [str(tmp_path / "model"), *given]]
    pages = []
    for form in forms:
        assert main(["explain", "--out", str(tmp_path / "a.html"), *form]) == 0, capsys.readouterr().err
        pages.append((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert len({*pages[:5]}) == 1
    assert not given or pages[5] == pages[6] != pages[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("{0}", "missing TEXT; for example: mygpt explain --model runs/book"),
        ("text", "missing --model; for example: mygpt explain --model runs/book"),
        ("--live", "missing --model; for example"),
        ("--replay", "--replay needs the directory of a run, as in mygpt explain RUN --replay"),
        ("nowhere text", "no model at nowhere"),
        ("nowhere --live", "no model at nowhere"),
        ("nowhere --replay", "there is no run nowhere"),
    ],
)
def test_a_missing_model_or_text_is_named(
    arguments: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments.format(tmp_path).split(), "--out", str(tmp_path / "a.html")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"mygpt explain: {error}") and errors.count("\n") == 1


KINDS_OF_PAGE = {"": {"adapter", "device", "with"}, "--live": {"precision", "adapter"},
                 "--features": {"layer", "data", "n_features", "k", "adapter", "device", "with"},
                 "--replay": {"device", "with"}}  # fmt: skip
"""The options of each kind of page."""


@pytest.mark.parametrize("kind", KINDS_OF_PAGE)
def test_every_option_that_does_not_apply_is_refused_before_the_model_is_opened(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "precision": "int8",
        "layer": 1,
        "data": "alice",
        "n_features": 3,
        "k": 2,
        "adapter": "x",
        "device": "cpu",
        "with": "x",
    }
    assert {*values} == {*set().union(*KINDS_OF_PAGE.values())}
    for name, value in values.items():
        command = [
            "explain",
            *kind.split(),
            "nowhere",
            "text",
            f"--{name}",
            str(value),
            "--out",
            str(tmp_path / "a.html"),
        ]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        is_refused = f"--{name} does not apply to {kind}" in error or f"--{name} is an option of --" in error
        assert is_refused == (name not in KINDS_OF_PAGE[kind]), error
    for other in KINDS_OF_PAGE:
        if other not in ("", kind) and kind:
            assert main(["explain", "nowhere", kind, other]) == 2
            error = capsys.readouterr().err
            assert "write different pages: choose one of them" in error or "does not apply to --replay" in error


PIXELS = """
const canvas = document.querySelector(arguments[0]);
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
return [...data].filter((_, i) => i % 4 === 3);
"""
"""A script that returns the opacity of each pixel of a canvas."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.mark.slow
def test_every_part_of_the_page_follows_the_choice_in_a_browser(
    browser: Any, model: GPTModel, ids: Tensor, tmp_path: Path
) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def texts(selector: str) -> list[str]:
        return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]

    data = page_data(model, TOKENIZER, ids)
    attention = base64.b64decode(data["attention"])
    (tmp_path / "page.html").write_text(explain_page(model, TOKENIZER, ids), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    labels = list("The·Cat")
    assert texts("#tokens button .mono") == labels
    assert texts("#tokens .chosen .mono") == ["t"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#heads button")) == 6
    assert texts("#map .rows span") == texts("#map .columns span") == labels
    assert texts("#lens tr")[-1].split() == ["after", "token", *labels]
    assert texts("#bars .mono")[:-1] == [label for label, _, _ in data["next"][6]["top"]]

    browser.find_element(By.CSS_SELECTOR, "#heads button[data-place='1.2']").click()
    browser.find_elements(By.CSS_SELECTOR, "#tokens button")[4].click()
    assert Select(browser.find_element(By.ID, "layer")).first_selected_option.text == "1"
    assert Select(browser.find_element(By.ID, "head")).first_selected_option.text == "2"
    weights = attention[(1 * 3 + 2) * 49 + 4 * 7 :][:5]
    shown = [text.removesuffix(" %").removeprefix("< ") for text in texts("#taken small")]
    assert [float(text) for text in shown] == pytest.approx([100 * weight / 255 for weight in weights], abs=0.51)
    assert browser.execute_script(PIXELS, "#map canvas") == [*attention[(1 * 3 + 2) * 49 :][:49]]
    # The small maps of all heads are in one canvas, each within its button.
    small = torch.tensor(browser.execute_script(PIXELS, "#heads canvas")).view(2 * 74 - 6, 3 * 74 - 6)
    for i, button in enumerate(browser.find_elements(By.CSS_SELECTOR, "#heads button")):
        row, column = 74 * (i // 3) + 2, 74 * (i % 3) + 2
        map_ = small[row : row + 64, column : column + 64]
        nearest = torch.arange(64) * 7 // 64
        expected = torch.tensor([*attention[49 * i :][:49]]).view(7, 7)[nearest][:, nearest]
        assert torch.equal(map_, expected)
        canvas = browser.find_element(By.CSS_SELECTOR, "#heads canvas").rect
        assert button.rect["x"] - canvas["x"] == pytest.approx((column - 2) / 2, abs=0.01)
        assert button.rect["y"] - canvas["y"] == pytest.approx((row - 2) / 2, abs=0.01)
    assert "In layer 1, head 2, C (token 4) attends to:" in browser.find_element(By.ID, "reading").text
    assert "The text continues with a, which has rank" in browser.find_element(By.ID, "question").text
    assert browser.execute_script("return location.hash") == "#layer=1&head=2&token=4"

    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("0")
    assert browser.find_element(By.CSS_SELECTOR, "#heads .chosen").get_attribute("data-place") == "0.2"
    browser.find_elements(By.CSS_SELECTOR, "#lens tr:nth-child(3) td")[1].click()  # the row of the embeddings
    second = data["lens"][0][1][1][0]
    assert (
        f"After the embeddings, the most likely tokens to follow h are {data['lens'][0][1][0][0]}"
        in browser.find_element(By.ID, "runners").text
    )
    assert second in browser.find_element(By.ID, "runners").text

    # A click into the map chooses its row. The pointer shows the weight below it.
    canvas, move = browser.find_element(By.CSS_SELECTOR, "#map canvas"), ActionChains(browser)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    cell = canvas.rect["width"] / 7
    move.move_to_element_with_offset(canvas, -3 * cell, 2 * cell).click().perform()  # row 5, column 0
    assert browser.execute_script("return location.hash") == "#layer=0&head=2&token=5"
    weight = 100 * attention[2 * 49 + 5 * 7] / 255
    title = canvas.get_attribute("title")
    assert title.startswith("a attends to T: ") and float(title.split(": ")[1].strip("<% ")) == pytest.approx(
        weight, abs=0.51
    )
    # The keyboard moves among the heads.
    browser.find_element(By.CSS_SELECTOR, "#heads .chosen").send_keys(Keys.ARROW_LEFT, Keys.ARROW_DOWN)
    assert browser.switch_to.active_element.get_attribute("data-place") == "1.1"
    assert Select(browser.find_element(By.ID, "head")).first_selected_option.text == "1"
    assert not browser.find_element(By.ID, "switch").is_displayed()  # this page cannot compute

    browser.set_window_size(400, 800)
    narrow = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert browser.execute_script(narrow)  # only the maps may scroll sideways
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_bars_in_a_browser_are_proportional_to_the_probabilities(
    browser: Any, model: GPTModel, ids: Tensor, tmp_path: Path
) -> None:
    """The bars of 12 tokens, of the actual next token and of all others show probabilities with the sum 1."""
    from selenium.webdriver.common.by import By

    flat = copy.deepcopy(model)
    with torch.no_grad():
        flat.transformer.ln_f.weight.mul_(0.05)
    (tmp_path / "page.html").write_text(explain_page(flat, TOKENIZER, ids), encoding="utf-8")
    data, counts = page_data(flat, TOKENIZER, ids), set()
    for t, entry in enumerate(data["next"]):
        browser.get((tmp_path / "page.html").as_uri() + f"#layer=0&head=0&token={t}")
        browser.refresh()
        bars = browser.find_elements(By.CSS_SELECTOR, "#bars .now")
        probabilities = [probability for _, probability, _ in entry["top"]]
        if entry["actual"] and entry["actual"][3] not in [id_ for _, _, id_ in entry["top"]]:
            probabilities.append(entry["actual"][1])
        probabilities.append(1 - sum(probabilities))
        widths = [bar.rect["width"] for bar in bars]
        assert entry["rest"] > 0.5 and max(widths) == widths[-1]
        scale = widths[-1] / probabilities[-1]
        assert widths == pytest.approx([scale * probability for probability in probabilities], abs=1)
        counts.add(len(widths))
    assert counts == {13, 14}


@pytest.mark.slow
def test_markup_in_a_text_is_shown_as_text_in_a_browser(browser: Any, model: GPTModel, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    ids = torch.tensor([TOKENIZER.encode(TEXT)])
    (tmp_path / "page.html").write_text(explain_page(model, TOKENIZER, ids, name="</title>"), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri() + "#layer=1&head=9&token=3")
    shown = [found.text for found in browser.find_elements(By.CSS_SELECTOR, "#tokens button .mono")]
    assert shown == list(TEXT.replace("\n", "↵"))
    assert browser.title == "How </title> reads a text"
    # The page ignores parts of the address that do not exist: there is no head 9.
    assert browser.find_element(By.CSS_SELECTOR, "#heads .chosen").get_attribute("data-place") == "1.0"
    assert browser.get_log("browser") == []
