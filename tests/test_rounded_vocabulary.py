"""Models with more ids than their tokenizer has tokens, as nanoGPT and transformers make them by rounding up.

The oracle is transformers: its `suppress_tokens` for generation, and its tokenizers for decoding.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, SimpleTokenizer, TrainConfig, generate, open_model
from MyGPT.acceleration.captured import CapturedModel
from MyGPT.acceleration.lookup import PromptLookup
from MyGPT.acceleration.step import accelerate
from MyGPT.cli import main
from MyGPT.generation import generate_stream, stream_text
from MyGPT.inside.page import explain_page, page_data
from MyGPT.inside.plots import plot_logit_lens, plot_neighbours, plot_sampling, token_labels
from MyGPT.inside.tracing import logit_lens, trace
from MyGPT.sampling import SamplingConfig
from MyGPT.tokenizers import Tokenizer
from MyGPT.tokenizers.added import AddedToken
from MyGPT.tokenizers.base import ids_without_token
from MyGPT.training.simple import generate_and_print_sample
from MyGPT.training.texts import LiveSamples

TEXT = "the cat sat on the mat. the dog sat by the fire."
TOKENIZERS: dict[str, Tokenizer] = {
    "chars": CharTokenizer.from_text(TEXT),
    "words": SimpleTokenizer.from_text(TEXT),
    "bpe": BPETokenizer.train(TEXT, 270, progress=False),
    "gaps": SimpleTokenizer({word: 3 * i for i, word in enumerate(["the", "cat", "sat", ".", "<|endoftext|>"])}),
    "added": BPETokenizer.train(TEXT, 262, progress=False),
}
TOKENIZERS["added"] = BPETokenizer(
    TOKENIZERS["added"]._vocab, TOKENIZERS["added"].merges, {}, added_tokens=[AddedToken("<x>", 270)]
)
PROMPT = "the cat"


def rounded() -> GPTModel:
    """Return a model whose most likely tokens nearly always lack a token: 2,048 ids, and few of them in the tokenizer."""
    return lively_model(GPTConfig(2048, context_length=32, emb_dim=8, n_heads=2, n_layers=2, qkv_bias=True)).double()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_greedy_ids_are_those_of_transformers_with_suppressed_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer, model = TOKENIZERS[kind], rounded()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    known = {id_ for id_ in range(2048) if tokenizer.decode([id_])} | ({tokenizer.eot_token} - {None})
    unknown = [id_ for id_ in range(2048) if id_ not in known]
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        suppress_tokens=unknown,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(generate(model, ids, 20, tokenizer=tokenizer), expected)
    assert ids_without_token(tokenizer, 2048) == unknown
    assert not set(generate(model, ids, 20)[0, ids.shape[1] :].tolist()) <= known  # without the tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("how", ["plain", "uncached", "fp32", "int8", "lookup", "captured"])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 5.0},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.5},
    ],
)
def test_no_way_of_generating_gives_an_id_without_a_token(kind: str, how: str, sampling: dict[str, Any]) -> None:
    tokenizer, model = TOKENIZERS[kind], rounded().float()
    fast: Any = {
        "fp32": lambda: accelerate(model, "fp32", compiled=False),
        "int8": lambda: accelerate(model, "int8", compiled=False),
        "lookup": lambda: PromptLookup(model, n_match=1),
        "captured": lambda: CapturedModel(model),
    }.get(how, lambda: model)()
    ids = torch.tensor([tokenizer.encode(PROMPT)] * 2)
    new = generate(fast, ids, 25, tokenizer=tokenizer, use_cache=how != "uncached", seed=3, **sampling)[
        :, ids.shape[1] :
    ]
    assert new.shape[1] == 25 and set(new.flatten().tolist()) <= set(tokenizer.ids())


def test_an_eos_id_without_a_token_still_ends_a_text() -> None:
    """The config of some models names an end of text that their tokenizer lacks."""
    tokenizer, model = TOKENIZERS["chars"], rounded()
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    best = int(model(ids)[0, -1].argmax())
    assert best >= tokenizer.n_vocab
    assert list(generate_stream(model, ids, 5, eos_id=best, tokenizer=tokenizer)) == []


def test_other_tokenizers_are_known_too(tmp_path: Path) -> None:
    encoding = tiktoken.Encoding(
        "holes", pat_str=r".+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<x>": 300}
    )
    TOKENIZERS["bpe"].save(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert ids_without_token(encoding, 305) == [*range(256, 300), *range(301, 305)]
    assert ids_without_token(theirs, 275) == ids_without_token(TOKENIZERS["bpe"], 275)
    assert ids_without_token(object(), 9) == []
    assert token_labels(encoding, [97, 299, 300]) == ["a", "<id 299>", "<x>"]
    new = generate(rounded(), torch.tensor([[97, 98]]), 20, tokenizer=encoding)
    assert encoding.decode(new[0].tolist())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_live_samples_and_the_books_sample_survive(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One such token ended a whole training run."""
    tokenizer, model = TOKENIZERS[kind], rounded().float()
    config = TrainConfig(max_steps=1, sample_every=1, sample_tokens=20, sample_temperature=1.5)
    prompt = [*tokenizer.encode(PROMPT), 2047]  # text that was prepared with another tokenizer may contain such ids
    text = LiveSamples(model, tokenizer, [prompt], config).text(1)
    assert text is not None and text.startswith(tokenizer.decode(prompt))
    generate_and_print_sample(model, tokenizer, "cpu", PROMPT)
    assert capsys.readouterr().out.startswith(tokenizer.decode(tokenizer.encode(PROMPT)))
    assert "".join(stream_text(model, tokenizer, prompt, 20, SamplingConfig(2.0), stop=["zzz"], seed=1)).strip()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pictures_label_ids_without_a_token(kind: str) -> None:
    tokenizer, model = TOKENIZERS[kind], rounded().float()
    assert token_labels(tokenizer, [0, 2047]) == [token_labels(tokenizer, [0])[0], "<id 2047>"]
    ids = torch.tensor([[*tokenizer.encode(PROMPT), 2047]])
    data = page_data(model, tokenizer, ids)
    assert data["tokens"][-1] == {"id": 2047, "label": "<id 2047>"}
    shown = {(label, id_) for position in data["next"] for label, _, id_ in position["top"]}
    assert all((label == f"<id {id_}>") == (id_ not in tokenizer.ids()) for label, id_ in shown)
    assert any(label.startswith("<id ") for label, _ in shown)
    assert "<id 2047>" in html.unescape(explain_page(model, tokenizer, ids).replace("\\u003c", "<"))
    labels = token_labels(tokenizer, ids[0].tolist())
    lens = logit_lens(model, trace(model, ids))[:, 0]
    texts = [text.get_text() for text in plot_logit_lens(lens, labels, tokenizer).axes[0].texts]
    assert any(text.startswith("<id") for text in texts)
    names = [tick.get_text() for tick in plot_neighbours(model, tokenizer, [0, 2047]).axes[0].get_yticklabels()]
    assert any(name.startswith("<id") for name in names)


