"""Draw the pictures of docs/learn.md, one for each idea in the core files: `python docs/pictures/draw.py`.

Each picture is drawn from what the code does: its numbers, tokens and names come from MyGPT's own functions. The functions in
LESSONS need only this repository. Those in TRAINED_LESSONS show a trained run of configs/quickstart.yaml.
"""

from __future__ import annotations

import contextlib
import html
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from MyGPT import BPETokenizer, GPTConfig, GPTDataset, GPTModel, SamplingConfig, TrainConfig, generate, load_tokenizer
from MyGPT.data.sources import find_files, read_documents
from MyGPT.finetuning.lora import LinearWithLoRA
from MyGPT.inside import collect_activations, places, trace, train_autoencoder
from MyGPT.sampling import filter_logits
from MyGPT.serving.engine import Engine
from MyGPT.tokenizers.chars import CharTokenizer
from MyGPT.tokenizers.display import token_labels
from MyGPT.training.metrics import read_metrics
from MyGPT.training.optim import schedule_factor

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "configs/quickstart.yaml"
SENTENCE = "Alice was beginning to get very tired"

INK, GREY, LINE = "#1b1f24", "#5b6470", "#b9c1ca"
# Light fills for dark text, the colours of architecture.dot: embeddings, attention, LayerNorm, MLP, residual stream.
BLUE, ORANGE, VIOLET, GREEN, PALE = "#cfe5f5", "#f9dcc4", "#e9e4f3", "#d5ecdf", "#eef1f4"
# Okabe and Ito's colours for bars and curves, which colour-blind readers can distinguish.
DARK_BLUE, DARK_ORANGE = "#0072B2", "#D55E00"
WIDTH = 480
"""The width of all pictures. A phone shows them at three quarters of their size, so the smallest text is 14 pixels high."""


