"""Text that is safe to print, errors in one line, suggestions, quoted paths, and streams of every encoding."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from MyGPT.messages import (
    MAX_MESSAGE,
    MODEL_SYNONYMS,
    OPTION_SYNONYMS,
    did_you_mean,
    error_message,
    printable,
    quote,
    read_standard_input,
)
from terminal import run_in_terminal

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt\u2066\r\b\0\x7f\u2028\ud800"


def test_printable_escapes_every_control_character_and_nothing_else() -> None:
    for code in (*range(0x3000), *range(0xD7F0, 0x10000, 7), 0x1F600, sys.maxunicode):
        character = chr(code)
        category = unicodedata.category(character)
        is_bidi = unicodedata.bidirectional(character) in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
        is_control = category in ("Cc", "Cs", "Zl", "Zp") or is_bidi
        if is_control and character not in "\n\t":
            assert printable(character).isprintable(), hex(code)
            assert printable(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"
        elif category not in ("Cf", "Cn"):
            assert printable(f"a{character}b") == f"a{character}b", hex(code)


@pytest.mark.parametrize(
    "text", ["a\u200d👩\u200d💻", "\u00a0\u3000", "नमस्\u200cते", "e\u0301", "line\n\ttab", "\ufffd"]
)
def test_printable_keeps_ordinary_text(text: str) -> None:
    assert printable(text) == text


def test_an_error_message_is_one_printable_line_of_limited_length() -> None:
    message = error_message(
        ValueError(f"the key {'k' * 10_000 + chr(27)!r} in {HOSTILE} is\nnot allowed; it's 'short'")
    )
    assert message.isprintable() and len(message) < 600
    assert "k" * 200 + "…'" in message and message.endswith("is not allowed; it's 'short'")
    assert "k" * 201 not in message
    long = error_message(ValueError("x " * 10_000 + "the way out"))
    assert len(long) < MAX_MESSAGE + 10 and long.endswith("the way out")


def test_the_message_of_an_operating_system_error_has_no_number(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "no\x1bwhere").read_bytes()
    assert error_message(caught.value) == f"{tmp_path}/no\\x1bwhere: No such file or directory"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("trian", "train"),
        ("infoo", "info"),
        ("Train", "train"),
        ("fine-tune", "finetune"),
        ("gen", "generate"),
        ("xyzzy", None),
        ("", None),
    ],
)
def test_the_nearest_name_is_suggested(name: str, meant: str | None) -> None:
    hint = did_you_mean(name, ["train", "finetune", "generate", "info", "evaluate"])
    assert hint == ("" if meant is None else f"; did you mean {meant}?")


def test_synonyms_are_found_in_any_spelling_and_only_if_the_name_is_known() -> None:
    for name, synonyms in {**OPTION_SYNONYMS, **MODEL_SYNONYMS}.items():
        for synonym in synonyms.split():
            for spelling in (synonym, synonym.upper(), synonym.replace("_", "-")):
                hint = did_you_mean(spelling, [name], {**OPTION_SYNONYMS, **MODEL_SYNONYMS})
                assert hint == f"; did you mean {name}?", spelling
    assert did_you_mean("lr", ["seed"], OPTION_SYNONYMS) == ""


@pytest.mark.parametrize("path", ["plain", "two words", "it's", "-x", "--model", "a;b", "$HOME", "*", "ü", 'q"q', ""])
def test_a_quoted_path_survives_the_shell(path: str) -> None:
    word = shlex.split(quote(path))
    assert len(word) == 1 and not word[0].startswith("-")
    assert os.path.normpath(word[0] or ".") == os.path.normpath(path or ".")
    shell = subprocess.run(["sh", "-c", f"printf %s {quote(path)}"], capture_output=True, check=True).stdout
    assert shell.decode() == word[0]


@pytest.mark.parametrize(
    ("data", "encoding", "text"),
    [
        ("é\r\n☃".encode(), "cp1252", "é\n☃"),
        ("é".encode(), "ascii", "é"),
        ("é".encode("utf-8-sig"), "utf-8", "é"),
        ("é".encode("cp1252"), "cp1252", "é"),
    ],
)
def test_standard_input_is_utf_8_or_in_the_encoding_of_the_terminal(
    data: bytes, encoding: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding))
    assert read_standard_input() == text


def test_standard_input_that_is_not_text_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"))
    with pytest.raises(ValueError, match="standard input is not UTF-8 text: byte 2 is 0xff"):
        read_standard_input()


PRINT = """
import sys
from MyGPT.messages import print_styled, safe_streams
text = {text!a}
with safe_streams():
    print(text)
    sys.stdout.writelines([text, "\\n"])
    print(text, file=sys.stderr)
    if {styled}:
        print_styled("\\x1b[1mbold\\x1b[0m")
"""


def test_a_terminal_receives_no_control_character_on_either_stream() -> None:
    code = PRINT.format(text=HOSTILE, styled=True)
    status, received = run_in_terminal([sys.executable, "-c", code], PYTHONUTF8="1")
    assert status == 0
    received, _, styled = received.rpartition(b"\x1b[1m")
    assert styled == b"bold\x1b[0m\r\n"
    text = received.decode()
    assert text.count("\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202etxt\\u2066") == 3
    assert text.replace("\r\n", "").replace("\r", "").isprintable()


def test_a_pipe_receives_the_text_unchanged() -> None:
    text = HOSTILE.replace("\ud800", "")
    code = PRINT.format(text=text, styled=False)
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", code], capture_output=True, check=True)
    assert done.stdout == f"{text}\n{text}\n".encode() and done.stderr == f"{text}\n".encode()


ENCODINGS: list[dict[str, str]] = [
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("environment", ENCODINGS)
@pytest.mark.parametrize("in_terminal", [False, True])
def test_every_text_can_be_printed_in_every_encoding(environment: dict[str, str], in_terminal: bool) -> None:
    command = [sys.executable, "-c", PRINT.format(text="a\ufffd☃é\udc80z", styled=False)]
    if in_terminal:
        status, received = run_in_terminal(command, **environment)
    else:
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment})
        status, received = done.returncode, done.stdout
    assert status == 0, received
    assert received.startswith(b"a??")


def test_progress_bars_work_on_an_escaped_terminal() -> None:
    """tqdm moves the cursor with \\r and ESC [A, and messages are written above the bar."""
    code = """
import sys
from tqdm import tqdm
from MyGPT.messages import safe_streams
with safe_streams():
    with tqdm(total=2, desc="outer\\x1b[2J") as outer, tqdm(total=1, position=1) as inner:
        inner.update()
        tqdm.write("message\\x1b[2J")
        outer.update()
"""
    status, received = run_in_terminal([sys.executable, "-c", code])
    assert status == 0
    assert b"outer\\x1b[2J" in received and b"message\\x1b[2J" in received
    assert b"\x1b[2J" not in received and b"\\r" not in received
    assert b"\x1b[A" in received and b"\\x1b[A" not in received
