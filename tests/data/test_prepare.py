"""Tests of token files: the ids equal those of the whole text, and a failure leaves no half-written data set."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT import BPETokenizer, CharTokenizer, SimpleTokenizer, files
from MyGPT.data import prepare as prepare_module
from MyGPT.data import sources
from MyGPT.data.prepare import prepare, tokenize
from MyGPT.data.sources import find_files, read_pieces
from MyGPT.data.tokens import is_prepared, open_tokens
from MyGPT.tokenizers import Tokenizer
from places import ALICE

BPE = BPETokenizer.train(ALICE, 400, progress=False)


def documents_of(path: Path) -> list[str]:
    pieces, documents = "", []
    for piece in read_pieces(path):
        pieces += piece.text
        if piece.ends_document:
            documents.append(pieces)
            pieces = ""
    assert not pieces
    return documents


def test_all_kinds_of_files_become_one_token_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first é", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("second")
    lines = [json.dumps({"text": text}) for text in ("third", "", "fourth")]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n\n")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(lines[0])
    (tmp_path / "empty.txt").write_text("")
    paths = find_files([str(tmp_path / "*.txt"), str(tmp_path / "b.txt.gz"), str(tmp_path / "?.jsonl*")])
    described = prepare(paths, tmp_path / "out", BPE, progress=False)

    expected: list[int] = []
    for document in ("first é", "second", "third", "fourth", "third"):
        expected += [*BPE.encode(document), BPE.eot_token]
    ids, again = open_tokens(tmp_path / "out")
    assert isinstance(ids, np.memmap)
    assert ids.tolist() == expected
    assert again == described
    assert (described["n_documents"], described["n_tokens"], described["dtype"]) == (5, len(expected), "uint16")
    assert described["n_characters"] == len("first ésecondthirdfourththird")
    assert described["sha256"] == hashlib.sha256((tmp_path / "out" / "tokens.bin").read_bytes()).hexdigest()
    assert described["files"] == ["a.txt", "empty.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz"]
    assert tokenize(paths, BPE).tolist() == expected


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab c\n\r\t.é中\U0001f680'"), max_size=80),
    block=st.integers(1, 9),
    task=st.integers(1, 20),
)
def test_pieces_give_the_ids_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int, task: int
) -> None:
    """The blocks are so small that they split characters, line ends and words."""
    path = tmp_path_factory.mktemp("pieces") / "text.txt"
    path.write_bytes(text.encode())
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(prepare_module, "TASK_CHARACTERS", task)
        assert documents_of(path) == ([plain] if plain else [])
        kinds: list[Tokenizer] = [BPE]
        if plain.strip():
            kinds += [CharTokenizer.from_text(plain), SimpleTokenizer.from_text(plain)]
        for tokenizer in kinds:
            end = [tokenizer.eot_token] if tokenizer.eot_token is not None and plain else []
            assert tokenize([path], tokenizer).tolist() == tokenizer.encode(plain) + end


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert documents_of(tmp_path / "a.txt") == ["text"]


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "TASK_CHARACTERS", 20_000)
    (tmp_path / "a.txt").write_text(ALICE)
    (tmp_path / "b.txt").write_text(ALICE[::-1])
    paths = find_files(str(tmp_path / "*.txt"))
    one = prepare(paths, tmp_path / "one", BPE, workers=1, progress=False)
    two = prepare(paths, tmp_path / "two", BPE, workers=2, progress=False)
    assert one == two
    assert (tmp_path / "one" / "tokens.bin").read_bytes() == (tmp_path / "two" / "tokens.bin").read_bytes()


def test_calls_in_two_threads_keep_their_own_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call once replaced the tokenizer of the first, which then wrote wrong ids without an error."""
    monkeypatch.setattr(prepare_module, "TASK_CHARACTERS", 1)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in "abcabcabc")
    (tmp_path / "a.jsonl").write_text(lines)

    def other_call() -> None:
        prepare([tmp_path / "a.jsonl"], tmp_path / "other", CharTokenizer("cba"), progress=False)

    class Interrupted(CharTokenizer):
        def encode(self, text: str) -> list[int]:
            if not (tmp_path / "other").exists():
                thread = threading.Thread(target=other_call)
                thread.start()
                thread.join()
            return super().encode(text)

    prepare([tmp_path / "a.jsonl"], tmp_path / "out", Interrupted("abc"), progress=False)
    assert open_tokens(tmp_path / "out")[0].tolist() == [0, 1, 2] * 3
    assert open_tokens(tmp_path / "other")[0].tolist() == [2, 1, 0] * 3


