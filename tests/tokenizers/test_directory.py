"""Test how the tokenizer of a directory is found: vocab.json with merges.txt as in transformers, and refused files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import MyGPT
import tokenizers
from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, get_tokenizer, load_tokenizer, open_model
from MyGPT.cli import main
from MyGPT.messages import FileWarning
from MyGPT.opening import find_model_files
from MyGPT.tokenizers import Tokenizer
from MyGPT.tokenizers.gpt2 import gpt2_vocabulary
from MyGPT.tokenizers.settings import read_settings
from MyGPT.weights.hub import _choose_files
from oracles_layouts import NanoGPT

OPENAI_FILES = Path(MyGPT.__file__).parent / "assets" / "gpt2"
SPANISH = "El perro corre por la casa y la niña canta todos los días "
TEXT = "la niña canta<|endoftext|> <x>perro<y> </s> día <z>"


@pytest.fixture(scope="module")
def spanish(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with vocab.json and merges.txt, which the tokenizers library wrote, and a config.json."""
    directory = tmp_path_factory.mktemp("spanish")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([SPANISH * 20], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(directory))
    write(directory, config={"model_type": "gpt2"})  # without it, AutoTokenizer does not know the class
    return directory


@pytest.fixture
def copy(spanish: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spanish, tmp_path / "copy"))


def write(directory: Path, **files: Any) -> None:
    """Write each value as the JSON file that its name, without the suffix, says."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


def check(directory: Path, text: str = TEXT) -> None:
    """Assert that the ids, texts and special tokens are those of AutoTokenizer, also after saving the tokenizer."""
    theirs = AutoTokenizer.from_pretrained(directory)
    for place in (directory, directory / "saved"):
        ours = load_tokenizer(place)
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.n_vocab == len(theirs)
        ids = list(range(len(theirs) + 5))
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.eot_token == theirs.eos_token_id
        is_saved = place != directory and "tokenizer_class" not in read_settings(directory)
        padding = ours.eot_token if is_saved and theirs.pad_token is None else theirs.pad_token_id
        assert ours.pad_token == padding
        expected = {(id_, added.content, added.special) for id_, added in theirs.added_tokens_decoder.items()}
        assert {(added.id, added.content, added.special) for added in ours.added_tokens} == expected
        ours.save(directory / "saved")
    assert AutoTokenizer.from_pretrained(directory / "saved")(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"added_tokens": {"<y>": 301, "<x>": 300}},
        {"added_tokens": {"<x>": 310, "<y>": 320}},
        {"special_tokens_map": {"eos_token": "<x>", "pad_token": token("<y>")}},
        {"special_tokens_map": {"additional_special_tokens": ["<x>", "<y>"]}, "added_tokens": {"<z>": 300}},
        {"tokenizer_config": {"eos_token": "<x>", "pad_token": "<y>", "tokenizer_class": "GPT2Tokenizer"}},
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", **token("<x>", normalized=True)}}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "301": token("<y>", special=True),
                    "0": token("<|endoftext|>", special=True),
                    "300": token("<x>", normalized=True, special=False),
                },
                "pad_token": "<y>",
            },
            "special_tokens_map": {"eos_token": "<z>"},
            "added_tokens": {"<z>": 302},
        },
        {"tokenizer_config": {"image_token": "<x>", "extra_special_tokens": {"other": "<y>"}}},
        {"tokenizer_config": {"eos_token": "casa", "unk_token": None}},
    ],
    ids=str,
)
def test_vocab_and_merges_are_read_as_in_transformers(copy: Path, files: dict[str, Any]) -> None:
    """Such a directory was silently read with GPT-2's vocabulary if the model had as many tokens."""
    write(copy, **files)
    check(copy)


@pytest.mark.parametrize("version", ["#version: 0.2\n", "#version: 0.2 - Trained by `huggingface/tokenizers`\n", ""])
def test_the_version_line_is_optional_and_line_ends_may_be_windows(copy: Path, version: str) -> None:
    lines = (copy / "merges.txt").read_text(encoding="utf-8").split("\n", 1)[1]
    (copy / "merges.txt").write_bytes((version + lines).replace("\n", "\r\n").encode())
    check(copy)


def test_ids_may_be_in_any_order(copy: Path) -> None:
    vocab = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    n = len(vocab)
    step = next(step for step in (7, 11, 13) if n % step)
    write(copy, vocab={token: (id_ * step + 5) % n for token, id_ in vocab.items()})
    check(copy)


def test_a_vocabulary_without_endoftext_gets_it_as_in_transformers(copy: Path) -> None:
    vocab = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    write(copy, vocab={token: id_ - 1 for token, id_ in vocab.items() if token != "<|endoftext|>"})
    check(copy)


