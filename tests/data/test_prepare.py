"""Tests of token files: the ids equal those of the whole text, and errors and kills lose neither data sets nor work."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT import BPETokenizer, CharTokenizer, SimpleTokenizer, files
from MyGPT.cli import main
from MyGPT.data import prepare as prepare_module
from MyGPT.data import sources
from MyGPT.data.plan import MIN_SHARD_BYTES, default_shard_bytes, plan_shards, read_shard
from MyGPT.data.prepare import prepare, tokenize
from MyGPT.data.sources import find_files, read_pieces
from MyGPT.data.tokens import is_prepared, open_tokens
from MyGPT.tokenizers import ENDOFTEXT as END
from MyGPT.tokenizers import Tokenizer
from places import ALICE
from tokenizers import Tokenizer as HFTokenizer

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
    assert not ids.flags.owndata and not ids.flags.writeable  # It is memory-mapped.
    (shard,) = described["shards"]
    assert ids.tolist() == expected
    assert again == described
    assert (described["n_documents"], described["n_tokens"], described["dtype"]) == (5, len(expected), "uint16")
    assert described["n_characters"] == len("first ésecondthirdfourththird")
    assert (shard["file"], shard["n_tokens"]) == ("tokens-00000.bin", len(expected))
    assert shard["sha256"] == hashlib.sha256((tmp_path / "out" / "tokens-00000.bin").read_bytes()).hexdigest()
    assert described["files"] == ["a.txt", "empty.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz"]
    assert tokenize(paths, BPE).tolist() == expected


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab c\n\r\t.é中\U0001f680'"), max_size=80),
    block=st.integers(1, 9),
    batch=st.integers(1, 20),
    shard=st.integers(1, 40),
)
def test_pieces_and_shards_give_the_ids_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int, batch: int, shard: int
) -> None:
    """The blocks are so small that they split characters, line ends and words, and so may the sizes of shards."""
    path = tmp_path_factory.mktemp("pieces") / "text.txt"
    path.write_bytes(text.encode())
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "_SEARCH_BYTES", block + 4)
        patch.setattr(prepare_module, "BATCH_CHARACTERS", batch)
        assert documents_of(path) == ([plain] if plain else [])
        kinds: list[Tokenizer] = [BPE]
        if plain.strip():
            kinds += [CharTokenizer.from_text(plain), SimpleTokenizer.from_text(plain)]
        for tokenizer in kinds:
            end = [tokenizer.eot_token] if tokenizer.eot_token is not None and plain else []
            assert tokenize([path], tokenizer).tolist() == tokenizer.encode(plain) + end
            assert ids_of_shards([path], tokenizer, shard) == tokenizer.encode(plain) + end


def ids_of_shards(paths: list[Path], tokenizer: Tokenizer, shard_bytes: int) -> list[int]:
    """Return the ids of all shards of the plan for these files."""
    shards = plan_shards(paths, shard_bytes)
    return [
        int(id_)
        for shard in shards
        for ids, _, _ in prepare_module._encode(read_shard(shard, "text"), tokenizer)
        for id_ in ids
    ]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert documents_of(tmp_path / "a.txt") == ["text"]


TEXTS = [
    "The cat sat on the mat.\n\nIt was 3 o'clock, wasn't it?  \u4e2d\u6587\u3002\n" * 9,
    f"It ends with the token{END}\n \u3000\n",
    f"{END}one in the middle{END} and the rest of it\n",
    " \n\t leading and trailing white space \U0001f680 \n\n   \n",
    "x" * 300 + " y",
    " ",
]


def files_of_all_formats(place: Path) -> list[Path]:
    """Write the TEXTS to files of all formats and return the paths of the files."""
    for i, text in enumerate(TEXTS):
        (place / f"{i}.txt").write_bytes((b"\xef\xbb\xbf" if i % 2 else b"") + text.replace("\n", "\r\n").encode())
        with gzip.open(place / f"{i}.txt.gz", "wt", encoding="utf-8") as file:
            file.write(text)
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=i % 2 == 0) for i, text in enumerate([*TEXTS, "", *TEXTS])]
    (place / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (place / "lines.json").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    with gzip.open(place / "lines.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    (place / "array.json").write_text(f"[{', '.join(lines)}]", encoding="utf-8")
    with open(place / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(TEXTS) if text.strip())])
    return sorted(place.iterdir())


def read_with_the_standard_library(path: Path) -> list[str]:
    """Return the documents of a file of `files_of_all_formats`, read with Python's own modules."""
    opener = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    with opener(path, "rt", encoding="utf-8-sig", newline="" if name.endswith("csv") else None) as file:
        if name.endswith(".csv"):
            return [row["text"] for row in csv.DictReader(file)]
        content = file.read()
    if name.endswith(".txt"):
        return [content]
    records = (
        json.loads(content) if content.startswith("[") else map(json.loads, filter(str.strip, content.split("\n")))
    )
    return [record["text"] for record in records if record["text"]]


