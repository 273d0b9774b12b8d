"""Test figures by reading their numbers and labels back from matplotlib."""

from __future__ import annotations

import html
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from MyGPT import BPETokenizer, CharTokenizer, GPTModel, SamplingConfig, SimpleTokenizer, TrainConfig, get_tokenizer
from MyGPT.cli import main
from MyGPT.commands.plot import KINDS
from MyGPT.inside.plots import (
    COLOURS,
    plot_attention,
    plot_layers,
    plot_logit_lens,
    plot_losses,
    plot_neighbours,
    plot_sampling,
    plot_schedule,
    save_figure,
    smooth,
)
from MyGPT.inside.tracing import logit_lens, trace
from MyGPT.tokenizers.display import token_labels, token_texts, tokens_to_html, tokens_to_terminal
from oracles_model import naive_distribution
from places import ROOT

CHARACTERS = CharTokenizer([chr(33 + i) for i in range(67)])
TEXT = "The cat, naïve as 漢字,\nsat\t🧙."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a short training run, which all tests share and must not change."""
    directory = tmp_path_factory.mktemp("runs")
    options = "--context_length 16 --emb_dim 16 --n_heads 2 --n_layers 2 --max_steps 3 --warmup_steps 1".split()
    assert main(["train", "--out", str(directory / "run"), *options, "--eval_windows", "2", "--sample_every", "0"]) == 0
    return directory / "run"


def drawn(figure: Figure) -> Figure:
    """Draw the figure, because a missing glyph, a layout conflict or mathtext in a label warns only when drawn."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def texts_of(figure: Figure) -> list[str]:
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.slow
def test_attention_maps_show_the_weights_with_tokens_on_both_axes(tiny_model: GPTModel) -> None:
    ids = torch.randint(67, (1, 7))
    labels = token_labels(CHARACTERS, ids[0].tolist())
    weights = trace(tiny_model, ids)["h.1.attn.weights"][0]
    figure = drawn(plot_attention(weights, labels))
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in maps] == ["head 0", "head 1", "head 2"]
    for head, axes in enumerate(maps):
        torch.testing.assert_close(torch.from_numpy(axes.images[0].get_array().data), weights[head])
        assert axes.images[0].get_clim() == (0, 1)
        assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert [label.get_text() for label in maps[0].get_yticklabels()] == labels  # the maps share this axis


@pytest.mark.slow
@pytest.mark.parametrize(("n_heads", "T"), [(1, 1), (1, 60), (5, 3), (12, 30), (16, 64), (25, 8)])
def test_attention_of_any_number_of_heads_and_tokens_is_drawn_within_the_width(n_heads: int, T: int) -> None:
    weights = torch.rand(n_heads, T, T).tril()
    figure = drawn(plot_attention(weights, ["a$b$_{", "漢字", "·token", "x"] * 16 if T == 64 else ["·token"] * T))
    assert figure.get_figwidth() <= 9.01
    assert sum(bool(axes.get_title()) for axes in figure.axes) == n_heads


@pytest.mark.slow
def test_crowded_labels_are_thinned_out_and_missing_glyphs_escaped() -> None:
    figure = drawn(plot_attention(torch.rand(1, 100, 100), ["字$^{"] * 100))
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert 20 <= len(shown) <= 60
    assert set(shown) == {"\\u5b57$^{"}


def test_the_lens_shows_the_most_likely_token_of_each_layer_and_its_probability(tiny_model: GPTModel) -> None:
    ids = torch.randint(67, (1, 6))
    lens = logit_lens(tiny_model, trace(tiny_model, ids))[:, 0]
    figure = drawn(plot_logit_lens(lens, token_labels(CHARACTERS, ids[0].tolist()), CHARACTERS))
    axes = figure.axes[0]
    probabilities, best = lens.softmax(-1).max(-1)
    torch.testing.assert_close(torch.from_numpy(axes.images[0].get_array().data), probabilities)
    shown = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert shown == {(t, depth): CHARACTERS.decode([int(best[depth, t])]) for depth in range(4) for t in range(6)}
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["embeddings", "layer 0", "layer 1", "layer 2"]