class Picture:
    """An SVG picture on a white card, which readers see in light and in dark mode. `title` describes it."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.title = title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 15,
        *,
        anchor: str = "start",
        colour: str = INK,
        style: str = "",
    ) -> None:
        """Add a line of text whose baseline is at y. `style` is any of the words "bold" and "mono"."""
        attributes = f' class="{style}"' if style else ""
        attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
        attributes += f' fill="{colour}"' if colour != INK else ""
        attributes += f' font-size="{size}"' if size != 15 else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{attributes}>{html.escape(text, quote=False)}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        label: str = "",
        fill: str = PALE,
        *,
        size: int = 15,
        stroke: str = "none",
        colour: str = INK,
        style: str = "",
        round_: int = 4,
    ) -> None:
        """Add a rectangle with a label in its middle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_}" fill="{fill}" stroke="{stroke}"/>'
        )
        if label:
            middle = y + height / 2 + size * 0.35
            self.text(x + width / 2, middle, label, size, anchor="middle", colour=colour, style=style)

    def line(self, *points: tuple[float, float], colour: str = GREY, width: float = 1.5, arrow: bool = False) -> None:
        """Add a line through the points, with an arrow head at its end if `arrow` is true."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{end}/>')

    def plus(self, x: float, y: float) -> None:
        """Add a circle with a plus sign: an addition."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#fff" stroke="{GREY}" stroke-width="1.5"/>')
        self.text(x, y + 6, "+", 18, anchor="middle")

    def svg(self) -> str:
        """Return the content of the SVG file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" role="img" font-size="15" fill="{INK}" '
            'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, Arial, sans-serif">'
        )
        style = "<style>.bold{font-weight:600}.mono{font-family:ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace}</style>"
        arrow = (
            '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0,0L8,4L0,8z" fill="{GREY}"/></marker>'
        )
        card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="10" fill="#fff" stroke="{LINE}"/>'
        title = f"<title>{html.escape(self.title)}</title>"
        return "\n".join([head, title, style, f"<defs>{arrow}</defs>", card, *self.parts, "</svg>", ""])


def _alice() -> str:
    return "".join(read_documents(find_files("alice")))


def _recipe() -> dict[str, Any]:
    return dict(yaml.safe_load(RECIPE.read_text(encoding="utf-8")))


def _quickstart_config() -> GPTConfig:
    recipe, vocab_size = _recipe(), CharTokenizer.from_text(_alice()).n_vocab
    return GPTConfig(
        **{key: recipe[key] for key in ("context_length", "emb_dim", "n_heads", "n_layers")}, vocab_size=vocab_size
    )


def _shade(value: float) -> str:
    """Return a shade of blue for a number from 0 (white) to 1 (dark)."""
    return "#" + "".join(f"{round(255 + (dark - 255) * value):02x}" for dark in (8, 81, 156))


def _number(value: float) -> str:
    """Return a number from 0 to 1 with two decimals and without its leading zero."""
    return f"{value:.2f}".removeprefix("0")


# ---- pictures that need no trained model


def parameters() -> Picture:
    """The distribution of the parameters over the parts of a small and of a larger model."""
    picture = Picture("The share of the parameters in the embeddings, attention and MLP of two models", 236)
    colours = {"token embedding": BLUE, "position embedding": VIOLET, "attention": ORANGE, "MLP": GREEN}

    def part_of(name: str) -> str:
        names = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "MLP"}
        return next((part for key, part in names.items() if key in name), "LayerNorm")

    models = {"quick start": _quickstart_config(), "GPT-2 124M": GPTConfig(qkv_bias=True)}
    for row, (name, config) in enumerate(models.items()):
        with torch.device("meta"):
            model = GPTModel(config)
        counts: dict[str, int] = {}
        for parameter_name, parameter in model.named_parameters():
            part = part_of(parameter_name)
            counts[part] = counts.get(part, 0) + parameter.numel()
        total, x, y = sum(counts.values()), 20.0, 22 + row * 82
        sizes = f"{total / 1e6:.1f} million parameters"
        picture.text(20, y + 13, f"{name}: {sizes}", style="bold")
        sizes = f"C = {config.emb_dim}, H = {config.n_heads}, {config.n_layers} layers, V = {config.vocab_size:,}"
        for part, colour in colours.items():
            width = 440 * counts[part] / total
            label = f"{counts[part] / total:.0%}" if width > 34 else ""
            picture.box(x, y + 22, width, 28, label, colour, round_=0)
            x += width
        picture.text(20, y + 68, sizes, 14, colour=GREY)
    for i, (part, colour) in enumerate(colours.items()):
        x, y = 20 + i % 2 * 170, 184 + i // 2 * 22
        picture.box(x, y, 14, 14, "", colour, stroke=LINE)
        picture.text(x + 20, y + 12, part, 14)
    picture.text(460, 218, "LayerNorms: below 1%", 14, anchor="end", colour=GREY)
    return picture


def merges() -> Picture:
    """A sentence after more and more merges."""
    picture = Picture("One sentence as tokens after 0, 20, 100 and 510 merges of byte-pair encoding", 300)
    learned = BPETokenizer.train(_alice(), vocab_size=257 + 510, progress=False)
    single_bytes = {bytes([byte]): byte for byte in range(256)}

    def shown(token: bytes) -> str:
        return token.decode().replace(" ", "·")

    for row, n_merges in enumerate((0, 20, 100, 510)):
        first = learned.merges[:n_merges]
        merged = {left + right: 256 + i for i, (left, right) in enumerate(first)}
        tokenizer = BPETokenizer(single_bytes | merged, first, {})
        labels = token_labels(tokenizer, tokenizer.encode(SENTENCE))
        y, x = 18 + row * 56, 20.0
        picture.text(20, y + 13, f"{n_merges} merges, {len(labels)} tokens", 14, style="bold")
        unit = 440 / len(SENTENCE)
        for i, label in enumerate(labels):
            width = unit * len(label)
            picture.box(
                x, y + 20, width - 1.5, 24, label, (BLUE, ORANGE, GREEN)[i % 3], size=15, style="mono", round_=3
            )
            x += width
    picture.text(20, 257, "The first merges, learned from the whole book:", 14, colour=GREY)
    for i, (left, right) in enumerate(learned.merges[:6]):
        picture.text(20 + i * 76, 281, f"{shown(left)} + {shown(right)}", style="mono")
    return picture


def windows() -> Picture:
    """Two windows of a text with their targets."""
    picture = Picture(
        "A text cut into two windows; the targets of each window are its inputs shifted by one token", 268
    )
    T, text = 6, SENTENCE[:13]
    tokenizer = CharTokenizer.from_text(_alice())
    dataset = GPTDataset(text, tokenizer, max_length=T, stride=T)
    unit, left = 29, 88
    picture.text(20, 42, "text", 14, style="bold")
    for i, label in enumerate(token_labels(tokenizer, tokenizer.encode(text))):
        picture.box(left + i * unit, 22, unit - 2, 30, label, PALE, style="mono")
    for number, (inputs, targets) in enumerate(dataset):
        y = 72 + number * 92
        start = left + number * dataset.stride * unit
        for row, (name, ids, fill) in enumerate((("inputs", inputs, BLUE), ("targets", targets, ORANGE))):
            picture.text(20 if number == 0 else start - 68, y + row * 38 + 21, name, 14, style="bold")
            for i, label in enumerate(token_labels(tokenizer, ids.tolist())):
                picture.box(start + i * unit, y + row * 38, unit - 2, 30, label, fill, style="mono")
    labels = token_labels(tokenizer, dataset[0][0].tolist())
    target = token_labels(tokenizer, dataset[0][1].tolist())
    picture.text(
        20,
        252,
        f"Below each input is its target: “{''.join(labels[:3])}” is followed by “{target[2]}”.",
        14,
        colour=GREY,
    )
    return picture


def block(lengths: Sequence[float] = ()) -> Picture:
    """A block: two branches that read the residual stream and add to it. `lengths` are those of one token's vector."""
    picture = Picture(
        "A block: attention and MLP read a normalised copy of the residual stream and add their outputs to it", 250
    )
    y = 186
    picture.text(20, 240, "residual stream (B, T, C)", 14, style="bold")
    if lengths:
        picture.text(466, 240, "|x|: length of one vector", 14, anchor="end", colour=GREY)
    picture.line((20, y), (466, y), colour=LINE, width=9)
    for x, norm, (name, shape, fill), end in (
        (40, "ln_1", ("attention", "mixes tokens", ORANGE), 222),
        (252, "ln_2", ("MLP", "each token alone", GREEN), 434),
    ):
        picture.line((x, y), (x, 134), arrow=True)
        picture.box(x - 20, 102, 56, 30, norm, VIOLET, stroke=GREY)
        picture.line((x, 100), (x, 66), arrow=True)
        picture.box(x - 20, 20, 150, 44, "", fill, stroke=GREY)
        picture.text(x + 55, 40, name, anchor="middle", style="bold")
        picture.text(x + 55, 57, shape, 14, anchor="middle", colour=GREY)
        picture.line((x + 130, 42), (end, 42), (end, y - 13), arrow=True)
        picture.plus(end, y)
    for x, value in zip((96, 336, 466), lengths, strict=False):
        picture.text(x, 216, f"|x| = {value:.1f}", 14, anchor="end" if x > 400 else "middle", colour=GREY)
    return picture