def reference_ids(paths: list[Path], directory: Path) -> tuple[list[int], int, int]:
    """Return the ids of documents from the tokenizers library, and the numbers of documents and characters.

    `directory` has the tokenizer.json. A document ends with one end-of-text token.
    """
    theirs = HFTokenizer.from_file(str(directory / "tokenizer.json"))
    end = theirs.token_to_id(END)
    ids, n_documents, n_characters = list[int](), 0, 0
    for document in (document for path in paths for document in read_with_the_standard_library(path)):
        ended = document.rstrip().endswith(END)
        ids += theirs.encode(document.rstrip() if ended else document, add_special_tokens=False).ids + [end] * (
            not ended
        )
        n_documents, n_characters = n_documents + 1, n_characters + len(document)
    return ids, n_documents, n_characters


@pytest.mark.parametrize(("shard_bytes", "workers"), [(1, 1), (50, 3), (170, 2), (700, 1), (10**6, 1)])
def test_ids_equal_those_of_the_tokenizers_library_for_all_formats_and_shards(
    tmp_path: Path, shard_bytes: int, workers: int
) -> None:
    (tmp_path / "texts").mkdir()
    paths = files_of_all_formats(tmp_path / "texts")
    with ThreadPoolExecutor(workers) as threads:
        described = prepare(paths, tmp_path / "out", BPE, progress=False, executor=threads, shard_bytes=shard_bytes)
    expected, n_documents, n_characters = reference_ids(paths, tmp_path / "out")
    assert np.asarray(open_tokens(tmp_path / "out")[0]).tolist() == expected == tokenize(paths, BPE).tolist()
    assert (described["n_documents"], described["n_characters"]) == (n_documents, n_characters)
    assert described["n_tokens"] == len(expected) == sum(shard["n_tokens"] for shard in described["shards"])
    assert (len(described["shards"]) > 60) == (shard_bytes == 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from('ab\n\r \u2028é中\U0001f680"\\'), max_size=20), max_size=8),
    separator=st.sampled_from(["\n", "\r\n", "\n\n"]),
    shard=st.integers(1, 60),
)
def test_shards_of_json_lines_have_the_documents_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], separator: str, shard: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(separator.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    pieces = [piece for part in plan_shards([path], shard) for piece in read_shard(part, "text")]
    assert pieces == [(text, True) for text in texts if text]


def test_a_part_of_a_json_file_is_not_taken_for_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "abc"}\n[{"text": "d"}]\n')
    for shard_bytes in (1, 1000):
        with pytest.raises(ValueError, match=r"a\.json, line 2: no text"):
            prepare([tmp_path / "a.json"], tmp_path / "out", BPE, progress=False, shard_bytes=shard_bytes)
        shutil.rmtree(tmp_path / ".out.unfinished", ignore_errors=True)