@pytest.mark.slow
@pytest.mark.parametrize(("n_depths", "T"), [(2, 1), (13, 40), (49, 12)])
def test_a_lens_of_any_size_is_drawn_within_the_width(n_depths: int, T: int) -> None:
    figure = drawn(plot_logit_lens(torch.randn(n_depths, T, 67), ["·longish_label"] * T, CHARACTERS))
    assert figure.get_figwidth() <= 9.01


@pytest.mark.slow
def test_sampling_shows_the_distribution_after_each_filter() -> None:
    logits, seen = (0.3 * torch.randn(67)).tolist(), [4, 9]  # flat, so the bar of all others is the longest
    config = SamplingConfig(temperature=0.7, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    figure = drawn(plot_sampling(torch.tensor(logits), config, CHARACTERS, seen, n_tokens=15))
    stages = [
        ("unfiltered", (1.0, None, None, None, None)),
        ("penalty 1.3", (1.0, None, None, None, 1.3)),
        ("temperature 0.7", (0.7, None, None, None, 1.3)),
        ("top-k 12", (0.7, 12, None, None, 1.3)),
        ("top-p 0.9", (0.7, 12, 0.9, None, 1.3)),
        ("min-p 0.05", (0.7, 12, 0.9, 0.05, 1.3)),
    ]
    best = sorted(range(67), key=lambda i: -logits[i])[:15]
    assert len(figure.axes) == len(stages)
    for axes, (title, options) in zip(figure.axes, stages, strict=True):
        expected = naive_distribution(logits, set(seen), *options)
        bars = [bar.get_width() for bar in axes.patches]
        others = 1 - sum(expected[i] for i in best)
        assert bars == pytest.approx([*(expected[i] for i in best), others], abs=1e-5)
        assert max(bars) < axes.get_xlim()[1]  # no bar is cut off
        first, second = axes.get_title().split("\n")
        assert first == title
        if title != "unfiltered":
            assert second == f"{sum(p > 0 for p in expected)} left"
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [*(CHARACTERS.decode([i]) for i in best), "all others"]


def test_a_temperature_of_zero_leaves_one_token() -> None:
    logits = torch.randn(67)
    figure = drawn(plot_sampling(logits, SamplingConfig(temperature=0, top_k=5), CHARACTERS))
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["unfiltered", "temperature 0"]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [1.0] + [0.0] * 15


@pytest.mark.slow
def test_neighbours_are_labelled_with_their_cosine_similarities(tiny_model: GPTModel) -> None:
    figure = drawn(plot_neighbours(tiny_model, CHARACTERS, [3, 10, 11, 12, 13], k=4))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [CHARACTERS.decode([i]) for i in (3, 10, 11, 12, 13)]
    weight = tiny_model.transformer.wte.weight.detach()
    for axes in panels:
        assert axes.xaxis.get_tick_params()["labelbottom"]  # also in the first column, above the fifth panel
        own = CHARACTERS.encode(axes.get_title())[0]
        for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True):
            other = CHARACTERS.encode(label.get_text())[0]
            cosine = torch.cosine_similarity(weight[own], weight[other], dim=0)
            assert bar.get_width() == pytest.approx(float(cosine), abs=1e-5)


def test_a_schedule_shows_the_learning_rates_of_training() -> None:
    from MyGPT.training.optim import make_optimizers, set_learning_rate

    config = TrainConfig(max_steps=50, warmup_steps=10, schedule="wsd")
    figure = drawn(plot_schedule({"mine": config, "other": TrainConfig(max_steps=20, warmup_steps=0)}))
    optimizers = make_optimizers(torch.nn.Linear(2, 2), config)
    used = [set_learning_rate(optimizers, config, step) for step in range(50)]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx(used)
    assert [line.get_label() for line in figure.axes[0].lines] == ["mine", "other"]


