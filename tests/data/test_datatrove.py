"""Tests of token files written by datatrove's DocumentTokenizer (tests/fixtures/datatrove)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from MyGPT import get_tokenizer, load_tokenizer
from MyGPT.commands.train import load_sources
from MyGPT.data.datatrove import find_token_files, open_token_files
from MyGPT.data.prepare import prepare

FIXTURE = Path(__file__).parents[1] / "fixtures" / "datatrove"
FILES = [FIXTURE / f"0000{i}_unshuffled.ds" for i in range(2)]
TEXTS = [[f"the cat {i} sat" for i in range(5)], ["on the mat", "", "é"]]


def copied(place: Path, name: str = "gpt2|2") -> Path:
    """Copy the token files to a directory, with metadata that begin with `name`, and return the directory."""
    shutil.copytree(FIXTURE, place, dirs_exist_ok=True)
    for path in place.glob("*.metadata"):
        path.write_text("\n".join([name, *path.read_text().split("\n")[1:]]))
    return place


def test_the_ids_are_those_of_the_documents() -> None:
    tokens, coder = open_token_files(FILES, str(FIXTURE))
    assert coder.to_json() == load_tokenizer(FIXTURE).to_json()
    expected = [id_ for texts in TEXTS for text in texts for id_ in [*coder.encode(text), coder.eot_token]]
    assert np.asarray(tokens).tolist() == expected and tokens.dtype == np.uint16


@pytest.mark.slow
def test_datatrove_writes_the_fixture(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    for rank, texts in enumerate(TEXTS):
        step = DocumentTokenizer(
            str(tmp_path), str(FIXTURE / "tokenizer.json"), eos_token="<|endoftext|>", shuffle_documents=False
        )
        step.run(iter([Document(text=text, id=str(i)) for i, text in enumerate(texts)]), rank=rank, world_size=2)
        for suffix in ("", ".index"):
            assert (tmp_path / f"{FILES[rank].name}{suffix}").read_bytes() == Path(
                f"{FILES[rank]}{suffix}"
            ).read_bytes()
        expected = Path(f"{FILES[rank]}.metadata").read_text().split("\n")
        assert (tmp_path / f"{FILES[rank].name}.metadata").read_text().split("\n")[1:] == expected[1:]


def test_files_directories_and_patterns_are_found(tmp_path: Path) -> None:
    for data in (FIXTURE, str(FIXTURE), str(FIXTURE / "*.ds"), [str(path) for path in FILES]):
        assert find_token_files(data) == FILES
    assert find_token_files(str(FILES[1])) == FILES[1:]
    (tmp_path / "a.txt").write_text("a")
    for data in (
        str(tmp_path),
        str(tmp_path / "a.txt"),
        [str(FILES[0]), str(tmp_path / "a.txt")],
        "alice",
        str(tmp_path / "*"),
    ):
        assert find_token_files(data) == []


def test_train_uses_the_files(tmp_path: Path) -> None:
    expected = np.concatenate([np.fromfile(path, "<u2") for path in FILES])
    (tmp_path / "a.txt").write_text("the cat")
    sources, coder = load_sources({"a": str(FIXTURE), "b": str(tmp_path / "a.txt")}, str(FIXTURE), 1024)
    assert np.array_equal(np.asarray(sources["a"]), expected)
    assert np.asarray(sources["b"]).tolist() == [*load_tokenizer(FIXTURE).encode("the cat"), coder.eot_token]
    prepare([tmp_path / "a.txt"], tmp_path / "prepared", load_tokenizer(FIXTURE), progress=False)
    sources, _ = load_sources({"b": str(tmp_path / "prepared"), "a": str(FIXTURE)}, str(FIXTURE), 1024)
    assert [*sources] == ["b", "a"] and np.array_equal(np.asarray(sources["a"]), expected)
    with pytest.raises(ValueError, match="were prepared with different tokenizers"):
        load_sources({"a": str(copied(tmp_path / "gpt2")), "b": str(tmp_path / "prepared")}, "chars", 1024)


@pytest.mark.parametrize("name", ["gpt2|2", "openai-community/gpt2-xl|2"])
def test_the_metadata_name_gpt2(tmp_path: Path, name: str) -> None:
    assert open_token_files(find_token_files(copied(tmp_path, name)), "chars")[1] is get_tokenizer("gpt2")


def test_a_tokenizer_that_is_not_known_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"were made with the tokenizer meta/llama: give its directory with --tokenizer DIR"
    ):
        open_token_files(find_token_files(copied(tmp_path, "meta/llama|2")), "chars")
    for path in tmp_path.glob("*.metadata"):
        path.unlink()
    with pytest.raises(ValueError, match="do not name their tokenizer: give its directory"):
        open_token_files(find_token_files(tmp_path), "chars")
    assert len(open_token_files(find_token_files(tmp_path), str(FIXTURE))[0]) == len(
        open_token_files(FILES, str(FIXTURE))[0]
    )


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    place = copied(tmp_path)
    paths = find_token_files(place)
    whole = paths[0].read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            open_token_files(paths, str(FIXTURE))

    paths[0].write_bytes(whole[:-1])
    refused(r"00000_unshuffled\.ds has \d+ bytes, but must have \d+ ids of 2 bytes")
    paths[0].write_bytes(b"")
    refused("has 0 bytes")
    paths[0].write_bytes(b"\xff\xff" + whole[2:])
    refused("has the id 65535, but the tokenizer has only")
    paths[0].write_bytes(whole)
    index = Path(f"{paths[0]}.index")
    for content in (index.read_bytes()[:-8], index.read_bytes()[:-1], b"abc", b""):
        whole_index = index.read_bytes()
        index.write_bytes(content)
        refused(r"\.index does not belong to")
        index.write_bytes(whole_index)
    metadata = Path(f"{paths[0]}.metadata")
    for text in ("", "gpt2|3\n25\n25 T", "gpt2|2\n-1\n", "gpt2|2", "gpt2|2\n\u0663\n", "gpt2|2\n" + "9" * 30):
        metadata.write_text(text, encoding="utf-8")
        refused(r"\.metadata is damaged")
    metadata.write_text(f"other|2\n{len(whole) // 2}\n")
    refused("has token files of different tokenizers: gpt2, other")
    metadata.write_text(f"gpt2|4\n{len(whole) // 4}\n")
    refused("ids of 2 and of 4 bytes")