def test_wide_vocabularies_get_wider_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(map(chr, range(40, 60))))
    tokenizer = CharTokenizer(map(chr, [*range(40, 0xD800), *range(0xE000, 0x12000)]))
    described = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer, progress=False)
    assert described["dtype"] == "uint32"
    assert open_tokens(tmp_path / "out")[0].tolist() == list(range(20))


def files_under(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine \xff\xfe", r"a\.txt is not UTF-8 text: byte 5 is 0xff"),
        ("a.txt", "é".encode()[:1], r"a\.txt is not UTF-8 text: byte 0 is 0xc3"),
        ("a.txt", b"x" * 50 + b"\xe4\xb8", r"a\.txt is not UTF-8 text: byte 50 is 0xe4"),
        ("a.txt", b"GIF\0\1", r"a\.txt looks like a binary file: it has a NUL character at position 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2: no text under the key 'text'"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: no text"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], r"a\.txt\.gz is a damaged archive"),
        ("a.txt.gz", b"no archive", r"a\.txt\.gz is a damaged archive"),
        ("a.txt", b"", r"there is no text in .*a\.txt"),
    ],
)
def test_an_error_names_the_bad_file_and_the_position_and_leaves_no_files(
    tmp_path: Path, name: str, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 16)
    (tmp_path / name).write_bytes(content)
    before = files_under(tmp_path)
    with pytest.raises(ValueError, match=words):
        prepare([tmp_path / name], tmp_path / "out", BPE, progress=False)
    assert files_under(tmp_path) == before


def test_an_old_data_set_is_kept_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old text")
    out = tmp_path / "out"
    prepare([path], out, BPE, progress=False)
    before = {name.name: name.read_bytes() for name in out.iterdir()}
    path.write_text("new text")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare([path], out, BPE, progress=False)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_encode", full)
        with pytest.raises(OSError, match="No space left"):
            prepare([path], out, BPE, overwrite=True, progress=False)
    assert {name.name: name.read_bytes() for name in out.iterdir()} == before
    assert files_under(tmp_path) == ["a.txt", "out", *sorted(f"out/{name}" for name in before)]
    prepare([path], out, BPE, overwrite=True, progress=False)
    assert BPE.decode(open_tokens(out)[0].tolist()) == "new text<|endoftext|>"


