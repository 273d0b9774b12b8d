"""`mygpt chat`: the commands of a conversation, and a real terminal with editing, history and Ctrl-C."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, SamplingConfig
from MyGPT.cli import main
from MyGPT.commands.chat import Chat, Conversation
from MyGPT.serving import Engine
from terminal import Terminal

TALK = "User: hello\nAssistant: the cat sat by the fire\nUser: is it?\nAssistant: it is\n" * 20
CHAT = ["--temperature", "0", "--top_p", "1", "--repetition_penalty", "1", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = BPETokenizer.train(TALK, 300, progress=False)
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=64, emb_dim=24, n_heads=3, n_layers=2)
    directory = tmp_path_factory.mktemp("talker")
    lively_model(config).save_pretrained(directory, tokenizer)
    return directory


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def answers(talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, lines: list[str], *options: str) -> Any:
    """Chat with these lines, and return what was printed. The model echoes the prompt and the options that it receives."""

    def echo(engine: Engine, ids: list[int], length: int, sampling: Any, stop: Any, seed: Any) -> Any:
        question = engine.tokenizer.decode(ids).rpartition("User: ")[2].partition("\n")[0]
        yield f"{question}|{sampling.temperature}|{sampling.top_k}|{length}|{seed}"

    monkeypatch.setattr(Engine, "stream_text", echo)
    say(monkeypatch, *lines)
    assert main(["chat", "--model", str(talker), *options]) == 0
    return capsys.readouterr()


def test_set_changes_the_options_of_the_next_answers(talker: Path, monkeypatch: Any, capsys: Any) -> None:
    lines = ["a", "/set temperature 0.25", "/set top_k=5", "/set max-new-tokens 7", "b", "/set top_k off", "c"]
    printed = answers(talker, monkeypatch, capsys, lines)
    assert printed.out.splitlines() == ["a|0.7|None|32|None", "b|0.25|5|7|None", "c|0.25|None|7|None"]
    assert "temperature 0.25\n" in printed.err and "top_k off\n" in printed.err


def test_set_alone_shows_all_options(talker: Path, monkeypatch: Any, capsys: Any) -> None:
    error = answers(talker, monkeypatch, capsys, ["/set", "/set seed"], "--seed", "3").err.splitlines()
    expected = ["temperature 0.7", "top_k off", "top_p 0.9", "min_p off", "repetition_penalty 1.1", "max_new_tokens 32"]
    assert error[1:] == [*expected, "seed 3", "seed 3"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature -1", "temperature must be a number of at least 0, got -1"),
        ("/set temperature hot", "temperature must be a number of at least 0, got 'hot'"),
        ("/set temperature nan", "temperature must be a number of at least 0, got nan"),
        ("/set top_k 0", "top_k must be a whole number of at least 1, got 0"),
        ("/set top_p 2", "top_p must be a number above 0 and at most 1, got 2"),
        ("/set min_p 2", "min_p must be a number from 0 to 1, got 2"),
        ("/set repetition_penalty 0", "repetition_penalty must be a number above 0, got 0"),
        ("/set max_new_tokens 64", "max_new_tokens must be below the model's context of 64, got 64"),
        ("/set max_new_tokens off", "max_new_tokens must be a whole number of at least 1, got None"),
        ("/set seed abc", "seed must be a whole number or off, got 'abc'"),
        ("/set temprature 1", "unknown option 'temprature'; did you mean temperature?"),
        ("/set temp", "unknown option 'temp'; did you mean temperature?"),
        ("/set colour red", "unknown option 'colour'; the options are temperature, top_k,"),
        ("/rest", "unknown command '/rest'; did you mean /reset? (//rest sends /rest to the model as text)"),
        ("/clear", "did you mean /reset?"),
        ("/Help", "did you mean /help?"),
        ("/", "unknown command '/'; the commands are /set, /reset, /help, /exit"),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(
    line: str, words: str, talker: Path, monkeypatch: Any, capsys: Any
) -> None:
    printed = answers(talker, monkeypatch, capsys, [line, "a"])
    assert words in printed.err and len(printed.err.splitlines()) == 2
    assert printed.out == "a|0.7|None|32|None\n"


@pytest.mark.parametrize("line", ["exit", "quit", "/exit", "/quit", "EXIT", " exit "])
def test_exit_ends_the_chat(line: str, talker: Path, monkeypatch: Any, capsys: Any) -> None:
    assert answers(talker, monkeypatch, capsys, [line, "a"]).out == ""


@pytest.mark.parametrize(("line", "sent"), [("//help", "/help"), ("/usr/bin", "/usr/bin"), ("exit it", "exit it")])
def test_a_text_that_is_no_command_is_sent(line: str, sent: str, talker: Path, monkeypatch: Any, capsys: Any) -> None:
    assert answers(talker, monkeypatch, capsys, [line]).out.startswith(f"{sent}|")


def test_reset_starts_again_with_the_first_seed_and_keeps_the_options(
    talker: Path, monkeypatch: Any, capsys: Any
) -> None:
    lines = ["a", "b", "/set top_k 9", "/reset", "a", "b"]
    printed = answers(talker, monkeypatch, capsys, lines, "--seed", "5")
    assert printed.out.split() == ["a|0.7|None|32|5", "b|0.7|None|32|6", "a|0.7|9|32|5", "b|0.7|9|32|6"]


def test_a_seed_makes_a_conversation_repeatable(talker: Path, monkeypatch: Any, capsys: Any) -> None:
    say(monkeypatch, "hello", "is it?", "/reset", "hello", "is it?")
    assert main(["chat", "--model", str(talker), "--seed", "1", "--temperature", "1", "--max_new_tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert printed[: len(printed) // 2] * 2 == printed


def test_a_question_that_is_too_long_loses_no_turns(talker: Path) -> None:
    """The turns were deleted before the error about the question's length."""
    from MyGPT import get_tokenizer

    conversation = Conversation(turns=[("hello", " it is")])
    with pytest.raises(ValueError, match="shorten the question"):
        conversation.ids("x" * 200, get_tokenizer(talker), 52)
    assert conversation.turns == [("hello", " it is")]