def cache() -> Picture:
    """The tokens that a model computes in each step, with and without a cache."""
    picture = Picture(
        "With a cache each step computes one new token; without a cache it computes all tokens again", 246
    )
    model = GPTModel(GPTConfig(vocab_size=70, context_length=16, emb_dim=8, n_heads=1, n_layers=1)).eval()
    prompt, new = "Alice", "·was"
    computed: dict[bool, list[int]] = {}
    for use_cache in (True, False):
        counts: list[int] = []
        hook = model.transformer.wte.register_forward_hook(
            lambda _, args, __, counts=counts: counts.append(args[0].shape[1])
        )
        generate(model, torch.zeros(1, len(prompt), dtype=torch.int64), len(new), use_cache=use_cache)
        hook.remove()
        computed[use_cache] = counts
    unit = 26
    for column, use_cache in enumerate((True, False)):
        left = 22 + column * 230
        picture.text(left, 28, "with a cache" if use_cache else "without a cache", style="bold")
        for step, n_computed in enumerate(computed[use_cache]):
            y, n = 42 + step * 32, len(prompt) + step
            for i in range(n):
                label = (prompt + new)[i]
                is_new = i >= n - n_computed
                picture.box(left + i * unit, y, unit - 3, 27, label, ORANGE if is_new else BLUE, style="mono", round_=3)
        picture.text(left, 190, f"{sum(computed[use_cache])} tokens computed", 14)
    picture.box(22, 212, 16, 16, "", ORANGE)
    picture.text(44, 225, "computed in this step", 14)
    picture.box(252, 212, 16, 16, "", BLUE)
    picture.text(274, 225, "keys and values stored", 14)
    return picture


def schedule() -> Picture:
    """The learning rate of the quick start at each step."""
    picture = Picture("The learning rate over the steps of the quick start: a short warmup, then a decay to zero", 214)
    recipe = _recipe()
    config = TrainConfig(**{key: recipe[key] for key in recipe.keys() & {field.name for field in fields(TrainConfig)}})
    peak, n_steps = config.learning_rate, config.max_steps
    rates = [peak * schedule_factor(config, step) for step in range(n_steps)]

    def at(step: int, rate: float) -> tuple[float, float]:
        return round(66 + 388 * step / n_steps, 1), round(166 - 120 * rate / peak, 1)

    picture.text(20, 28, "learning rate", 14, style="bold")
    for share in (0.0, 0.5, 1.0):
        picture.line(at(0, share * peak), at(n_steps, share * peak), colour=PALE)
        picture.text(58, at(0, share * peak)[1] + 5, f"{share * peak:.4f}", 14, anchor="end", colour=GREY)
    warmup, bottom = config.warmup_steps, 166
    left, right = at(0, 0)[0], at(warmup, 0)[0]
    picture.box(left, 46, right - left, bottom - 46, "", ORANGE, round_=0)
    picture.line(*(at(step, rates[step]) for step in range(0, n_steps, 10)), colour=DARK_BLUE, width=2.5)
    picture.text(right + 8, 158, f"warmup: {warmup} steps", 14)
    picture.text(at(n_steps, 0)[0], 82, f"decay ({config.schedule})", 14, anchor="end")
    for step in range(0, n_steps + 1, 200):
        picture.text(at(step, 0)[0], 188, str(step), 14, anchor="middle", colour=GREY)
    picture.text(260, 206, "step", 14, anchor="middle", colour=GREY)
    return picture