def prepared(tmp_path: Path) -> tuple[list[Path], Path, dict[str, bytes]]:
    """Return the path of a text in a list, a data set that was made from another text, and the files of the data set."""
    (tmp_path / "a.txt").write_text("old text")
    prepare([tmp_path / "a.txt"], tmp_path / "out", BPE, progress=False)
    (tmp_path / "a.txt").write_text(ALICE)
    return (
        [tmp_path / "a.txt"],
        tmp_path / "out",
        {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_file_that_the_system_refuses_to_grow_leaves_the_old_data_set(tmp_path: Path) -> None:
    """A limit of 16 KiB per file, which the token file exceeds, makes a real write fail like a full disk."""
    import resource

    paths, out, before = prepared(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
    try:
        with pytest.raises(OSError) as caught:
            prepare(paths, out, BPE, overwrite=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.slow
def test_a_disk_full_at_any_flush_leaves_one_whole_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out, before = prepared(tmp_path)
    fsync = os.fsync
    for nth in range(1, 100):
        calls = 0

        def full(descriptor: int, nth: int = nth) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            try:
                prepare(paths, out, BPE, overwrite=True, progress=False)
            except OSError:
                content = {path.name: path.read_bytes() for path in out.iterdir()}
                if content != before:  # The new data set is complete; only the flush of the parent directory failed.
                    assert BPE.decode(open_tokens(out)[0].tolist()) == ALICE + "<|endoftext|>"
                    return
                assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
            else:
                break
    raise AssertionError(f"the flush after the renaming never came, {nth} others did")


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    """A killed call once left the data set under a temporary name, and the next call replaced it without `overwrite`."""
    paths, out, before = prepared(tmp_path)
    out.rename(tmp_path / ".out.previous")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare(paths, out, BPE, progress=False)
    previous = out.rename(tmp_path / ".out.previous")
    assert is_prepared(out)  # Readers find the old data set, and only the next `prepare` moves it back.
    assert BPE.decode(open_tokens(out)[0].tolist()) == "old text<|endoftext|>"
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before


def test_an_error_in_a_worker_process_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="character 'c' at position 2 is not in the vocabulary of 2 characters"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", CharTokenizer("ab"), workers=2, progress=False)
    assert files_under(tmp_path) == ["a.txt"]


def test_an_existing_empty_directory_is_used_and_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "out").mkdir()
    assert prepare([tmp_path / "a.txt"], tmp_path / "out", CharTokenizer("abc"), progress=False)["n_tokens"] == 3
    for overwrite in (False, True):
        with pytest.raises(NotADirectoryError):
            prepare([tmp_path / "a.txt"], tmp_path / "a.txt", BPE, overwrite=overwrite, progress=False)
    assert (tmp_path / "a.txt").read_text() == "abc"


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True])
def test_an_invalid_number_of_workers_is_refused(tmp_path: Path, workers: Any) -> None:
    with pytest.raises(ValueError, match=f"workers must be a whole number of at least 1, got {workers!r}"):
        prepare([], tmp_path / "out", BPE, workers=workers, progress=False)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"n_tokens": ' + "1" * 5_000 + "}", "\ud800", "3", '"text"', ""])
def test_an_invalid_tokens_json_raises_value_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"tokens\.json"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("damage", ["shorter", "longer", "json", "dtype", "count", "missing"])
def test_a_damaged_token_file_is_detected(tmp_path: Path, damage: str) -> None:
    (tmp_path / "a.txt").write_text("some text")
    out = tmp_path / "out"
    prepare([tmp_path / "a.txt"], out, BPE, progress=False)
    described = json.loads((out / "tokens.json").read_text())
    if damage in ("shorter", "longer"):
        data = (out / "tokens.bin").read_bytes()
        (out / "tokens.bin").write_bytes(data[:-1] if damage == "shorter" else data + b"xy")
    elif damage == "missing":
        (out / "tokens.bin").unlink()
    else:
        change = {"json": None, "dtype": {**described, "dtype": "float64"}, "count": {**described, "n_tokens": -2}}[
            damage
        ]
        (out / "tokens.json").write_text(json.dumps(change))
    with pytest.raises((ValueError, FileNotFoundError), match="tokens"):
        open_tokens(out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_prepare_leaves_no_processes_and_the_next_one_removes_its_files(tmp_path: Path) -> None:
    """Its worker processes once waited for ever, and its temporary directory stayed, which can have gigabytes."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 300_000)
    command = [sys.executable, "-m", "MyGPT", "prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", "chars", "--workers", "2"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".out.*/tokens.bin")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    children = children_of(first.pid)
    first.kill()
    first.wait()
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(tmp_path.glob(".out.*"))) == 1
    prepare([tmp_path / "a.txt"], tmp_path / "out", CharTokenizer("the caosnm"), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