def test_the_white_space_at_the_end_of_a_long_text_stays_with_the_last_word(tmp_path: Path) -> None:
    """A shard with white space alone would hide that the document ends with the end-of-text token."""
    (tmp_path / "a.txt").write_text(f"some words and{END}" + " \n\u3000" * 100, encoding="utf-8")
    for shard_bytes in (1, 5, 20, 100):
        shards = plan_shards([tmp_path / "a.txt"], shard_bytes)
        assert END in "".join(piece.text for piece in read_shard(shards[-1], "text"))
        assert ids_of_shards([tmp_path / "a.txt"], BPE, shard_bytes) == [*BPE.encode("some words and"), BPE.eot_token]


def test_the_plan_fills_shards_and_cuts_no_archive(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text("ten bytes.")
    (tmp_path / "long.txt").write_text("0123456789 " * 1000)
    (tmp_path / "z.gz").write_bytes(os.urandom(1000))
    shards = plan_shards(sorted(tmp_path.iterdir()), 100)
    sizes = [sum(span.stop - span.start for span in shard) for shard in shards]
    assert sizes[-1] == 1000 and shards[-1][0].is_whole
    assert all(80 <= size <= 125 for size in sizes[:-2]), sizes
    spans = [span for shard in shards for span in shard]
    assert [len(shard) for shard in shards[:3]] == [9, 9, 9]  # A shard may be an eighth smaller
    for one, other in itertools.pairwise(spans):
        assert other.start == (one.stop if one.path == other.path else 0)
    assert default_shard_bytes([tmp_path / "long.txt"]) == MIN_SHARD_BYTES


@pytest.mark.slow
def test_several_processes_write_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(ALICE)
    (tmp_path / "b.txt").write_text(ALICE[::-1])
    paths = find_files(str(tmp_path / "*.txt"))
    one = prepare(paths, tmp_path / "one", BPE, workers=1, progress=False, shard_bytes=20_000)
    two = prepare(paths, tmp_path / "two", BPE, workers=2, progress=False, shard_bytes=20_000)
    assert one == two and len(one["shards"]) > 10
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    whole = prepare(paths, tmp_path / "whole", BPE, progress=False)
    parts = [(tmp_path / "two" / shard["file"]).read_bytes() for shard in two["shards"]]
    assert b"".join(parts) == (tmp_path / "whole" / "tokens-00000.bin").read_bytes()
    assert whole["n_characters"] == one["n_characters"] == 2 * len(ALICE)


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_calls_in_two_threads_keep_their_own_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call once replaced the tokenizer of the first, which then wrote wrong ids without an error."""
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 1)
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
    before = content_of(out)
    path.write_text("new text")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare([path], out, BPE, progress=False)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_encode", full)
        with pytest.raises(OSError, match="No space left"):
            prepare([path], out, BPE, overwrite=True, progress=False)
    assert content_of(out) == before
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
        content_of(tmp_path / "out"),
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
    assert content_of(out) == before
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
                content = content_of(out)
                if content != before:  # The new data set is complete; only the flush of the parent directory failed.
                    assert BPE.decode(open_tokens(out)[0].tolist()) == ALICE + "<|endoftext|>"
                    return
                # A shard that is finished is kept for the next call.
                left = sorted(path.name for path in tmp_path.iterdir())
                finished = list(tmp_path.glob(".out.unfinished/records/*.json"))
                assert left == [*([".out.unfinished"] if finished else []), "a.txt", "out"]
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
    assert content_of(previous) == before


def test_an_error_in_a_worker_process_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cab c")
    with pytest.raises(ValueError, match="character 'c' at position 0 is not in the vocabulary of 3 characters"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", CharTokenizer("ab "), workers=2, progress=False, shard_bytes=2)
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
        data = (out / "tokens-00000.bin").read_bytes()
        (out / "tokens-00000.bin").write_bytes(data[:-1] if damage == "shorter" else data + b"xy")
    elif damage == "missing":
        (out / "tokens-00000.bin").unlink()
    else:
        change = {"json": None, "dtype": {**described, "dtype": "float64"}, "count": {**described, "n_tokens": -2}}[
            damage
        ]
        (out / "tokens.json").write_text(json.dumps(change))
    with pytest.raises((ValueError, FileNotFoundError), match="tokens"):
        open_tokens(out)


DYING = """
import os, signal, sys
from pathlib import Path
from MyGPT import CharTokenizer
from MyGPT.data.prepare import prepare

n_left, function = int(sys.argv[3]), getattr(os, sys.argv[2])
def dying(*arguments, **options):
    global n_left
    n_left -= 1
    if n_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(os, sys.argv[2], dying)
place = Path(sys.argv[1])
prepare([place / "a.txt"], place / "out", CharTokenizer("abc "), overwrite=True, progress=False, shard_bytes=50)
"""
"""A program that prepares a text in ten shards and is killed by SIGKILL at the n-th call of a function of the module os."""
LETTERS = "abc cab " * 63


def die(place: Path, function: str, n: int) -> int:
    """Run the program DYING and return its exit status."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", DYING, str(place), function, str(n)], env=environment).returncode


