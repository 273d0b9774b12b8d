"""Text files to token files: the same ids as in one go, in bounded memory, whole or not at all."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT import BPETokenizer, CharTokenizer, SimpleTokenizer
from MyGPT.data import prepare as prepare_module
from MyGPT.data import sources
from MyGPT.data.prepare import prepare, tokenize
from MyGPT.data.sources import find_files, read_pieces
from MyGPT.data.tokens import open_tokens
from MyGPT.tokenizers import Tokenizer

ALICE = (Path(__file__).parents[1] / "src/MyGPT/assets/alice.txt").read_text(encoding="utf-8")
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


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab c\n\r\t.é中\U0001f680'"), max_size=80),
    block=st.integers(1, 9),
    task=st.integers(1, 20),
)
def test_pieces_make_the_ids_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int, task: int
) -> None:
    """Blocks so small that they cut characters, line ends and words."""
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


def test_a_long_file_comes_in_pieces_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    path = tmp_path / "long.txt"
    path.write_text(ALICE)
    pieces = list(read_pieces(path))
    assert max(len(piece.text) for piece in pieces) < 1100
    assert "".join(piece.text for piece in pieces) == ALICE


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert documents_of(tmp_path / "a.txt") == ["text"]


def test_several_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "TASK_CHARACTERS", 20_000)
    (tmp_path / "a.txt").write_text(ALICE)
    (tmp_path / "b.txt").write_text(ALICE[::-1])
    paths = find_files(str(tmp_path / "*.txt"))
    one = prepare(paths, tmp_path / "one", BPE, workers=1, progress=False)
    two = prepare(paths, tmp_path / "two", BPE, workers=2, progress=False)
    assert one == two
    assert (tmp_path / "one" / "tokens.bin").read_bytes() == (tmp_path / "two" / "tokens.bin").read_bytes()


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
        ("a.txt", b"GIF\0\1", r"a\.txt looks like a binary file: it holds a NUL character at position 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2: no text under the key 'text'"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: no text"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.txt.gz", gzip.compress(b"some text")[:-9], r"a\.txt\.gz is a damaged archive"),
        ("a.txt.gz", b"no archive", r"a\.txt\.gz is a damaged archive"),
        ("a.txt", b"", r"there is no text in .*a\.txt"),
    ],
)
def test_a_bad_file_is_named_with_the_place_and_nothing_is_left(
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


@pytest.mark.parametrize("damage", ["shorter", "longer", "json", "dtype", "count", "missing"])
def test_a_damaged_token_file_is_noticed(tmp_path: Path, damage: str) -> None:
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


# --- names and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("nothing.txt", "no text 'nothing.txt': it is neither a file nor one of alice, tinyshakespeare"),
        ("*.nothing", r"no file matches '\*\.nothing'"),
        ("folder", r"folder is a directory: name its files, for example 'folder/\*\.txt'"),
        ([], "no text was named"),
    ],
)
def test_names_that_stand_for_no_file_are_refused(in_tmp_path: Path, names: Any, words: str) -> None:
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=words):
        find_files(names)


def test_a_file_is_found_by_its_path_before_its_name(in_tmp_path: Path) -> None:
    assert find_files("alice")[0].read_text(encoding="utf-8") == ALICE
    Path("alice").write_text("mine")
    assert find_files("alice")[0].read_text() == "mine"
