"""nanoGPT's meta.pkl: the table of characters is read without executing the pickle."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT import CharTokenizer, GPTModel, load_tokenizer, open_model
from MyGPT.generation import stream_text
from MyGPT.sampling import SamplingConfig
from MyGPT.tokenizers.nanogpt import MAX_META_BYTES
from oracles_layouts import NanoGPT

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak. é☃🙂"
CHARACTERS = sorted(set(TEXT))
STOI = {character: id_ for id_, character in enumerate(CHARACTERS)}


def meta(**changes: Any) -> dict[str, Any]:
    """Return what nanoGPT's data/shakespeare_char/prepare.py pickles, with some entries changed."""
    return {"vocab_size": len(STOI), "itos": dict(enumerate(CHARACTERS)), "stoi": STOI, **changes}


def checkpoint(path: Path, vocab_size: int = len(STOI), dataset: Any = None) -> Path:
    content: dict[str, Any] = NanoGPT(vocab_size, 32, 8, 1, 1, bias=True).checkpoint()
    if dataset is not None:
        content["config"] = {"dataset": dataset, "out_dir": "out"}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_ids_are_those_of_nanogpt(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta(), protocol))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, CharTokenizer) and tokenizer.n_vocab == len(STOI)
    assert tokenizer.encode(TEXT) == [STOI[character] for character in TEXT]  # nanoGPT's encode
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.source == f"meta.pkl in {tmp_path}"


def test_a_checkpoint_generates_and_is_saved_with_the_characters_beside_it(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "ckpt.pt", len(STOI) + 9)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta()))
    model, tokenizer = open_model(path, "cpu")
    model.save_pretrained(tmp_path / "saved", tokenizer)
    assert load_tokenizer(tmp_path / "saved").encode(TEXT) == tokenizer.encode(TEXT)
    pieces = stream_text(model, tokenizer, tokenizer.encode("First"), 30, SamplingConfig(2.0), seed=1)
    text = "".join(pieces)
    assert len(text) == 30 and set(text) <= set(CHARACTERS)


@pytest.mark.parametrize("start", ["repository", "elsewhere"])
def test_the_table_is_found_where_nanogpt_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    """nanoGPT reads data/<dataset>/meta.pkl in the directory from which it was started."""
    path = checkpoint(tmp_path / "nanoGPT/out/ckpt.pt", dataset="shakespeare_char")
    table = tmp_path / "nanoGPT/data/shakespeare_char/meta.pkl"
    with pytest.raises(ValueError, match=r"copy nanoGPT's data/shakespeare_char/meta\.pkl there"):
        open_model(path, "cpu")
    table.parent.mkdir(parents=True)
    table.write_bytes(pickle.dumps(meta()))
    monkeypatch.chdir(tmp_path / "nanoGPT" if start == "repository" else tmp_path)
    given = Path("out/ckpt.pt") if start == "repository" else path
    assert open_model(given, "cpu")[1].encode(TEXT) == [STOI[character] for character in TEXT]


@pytest.mark.parametrize("dataset", ["../../secret", "/etc", "..", "a/b", 3, ["x"], ""])
def test_a_dataset_that_is_no_plain_name_is_not_looked_for(tmp_path: Path, dataset: Any) -> None:
    for place in ("secret", "nanoGPT/data/a/b", "nanoGPT/data"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "meta.pkl").write_bytes(pickle.dumps(meta()))
    path = checkpoint(tmp_path / "nanoGPT/out/ckpt.pt", dataset=dataset)
    with pytest.raises(ValueError, match="has no tokenizer"):
        open_model(path, "cpu")


def test_a_checkpoint_of_openwebtext_still_gets_gpt2s_tokenizer(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "out/ckpt.pt", 50304, "openwebtext")
    assert open_model(path, "cpu")[1].is_assumed


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def memo_bomb() -> bytes:
    """Return a pickle of 20 bytes that makes the unpickler allocate a table of 2**31 entries."""
    return b"\x80\x04}r\xff\xff\xff\x7f."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(Evil()), "more than dicts of str and int"),
        (pickle.dumps(meta(extra=Evil())), "more than dicts of str and int"),
        (pickle.dumps(meta(vocab_size=np.int64(3))), "more than dicts of str and int"),
        (pickle.dumps(meta(stoi={"a": 0.5})), "more than dicts of str and int"),
        (b"cos\nsystem\n(S'touch executed'\ntR.", "more than dicts of str and int"),
        (pickle.dumps({}), "the dicts stoi and itos"),
        (pickle.dumps(3), "the dicts stoi and itos"),
        (pickle.dumps(meta(stoi=3)), "the dicts stoi and itos"),
        (pickle.dumps(meta(itos={0: {}})), "stoi must be a dict from str to int"),
        (pickle.dumps(meta(stoi={"a": "b"})), "stoi must be a dict from str to int"),
        (pickle.dumps(meta(stoi={**STOI, "Z": 0})), "not inverses"),
        (pickle.dumps({"stoi": {"a": 1}, "itos": {1: "a"}}), "0, 1, 2, … without gaps"),
        (pickle.dumps({"stoi": {"the": 0}, "itos": {0: "the"}}), "single characters"),
        (pickle.dumps({"stoi": {}, "itos": {}}), "vocabulary is empty"),
        (pickle.dumps(meta(vocab_size=9)), "vocab_size is 9, but there are"),
        (pickle.dumps(meta())[:-9], "damaged"),
        (b"", "damaged"),
        (b"not a pickle", "damaged|more than"),
        (memo_bomb(), "memo entry 2147483647 does not exist"),
        (b"\x80\x04" + bytes(MAX_META_BYTES), "the limit is"),
    ],
)
def test_anything_else_is_refused_and_explained_without_running_it(
    in_tmp_path: Path, content: bytes, words: str
) -> None:
    Path("meta.pkl").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"meta.pkl is not a table of characters as nanoGPT writes it: .*({words})"
    ) as error:
        load_tokenizer(in_tmp_path)
    assert "CharTokenizer(itos[i] for i in range(len(itos))).save" in str(error.value)
    assert not Path("executed").exists()
    if b"touch" in content:  # the file is dangerous indeed
        subprocess.run(["python3", "-c", "import pickle; pickle.load(open('meta.pkl', 'rb'))"], capture_output=True)
        assert Path("executed").exists()


def test_the_way_out_works(tmp_path: Path) -> None:
    """The error names a line of Python; afterwards tokenizer.json comes first."""
    path = checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta(names=[1.5])))
    with pytest.raises(ValueError, match="not a table of characters"):
        open_model(path, "cpu")
    itos = pickle.loads((tmp_path / "meta.pkl").read_bytes())["itos"]
    CharTokenizer(itos[i] for i in range(len(itos))).save(str(tmp_path))
    model, tokenizer = open_model(path, "cpu")
    assert isinstance(model, GPTModel) and tokenizer.encode(TEXT) == [STOI[character] for character in TEXT]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_table_raises_value_error_or_gives_a_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: bool
) -> None:
    content = bytearray(pickle.dumps(meta()))
    place = position % len(content)
    content[place:] = b"" if cut else bytes([byte]) + content[place + 1 :]
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "meta.pkl").write_bytes(bytes(io.BytesIO(content).getvalue()))
    try:
        assert load_tokenizer(directory).n_vocab > 0
    except ValueError as error:
        assert "meta.pkl" in str(error)