def test_an_answer_stopped_before_its_first_word_is_not_kept(capsys: Any) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt
        yield ""

    tokenizer = CharTokenizer.from_text(TALK)
    chat = Chat(stopped, tokenizer, Conversation(turns=[("is it?", " it is")]), 200, SamplingConfig(), 10)
    chat.answer("hello")
    assert chat.conversation.turns == [("is it?", " it is")] and "the question is not kept" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--max_new_tokens", "0"], ["--template", "vicuna"], ["--temperature", "-1"]])
def test_options_are_checked_before_the_model_is_opened(options: list[str], capsys: Any) -> None:
    assert main(["chat", "--model", "nowhere", *options]) == 2
    error = capsys.readouterr().err
    assert "nowhere" not in error and options[1] in error


def test_a_tokenizer_that_cannot_ask_says_what_to_do(tmp_path: Path, capsys: Any) -> None:
    tokenizer = CharTokenizer.from_text("abc")
    sizes = {"context_length": 16, "emb_dim": 8, "n_heads": 1, "n_layers": 1}
    lively_model(GPTConfig(vocab_size=3, **sizes)).save_pretrained(tmp_path, tokenizer)
    assert main(["chat", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "cannot encode the text that chat adds to a question" in error and "--tokenizer bpe" in error


def test_a_model_without_an_end_token_is_told_at_the_start(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tokenizer = CharTokenizer.from_text(TALK)
    sizes = {"context_length": 64, "emb_dim": 8, "n_heads": 1, "n_layers": 1}
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)).save_pretrained(tmp_path, tokenizer)
    say(monkeypatch, "hello")
    assert main(["chat", "--model", str(tmp_path), *CHAT]) == 0
    error = capsys.readouterr().err
    assert "no <|endoftext|> token, so answers may end only after max_new_tokens=12 tokens" in error and "bpe" in error


def start(talker: Path, tmp_path: Path, *options: str) -> Terminal:
    """Start a chat in a terminal, and wait for its prompt."""
    command = [sys.executable, "-m", "MyGPT", "chat", "--model", str(talker), "--device", "cpu", *CHAT, *options]
    terminal = Terminal(command, XDG_STATE_HOME=str(tmp_path / "state"), TERM="xterm")
    terminal.wait_for("> ")
    return terminal


def ask(terminal: Terminal, keys: str, expected: str) -> None:
    """Type keys, and wait until the terminal shows `expected` and the next prompt after it."""
    seen = len(terminal.received)
    terminal.type(keys)
    terminal.wait_until(lambda: b"> " in terminal.received[seen:].partition(expected.encode())[2])


@pytest.mark.slow
def test_a_terminal_edits_lines_recalls_them_and_survives_ctrl_c(talker: Path, tmp_path: Path) -> None:
    terminal = start(talker, tmp_path)
    ask(terminal, "/sex\x7ft top_k 3\r", "top_k 3\r\n")  # backspace
    ask(terminal, "set top_k 4\x01/\r", "top_k 4\r\n")  # Ctrl-A moves to the beginning of the line
    ask(terminal, "nonsense\x03", "\r\n")  # clears the line
    ask(terminal, "\x03", "exit or Ctrl-D ends the chat")
    ask(terminal, "\x1b[A\x1b[A\r", "top_k 3\r\n")  # the line before the previous one
    ask(terminal, "\x1b[200~hello\nx\x1b[201~\r", "x\r\n")  # a pasted text is one question
    ask(terminal, "hello\\\ry\r", "y\r\n")  # a backslash continues the line
    terminal.type("\x04")
    assert terminal.end() == 0
    history = tmp_path / "state/mygpt/chat_history"
    lines = ["/set top_k 3", "/set top_k 4", "/set top_k 3", "hello\u2028x", "hello\u2028y"]
    assert history.read_text(encoding="utf-8") == "\n".join([*lines, ""])
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    again = start(talker, tmp_path)
    ask(again, "\x1b[A\x1b[A\x1b[A\r", "top_k 3\r\n")
    again.type("exit\r")
    assert again.end() == 0


@pytest.mark.slow
def test_piped_questions_are_answered_and_leave_no_history(talker: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "MyGPT", "chat", "--model", str(talker), "--device", "cpu", *CHAT]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(command, input="hello\nis it?", capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2 and "> " not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_later_turns_compute_only_what_is_new(talker: Path, monkeypatch: Any, capsys: Any) -> None:
    """The keys and values of the conversation so far are still in the cache."""
    requests = []
    submit = Engine.submit

    def spy(*arguments: Any, **options: Any) -> Any:
        requests.append(submit(*arguments, **options))
        return requests[-1]

    monkeypatch.setattr(Engine, "submit", spy)
    say(monkeypatch, "hello", "is it?", "the cat?")
    assert main(["chat", "--model", str(talker), "--max_new_tokens", "5", "--seed", "1", "--device", "cpu"]) == 0
    first, second, third = requests
    assert first.n_reused == 0
    for before, after in ((first, second), (second, third)):
        # The last token of an answer was not computed, and the answer loses spaces at its end.
        assert after.n_reused >= len(before.prompt_ids) and after.n_reused < len(after.prompt_ids)
