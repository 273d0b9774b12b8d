"""The models that commands accept (names, runs, directories, files), and the commands chat, download and info."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import lively_model
from http_server import file, serving
from MyGPT import BPETokenizer, GPTConfig, GPTModel, generate, get_tokenizer
from MyGPT.cli import main
from MyGPT.commands.chat import Conversation
from MyGPT.download import download
from MyGPT.serving import Engine
from MyGPT.weights import released
from oracles_layouts import BookGPT, NanoGPT
from oracles_openai import OPENAI
from texts import OPENAI_FILES

TALK = "User: hello\nAssistant: the cat sat by the fire\nUser: is it?\nAssistant: it is\n" * 20


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = BPETokenizer.train(TALK, 300, progress=False)
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=64, emb_dim=24, n_heads=3, n_layers=2)
    directory = tmp_path_factory.mktemp("talker")
    lively_model(config).save_pretrained(directory, tokenizer)
    return directory


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def continuation(directory: Path, prompt: str, n: int) -> str:
    """Return the model's greedy continuation of a prompt, up to the text "User:"."""
    model, tokenizer = GPTModel.from_pretrained(directory), get_tokenizer(directory)
    ids = tokenizer.encode(prompt)
    eot = tokenizer.eot_token
    out = generate(model, torch.tensor([ids]), n, eos_id=eot, stop="\nUser:", tokenizer=tokenizer)[
        0, len(ids) :
    ].tolist()
    return tokenizer.decode(out).split("\nUser:")[0]


CHAT = ["--temperature", "0", "--top_p", "1", "--repetition_penalty", "1", "--max_new_tokens", "12"]