def lora() -> Picture:
    """The shapes of a frozen weight matrix and of the two trained matrices."""
    picture = Picture(
        "The output of LoRA: x times the frozen matrix W, plus x times the product of the thin matrices A and B", 262
    )
    config, rank = _quickstart_config(), 8
    layer = LinearWithLoRA(GPTModel(config).transformer.h[0].attn.c_attn, rank, 16)
    C, out, r = layer.linear.in_features, layer.linear.out_features, layer.lora.rank
    frozen, trained = layer.linear.weight.numel(), layer.lora.A.numel() + layer.lora.B.numel()
    picture.box(16, 88, 54, 36, "x", PALE, stroke=GREY)
    picture.text(43, 142, f"C = {C}", 14, anchor="middle", colour=GREY)
    picture.line((70, 106), (92, 106), (92, 56), (118, 56), arrow=True)
    picture.line((92, 106), (92, 168), (118, 168), arrow=True)
    picture.box(120, 20, 210, 72, "", BLUE, stroke=GREY)
    picture.text(225, 50, "W, frozen", anchor="middle", style="bold")
    picture.text(225, 72, f"{C} × {out} = {frozen:,}", 14, anchor="middle")
    picture.box(120, 132, 56, 72, "A", ORANGE, stroke=GREY, style="bold")
    picture.text(148, 222, f"{C} × {r}", 14, anchor="middle")
    picture.line((176, 168), (196, 168), arrow=True)
    picture.box(198, 148, 132, 40, "B", ORANGE, stroke=GREY, style="bold")
    picture.text(264, 222, f"{r} × {out}", 14, anchor="middle")
    picture.text(225, 246, f"A and B, trained: {trained:,} numbers, {trained / frozen:.0%} of W", 14, anchor="middle")
    picture.line((330, 56), (394, 56), (394, 92), arrow=True)
    picture.line((330, 168), (394, 168), (394, 120), arrow=True)
    picture.text(340, 160, "× α/r", 14)
    picture.plus(394, 106)
    picture.line((405, 106), (424, 106), arrow=True)
    picture.box(426, 88, 40, 36, "y", PALE, stroke=GREY)
    return picture


def activations() -> Picture:
    """The names of the activations in one layer, in the order of the forward pass."""
    picture = Picture(
        "The names under which trace records the activations of a layer, in the order of the forward pass", 446
    )
    model = GPTModel(GPTConfig(vocab_size=70, context_length=16, emb_dim=8, n_heads=2, n_layers=1))
    names = places(model)
    shapes = {name: value.dim() for name, value in trace(model, torch.zeros(1, 2, dtype=torch.int64)).items()}
    rows = [
        (("embeddings",), PALE, "residual stream before layer 0"),
        (("h.0.ln_1",), VIOLET, "input of attention"),
        (("h.0.attn.q", ".k", ".v"), ORANGE, "per head"),
        (("h.0.attn.weights",), ORANGE, "per head, rows sum to 1"),
        (("h.0.attn.heads",), ORANGE, "per head"),
        (("h.0.attn",), ORANGE, "added to the stream"),
        (("h.0.after_attn",), PALE, "residual stream"),
        (("h.0.ln_2",), VIOLET, "input of the MLP"),
        (("h.0.mlp.c_fc",), GREEN, "neurons before GELU"),
        (("h.0.mlp.activations",), GREEN, "neurons after GELU"),
        (("h.0.mlp",), GREEN, "added to the stream"),
        (("h.0",), PALE, "residual stream after layer 0"),
        (("ln_f",), VIOLET, "input of the output head"),
        (("logits",), BLUE, "scores of the next token"),
    ]
    shown = {name if name[0] != "." else "h.0.attn" + name for row, _, _ in rows for name in row}
    assert shown == set(names) - {"wte", "wpe"}, "a place was added or renamed"
    assert shapes["h.0.attn.heads"] == shapes["h.0.attn.q"] == 4
    for i, (row, fill, note) in enumerate(rows):
        y = 14 + i * 30
        if i:
            picture.line((100, y - 5), (100, y), width=1.5)
        picture.box(16, y, 186, 25, ", ".join(row), fill, size=14, stroke=LINE, style="mono")
        picture.text(212, y + 18, note, 14, colour=GREY)
    return picture


class _Gate(contextlib.AbstractContextManager[None]):
    """A lock for an engine that holds its first step until `open` is called."""

    def __init__(self) -> None:
        self.is_reached, self._is_open = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self.is_reached.set()
        self._is_open.wait()

    def __exit__(self, *_: object) -> None: ...

    def open(self) -> None:
        self._is_open.set()


