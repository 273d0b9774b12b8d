"""`mygpt bench`, and `mygpt generate` and `mygpt chat` with an accelerated model."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import lively_model
from MyGPT import BPETokenizer, GPTConfig, GPTModel, accelerate, generate, load_tokenizer
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.cli import main
from MyGPT.commands import bench

TALK = "User: hello\nAssistant: the cat sat by the fire\nUser: is it?\nAssistant: it is\n" * 20
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = BPETokenizer.train(TALK, 300, progress=False)
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=64, emb_dim=24, n_heads=3, n_layers=2)
    directory = tmp_path_factory.mktemp("talker")
    lively_model(config).save_pretrained(directory, tokenizer)
    return directory


def generated(talker: Path, capsys: Any, *options: str) -> str:
    arguments = [
        "generate",
        "--model",
        str(talker),
        "--prompt",
        "the cat",
        "--max_new_tokens",
        "20",
        "--temperature",
        "0",
    ]
    assert main([*arguments, *options]) == 0
    out: str = capsys.readouterr().out
    return out


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_generate_takes_the_weights_in_the_precision_that_is_asked_for(
    talker: Path, precision: Any, capsys: Any
) -> None:
    tokenizer = load_tokenizer(talker)
    ids = torch.tensor([tokenizer.encode("the cat")])
    out = generate(accelerate(GPTModel.from_pretrained(talker), precision), ids, 20, eos_id=tokenizer.eot_token)
    assert generated(talker, capsys, "--precision", precision) == tokenizer.decode(out[0].tolist()) + "\n"


@pytest.mark.slow
def test_fp32_and_lookup_change_no_text(talker: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer(talker)
    ids = torch.tensor([tokenizer.encode("the cat")])
    out = generate(GPTModel.from_pretrained(talker), ids, 20, eos_id=tokenizer.eot_token)
    expected = tokenizer.decode(out[0].tolist()) + "\n"
    assert generated(talker, capsys) == expected
    assert generated(talker, capsys, "--precision", "fp32", "--lookup") == expected


def test_weights_stored_in_bf16_stay_bf16(talker: Path, tmp_path: Path, capsys: Any) -> None:
    GPTModel.from_pretrained(talker, dtype=torch.bfloat16).save_pretrained(tmp_path / "half", load_tokenizer(talker))
    stored = generated(tmp_path / "half", capsys)
    assert stored == generated(tmp_path / "half", capsys, "--precision", "bf16")


def test_chat_takes_them_too(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["chat", "--model", str(talker), "--temperature", "0", "--max_new_tokens", "12"]
    answers = []
    for options in ([], ["--precision", "fp32", "--lookup"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert main([*arguments, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_an_unknown_precision_is_refused(talker: Path, capsys: Any) -> None:
    assert main(["generate", "--model", str(talker), "--prompt", "a", "--precision", "int3"]) == 2
    assert "precision" in capsys.readouterr().err


@pytest.mark.slow
@needs_compiler
def test_bench_prints_a_row_for_each_program(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 20e9)
    assert main(["bench", "--model", str(talker), "--n_tokens", "2", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "memory bandwidth 20.0 GB/s" in out
    for name in (*bench.MYGPT, "transformers fp32"):
        assert re.search(rf"^{name} +[0-9.]+ \([0-9.]+ to [0-9.]+\) +[0-9]+% +[0-9.]+ ", out, re.M), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds must be a whole number of at least 1, got 0"),
        (["--size", "1M"], "size must be one of 124M, gpt2,"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(options: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_bench_refuses_more_than_the_context(talker: Path, capsys: Any) -> None:
    assert main(["bench", "--model", str(talker), "--n_tokens", "60"]) == 2
    assert "prompt + n_tokens must be below the model's context of 64, got 76" in capsys.readouterr().err


def test_the_bandwidth_is_one_that_a_machine_can_have() -> None:
    assert 1e8 < bench.read_bandwidth(2**24) < 1e13