def test_chat_answers_and_remembers(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    say(monkeypatch, "hello", "", "is it?")
    assert main(["chat", "--model", str(talker), "--system", "A cat.", *CHAT]) == 0
    first = continuation(talker, "A cat.\n\nUser: hello\nAssistant:", 12)
    second = continuation(talker, f"A cat.\n\nUser: hello\nAssistant:{first.rstrip()}\nUser: is it?\nAssistant:", 12)
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_chat_forgets_on_request_and_ends(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    say(monkeypatch, "hello", "/reset", "hello", "/help", "/quit", "hello")
    assert main(["chat", "--model", str(talker), *CHAT]) == 0
    answer = continuation(talker, "User: hello\nAssistant:", 12)
    captured = capsys.readouterr()
    assert captured.out == f"{answer}\n{answer}\n"
    assert "conversation cleared" in captured.err and "forget the conversation" in captured.err


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    say(monkeypatch, "hello", "the cat sat by the fire, is it? " * 2, "x" * 200)
    assert main(["chat", "--model", str(talker), *CHAT]) == 0
    error = capsys.readouterr().err
    assert "the context is full: dropped the oldest 1 of 1 turns" in error
    assert "tokens, but the context leaves room for 52; shorten the question" in error


def test_a_conversation_keeps_as_many_turns_as_fit(talker: Path) -> None:
    tokenizer = get_tokenizer(talker)
    conversation = Conversation(turns=[("hello", " it is"), ("is it?", " the cat")])
    whole = tokenizer.encode("User: hello\nAssistant: it is\nUser: is it?\nAssistant: the cat\nUser: sat?\nAssistant:")
    assert conversation.ids("sat?", tokenizer, len(whole)) == whole
    shorter = tokenizer.encode("User: is it?\nAssistant: the cat\nUser: sat?\nAssistant:")
    assert conversation.ids("sat?", tokenizer, len(whole) - 1) == shorter


def test_ctrl_c_ends_the_answer_but_not_the_chat(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*_: Any) -> Any:
        yield " the"
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream_text", interrupted)
    say(monkeypatch, "hello", "hello")
    assert main(["chat", "--model", str(talker), *CHAT]) == 0
    assert capsys.readouterr().out == " the\n the\n"


def test_chat_needs_room_for_a_question(talker: Path, capsys: Any) -> None:
    assert main(["chat", "--model", str(talker), "--max_new_tokens", "64"]) == 2
    assert "max_new_tokens must be below the model's context of 64" in capsys.readouterr().err


@pytest.fixture
def gpt2_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A server with OpenAI's files of a small model called 124M, and an empty cache."""
    data = (OPENAI / "model.ckpt.data-00000-of-00001").read_bytes()
    monkeypatch.setitem(released.DATA_BYTES, "124M", len(data))
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        for name in released.FILES:
            server.will(file(((OPENAI if (OPENAI / name).is_file() else OPENAI_FILES) / name).read_bytes()))
        yield server


@pytest.mark.slow
def test_a_model_that_was_downloaded_is_found_by_its_name(gpt2_server: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["download", "gpt2", "--base_url", gpt2_server.address]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache/models/124M'}\n"
    n_requests = len(gpt2_server.requests)
    shutil.copy(OPENAI_FILES / "encoder.json", tmp_path)
    # The model knows only the first 503 tokens of GPT-2, such as "!".
    assert main(["generate", "--model", "gpt2", "--prompt", "!", "--max_new_tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("!")
    assert len(gpt2_server.requests) == n_requests


@pytest.mark.parametrize(("given", "stops"), [(".", ["."]), ("5", ["5"]), ("a b", ["a b"]), ('["a", "."]', ["a", "."])])
def test_a_stop_is_a_text_or_a_list_of_texts(talker: Path, monkeypatch: Any, given: str, stops: list[str]) -> None:
    seen = []

    def stream(model: Any, tokenizer: Any, ids: Any, length: Any, sampling: Any, stop: Any, seed: Any) -> list[str]:
        seen.append(list(stop))
        return []

    monkeypatch.setattr("MyGPT.commands.generate.stream_text", stream)
    assert main(["generate", "--model", str(talker), "--prompt", "a", "--stop", given, "--device", "cpu"]) == 0
    assert seen == [stops]


def test_what_cannot_be_downloaded_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(download.__kwdefaults__, "sleep", lambda seconds: None)  # between two attempts
    assert main(["download", "gpt5"]) == 2
    assert "unknown model 'gpt5': choose 124M, gpt2," in capsys.readouterr().err
    assert main(["download", "124M", "--out", str(tmp_path), "--base_url", "http://127.0.0.1:1/models"]) == 2
    error = capsys.readouterr().err
    assert "127.0.0.1:1/models/124M/checkpoint" in error and str(tmp_path / "124M") in error
    assert main(["generate", "--model", "hf://gpt2"]) == 2
    assert "must be written as hf://user/model, got 'hf://gpt2'" in capsys.readouterr().err


def test_info_names_the_format_of_a_checkpoint(talker: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(NanoGPT(67, 16, 24, 3, 2, bias=False).checkpoint(), tmp_path / "ckpt.pt")
    torch.save(BookGPT(67, 16, 64, 4, 2, qkv_bias=False).state_dict(), tmp_path / "model.pth")
    for path, expected in (
        (OPENAI, ["OpenAI's TensorFlow checkpoint", "28 of float32", "2, 3, 24", "27,336"]),
        (talker, ["a model directory in Hugging Face's layout", "2, 3, 24", "complete                     yes"]),
        (tmp_path / "ckpt.pt", ["nanoGPT's checkpoint", "2, 3, 24", "complete                     yes"]),
        (tmp_path / "model.pth", ["a state dict in the book's layout", "64 wide", "2, 1, 64"]),
    ):
        assert main(["info", str(path)]) == 0
        printed = capsys.readouterr().out
        for words in expected:
            assert words in printed


def test_a_directory_of_downloaded_models_does_not_hide_their_names(in_tmp_path: Path, capsys: Any) -> None:
    """The book's call download_and_load_gpt2("124M", "gpt2") makes a directory called gpt2."""
    Path("gpt2/124M").mkdir(parents=True)
    assert main(["info", "gpt2"]) == 0
    assert "124,439,808" in capsys.readouterr().out


def test_info_lists_what_is_wrong_with_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    checkpoint = NanoGPT(67, 16, 24, 3, 2, bias=True).checkpoint()
    del checkpoint["model"]["_orig_mod.transformer.h.1.ln_2.bias"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert main(["info", str(tmp_path / "ckpt.pt")]) == 0
    assert "no: the weights do not fit the config: transformer.h.1.ln_2.bias is missing" in capsys.readouterr().out


def test_a_file_without_a_tokenizer_gets_gpt2s_only_if_the_vocabulary_is_as_large(tmp_path: Path, capsys: Any) -> None:
    """nanoGPT rounds the vocabulary size of 50,257 up to 50,304."""
    for vocab_size, status in ((50304, 0), (67, 2)):
        torch.save(NanoGPT(vocab_size, 16, 8, 1, 1, bias=True).checkpoint(), tmp_path / "ckpt.pt")
        arguments = ["generate", "--model", str(tmp_path / "ckpt.pt"), "--prompt", "a b", "--max_new_tokens", "1"]
        assert main([*arguments, "--top_k", "1"]) == status
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("slots", [1, 16])
def test_samples_generated_together_are_those_generated_alone(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, slots: int
) -> None:
    monkeypatch.setattr("MyGPT.commands.generate.MAX_SLOTS", slots)
    options = ["generate", "--model", str(talker), "--prompt", "the", "--max_new_tokens", "70", "--device", "cpu"]
    assert main([*options, "--n_samples", "3", "--seed", "5"]) == 0  # 70 tokens are more than the context
    together = capsys.readouterr().out
    alone = []
    for seed in (5, 6, 7):
        assert main([*options, "--seed", str(seed)]) == 0
        alone.append(capsys.readouterr().out)
    assert together == "\n---\n".join(alone)