def slots() -> Picture:
    """The tokens that a server with two slots computes in each step for three requests."""
    picture = Picture(
        "Steps of a server with two slots and three requests: a request joins when another has left its slot", 262
    )
    model = GPTModel(GPTConfig(vocab_size=70, context_length=128, emb_dim=8, n_heads=1, n_layers=1)).eval()
    steps: list[dict[int, tuple[Any, int]]] = []  # per step and slot, the request and its number of computed tokens
    forward_slots, gate = model.forward_slots, _Gate()

    def recorded(pieces: Any, cache: Any) -> Any:
        owners = {run.slot: run.request for run in engine._running}
        steps.append({piece.slot: (owners[piece.slot], len(piece.ids)) for piece in pieces})
        return forward_slots(pieces, cache)

    model.forward_slots = recorded  # type: ignore[method-assign]
    requests = {"A": (5, 4), "B": (100, 6), "C": (8, 3)}  # prompt tokens and new tokens
    submitted = []
    with Engine(model, None, slots=2, lock=gate) as engine:
        for i, (length, n_new) in enumerate(requests.values()):
            submitted.append(engine.submit([i] * length, max_new_tokens=n_new, eos_id=None))
            gate.is_reached.wait()  # the first step, which A begins alone
        gate.open()
        for request in submitted:
            list(request)
    fills = dict(zip(requests, (BLUE, ORANGE, GREEN), strict=True))
    name_of = dict(zip(submitted, requests, strict=True))
    unit, left = 47, 74
    for slot in range(2):
        y = 56 + slot * 62
        picture.text(16, y + 30, f"slot {slot}", 14, style="bold")
        for step, computed in enumerate(steps):
            x = left + step * unit
            if slot not in computed:
                picture.box(x, y, unit - 3, 48, "", "#fff", stroke=LINE)
                continue
            request, n_tokens = computed[slot]
            picture.box(x, y, unit - 3, 48, "", fills[name_of[request]])
            picture.text(x + 22, y + 20, name_of[request], anchor="middle", style="bold")
            picture.text(x + 22, y + 40, str(n_tokens), 14, anchor="middle")
    for step in range(len(steps)):
        picture.text(left + step * unit + 22, 44, str(step + 1), 14, anchor="middle", colour=GREY)
    picture.text(16, 44, "step", 14, colour=GREY)
    picture.text(16, 26, "Tokens that each step computes for each request", style="bold")
    for i, (name, (length, n_new)) in enumerate(requests.items()):
        picture.box(16, 182 + i * 24, 16, 16, "", fills[name])
        picture.text(38, 195 + i * 24, f"request {name}: a prompt of {length} tokens, {n_new} new tokens", 14)
    return picture


# ---- pictures of a trained run


class Trained:
    """The model, the tokenizer and the directory of a trained run."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.model, self.tokenizer = GPTModel.from_pretrained(run).eval(), load_tokenizer(run / "model")

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer.encode(text)])

    def labels(self, text: str) -> list[str]:
        return token_labels(self.tokenizer, self.tokenizer.encode(text))

    @torch.no_grad()
    def logits(self, text: str) -> torch.Tensor:
        """Return the logits (T, V) of a text."""
        logits: torch.Tensor = self.model(self.ids(text))[0]
        return logits


def embeddings(trained: Trained) -> Picture:
    """The vectors of three tokens: token embedding plus position embedding."""
    picture = Picture(
        "For each of three tokens, a row of wte plus a row of wpe is the vector that enters the model", 288
    )
    text, n_shown = "Ali", 8
    traced, wpe = trace(trained.model, trained.ids(text)), trained.model.transformer.wpe.weight.detach()
    rows = [traced["wte"][0], wpe[: len(text)], traced["embeddings"][0]]
    assert torch.allclose(rows[0] + rows[1], rows[2], atol=1e-6)
    largest = max(float(row[:, :n_shown].abs().max()) for row in rows)
    ids, C = trained.ids(text)[0].tolist(), trained.model.config.emb_dim
    for column, (label, id_) in enumerate(zip(trained.labels(text), ids, strict=True)):
        left = 20 + column * 150
        picture.box(left, 16, 34, 30, label, PALE, stroke=LINE, style="mono")
        picture.text(left + 44, 37, f"id {id_}", 14)
        names = (f"wte[{id_}]", f"+ wpe[{column}]", "= x")
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            y = 70 + i * 62
            picture.text(left, y, name, 14, style="mono")
            for j, value in enumerate(row[column, :n_shown].tolist()):
                strength = abs(value) / largest
                fill = (
                    _shade(strength)
                    if value >= 0
                    else "#" + "".join(f"{round(255 + (dark - 255) * strength):02x}" for dark in (190, 80, 0))
                )
                picture.box(left + j * 16, y + 8, 16, 26, "", fill, stroke=LINE, round_=0)
    picture.text(20, 250, f"The first {n_shown} of C = {C} numbers of each vector.", 14, colour=GREY)
    picture.text(20, 271, f"Blue is positive, orange negative; the darkest is {largest:.2f}.", 14, colour=GREY)
    return picture


def attention(trained: Trained) -> Picture:
    """The scores of one head with the mask, and the attention weights."""
    layer, head, text = 0, 1, "Alice"
    picture = Picture(f"The scores and the attention weights of head {head} in layer {layer} for five characters", 294)
    traced = trace(trained.model, trained.ids(text))
    q, k = (traced[f"h.{layer}.attn.{name}"][0, head] for name in "qk")
    scores, weights = q @ k.T / math.sqrt(q.shape[1]), traced[f"h.{layer}.attn.weights"][0, head]
    masked = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    assert torch.allclose(masked.softmax(1), weights, atol=1e-5)
    labels, unit = trained.labels(text), 40
    for left, title, values in ((36, "scores q·k/√D", masked), (276, "weights", weights)):
        picture.text(left, 24, title, style="bold")
        for i, label in enumerate(labels):
            picture.text(left - 12, 66 + i * unit + 16, label, anchor="middle", style="mono")
            picture.text(left + i * unit + 19, 48, label, anchor="middle", style="mono", colour=GREY)
            for j in range(len(labels)):
                value = values[i, j].item()
                x, y = left + j * unit, 56 + i * unit
                if j > i:
                    picture.box(x, y, unit - 2, unit - 2, "−∞" if values is masked else "", PALE, size=14, colour=GREY)
                elif values is masked:
                    picture.box(x, y, unit - 2, unit - 2, f"{value:.1f}".replace("-", "−"), BLUE, size=14)
                else:
                    colour = "#fff" if value > 0.5 else INK
                    picture.box(
                        x, y, unit - 2, unit - 2, _number(value), _shade(value), size=14, colour=colour, stroke=PALE
                    )
    picture.line((238, 155), (254, 155), arrow=True)
    picture.text(20, 280, "A row is a query, a column a key. Softmax of a row sums to 1.", 14, colour=GREY)
    return picture


def block_of_run(trained: Trained) -> Picture:
    """The block, with the lengths of one token's vector before it, after attention and after the MLP."""
    traced = trace(trained.model, trained.ids(SENTENCE[:6]))
    names = ("embeddings", "h.0.after_attn", "h.0")
    return block([float(traced[name][0, -1].norm()) for name in names])