def test_plot_schedule_reads_recipes_like_the_other_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plot schedule` once rejected 1e-3, which YAML 1.1 reads as text, and expanded aliases until the memory was full."""
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-3\nmax_steps: 20\nwarmup_steps: 1\n")
    assert main(["plot", "schedule", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "a.svg")]) == 0
    capsys.readouterr()
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefgh"))
    for content, problem in [
        (bomb, "the alias *a is not allowed: write out the value"),
        ("a: " + "[" * 30 + "]" * 30, "nested more than 20"),
        ("max_steps: many", "a.yaml: "),
    ]:
        (tmp_path / "a.yaml").write_text(content)
        assert main(["plot", "schedule", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "b.svg")]) == 2
        message = capsys.readouterr().err
        assert problem in message and message.count("\n") == 1
        assert not (tmp_path / "b.svg").exists()


def test_layer_values_are_drawn_from_the_bottom_up() -> None:
    values = torch.rand(3, 5)
    figure = drawn(plot_layers(values, "head", "induction score"))
    torch.testing.assert_close(torch.from_numpy(figure.axes[0].images[0].get_array().data), values)
    assert figure.axes[0].get_ylim() == (-0.5, 2.5)
    with pytest.raises(ValueError, match="5 columns, there are 2 labels"):
        plot_layers(values, ["a", "b"], "score")


@pytest.mark.slow
def test_loss_curves_are_drawn_and_smoothed(run: Path) -> None:
    figure = drawn(plot_losses([run]))
    assert figure.axes[0].lines
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert smooth([0.0, 3.0] * 50)[50] == pytest.approx(1.0, abs=1.0)


def test_colours_can_be_told_apart_by_colour_blind_readers() -> None:
    """Any two colours keep a distance after the simulation of eyes without red or without green receptors."""
    # Machado et al. (2009), linear RGB, severity 1.
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    rgb = torch.tensor([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS])
    linear = rgb**2.2
    for matrix in (deuteranopia, protanopia):
        seen = (linear @ torch.tensor(matrix).T).clamp(0, 1) ** (1 / 2.2)
        distances = torch.cdist(seen, seen) + torch.eye(len(seen))
        assert distances.min() > 0.12


@pytest.mark.slow
def test_figures_do_not_import_pyplot_and_are_written_in_each_format(tmp_path: Path) -> None:
    code = "import sys; from MyGPT.inside.plots import plot_layers; import torch; plot_layers(torch.rand(2, 2), 'head', 'x'); "
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    figure = plot_layers(torch.rand(2, 2), "head", "x")
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        save_figure(figure, tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf, got a\.jpeg"):
        save_figure(figure, "a.jpeg")


class Spans(HTMLParser):
    """The texts and titles of the span elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "span":
            self.titles.append(dict(attrs)["title"] or "")
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


def unmarked(shown: str) -> str:
    return shown.replace("↵\n", "\n").replace("⇥   ", "\t")


@pytest.mark.parametrize(
    "tokenizer",
    [get_tokenizer("gpt2"), BPETokenizer.train(TEXT * 3, 270, progress=False), CharTokenizer.from_text(TEXT)],
    ids=["gpt2", "bpe", "chars"],
)
def test_coloured_tokens_join_to_the_text(
    tokenizer: BPETokenizer | CharTokenizer,
) -> None:
    ids = tokenizer.encode(TEXT)
    spans = Spans(tokens_to_html(tokenizer, TEXT))
    assert spans.titles == [f"id {id_}" for id_ in ids]
    assert list(map(unmarked, spans.texts)) == token_texts(tokenizer, ids)
    terminal = tokens_to_terminal(tokenizer, TEXT)
    assert unmarked(re.sub(r"\x1b\[[0-9;]*m", "", terminal)) == "".join(token_texts(tokenizer, ids))
    assert all(line.count("\x1b[0m") == line.count("\x1b[30;48;5;") for line in terminal.splitlines())
    plain = tokens_to_terminal(tokenizer, TEXT, colour=False)
    assert unmarked(plain).split("|") == token_texts(tokenizer, ids)


def test_neighbouring_tokens_never_share_a_colour() -> None:
    backgrounds = re.findall(r"background:(#\w+)", tokens_to_html(get_tokenizer("gpt2"), TEXT * 5))
    assert all(first != second for first, second in pairwise(backgrounds))


@pytest.mark.slow
@given(st.text(max_size=40))
def test_no_text_can_inject_markup_or_terminal_codes(text: str) -> None:
    gpt2 = get_tokenizer("gpt2")
    page = tokens_to_html(gpt2, text)
    spans = Spans(page)
    assert len(spans.texts) == len(gpt2.encode(text))
    assert page.count("<") == page.count(">") == 2 * len(spans.texts) + 2
    for label in token_labels(gpt2, gpt2.encode(text)):
        assert label.isprintable() and " " not in label
    shown = tokens_to_terminal(gpt2, text, colour=False)
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_unknown_words_are_shown_as_the_unknown_token() -> None:
    words = SimpleTokenizer.from_text("the cat sat")
    assert token_labels(words, words.encode("the dog sat")) == ["the", "<|unk|>", "sat"]
    assert html.escape("<|unk|>") in tokens_to_html(words, "the dog sat")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plot_has_a_help_text_with_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["plot", kind, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"mygpt plot {kind}" in text
    assert "Example:" in text


@pytest.mark.slow
def test_every_kind_of_plot_is_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_model = ["--model", str(run), "--text", "Alice was"]
    for kind, options in {
        "attention": [*on_a_model, "--layer", "1"],
        "lens": on_a_model,
        "sampling": [*on_a_model, "--top-k", "null", "--temperature", "0.5"],
        "neighbours": on_a_model,
        "schedule": [str(run), str(ROOT / "configs" / "quickstart.yaml")],
    }.items():
        out = tmp_path / f"{kind}.svg"
        assert main(["plot", kind, *options, "--out", str(out)]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == f"{out}\n"
        assert "<svg" in out.read_text(encoding="utf-8")
    assert main(["plot", "attention", *on_a_model, "--head", "1", "--out", str(tmp_path / "one.svg")]) == 0
    assert "<!-- head 1 -->" in (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "<!-- head 0 -->" not in (tmp_path / "one.svg").read_text(encoding="utf-8")


def test_tokens_are_printed_or_written_as_a_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "tokens", "--text", "The wizard's room"]) == 0
    assert capsys.readouterr().out == "The| wizard|'s| room\n"
    assert main(["plot", "tokens", "--text", "Alice", "--tokenizer", str(run)]) == 0
    assert capsys.readouterr().out == "A|l|i|c|e\n"
    assert main(["plot", "tokens", "--text", "The wizard", "--out", str(tmp_path / "t.html")]) == 0
    assert "<!doctype html>" in (tmp_path / "t.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention", "--layer", "2"], ["layer", "0 to 1", "got 2"]),
        (["attention", "--head", "-1"], ["head", "0 to 1", "got -1"]),
        (["attention", "--text", "Alice was beginning"], ["19 tokens", "context is 16"]),
        (["attention", "--text", ""], ["the text is empty"]),
        (["lens", "--out", "{tmp}/lens.jpeg"], [".png, .svg or .pdf", "lens.jpeg"]),
        (["sampling", "--top_p", "2"], ["top_p", "2"]),
        (["neighbours", "--k", "70"], ["k", "70"]),
        (["schedule", "nowhere.yaml"], ["no recipe at nowhere.yaml"]),
        (["tokens", "--text", "a", "--out", "{tmp}/a.png"], [".html", "a.png"]),
        (["tokens", "--text", "a", "--tokenizer", "klingon"], ["klingon"]),
        (["attentoin"], ["attentoin"]),
    ],
)
def test_user_errors_are_one_line_and_leave_no_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    if arguments[0] in ("attention", "lens", "sampling", "neighbours"):
        arguments = [*arguments, "--model", str(run)]
        arguments += [] if "--text" in arguments else ["--text", "Alice"]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "{tmp}/a.html" if arguments[0] == "tokens" else "{tmp}/a.png"]
    assert main(["plot", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    for word in words:
        assert word in errors
    assert list(tmp_path.iterdir()) == []
