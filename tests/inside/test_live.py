"""Test the page of `mygpt explain --live` in Chromium: JavaScript's numbers and token ids must equal Python's."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from browser import open_browser
from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, SimpleTokenizer, generate, get_tokenizer
from MyGPT.acceleration.packed import row_scales
from MyGPT.cli import main
from MyGPT.finetuning.lora import add_lora, merge
from MyGPT.inside.live import MAX_PARAMETERS, LivePage, tokenizer_data
from MyGPT.inside.page import WEB, next_token_data, page_data
from MyGPT.inside.tracing import ablate_heads, plain_attention
from MyGPT.inside.walk import walk_data
from MyGPT.sampling import SamplingConfig, filter_logits
from MyGPT.tokenizers.added import AddedToken
from MyGPT.tokenizers.bpe import BYTE_TO_CHARACTER, from_visible
from MyGPT.tokenizers.display import token_labels
from places import ALICE

Ask = Callable[[str], Any]
TEXT = "Alice was beginning to get very tired of sitting by her sister"
TOLERANCE = 2e-5
"""The bound for the difference of logits. float32 logits near 5 have rounding errors of about 5e-6."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser(logs=("browser", "performance")) as opened:
        opened.set_script_timeout(60)
        yield opened


@cache
def tokenizer_of(kind: str) -> Any:
    if kind == "chars":
        end = AddedToken("<|endoftext|>", 95, rstrip=True)
        return CharTokenizer(map(chr, range(32, 127)), [end])
    if kind == "words":
        return SimpleTokenizer.from_text(ALICE[:3000])
    if kind == "bpe":
        return BPETokenizer.train(ALICE[:20000], 400, ("<|endoftext|>", "<b>"), progress=False)
    if kind == "scattered":
        return scattered_bpe()
    return get_tokenizer("gpt2")


def scattered_bpe() -> BPETokenizer:
    """Return a BPE whose ids follow no order, with tokens that no merge creates and an added word that is no special token."""
    trained = tokenizer_of("bpe").to_json()["model"]
    names = [*trained["vocab"]][:300] + ["Ġnever", "→"]
    merges = [pair for pair in trained["merges"] if "".join(pair) in names]
    vocab = {token: (7 * i) % 311 for i, token in enumerate(names)}
    added = [
        AddedToken("<|im_start|>", 320, lstrip=True),
        AddedToken("Alice", 321, special=False, normalized=True, single_word=True),
        AddedToken("Alice was", 322, special=False, normalized=True),
    ]
    assert len(merges) == 44 and set(BYTE_TO_CHARACTER.values()) < set(names)
    return from_visible(vocab, merges, added)


def model_of(kind: str, **options: Any) -> GPTModel:
    """Return a small model for a tokenizer, with three ids that have no token."""
    sizes = {"context_length": 40, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}
    return lively_model(GPTConfig(vocab_size=tokenizer_of(kind).n_vocab + 3, **{**sizes, **options}))


def write_page(directory: Path, page: LivePage) -> Path:
    path = directory / "live.html"
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(page.pieces())
    assert path.stat().st_size == page.n_bytes
    return path


def open_page(browser: Any, path: Path) -> Ask:
    """Open a live page, wait until its worker is ready, and return a function that evaluates JavaScript in the page."""
    browser.get(path.as_uri())

    def ask(expression: str) -> Any:
        script = "const done = arguments[0]; (async () => (%s))().then(done, error => done({ error: error.message }));"
        return browser.execute_async_script(script % expression)

    assert ask("(await started, 'ready')") == "ready"  # a later call of the page could supersede one of the test
    return ask


@torch.no_grad()
def rounded(model: GPTModel, precision: str) -> GPTModel:
    """Return a float32 copy of the model with the weights that the page stores."""
    copied = copy.deepcopy(model).float()
    for weight in copied.parameters():
        if precision == "fp16":
            weight.copy_(weight.half())
        elif weight.dim() == 2:
            scales = row_scales(weight)[:, None]
            weight.copy_((weight / scales).round() * scales)
    return copied


@torch.no_grad()
def last_logits(model: GPTModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids[-model.config.context_length :]]))[0, -1]