def test_the_picture_of_sampling_shows_what_generation_does() -> None:
    """Ids without a token have a bar before the filters and a cross after them."""
    tokenizer, model = TOKENIZERS["chars"], rounded().float()
    logits = model(torch.tensor([tokenizer.encode(PROMPT)]))[0, -1]
    first, second, *_ = plot_sampling(logits, SamplingConfig(temperature=0.7), tokenizer).axes
    heights = [[bar.get_width() for bar in axes.patches][:15] for axes in (first, second)]
    labels = [tick.get_text() for tick in first.get_yticklabels()][:15]
    assert any(label.startswith("<id") for label in labels)
    for label, before, after in zip(labels, *heights, strict=True):
        assert before > 0 and (after > 0) == (not label.startswith("<id"))


@pytest.mark.slow
def test_commands_run_a_model_that_transformers_rounded_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = TOKENIZERS["bpe"]
    lively_model(GPTConfig(270, context_length=256, emb_dim=8, n_heads=2, n_layers=1)).save_pretrained(
        tmp_path / "run", tokenizer
    )
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "run")
    theirs.resize_token_embeddings(270, pad_to_multiple_of=512, mean_resizing=False)
    with torch.no_grad():
        theirs.transformer.wte.weight[270:] *= 40
    theirs.save_pretrained(tmp_path / "rounded")
    tokenizer.save(tmp_path / "rounded")
    model = str(tmp_path / "rounded")
    assert open_model(model, "cpu")[0].config.vocab_size == 512
    data, records = tmp_path / "text.txt", tmp_path / "records.json"
    data.write_text(TEXT * 20)
    records.write_text(json.dumps([{"instruction": "the cat", "output": "sat"}] * 12))
    tune = "--epochs 1 --batch_size 2 --sample_every 1 --sample_tokens 5 --eval_every 1 --device cpu --full"
    for command in (
        ["generate", "--model", model, "--prompt", PROMPT, "--max_new_tokens", "20", "--temperature", "2"],
        ["generate", "--model", model, "--prompt", PROMPT, "--max_new_tokens", "20", "--lookup", "true"],
        ["explain", PROMPT, "--model", model, "--out", str(tmp_path / "page.html")],
        ["plot", "lens", "--model", model, "--text", PROMPT, "--out", str(tmp_path / "lens.png")],
        ["plot", "sampling", "--model", model, "--text", PROMPT, "--out", str(tmp_path / "sampling.png")],
        ["plot", "neighbours", "--model", model, "--text", "the", "--out", str(tmp_path / "neighbours.png")],
        ["plot", "attention", "--model", model, "--text", PROMPT, "--out", str(tmp_path / "attention.png")],
        ["evaluate", "--model", model, "--data", str(data)],
        ["info", model],
        ["finetune", "--model", model, "--data", str(records), "--out", str(tmp_path / "tuned"), *tune.split()],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert open_model(tmp_path / "tuned", "cpu")[0].config.vocab_size == 512
