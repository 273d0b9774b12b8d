"""Tests of finding texts, and of reading them in pieces: no text is lost, and no token is split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT.data import sources
from MyGPT.data.prepare import tokenize
from MyGPT.data.sources import find_files, read_documents, read_pieces
from MyGPT.evaluation.protocols import read_texts
from MyGPT.tokenizers import BPETokenizer, make_tokenizer
from places import ALICE

# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("nothing.txt", "no text 'nothing.txt': it is neither a file nor one of alice, tinyshakespeare"),
        ("*.nothing", r"no file matches '\*\.nothing'"),
        ("fold*", r"no file matches 'fold\*'"),
        ("folder", r"folder is a directory: name its files, for example 'folder/\*\.txt'"),
        ([], "no text was given: name at least one file"),
        (["alice", "elvish"], "no text 'elvish'"),
    ],
)
def test_names_without_a_file_are_refused(in_tmp_path: Path, names: Any, words: str) -> None:
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=words):
        find_files(names)


def test_a_file_has_priority_over_a_built_in_text_of_the_same_name(in_tmp_path: Path) -> None:
    assert find_files("alice")[0].read_text(encoding="utf-8") == ALICE
    Path("alice").write_text("mine")
    assert find_files("alice")[0].read_text() == "mine"


def test_patterns_match_at_any_depth_and_their_files_are_sorted(in_tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", "odd[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    assert find_files("?.txt") == [Path("a.txt"), Path("b.txt")]
    assert find_files(["deep/*.md", "*.txt"]) == [Path("deep/d.md"), Path("a.txt"), Path("b.txt"), Path("odd[1].txt")]
    assert find_files("**/c.txt") == [Path("deep/er/c.txt")]
    assert find_files("odd[1].txt") == [Path("odd[1].txt")]
    assert find_files(Path("a.txt")) == [Path("a.txt")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.txt", "a.txt"], ["a.txt"]),
        (["a.txt", "./a.txt", "deep/../a.txt"], ["a.txt"]),
        (["link.txt", "a.txt", "b.txt"], ["link.txt", "b.txt"]),
        (["b.txt", "*.txt"], ["b.txt", "a.txt"]),
        (["deep/../*.txt", "a.txt"], ["deep/../a.txt", "deep/../b.txt"]),
        (["alice", "alice"], ["alice.txt"]),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_that_is_named_twice_is_read_once_and_reported(
    in_tmp_path: Path, names: list[str], expected: list[str], absolute: bool
) -> None:
    Path("deep").mkdir()
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    Path("link.txt").symlink_to("a.txt")
    if absolute:
        names = [*names[:-1], names[-1] if names[-1] == "alice" else str(in_tmp_path / names[-1])]
    reports: list[str] = []
    found = find_files(names, reports.append)
    assert [path.name for path in found] == [Path(name).name for name in expected]
    assert reports and all("is named more than once and is read once" in report for report in reports)


def test_a_prepared_directory_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="is a directory made by mygpt prepare, which mygpt train reads"):
        find_files([str(tmp_path)])


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_progress_ends_at_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    lines = (
        json.dumps([{"text": "one"}, {"text": "two"}])
        if ".json." in f"{name}."
        else json.dumps({"text": ALICE[:5000]}) + "\n" + json.dumps({"text": "end"}) + "\n\n \n"
    )
    content = (ALICE if ".txt" in name else lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    steps: list[int] = []
    list(read_pieces(tmp_path / name, advance=steps.append))
    assert sum(steps) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    "text",
    [ALICE, "今天天气很好。\n" * 5_000, "Слово за словом - без точек\n" * 2_000, "كلمة " * 9_000],
    ids=["english", "chinese", "russian", "arabic"],
)
def test_a_long_file_of_any_script_comes_in_pieces_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A piece could once end only after ASCII, so a Chinese file of any size was one piece."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(read_pieces(path))
    assert max(len(piece.text) for piece in pieces) < 1100
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("aé中\U0001f680 \n"), max_size=30),
    place=st.integers(0, 30),
    bad=st.sampled_from([b"\xff", b"\x80", b"\xe4\xb8", b"\xf0\x9f\x9a", b"\xc0\xaf", b"\xed\xa0\x80"]),
    block=st.integers(1, 7),
    mark=st.booleans(),
)
def test_the_first_invalid_utf8_byte_is_the_one_that_python_finds(
    tmp_path_factory: pytest.TempPathFactory, text: str, place: int, bad: bytes, block: int, mark: bool
) -> None:
    content = b"\xef\xbb\xbf" * mark + text[:place].encode() + bad + text[place:].encode()
    path = tmp_path_factory.mktemp("bad") / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode("utf-8")
    first = expected.value.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        with pytest.raises(ValueError, match=f"text.txt is not UTF-8 text: byte {first} is 0x{content[first]:02x}$"):
            list(read_pieces(path))


def test_the_position_of_a_nul_counts_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 16)
    (tmp_path / "a.txt").write_bytes(b"word " * 50 + b"\0")
    with pytest.raises(ValueError, match=r"a\.txt looks like a binary file: it has a NUL character at position 250$"):
        list(read_pieces(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "half \\ud83d"}', r"line 2: the text contains the lone surrogate U\+D83D at position 5"),
        ('{"n": ' + "1" * 5_000 + "}", "line 2: not JSON: Exceeds the limit"),
        ('{"other": "text"}', "line 2: no text under the key 'text'"),
        ('{"text": null}', "line 2: no text under the key 'text'"),
        ('{"text": "a"', "line 2: not JSON"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, {words}"):
        list(read_pieces(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json", "a.json.gz", "a.NDJSON.GZ"])
@pytest.mark.parametrize("form", ["lines", "array", "array of lines", "one object"])
def test_json_files_of_all_names_hold_documents(tmp_path: Path, name: str, form: str) -> None:
    texts = ["one\n"] if form == "one object" else ["one\n", "", "zwei \u2028 drei"]
    records = [{"text": text, "n": None} for text in texts]
    content = {
        "lines": "\n".join(map(json.dumps, records)),
        "array": json.dumps(records),
        "array of lines": "\ufeff\n" + json.dumps(records, indent=2, ensure_ascii=False),
        "one object": json.dumps(records[0]),
    }[form].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    if "array" in form and ("jsonl" in name.lower() or "ndjson" in name.lower()):
        with pytest.raises(
            ValueError, match=r"an array of records a name that ends in \.json|only a \.json file may be"
        ):
            list(read_pieces(tmp_path / name))
        return
    pieces = list(read_pieces(tmp_path / name))
    assert [piece.text for piece in pieces] == [text for text in texts if text]
    assert all(piece.ends_document for piece in pieces)
    assert list(read_texts([tmp_path / name], by_line=True)) == [text for text in texts if text]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '[{"text": "a"},\n {"other": "b"}]',
            "a.json, line 2, record 2: no text under the key 'text', only 'other': mygpt prepare --text_key names another$",
        ),
        ('[{"text": "a"}, 5]', "a.json, line 1, record 2: no text under the key 'text'$"),
        ('["a"]', "a.json, line 1, record 1: no text under the key 'text'$"),
        (
            '{\n "text": "a"\n}',
            "a.json, line 1: not JSON: .*only a .json file may be an array; others need one object per line",
        ),
        ('[{"text": "a"}', "a.json, line 1: not JSON"),
        (
            "It was hot.",
            "a.json, line 1: not JSON: .*only a .json file may be an array; others need one object per line",
        ),
        (
            '[{"instruction": "a", "output": "b"}]',
            "record 1: no text under the key 'text': mygpt finetune reads such records",
        ),
        ('{"conversations": []}', "line 1: no text under the key 'text': mygpt finetune reads such records"),
    ],
)
def test_json_files_without_documents_are_refused_with_a_hint(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        list(read_pieces(tmp_path / "a.json"))


def test_the_text_of_a_record_is_not_changed(tmp_path: Path) -> None:
    """The line ends and NUL characters in a JSON string stay, unlike those of a text file."""
    texts = ["a\r\nb\rc", "\0", "\u2028 \U0001f680", "  "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    assert list(read_documents([tmp_path / "a.jsonl"], "body")) == texts


def test_a_compressed_file_reads_as_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo"))
    plain = list(read_pieces(tmp_path / "a.txt"))
    assert list(read_pieces(tmp_path / "a.txt.gz")) == plain
    assert "".join(piece.text for piece in plain) == "one\ntwo"


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 60), flip=st.integers(0, 59), bit=st.integers(0, 7))
def test_a_damaged_archive_raises_value_error_or_gives_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int
) -> None:
    whole = bytearray(gzip.compress(b"some text that is compressed", mtime=0))
    if cut < len(whole):
        del whole[cut:]
    if flip < len(whole):
        whole[flip] ^= 1 << bit
    path = tmp_path_factory.mktemp("archive") / "a.txt.gz"
    path.write_bytes(whole)
    try:
        text = "".join(piece.text for piece in read_pieces(path))
    except ValueError as error:
        assert "a.txt.gz" in str(error)
    else:
        assert text in ("some text that is compressed", "")  # Python reads an empty file as an empty archive.


@pytest.mark.parametrize("kind", ["chars", "words", "bpe"])
def test_a_vocabulary_is_learned_from_pieces_as_from_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "a.txt").write_text(ALICE[:20_000])
    monkeypatch.setattr(sources, "BLOCK_BYTES", 500)
    pieces = make_tokenizer(kind, read_documents([tmp_path / "a.txt"]), 400, progress=False)
    assert pieces.to_json() == make_tokenizer(kind, [ALICE[:20_000]], 400, progress=False).to_json()


def test_a_special_token_that_a_piece_could_cut_in_two_is_refused(tmp_path: Path) -> None:
    """A special token once became ordinary text if a block of four megabytes ended inside the token."""
    (tmp_path / "a.txt").write_text("xx<a b>yy")
    spaced = BPETokenizer.train("ab", 258, special_tokens=["<a b>"], progress=False)
    with pytest.raises(ValueError, match="the special token '<a b>' contains a space"):
        tokenize([tmp_path / "a.txt"], spaced)
    run = BPETokenizer.train("ab", 258, special_tokens=["   "], progress=False)
    assert tokenize([tmp_path / "a.txt"], run).tolist() == list(b"xx<a b>yy")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_column_of_a_table_holds_documents(tmp_path: Path, separator: str) -> None:
    texts = ["one, two", "", 'a "quoted"\nline; end']
    pd.DataFrame({"id": range(3), "text": texts}).to_csv(tmp_path / "a.csv", sep=separator, index=False)
    assert list(read_pieces(tmp_path / "a.csv")) == [(texts[0], True), (texts[2], True)]
    with pytest.raises(
        ValueError, match=r"a\.csv, line 2: no text in the column 'body', only 'id', 'text': mygpt prepare"
    ):
        list(read_pieces(tmp_path / "a.csv", "body"))