def assert_same(got: Any, expected: Any, tolerance: float = 1e-4, place: str = "") -> None:
    """Check that two JSON values are equal, apart from a small difference of numbers."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), place
        for key in expected:
            assert_same(got[key], expected[key], tolerance, f"{place}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), place
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same(one, other, tolerance, f"{place}[{i}]")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance), place
    else:
        assert got == expected, place


def assert_same_inside(got: dict[str, Any], expected: dict[str, Any]) -> None:
    bytes_of = [
        np.frombuffer(base64.b64decode(data.pop("attention")), np.uint8).astype(int) for data in (got, expected)
    ]
    assert abs(bytes_of[0] - bytes_of[1]).max() <= 1  # 1 where 255 p is close to half a number
    assert_same(got, expected, 3e-5)  # probabilities have five decimals


# ---- The forward pass ----

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("chars", "fp16", {"tie_weights": True, "qkv_bias": False}),
    ("chars", "int8", {"tie_weights": False, "qkv_bias": True, "activation": "gelu", "layer_norm_eps": 1e-3}),
    ("words", "fp16", {"tie_weights": False, "qkv_bias": True, "emb_dim": 15}),
    ("words", "int8", {"tie_weights": True, "qkv_bias": False, "n_layers": 1}),
    ("bpe", "fp16", {"tie_weights": True, "qkv_bias": True, "activation": "gelu"}),
    ("bpe", "int8", {"tie_weights": True, "qkv_bias": True, "n_heads": 1}),
    ("scattered", "fp16", {"tie_weights": False, "qkv_bias": False}),
    ("gpt2", "fp16", {"tie_weights": True, "qkv_bias": True, "emb_dim": 8, "n_heads": 2, "n_layers": 1}),
]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.5},
    {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision", "options"), VARIANTS)
def test_every_number_of_the_page_equals_pythons(
    browser: Any, tmp_path: Path, kind: str, precision: Any, options: dict[str, Any]
) -> None:
    model, tokenizer = model_of(kind, **options), tokenizer_of(kind)
    ask = open_page(browser, write_page(tmp_path, LivePage(model, tokenizer, "", "a model", precision)))
    twin, layer, head = rounded(model, precision), model.config.n_layers - 1, model.config.n_heads - 1
    read = ask(f"await source.read({json.dumps(TEXT)})")
    ids = tokenizer.encode(TEXT)
    labels = token_labels(tokenizer, ids)
    assert read == {"ids": ids, "tokens": [{"id": id_, "label": label} for id_, label in zip(ids, labels, strict=True)]}
    ids, every = ids[:12], 29 if kind == "gpt2" else 1  # the driver is slow with long lists
    for off in ([], [(0, 0), (layer, head)]):
        heads_off = f"heads_off: {json.dumps(off)}"
        with ablate_heads(twin, off):
            logits = last_logits(twin, ids)
        some = ask(f"(await source.logits({ids}, {{ {heads_off} }})).filter((_, i) => i % {every} === 0)")
        assert (torch.tensor(some) - logits[::every]).abs().max() < TOLERANCE
        data = page_data(twin, tokenizer, torch.tensor([ids]), off)
        assert_same_inside(ask(f"await source.inside({ids}, {{ {heads_off} }})"), {**data, "n_left_out": 0})
        without_token = torch.tensor([i for i in range(len(logits)) if i not in tokenizer.ids()])
        for sampling in SAMPLINGS:
            possible = logits.index_fill(0, without_token, -torch.inf)
            expected = next_token_data(possible, tokenizer, SamplingConfig(**sampling))
            assert_same(ask(f"await source.next({ids}, {{ ...{json.dumps(sampling)}, {heads_off} }})"), expected)
        expected = walk_data(twin, tokenizer, torch.tensor([ids]), layer, head, 5, off)
        place = f"{{ layer: {layer}, head: {head}, token: 5, {heads_off} }}"
        assert_same(ask(f"await source.walk({ids}, {place})"), expected)
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_a_text_that_changes_gives_the_same_logits_as_a_new_one(browser: Any, tmp_path: Path) -> None:
    """The worker keeps what it computed for the last text; every edit must give the logits of a fresh computation."""
    model, tokenizer, rng = model_of("chars"), tokenizer_of("chars"), random.Random(1)
    ask = open_page(browser, write_page(tmp_path, LivePage(model, tokenizer, "")))
    twin, ids, texts = rounded(model, "fp16"), tokenizer.encode(TEXT[:20]), []
    for _ in range(25):
        at = rng.randrange(len(ids) + 1)
        new = [rng.randrange(95) for _ in range(rng.choice([0, 1, 1, 3, 37]))]
        ids = (ids[:at] + new + ids[at + rng.randrange(6) :] or [5])[:60]
        texts.append((ids, rng.choice([[], [], [[1, 2]], [[0, 1]]])))
    got = ask(f"(async () => {{ const all = []; for (const [ids, off] of {json.dumps(texts)}) "
              "all.push(await source.logits(ids, { heads_off: off })); return all; })()")  # fmt: skip
    for (ids, off), logits in zip(texts, got, strict=True):
        with ablate_heads(twin, [tuple(pair) for pair in off]):
            assert (torch.tensor(logits) - last_logits(twin, ids)).abs().max() < TOLERANCE
    data = ask(f"await source.inside({[*range(60)]})")
    assert data["n_left_out"] == 20 and [token["id"] for token in data["tokens"]] == [*range(20, 60)]


@pytest.mark.slow
def test_generation_equals_pythons_and_can_be_stopped(browser: Any, tmp_path: Path) -> None:
    model, tokenizer = model_of("bpe"), tokenizer_of("bpe")
    ask = open_page(browser, write_page(tmp_path, LivePage(model, tokenizer, "")))
    twin, ids = rounded(model, "fp16"), tokenizer.encode("Alice — ")
    run = (
        "(async () => {{ const tokens = [], control = new AbortController(); const ending = await source.generate({ids}, "
        "{{ {options}, signal: control.signal }}, token => {{ tokens.push(token); {then} }}); return [tokens, ending]; }})()"
    )

    def generated(options: str, then: str = "") -> tuple[list[dict[str, Any]], str]:
        tokens, ending = ask(run.format(ids=ids, options=options, then=then))
        return tokens, ending["finish_reason"]

    end = tokenizer.eot_token
    expected = generate(twin, torch.tensor([ids]), 60, eos_id=end, tokenizer=tokenizer)[0, len(ids) :].tolist()
    tokens, reason = generated("max_tokens: 60")  # 20 tokens more than the context holds
    assert [token["id"] for token in tokens] == expected and len(expected) == 60 and reason == "length"
    assert "".join(token["text"] for token in tokens) == tokenizer.decode([*ids, *expected]).rstrip("\ufffd")[8:]
    assert [token["label"] for token in tokens] == token_labels(tokenizer, expected)
    sampled = generated("max_tokens: 20, temperature: 1, seed: 3")
    assert generated("max_tokens: 20, temperature: 1, seed: 3") == sampled
    assert generated("max_tokens: 20, temperature: 1, seed: 4") != sampled
    tokens, reason = generated("max_tokens: 1000, temperature: 1", "if (tokens.length === 3) control.abort();")
    assert (len(tokens), reason) == (3, "stopped")
    other = model_of("bpe")
    with torch.no_grad():  # every prediction is the token that ends a text
        other.transformer.ln_f.weight.zero_()
        other.transformer.ln_f.bias.copy_(other.transformer.wte.weight[end] * 10)
    ask = open_page(browser, write_page(tmp_path, LivePage(other, tokenizer, "")))
    assert generated("max_tokens: 5") == ([], "stop")


@pytest.mark.slow
def test_a_newer_request_supersedes_an_older_one(browser: Any, tmp_path: Path) -> None:
    ask = open_page(browser, write_page(tmp_path, LivePage(model_of("chars"), tokenizer_of("chars"), "")))
    answers = ask(
        "(async () => { const seen = []; for (const n of [1, 2, 3, 4]) source.inside([...Array(n).keys()])"
        ".then(data => seen.push(data.tokens.length)); const next = source.next([1]); await source.inside([1, 2, 3, 4, 5]); "
        "await next; return seen; })()"
    )
    assert answers == []
    assert ask("await source.inside([])")["error"] == "the text is empty; it must have at least one token"
    assert ask("await source.inside([99])")["error"] == "token id 99 is outside the model's vocabulary of 99 tokens"
    wrong = "await source.walk([1, 2], { layer: 0, head: 1, token: 2 })"
    assert ask(wrong)["error"] == "token must be a whole number from 0 to 1, got 2"
    wrong = "await source.inside([1], { heads_off: [[0, 3]] })"
    assert ask(wrong)["error"] == "head must be a whole number from 0 to 2, got 3"
    assert ask("await source.read('é')")["error"] == (
        "character 'é' at position 0 is not in the vocabulary of 96 characters"
    )


@pytest.mark.slow
def test_other_dtypes_and_a_merged_adapter_are_packed_as_their_float32_values() -> None:
    model, tokenizer = model_of("chars"), tokenizer_of("chars")
    plain = "".join(LivePage(model, tokenizer).pieces())
    assert "".join(LivePage(copy.deepcopy(model).double(), tokenizer).pieces()) == plain
    narrow = copy.deepcopy(model).bfloat16()
    assert (
        "".join(LivePage(narrow, tokenizer).pieces()) == "".join(LivePage(narrow.float(), tokenizer).pieces()) != plain
    )
    adapted = add_lora(copy.deepcopy(model), 2)
    with pytest.raises(ValueError, match="merge an adapter first"):
        LivePage(adapted.get_base_model(), tokenizer)
    assert "".join(LivePage(merge(adapted), tokenizer).pieces()) == plain  # a new adapter changes nothing


def test_models_that_a_page_cannot_hold_are_refused() -> None:
    tokenizer = tokenizer_of("chars")
    large = GPTConfig(vocab_size=99, emb_dim=768, n_layers=5)
    with torch.device("meta"):
        big = GPTModel(large)
    with pytest.raises(
        ValueError, match=rf"has {big.num_parameters():,} parameters, a live page can hold {MAX_PARAMETERS:,}"
    ):
        LivePage(big, tokenizer)
    own = GPTModel(model_of("chars").config, parts={"attention": plain_attention})
    with pytest.raises(ValueError, match="a live page computes only GPT-2's parts, but this model has attention from"):
        LivePage(own, tokenizer)
    model = model_of("chars")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight is as large as 1e\+05.*use --precision int8"):
        LivePage(model, tokenizer)
    assert LivePage(model, tokenizer, precision="int8").n_bytes
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"a weight of transformer\.ln_f\.bias is nan"):
        LivePage(model, tokenizer, precision="int8")
    with pytest.raises(ValueError, match="needs a tokenizer of MyGPT, got a Encoding"):
        import tiktoken

        LivePage(model_of("chars"), tiktoken.Encoding("x", pat_str="a", mergeable_ranks={b"a": 0}, special_tokens={}))


def test_command_reports_the_size_and_refuses_options_that_do_not_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = model_of("chars"), tokenizer_of("chars")
    model.save_pretrained(tmp_path / "model", tokenizer)
    on_the_model = ["explain", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "a.html")]
    assert main([*on_the_model, "--live", "The cat", "--precision", "int8"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'a.html'}\n"
    size = (tmp_path / "a.html").stat().st_size
    assert captured.err == f"the page has {size / 1e6:.1f} MB, with {model.num_parameters():,} parameters in int8\n"
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page == "".join(LivePage(model, tokenizer, "The cat", "model", "int8").pieces())
    assert '"text": "Once upon a time"' in "".join(LivePage(model, tokenizer).pieces())
    assert '"text": ""' in "".join(LivePage(model_of("words"), tokenizer_of("words")).pieces())
    for arguments, words in [
        (["The cat", "--precision", "int8"], "--precision is an option of --live"),
        (["--live", "--device", "cpu"], "--device does not apply to --live"),
        (["--live", "The é"], "'é'"),
    ]:
        assert main([*on_the_model, *arguments]) == 2
        errors = capsys.readouterr().err
        assert words in errors and len(errors.splitlines()) == 1


# ---- The tokenizers ----

PIECES = ["'s", "'ll", "'", " ", "  ", "\n", "\t", "\r", "\r\n", "\0", "\x1c", "\x85", "\xa0", "\u2028", "\ufeff", "\u200b",
          "\u200f", "é", "e\u0301", "👩\u200d👩", "🇩🇪", "中文", "العربية", "²", "Ⅷ", "٣", "<|endoftext|>", "<b>",
          "<|endoftext", "Alice", "was", "don't", "don\u2019t", "--", "...", "12345", "ſ", "İ", "\ud7a3", "\u1680", "\u3000",
          "𝐀", "\U0002b73a", "\U00010940", "_", "-", "a", "B", "$", "^", "\\", "<|im_start|>", "<|unk|>", "Ġnever", "→",
          "\U0010ffff"]  # fmt: skip


def hostile_texts(n: int, known: Callable[[str], bool]) -> list[str]:
    """Return random texts of difficult pieces, of random characters and from a book, of which `known` accepts all characters."""
    rng, texts = random.Random(0), []
    for _ in range(n):
        size, kind = rng.randrange(20), rng.random()
        if kind < 0.6:
            pieces = [rng.choice(PIECES) for _ in range(size)]
        elif kind < 0.8:
            start = rng.randrange(len(ALICE) - 100)
            pieces = [ALICE[start : start + 4 * size]]
        else:
            pieces = [
                chr(code) for code in (rng.randrange(0x33000) for _ in range(size)) if not 0xD800 <= code < 0xE000
            ]
        texts.append("".join(piece for piece in pieces if all(map(known, piece))))
    return texts


def in_page(browser: Any, names: list[str], body: str, *arguments: Any) -> Any:
    """Run JavaScript in an empty page after the named files of inside/web."""
    browser.get("about:blank")
    code = "\n".join((WEB / f"{name}.js").read_text(encoding="utf-8") for name in names)
    return browser.execute_script(f"{code}\n{body}", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chars", "words", "bpe", "scattered", "gpt2"])
def test_ids_texts_and_labels_equal_pythons(browser: Any, kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    texts = hostile_texts(400, lambda character: kind != "chars" or " " <= character <= "~")
    rng, n = random.Random(2), tokenizer.n_vocab
    sequences = [[rng.randrange(n + 3) for _ in range(rng.randrange(9))] for _ in range(200)]
    labelled = [*range(n + 3)] if n < 1000 else rng.sample(range(n + 3), 1000)
    body = (
        "const [data, texts, sequences, labelled] = arguments, tokenizer = makeTokenizer(data);"
        "return [texts.map(text => tokenizer.encode(text)), sequences.map(ids => tokenizer.decode(ids)),"
        "labelled.map(id => tokenizer.label(id))];"
    )
    encoded, decoded, labels = in_page(
        browser, ["model", "tokenizer"], body, tokenizer_data(tokenizer), texts, sequences, labelled
    )
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert decoded == [tokenizer.decode(ids) for ids in sequences]
    assert labels == token_labels(tokenizer, labelled)
    if kind == "gpt2":
        assert len(json.dumps(tokenizer_data(tokenizer))) < 300_000  # bytes; its tokenizer.json has 2 MB


@pytest.mark.slow
def test_texts_that_cannot_be_encoded_give_pythons_messages(browser: Any) -> None:
    without_unknown = SimpleTokenizer({"a": 0, "b": 1})
    cases = [(tokenizer_of("chars"), text) for text in ("aé", "a\n'", "\"'\n", "\x1b", "\U0001f600", "\ud83d", "\\é")]
    cases += [(without_unknown, text) for text in ("a it's", 'a "', "\u200b", "b \\n")]
    cases += [(tokenizer_of("bpe"), text) for text in ("ab\ud800", "😀\udfff c")]
    body = (
        "return JSON.parse(arguments[0]).map(([data, text]) => { try { return makeTokenizer(data).encode(text); }"
        "catch (error) { return error.message; } });"
    )
    written = json.dumps([[tokenizer_data(owner), text] for owner, text in cases])  # the driver refuses half characters
    got = in_page(browser, ["model", "tokenizer"], body, written)
    for (owner, text), message in zip(cases, got, strict=True):
        with pytest.raises(ValueError) as raised:
            owner.encode(text)
        assert message == str(raised.value)


# ---- Sampling ----


@pytest.mark.slow
def test_filters_keep_the_tokens_that_python_keeps_also_for_equal_logits(browser: Any) -> None:
    rng, cases, expected = random.Random(3), [], []
    for i in range(200):
        logits = [
            rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]) if i % 2 else rng.gauss(0, 2)
            for _ in range(rng.randrange(1, 40))
        ]
        config = SamplingConfig(
            temperature=rng.choice([0.5, 1.0, 2.0]),
            top_k=rng.choice([None, 1, 3, 100]),
            top_p=rng.choice([None, 0.1, 0.5, 0.9, 0.999, 1.0]),
            min_p=rng.choice([None, 0.0, 0.05, 0.5, 1.0]),
        )
        options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        cases.append([logits, options])
        expected.append((filter_logits(torch.tensor([logits]), config)[0] > -torch.inf).tolist())
    body = "return arguments[0].map(([logits, options]) => [...filterLogits(logits, options)].map(value => value > -Infinity));"
    assert in_page(browser, ["model", "sampling"], body, cases) == expected


@pytest.mark.slow
def test_tokens_are_drawn_with_their_probabilities(browser: Any) -> None:
    probabilities, n = [0.5, 0.3, 0.15, 0.05], 20000
    body = (
        "const counts = [0, 0, 0, 0]; for (let i = 0; i < arguments[1]; i++)"
        "counts[drawToken(arguments[0], i % 200, Math.floor(i / 200))]++; return counts;"
    )
    counts = in_page(browser, ["model", "sampling"], body, [float(np.log(p)) for p in probabilities], n)
    chi_squared = sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, probabilities, strict=True))
    assert chi_squared < 16.3  # three degrees of freedom: a fair generator exceeds this once in a thousand seeds


# ---- The text ----


def test_a_text_that_cannot_be_read_is_reported_and_not_continued(browser: Any, tmp_path: Path) -> None:
    ask = open_page(browser, write_page(tmp_path, LivePage(model_of("chars"), tokenizer_of("chars"), "ab", "tiny")))
    ask("($('text').value = 'abé', readText())")
    assert ask("$('error').textContent").startswith(
        "Character 'é' at position 2 is not in the vocabulary of 96 characters. The page"
    )
    ask("(generate(), 0)")
    assert ask("$('text').value") == "abé" and ask("running") is None
    ask("($('text').value = 'abc', readText())")
    assert ask("$('error').textContent") == "" and ask("ids") == tokenizer_of("chars").encode("abc")
    ask("(generate(), running.ended)")
    assert ask("$('text').value").startswith("abc") and ask("ids.length") > 3


# ---- Safety ----


@pytest.mark.slow
def test_hostile_names_texts_and_vocabularies_change_nothing_and_no_request_leaves_the_page(
    browser: Any, tmp_path: Path
) -> None:
    hostile = ["</script><script>document.title='bad'</script>", "<!--", "<img src=x onerror=fetch('http://x.test')>",
               "\u2028", "\u202e", '"', "'", "\\", "\0", "__proto__", "<!-- tensors -->", "{{policy}}", "{{data}}"]  # fmt: skip
    added = [AddedToken(token, 3 + i) for i, token in enumerate(hostile)]
    tokenizer = CharTokenizer(["a", "\r", "é"], added)
    model = lively_model(GPTConfig(vocab_size=16, context_length=40, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0))
    text, name = "a".join(hostile), "</title><script>document.title='bad'</script>{{tensors}}"
    browser.get_log("performance")
    ask = open_page(browser, write_page(tmp_path, LivePage(model, tokenizer, text, name)))
    assert ask("source.info.text") == text and ask("source.info.name") == name
    assert ask("await source.read(source.info.text)")["ids"] == tokenizer.encode(text)
    ids = tokenizer.encode(text)[:20]
    data = ask(f"await source.inside({ids})")
    assert [token["label"] for token in data["tokens"]] == token_labels(tokenizer, ids)
    assert name in browser.title
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert (tmp_path / "live.html").as_uri() in urls
    assert all(url.startswith(("file:", "blob:", "data:")) for url in urls)
    assert browser.get_log("browser") == []
    # The policy of the page also stops requests and code that a mistake in the page would let through.
    for attempt in ("fetch('http://127.0.0.1:9/x')", "fetch('blob:null/x')"):
        assert "error" in ask(f"await {attempt}")
    browser.get_log("browser")
