"""`mygpt evaluate`: the printed table, and one line for each error."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, SimpleTokenizer, get_tokenizer
from MyGPT.cli import main
from MyGPT.config import GPT2_CONFIGS
from MyGPT.evaluation.perplexity import strided_loss

TEXT = "The wizard sat by the fire . It was n't hot , he said .\n" * 5
CONFIG = {"context_length": 16, "emb_dim": 12, "n_heads": 3, "n_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with book.txt and one model per tokenizer. Tests share the directory and must not write to it."""
    directory = tmp_path_factory.mktemp("models")
    tokenizers = {
        "bpe": BPETokenizer.train(TEXT, 290, progress=False),
        "chars": CharTokenizer.from_text(TEXT),
        "words": SimpleTokenizer.from_text(TEXT),
    }
    for name, tokenizer in tokenizers.items():
        lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **CONFIG)).save_pretrained(directory / name, tokenizer)
    (directory / "book.txt").write_text(TEXT)
    return directory


def table(arguments: list[str], capsys: Any) -> str:
    assert main(["evaluate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no terminal, no progress
    return captured.out


def number(pattern: str, printed: str) -> float:
    match = re.search(pattern.replace("#", r"([\d.,]+)"), printed)
    assert match, printed
    return float(match[1].replace(",", ""))


@pytest.mark.parametrize("stride", [None, 5])
def test_it_prints_what_transformers_loss_amounts_to(stride: int | None, models: Path, capsys: Any) -> None:
    """The text fits into one window, and the loss of transformers is the mean over all tokens except the first, which is
    one byte and half of the first word."""
    from transformers import AutoModelForCausalLM

    (name := models / "short.txt").write_text("It was hot.\n")
    options = [] if stride is None else ["--stride", str(stride)]
    printed = table(["--model", str(models / "chars"), "--data", str(name), "--device", "cpu", *options], capsys)
    ids = torch.tensor([CharTokenizer.from_text(TEXT).encode("It was hot.\n")])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(models / "chars")(ids, labels=ids).loss.item()
    # Printed with six digits behind the point, of numbers of about 3 in float32: 1e-5 is ten times both.
    assert number("loss +# nats per token", printed) == pytest.approx(loss, abs=1e-5)
    assert number("# per token", printed) == pytest.approx(math.exp(loss), rel=1e-4)
    assert number("# per word", printed) == pytest.approx(math.exp(loss * 11 / 2.5), rel=1e-4)
    assert number("bits per byte +#", printed) == pytest.approx(loss / math.log(2), abs=1e-5)
    assert "counted          11 tokens, 2.5 words, 11 bytes\n" in printed
    expected = f"windows of 16 tokens, stride {stride or 16}; first token not counted; text unchanged\n"
    assert f"protocol         {expected}" in printed


def test_a_protocol_changes_the_text_and_is_told(models: Path, capsys: Any) -> None:
    book = str(models / "book.txt")
    plain = table(["--model", str(models / "bpe"), "--data", book], capsys)
    by_ptb = table(["--model", str(models / "bpe"), "--data", book, "--protocol", "ptb"], capsys)
    assert plain.splitlines()[1] != by_ptb.splitlines()[1]
    assert "first token after <|endoftext|>; text unchanged" in plain
    assert "de-tokenized; 0 words of the corpus have no unique spelling" in by_ptb
    n_words = len(TEXT.split())
    assert f"{n_words} words, {len(TEXT)} bytes" in plain
    assert f"{n_words + 5} words, {len(TEXT)} bytes" in by_ptb
    model, tokenizer = GPTModel.from_pretrained(models / "bpe"), get_tokenizer(models / "bpe")
    for text, printed in ((TEXT, plain), (TEXT.replace(" n't", "n't"), by_ptb)):
        expected = strided_loss(model, tokenizer.encode(text), bos_id=tokenizer.eot_token)
        assert number("counted +# tokens", printed) == expected.n_tokens
        assert number("loss +# nats", printed) == pytest.approx(expected.loss, abs=1e-6)
    assert "published" not in by_ptb


def test_last_words_have_a_table_of_their_own(models: Path, tmp_path: Path, capsys: Any) -> None:
    lines = [json.dumps({"text": text}) for text in ("The wizard sat", "It was hot", "he\nsaid the fire")]
    (tmp_path / "lambada.jsonl").write_text("\n".join(lines))
    arguments = ["--model", str(models / "bpe"), "--data", str(tmp_path / "lambada.jsonl"), "--protocol", "lambada"]
    printed = table(arguments, capsys)
    assert 0 <= number("accuracy +# of last words", printed) <= number("# of last tokens", printed) <= 1
    assert number("# per last word", printed) > 1
    assert "counted          3 passages" in printed


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("ptb", "for GPT-2 124M on PTB: word perplexity 65.85 (Radford et al., 2019, table 3)"),
        ("enwik8", "for GPT-2 124M on enwik8: bits per byte 1.16 ("),
        ("lambada", "for GPT-2 124M on LAMBADA: perplexity 35.13, accuracy 0.4599 ("),
    ],
)
def test_published_figures_stand_beside_a_model_of_that_shape(
    protocol: str, expected: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = GPTModel.from_pretrained(models / "bpe").config
    monkeypatch.setitem(GPT2_CONFIGS, "124M", config)  # in its stead, since the real one would not fit a test
    data = str(models / "book.txt")
    arguments = ["--model", str(models / "bpe"), "--data", data]
    assert f"published        {expected}" in table([*arguments, "--protocol", protocol], capsys)
    assert "published" not in table(arguments, capsys)


def test_a_tokenizer_that_loses_text_is_told(models: Path, capsys: Any) -> None:
    printed = table(["--model", str(models / "words"), "--data", str(models / "book.txt")], capsys)
    assert "warning          the tokenizer loses part of the text" in printed


@pytest.mark.parametrize("name", ["blank.txt", "blank.jsonl"])
def test_a_text_of_white_space_has_no_perplexity_per_word(name: str, models: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).write_text("  \n\n  " if name == "blank.txt" else '{"text": "  \\n\\n  "}\n{"text": " "}\n')
    printed = table(["--model", str(models / "chars"), "--data", str(tmp_path / name)], capsys)
    loss = number("loss +# nats", printed)
    assert number("bits per byte +#", printed) == pytest.approx(loss / math.log(2), abs=1e-5)
    assert "per token, not defined per word without words\n" in printed
    assert "counted          5 tokens, 0 words, 5 bytes\n" in printed
    assert ("skipped          1 texts without a token to predict" in printed) == (name == "blank.jsonl")


@pytest.mark.parametrize("n", [2000, 20, 5, 2])
@pytest.mark.parametrize("name", ["letters.jsonl", "letters.NDJSON", "letters.json"])
def test_bits_per_byte_do_not_depend_on_how_a_text_is_cut_into_documents(
    n: int, name: str, models: Path, tmp_path: Path, capsys: Any
) -> None:
    text = (TEXT * 8)[:2000]
    records = [{"text": text[i : i + n]} for i in range(0, 2000, n)]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(json.dumps(records) if name.endswith("json") else lines)
    printed = table(["--model", str(models / "chars"), "--data", str(tmp_path / name)], capsys)
    n_predicted = 2000 - 2000 // n
    assert number("counted +# tokens", printed) == n_predicted
    assert f"words, {n_predicted:,} bytes" in printed
    loss = number("loss +# nats", printed)
    assert number("bits per byte +#", printed) == pytest.approx(loss / math.log(2), abs=1e-5)


def test_a_file_that_is_named_twice_is_measured_once(models: Path, capsys: Any) -> None:
    book = str(models / "book.txt")
    assert main(["evaluate", "--model", str(models / "bpe"), "--data", json.dumps([book, book])]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{book} is named more than once and is read once\n"
    assert f"{len(TEXT)} bytes" in captured.out


def test_the_example_of_the_help_works(models: Path, in_tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "--help"])
    assert done.value.code == 0
    match = re.search(r"Examples: mygpt (evaluate .*? --stride \d+)", " ".join(capsys.readouterr().out.split()))
    assert match
    (in_tmp_path / "runs").mkdir()
    (in_tmp_path / "runs/book").symlink_to(models / "bpe")
    (in_tmp_path / "book.txt").write_text(TEXT)
    arguments = match[1].split()
    arguments[-1] = "8"  # this model's context is 16
    assert main(arguments) == 0
    assert "stride 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "book.txt", "--protocol", "wiki"],
            "unknown protocol 'wiki'; choose from wikitext2, wikitext103, ptb",
        ),
        (["--data", "book.txt", "--stride", "17"], "stride must be a whole number from 1 to 16"),
        (["--data", "book.txt", "--batch_size", "0"], "batch_size must be a whole number of at least 1, got 0"),
        (
            ["--data", "book.txt", "--protocol", "lambada", "--stride", "4"],
            "stride cannot be used with protocol lambada, which predicts one word per passage, got 4",
        ),
        (["--data", "other.txt"], "character '7' at position 3 is not in the vocabulary"),
        (["--data", "empty.txt"], "there is no text to measure"),
        (["--data", "letter.txt"], "a text needs at least 2 tokens, or 1 after a bos_id, got 1"),
        (["--data", "none.txt"], "no text 'none.txt'"),
        (["--data", "book.txt", "--model", "nowhere"], "nowhere"),
        ([], "data"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, models: Path, in_tmp_path: Path, capsys: Any
) -> None:
    for name, text in {"book.txt": TEXT, "other.txt": "It 7", "empty.txt": "", "letter.txt": "I"}.items():
        (in_tmp_path / name).write_text(text)
    assert main(["evaluate", "--model", str(models / "chars"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1