def loss(trained: Trained) -> Picture:
    """The loss of each character of a text."""
    text = "Alice was beg"
    picture = Picture(f"The loss of each character of “{text}”, and its mean", 274)
    ids = trained.ids(text)[0]
    losses = -trained.logits(text)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    labels, unit, base = trained.labels(text), 36, 176
    highest = float(losses.max())
    for i, (label, value) in enumerate(zip(labels[1:], losses.tolist(), strict=True)):
        x, height = 24 + i * unit, 120 * value / highest
        picture.box(x, base - height, unit - 8, max(height, 1), "", DARK_BLUE, round_=0)
        picture.text(x + 14, base - height - 6, f"{value:.1f}", 14, anchor="middle")
        picture.text(x + 14, base + 20, label, anchor="middle", style="mono")
        picture.text(x + 14, base + 42, _number(math.exp(-value)), 14, anchor="middle", colour=GREY)
    picture.line((16, base), (464, base))
    picture.text(20, 26, "loss −ln p of each character (bars)", 14, style="bold")
    mean = float(losses.mean())
    picture.text(20, 244, "Grey: the probability p that the model gave to the character.", 14, colour=GREY)
    picture.text(20, 264, f"Mean loss {mean:.2f}: perplexity exp({mean:.2f}) = {math.exp(mean):.1f}", 14)
    return picture


def filters(trained: Trained) -> Picture:
    """The probabilities of the next character under four sampling options."""
    text, n_shown = "Alice was ", 10
    picture = Picture(
        "The probabilities of the next character before and after temperature, top-k, top-p and min-p", 340
    )
    logits = trained.logits(text)[-1:]
    before = logits.softmax(-1)[0]
    ids = before.topk(n_shown).indices
    labels = token_labels(trained.tokenizer, ids.tolist())
    panels = {
        "temperature 0.5": SamplingConfig(0.5),
        "top_k 3": SamplingConfig(1.0, top_k=3),
        "top_p 0.6": SamplingConfig(1.0, top_p=0.6),
        "min_p 0.5": SamplingConfig(1.0, min_p=0.5),
    }
    after = {name: filter_logits(logits, config).softmax(-1)[0][ids] for name, config in panels.items()}
    highest = max(float(values.max()) for values in after.values())
    for i, (name, values) in enumerate(after.items()):
        left, base = 20 + i % 2 * 228, 132 + i // 2 * 148
        picture.text(left, base - 96, name, style="bold")
        for j, (label, value, old) in enumerate(zip(labels, values.tolist(), before[ids].tolist(), strict=True)):
            x = left + j * 21
            for height, fill, stroke in (
                (84 * value / highest, DARK_BLUE, "none"),
                (84 * old / highest, "none", DARK_ORANGE),
            ):
                picture.box(x, base - height, 17, height, "", fill, stroke=stroke, round_=0)
            picture.text(x + 8, base + 18, label, anchor="middle", style="mono")
        picture.line((left - 4, base), (left + n_shown * 21, base))
    picture.box(20, 313, 14, 14, "", "#fff", stroke=DARK_ORANGE)
    picture.text(40, 326, "before", 14)
    picture.box(110, 313, 14, 14, "", DARK_BLUE)
    picture.text(130, 326, f"after; the text is “{text.replace(' ', '·')}”", 14)
    return picture