def finish(place: Path, **options: Any) -> None:
    """Run what DYING runs to its end, and check the result."""
    prepare([place / "a.txt"], place / "out", CharTokenizer("abc "), shard_bytes=50, **options)
    assert CharTokenizer("abc ").decode(open_tokens(place / "out")[0]) == LETTERS
    assert sorted(path.name for path in place.iterdir()) == ["a.txt", "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_call_is_continued_with_the_next_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes when the fourth shard is complete, but not yet its record."""
    (tmp_path / "a.txt").write_text(LETTERS)
    assert die(tmp_path, "replace", 10) == -9  # two replacements per shard, after two for the tokenizer
    work = tmp_path / ".out.unfinished"
    assert sorted(path.name for path in work.glob("data/*.bin")) == [f"tokens-{i:05d}.bin" for i in range(4)]
    assert sorted(path.name for path in work.glob("records/*.json")) == [f"tokens-{i:05d}.json" for i in range(3)]
    written = list[str]()
    write = prepare_module._write_shard
    monkeypatch.setattr(
        prepare_module, "_write_shard", lambda task, coder: (written.append(task.name), write(task, coder))[1]
    )
    finish(tmp_path)
    assert written == [f"tokens-{i:05d}" for i in range(3, 10)]
    assert "continuing: 3 of 10 shards are finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("function", ["replace", "fsync", "rename", "unlink", "chmod"])
def test_a_call_killed_at_any_moment_keeps_the_old_data_set_and_is_continued(tmp_path: Path, function: str) -> None:
    (tmp_path / "a.txt").write_text("abc")
    prepare([tmp_path / "a.txt"], tmp_path / "out", CharTokenizer("abc"), progress=False)
    (tmp_path / "a.txt").write_text(LETTERS)
    before, n_killed = content_of(tmp_path / "out"), 0
    # Each program continues where the one before was killed, so its kill comes at a later shard.
    for n in (1, 2, 3, 5, 7, 2, 9, 1, 4):
        if die(tmp_path, function, n) == 0:
            break
        n_killed += 1
        if (tmp_path / "out").exists() and len(list((tmp_path / "out").iterdir())) < 6:
            assert content_of(tmp_path / "out") == before
    assert n_killed > 0
    finish(tmp_path, overwrite=True, progress=False)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory in which three of ten shards of LETTERS are finished."""
    (tmp_path / "a.txt").write_text(LETTERS)
    write, n_calls = prepare_module._write_shard, itertools.count()

    def failing(task: Any, coder: Any) -> Any:
        if next(n_calls) >= 3:
            raise KeyboardInterrupt
        return write(task, coder)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_write_shard", failing)
        with pytest.raises(KeyboardInterrupt, match="3 of 10 shards are finished; repeat the command to continue"):
            finish(tmp_path, progress=False)
    assert not list((tmp_path / ".out.unfinished" / "parts").iterdir())
    return tmp_path


@pytest.mark.parametrize("change", ["tokenizer", "time", "size", "shards", "key"])
def test_unfinished_work_is_discarded_only_on_demand_if_the_call_is_another_one(
    interrupted: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, arguments = interrupted / "a.txt", {"progress": True, "shard_bytes": 50}
    tokenizer = CharTokenizer("cba " if change == "tokenizer" else "abc ")
    if change == "time":
        os.utime(text, (1, 1))
    elif change == "size":
        text.write_text(LETTERS + "a")
    elif change == "shards":
        arguments["shard_bytes"] = 60
    elif change == "key":
        arguments["text_key"] = "body"
    before = files_under(interrupted)
    with pytest.raises(FileExistsError, match="3 finished shards of an earlier call with other files, options"):
        prepare([text], interrupted / "out", tokenizer, **arguments)
    assert files_under(interrupted) == before
    prepare([text], interrupted / "out", tokenizer, overwrite=True, **arguments)
    assert "3 shards of an earlier call with other files or options are discarded" in capsys.readouterr().err
    assert tokenizer.decode(open_tokens(interrupted / "out")[0]) == text.read_text()


@pytest.mark.parametrize("damage", ["content", "size", "missing", "record", "wrong record"])
def test_a_damaged_finished_shard_is_encoded_again(
    interrupted: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work = interrupted / ".out.unfinished"
    shard, record = work / "data" / "tokens-00001.bin", work / "records" / "tokens-00001.json"
    if damage == "content":
        shard.write_bytes(shard.read_bytes()[::-1])
    elif damage == "size":
        shard.write_bytes(shard.read_bytes() + b"ab")
    elif damage == "missing":
        shard.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:-9])
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "n_tokens": -1}))
    finish(interrupted, overwrite="record" in damage)
    assert "continuing: 2 of 10 shards are finished" in capsys.readouterr().err


def test_a_finished_data_set_is_not_replaced_by_the_rest_of_an_older_call(interrupted: Path) -> None:
    work = interrupted / ".out.unfinished"
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(work, copy, dirs_exist_ok=True)
        finish(interrupted, progress=False)
        shutil.copytree(copy, work)
    with pytest.raises(FileExistsError, match="out is not empty"):
        finish(interrupted, progress=False)
    finish(interrupted, overwrite=True, progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of open directories")
def test_two_calls_cannot_write_the_same_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(LETTERS)
    write, refused = prepare_module._write_shard, list[str]()

    def with_a_second_call(task: Any, coder: Any) -> Any:
        if task.number == 5:
            with pytest.raises(BlockingIOError) as caught:
                finish(tmp_path, overwrite=True, progress=False)
            refused.append(str(caught.value))
        return write(task, coder)

    monkeypatch.setattr(prepare_module, "_write_shard", with_a_second_call)
    finish(tmp_path, progress=False)
    assert len(refused) == 1 and f"another process is writing {tmp_path / 'out'}" in refused[0]


def test_a_text_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(LETTERS)
    write = prepare_module._write_shard

    def appending(task: Any, coder: Any) -> Any:
        with open(tmp_path / "a.txt", "a") as file:
            file.write("a")
        return write(task, coder)

    monkeypatch.setattr(prepare_module, "_write_shard", appending)
    with pytest.raises(ValueError, match=r"a\.txt was changed while it was read"):
        finish(tmp_path, progress=False)
    assert files_under(tmp_path) == ["a.txt"]


def test_an_error_stops_the_other_tasks_and_names_the_place_in_the_whole_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"text": "abc"}'] * 40
    lines[30] = '{"text": 1}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes("é ".encode() * 50 + b"\xff " + b"a " * 50)
    for name, words in (("a.jsonl", "line 31: no text"), ("b.txt", "byte 150 is 0xff")):
        with pytest.raises(ValueError, match=words):
            prepare([tmp_path / name], tmp_path / name[0], BPE, shard_bytes=40)
        assert "shards are finished; repeat the command to continue when the cause" in capsys.readouterr().err
        assert not list(tmp_path.glob(".*.unfinished/running-*"))
    (tmp_path / "c.txt").write_bytes("é ".encode() * 50 + b"\0 " + b"a " * 50)
    with pytest.raises(ValueError, match="NUL character at position 150"):
        prepare([tmp_path / "c.txt"], tmp_path / "c", BPE, progress=False, shard_bytes=40)


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems name the directory of temporary files differently")
def test_tasks_end_when_their_marker_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on another machine may still work on a call that was killed."""
    (tmp_path / "a.txt").write_text(LETTERS)
    encode = prepare_module._encode

    def slow(*arguments: Any) -> Any:
        for batch in encode(*arguments):
            for marker in tmp_path.glob(".out.unfinished/running-*"):
                marker.unlink()
            yield batch

    monkeypatch.setattr(prepare_module, "_encode", slow)
    with pytest.raises(prepare_module._Stopped):
        finish(tmp_path, progress=False)
    assert files_under(tmp_path) == ["a.txt"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_command_leaves_no_processes_and_the_same_command_continues(tmp_path: Path, sent: int) -> None:
    """The worker processes of a killed command once waited for ever."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 300_000)
    command = [sys.executable, "-m", "MyGPT", "prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", "chars", "--workers", "2", "--shard_mb", "0.2"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.unfinished/records/*.json")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    children = children_of(first.pid)
    first.send_signal(sent)
    _, errors = first.communicate()
    assert first.returncode == (130 if sent == signal.SIGINT else -9)
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if sent == signal.SIGINT:
        assert "of 35 shards are finished; repeat the command to continue" in errors
        assert not list(tmp_path.glob(".out.unfinished/parts/*"))
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    assert "continuing: " in again.stderr
    tokenizer = CharTokenizer(sorted(set("the cat sat on the mat ")))
    ids, _ = open_tokens(tmp_path / "out")
    assert tokenizer.decode(np.asarray(ids)) == (tmp_path / "a.txt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.slow
def test_the_workers_of_a_dask_cluster_write_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cluster has two worker processes. One of them is killed while it works, and dask repeats its tasks."""
    distributed = pytest.importorskip("distributed")
    (tmp_path / "a.txt").write_text(ALICE * 8)
    BPE.save(tmp_path / "tokenizer")
    arguments = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer"), "--shard_mb", "0.02"]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]

        def kill() -> None:
            while not list(tmp_path.glob(".dask.unfinished/records/*.json")):
                time.sleep(0.001)
            os.kill(pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        assert main([*arguments, "--out", str(tmp_path / "dask"), "--scheduler", cluster.scheduler_address]) == 0
        killer.join()
    assert main([*arguments, "--out", str(tmp_path / "local"), "--workers", "1"]) == 0
    assert content_of(tmp_path / "dask") == content_of(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "dask", "local", "tokenizer"]
    assert "tokens (uint16) in 58 shards" in capsys.readouterr().out


def test_an_unknown_scheduler_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    command = ["prepare", "alice", "--out", str(tmp_path / "out"), "--scheduler"]
    assert main([*command, "nowhere"]) == 2
    assert "no dask scheduler answers at nowhere" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([*command, "tcp://127.0.0.1:1"]) == 2
    assert "--scheduler needs dask: install it with pip install distributed" in capsys.readouterr().err
    assert main([*command, "tcp://127.0.0.1:1", "--workers", "2"]) == 2
    assert "leave it out with --scheduler" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