@pytest.mark.slow
def test_gpt2s_own_files_open_under_these_names(tmp_path: Path) -> None:
    shutil.copy(OPENAI_FILES / "vocab.bpe", tmp_path / "merges.txt")
    write(
        tmp_path,
        config={"model_type": "gpt2"},
        vocab=gpt2_vocabulary(get_tokenizer("gpt2").to_json()["model"]["merges"]),
    )
    check(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == get_tokenizer("gpt2").encode(TEXT)


def test_tokens_of_roberta_are_not_special_unless_a_file_says_so(tmp_path: Path) -> None:
    """ByteLevelBPETokenizer's usual script puts five special tokens first and writes only vocab.json and merges.txt."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([SPANISH * 9], vocab_size=290, special_tokens=names, show_progress=False)
    trained.save_model(str(tmp_path))
    write(tmp_path, config={"model_type": "gpt2"})
    check(tmp_path)
    assert load_tokenizer(tmp_path).decode([0, 2]) == "<s></s>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "merges.txt").unlink(), r"vocab\.json is half of a tokenizer: merges\.txt is missing there"),
        (lambda d: (d / "vocab.json").unlink(), r"merges\.txt is half of a tokenizer: vocab\.json is missing there"),
        (lambda d: (d / "merges.txt").write_text("q z\n"), r"vocab\.json: the merge of b'q' and b'z' needs tokens"),
        (lambda d: (d / "merges.txt").write_text("a b c\n"), r"merges\.txt must have two tokens"),
        (lambda d: (d / "vocab.json").write_text("[1]"), r"vocab\.json must be a JSON object, got list"),
        (
            lambda d: (d / "vocab.json").write_text('{"a": 0}'),
            r"vocab\.json: the vocabulary lacks 255 of the 256 bytes",
        ),
        (lambda d: (d / "vocab.json").write_text('{"a": []}'), r"vocab\.json"),
        (lambda d: write(d, tokenizer_config={"add_prefix_space": True}), "add_prefix_space .* not supported"),
        (lambda d: write(d, tokenizer_config={"add_bos_token": True}), "add_bos_token .* not supported"),
        (lambda d: write(d, tokenizer_config={"tokenizer_class": "RobertaTokenizer"}), "the class 'RobertaTokenizer'"),
        (lambda d: write(d, tokenizer_config=[]), r"tokenizer_config\.json must be a JSON object"),
        (lambda d: write(d, added_tokens={"<x>": "one", "<y>": 2}), r"vocab\.json"),
        (lambda d: write(d, tokenizer_config={"eos_token": 3}), r"vocab\.json"),
    ],
)
def test_files_that_do_not_fit_together_are_refused_by_name(copy: Path, change: Any, words: str) -> None:
    change(copy)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(copy)
    with pytest.raises(ValueError, match=words):
        get_tokenizer(copy)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tokenizer.model", marks=pytest.mark.slow),
        "spiece.model", "sentencepiece.bpe.model", "tokenizer.model.v3", "vocab.txt", "tekken.json",
        "gpt2.tiktoken", "tokenizer.bin", "gpt2_tokenizer.bin", "tokenizer.pkl", "encoder.json", "vocab.bpe",
        "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json",
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_never_replaced_by_gpt2s(name: str, tmp_path: Path) -> None:
    torch.save(NanoGPT(50304, 16, 8, 1, 1, bias=True).checkpoint(), tmp_path / "ckpt.pt")
    assert open_model(tmp_path / "ckpt.pt", "cpu")[1].is_assumed
    (tmp_path / name).write_text("{}")
    for open_it in (lambda: open_model(tmp_path / "ckpt.pt", "cpu"), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(ValueError, match=f"{tmp_path / name} (is half of a|is a|has no)"):
            open_it()
    assert name in _choose_files(["config.json", "model.safetensors", "notes.txt", name])  # the hub's files too
    assert "notes.txt" not in _choose_files(["config.json", "model.safetensors", "notes.txt", name])


@pytest.fixture
def model_directory(copy: Path) -> Path:
    """A model with 50,257 tokens beside the Spanish vocabulary."""
    config = GPTConfig(50257, context_length=16, emb_dim=4, n_heads=1, n_layers=1)
    written = copy.parent / "model"
    lively_model(config).save_pretrained(written)
    shutil.copy(copy / "vocab.json", written)
    shutil.copy(copy / "merges.txt", written)
    return written


def test_every_way_of_opening_gives_the_same_tokenizer(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = AutoTokenizer.from_pretrained(model_directory)(TEXT)["input_ids"]
    shutil.copytree(model_directory, tmp_path / "run/model")
    model, tokenizer = open_model(model_directory, "cpu")
    weights = model_directory / "model.safetensors"
    found = [open_model(path, "cpu")[1] for path in (weights, tmp_path / "run", tmp_path / "run/model")]
    found += [
        open_it(path) for open_it in (get_tokenizer, load_tokenizer) for path in (model_directory, tmp_path / "run")
    ]
    assert all(other.encode(TEXT) == expected for other in (tokenizer, *found))
    assert tokenizer.source == f"vocab.json and merges.txt in {model_directory}"
    assert not tokenizer.is_assumed and not capsys.readouterr().err
    assert main(["info", str(weights)]) == 0
    assert f"tokenizer                    {tokenizer.source}\n" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "again", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT)["input_ids"] == expected


@pytest.mark.slow
def test_commands_use_the_tokenizer_of_a_directory(
    copy: Path, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(SPANISH * 30, encoding="utf-8")
    assert main(["prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"), "--tokenizer", str(copy)]) == 0
    sizes = "--context_length 8 --emb_dim 8 --n_heads 1 --n_layers 1 --max_steps 1 --device cpu".split()
    arguments = ["--data", str(tmp_path / "text.txt"), "--tokenizer", str(copy), "--out", str(tmp_path / "run"), *sizes]
    assert main(["train", *arguments]) == 0
    expected = AutoTokenizer.from_pretrained(copy)(TEXT)["input_ids"]
    for directory in (tmp_path / "data", tmp_path / "run"):
        assert load_tokenizer(directory).encode(TEXT) == expected
    capsys.readouterr()
    assert main(["generate", "--model", str(model_directory), "--prompt", "la niña", "--max_new_tokens", "5"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("la niña") and "tokenizer" not in output.err


def test_an_adapters_own_tokenizer_comes_before_that_of_its_model(copy: Path, tmp_path: Path) -> None:
    own = BPETokenizer.train(SPANISH, 290, progress=False)
    own.save(tmp_path / "adapter")
    files = find_model_files(copy)
    assert type(files)(copy, tmp_path / "adapter").tokenizer(300).encode(SPANISH) == own.encode(SPANISH)
    assert files.tokenizer(300).encode(TEXT) == load_tokenizer(copy).encode(TEXT)


def test_gpt2s_tokenizer_is_assumed_only_without_files_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(NanoGPT(50304, 16, 8, 1, 1, bias=True).checkpoint(), tmp_path / "ckpt.pt")
    tokenizer = open_model(tmp_path / "ckpt.pt", "cpu")[1]
    assert tokenizer.is_assumed and not get_tokenizer("gpt2").is_assumed
    reason = f"GPT-2's, because {tmp_path} has no tokenizer and the vocabulary has 50,304 tokens"
    assert tokenizer.source == reason
    page = str(tmp_path / "page.html")
    assert main(["explain", "a cat", "--model", str(tmp_path / "ckpt.pt"), "--out", page, "--device", "cpu"]) == 0
    assert capsys.readouterr().err == f"tokenizer: {reason}\n"
    assert main(["info", str(tmp_path / "ckpt.pt")]) == 0
    assert f"tokenizer                    {reason}\n" in capsys.readouterr().out
    torch.save(NanoGPT(67, 16, 8, 1, 1, bias=True).checkpoint(), tmp_path / "ckpt.pt")
    with pytest.raises(
        ValueError, match=r"has no tokenizer \(tokenizer\.json, vocab\.json with merges\.txt.*67 tokens"
    ):
        open_model(tmp_path / "ckpt.pt", "cpu")


@pytest.mark.parametrize("n_missing", [1, 3])
@pytest.mark.parametrize(
    "tokenizer", [BPETokenizer.train(SPANISH, 290, progress=False), CharTokenizer.from_text(SPANISH)]
)
def test_a_model_with_fewer_ids_than_the_tokenizer_is_opened_with_a_warning(
    tmp_path: Path, tokenizer: Tokenizer, n_missing: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers opens such a model too. A text with a token that the model lacks was a traceback."""
    n = tokenizer.n_vocab
    known, unknown = "a", tokenizer.decode([n - 1])
    config = GPTConfig(n - n_missing, context_length=16, emb_dim=4, n_heads=1, n_layers=1)
    lively_model(config).save_pretrained(tmp_path, tokenizer)
    words = f"does not fit the model: tokenizer.json in .* has ids up to {n - 1}, but .* end at {n - n_missing - 1}"
    with pytest.warns(FileWarning, match=words):
        model, opened = open_model(tmp_path, "cpu")
    assert opened.encode(unknown) == [n - 1]
    with pytest.raises((IndexError, ValueError), match="outside the vocabulary"):
        model(torch.tensor([opened.encode(unknown)]))
    generate = ["generate", "--model", str(tmp_path), "--device", "cpu", "--max_new_tokens", "2", "--prompt"]
    assert main([*generate, known]) == 0
    note, *_ = capsys.readouterr().err.splitlines()
    assert re.match(f"note: .*{words}", note)
    assert main([*generate, unknown]) == 2
    assert f"id {n - 1} is outside the vocabulary" in capsys.readouterr().err


def test_a_padding_token_that_the_model_lacks_is_left_out(copy: Path) -> None:
    """Many directories add a padding token to the tokenizer without a row in the model; transformers opens them."""
    n = load_tokenizer(copy).n_vocab
    write(copy, tokenizer_config={"pad_token": "[PAD]"})
    assert load_tokenizer(copy).n_vocab == n + 1
    files = find_model_files(copy)
    tokenizer = files.tokenizer(n)
    assert tokenizer.n_vocab == n and tokenizer.pad_token is None
    assert max(tokenizer.encode("a[PAD]<|endoftext|>")) < n and tokenizer.encode("<|endoftext|>") == [0]
    assert files.tokenizer(n + 1).pad_token == n
    tokenizer.save(copy / "saved")
    assert AutoTokenizer.from_pretrained(copy / "saved").pad_token == "[PAD]"