def decoding(trained: Trained) -> Picture:
    """The loop that generates text, with four real steps."""
    picture = Picture(
        "Generation: the ids go through the model, a token is picked from the last logits and appended", 258
    )
    boxes = (("ids", PALE), ("model", ORANGE), ("logits", BLUE), ("pick", GREEN))
    for i, (name, fill) in enumerate(boxes):
        x = 16 + i * 118
        picture.box(x, 20, 94, 36, name, fill, stroke=GREY, style="bold")
        if i:
            picture.line((x - 24, 38), (x - 3, 38), arrow=True)
    picture.line((417, 56), (417, 80), (63, 80), (63, 59), arrow=True)
    picture.text(240, 98, "append the new token", 14, anchor="middle", colour=GREY)
    text, n_steps = "Alice was ", 5
    ids = generate(trained.model, trained.ids(text), n_steps, temperature=0.8, top_k=20, seed=3)
    for step in range(n_steps):
        so_far = trained.tokenizer.decode(ids[0, : len(text) + step].tolist())
        probabilities = trained.logits(so_far)[-1].softmax(-1)
        new = int(ids[0, len(text) + step])
        y = 130 + step * 27
        picture.text(20, y, so_far.replace(" ", "·"), style="mono")
        picture.line((190, y - 5), (222, y - 5), arrow=True)
        label = token_labels(trained.tokenizer, [new])[0]
        picture.box(230, y - 19, 28, 25, label, GREEN, style="mono")
        picture.text(270, y, f"p = {probabilities[new]:.2f}", 14)
        best = token_labels(trained.tokenizer, probabilities.topk(3).indices.tolist())
        picture.text(350, y, f"best: {' '.join(best)}", 14, colour=GREY, style="mono")
    return picture


def training(trained: Trained) -> Picture:
    """The five parts of a training step, and the losses of the run."""
    picture = Picture(
        "A training step: batch, model, loss, gradients, new weights; below, the losses of the quick start", 300
    )
    boxes = (
        ("batch", PALE), ("model", ORANGE), ("loss", BLUE), ("gradients", VIOLET), ("weights", GREEN),
    )  # fmt: skip
    widths = (72, 72, 58, 94, 82)
    x = 14.0
    for i, ((name, fill), width) in enumerate(zip(boxes, widths, strict=True)):
        picture.box(x, 20, width, 36, name, fill, stroke=GREY, size=15)
        if i < len(boxes) - 1:
            picture.line((x + width, 38), (x + width + 15, 38), arrow=True)
        x += width + 18
    picture.line((424, 56), (424, 76), (140, 76), (140, 59), arrow=True)
    picture.text(282, 94, "the next step uses the new weights", 14, anchor="middle", colour=GREY)
    records = read_metrics(trained.run)
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validation = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
    n_steps, top, bottom = max(step for step, _ in losses), 4.0, 1.0

    def at(step: int, value: float) -> tuple[float, float]:
        return round(52 + 400 * step / n_steps, 1), round(262 - 140 * (value - bottom) / (top - bottom), 1)

    for value in range(int(bottom), int(top) + 1):
        picture.line(at(0, value), at(n_steps, value), colour=PALE)
        picture.text(40, at(0, value)[1] + 5, str(value), 14, anchor="end", colour=GREY)
    for step in range(0, n_steps + 1, 200):
        picture.text(at(step, 1)[0], 282, str(step), 14, anchor="middle", colour=GREY)
    picture.line(*(at(step, value) for step, value in losses), colour=DARK_BLUE)
    for step, value in validation:
        x, y = at(step, value)
        picture.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4.5" fill="{DARK_ORANGE}"/>')
    picture.text(450, 136, "training loss", 14, anchor="end", colour=DARK_BLUE)
    picture.text(450, 158, "validation loss", 14, anchor="end", colour=DARK_ORANGE)
    picture.text(52, 118, "nats per character", 14, colour=GREY)
    return picture


def checkpoints(trained: Trained) -> Picture:
    """A run that is killed and resumed, and the files of a checkpoint."""
    picture = Picture("A run that was killed resumes at its newest checkpoint, and takes the same steps again", 292)
    directory = trained.run / "checkpoints" / (trained.run / "checkpoints/latest").read_text().strip()
    every, n_steps, killed = TrainConfig.checkpoint_every, _recipe()["max_steps"], 610
    kept = range(every, n_steps + 1, every)

    def at(step: float) -> float:
        return 30 + 416 * step / n_steps

    last = max(step for step in kept if step < killed)
    picture.text(20, 26, "first start", 14, style="bold")
    picture.line((at(0), 44), (at(killed), 44), colour=DARK_BLUE, width=3)
    picture.text(at(killed), 51, "×", 24, anchor="middle", colour=DARK_ORANGE)
    picture.text(at(killed) + 12, 50, "killed", 14, colour=DARK_ORANGE)
    picture.text(20, 78, "mygpt train --resume", 14, style="mono")
    picture.line((at(last), 100), (at(n_steps), 100), colour=DARK_BLUE, width=3)
    picture.line((at(last), 44), (at(last), 98), arrow=True)
    for step in kept:
        y = 44 if step < killed else 100
        picture.parts.append(
            f'<circle cx="{at(step):g}" cy="{y}" r="6" fill="#fff" stroke="{DARK_BLUE}" stroke-width="2"/>'
        )
        picture.text(at(step), 124, str(step), 14, anchor="middle", colour=GREY)
    picture.text(at(0), 124, "0", 14, anchor="middle", colour=GREY)
    picture.text(20, 146, "○ a checkpoint, below it its step", 14, colour=GREY)
    contents = {
        "weights.safetensors": "the parameters",
        "optimizer.safetensors": "the optimizer's state",
        "state.json": "step, random states",
        "manifest.json": "sizes and checksums",
    }
    assert set(contents) == {path.name for path in directory.iterdir()}
    for i, (name, content) in enumerate(contents.items()):
        y = 160 + i * 31
        picture.box(20, y, 196, 26, name, (BLUE, ORANGE, GREEN, VIOLET)[i], size=14, style="mono")
        picture.text(226, y + 18, content, 14)
        n_bytes = (directory / name).stat().st_size
        size = f"{n_bytes / 1e6:.1f} MB" if n_bytes > 1e5 else f"{n_bytes / 1e3:.1f} kB"
        picture.text(464, y + 18, size, 14, anchor="end", colour=GREY)
    return picture


def features(trained: Trained) -> Picture:
    """The features of a sparse autoencoder that fire in a few words."""
    text, place, n_features, k, n_rows = "Alice was very tired", "h.2", 256, 8, 7
    picture = Picture(
        "The features of a sparse autoencoder that fire most in a few words, and the characters at which they fire", 318
    )
    ids = trained.ids(_alice()[:80_000])[0]
    activations = collect_activations(trained.model, ids, place)
    autoencoder = train_autoencoder(activations[:-8000], n_features, k, steps=600)
    with torch.no_grad():
        held_out = activations[-8000:]
        error = (held_out - autoencoder(held_out)).pow(2).sum() / (held_out - held_out.mean(0)).pow(2).sum()
        strengths = autoencoder.encode(trace(trained.model, trained.ids(text))[place][0])  # (T, F)
    rows = strengths.sum(0).topk(n_rows).indices.sort().values.tolist()
    labels, unit, left = trained.labels(text), 18, 104
    highest = float(strengths[:, rows].max())
    C = trained.model.config.emb_dim
    picture.text(20, 28, f"x ({C} numbers) ≈ center + {k} of {n_features} directions", style="bold")
    picture.text(20, 50, f"explains {1 - error:.0%} of the variance on other text", 14, colour=GREY)
    for t, label in enumerate(labels):
        picture.text(left + t * unit + 9, 82, label, anchor="middle", style="mono")
    for i, feature in enumerate(rows):
        y = 92 + i * 28
        picture.text(16, y + 17, f"feature {feature}", 14)
        for t, strength in enumerate(strengths[:, feature].tolist()):
            picture.box(left + t * unit, y, unit - 1, 24, "", _shade(strength / highest), stroke=LINE, round_=2)
    picture.text(20, 308, "Dark: the feature fires strongly at this character.", 14, colour=GREY)
    return picture


LESSONS: dict[str, Callable[[], Picture]] = {
    "parameters": parameters,
    "merges": merges,
    "windows": windows,
    "cache": cache,
    "schedule": schedule,
    "lora": lora,
    "activations": activations,
    "slots": slots,
}
"""The pictures that need only the code of this repository."""

TRAINED_LESSONS: dict[str, Callable[[Trained], Picture]] = {
    "embeddings": embeddings,
    "attention": attention,
    "block": block_of_run,
    "loss": loss,
    "filters": filters,
    "decoding": decoding,
    "training": training,
    "checkpoints": checkpoints,
    "features": features,
}
"""The pictures that show a trained run of the quick start."""


def drawn(run: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file of each picture with its content."""
    for name, draw in LESSONS.items():
        yield HERE / "learn" / f"{name}.svg", draw().svg()
    trained = Trained(run)
    for name, draw_trained in TRAINED_LESSONS.items():
        yield HERE / "learn" / f"{name}.svg", draw_trained(trained).svg()
