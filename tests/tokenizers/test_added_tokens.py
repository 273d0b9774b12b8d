"""Vocabularies in which ids, merges and added tokens are not in GPT-2's order; the oracle is Hugging Face's tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizers
from MyGPT import BPETokenizer, load_tokenizer

TEXT = "the cat sat on the mat<|endoftext|> as a cat: th as<x>the<y> <x ninth"
TRAINED = BPETokenizer.train("the cat sat on the mat as a bat " * 9, 280, special_tokens=(), progress=False)


def content(added: list[dict[str, Any]], vocab: dict[str, int] | None = None) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the merges of TRAINED and these added tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    file = TRAINED.to_json()
    file["added_tokens"] = [{**flags, **token} for token in added]
    if vocab is not None:
        file["model"]["vocab"] = vocab
    return file


def check(directory: Path, file: dict[str, Any], text: str = TEXT) -> None:
    """Assert that MyGPT encodes and decodes as tokenizers does, also after saving the tokenizer again."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    ours = load_tokenizer(directory)
    ours.save(directory / "again")
    for path in (directory, directory / "again"):
        theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        ids = theirs.encode(text).ids
        assert ours.encode(text) == load_tokenizer(path).encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert ours.n_vocab == max(theirs.get_vocab().values()) + 1


VOCAB: dict[str, int] = TRAINED.to_json()["model"]["vocab"]
N = len(VOCAB)


@pytest.mark.parametrize(
    "added",
    [
        [{"id": VOCAB["at"], "content": "at"}],
        [{"id": VOCAB["at"], "content": "at", "special": False}],
        [{"id": VOCAB["a"], "content": "a"}, {"id": N, "content": "<x>"}],
        [{"id": N + 7, "content": "at"}],
        [{"id": N + 1, "content": "<y>"}, {"id": N, "content": "<x>"}],
        [{"id": N + 5, "content": "<x>"}, {"id": N + 9, "content": "<y>"}],
        [{"id": N, "content": "<x>"}, {"id": N, "content": "<x>"}],
        [{"id": N, "content": "<x>"}, {"id": N, "content": "<y>"}],
        [{"id": 5, "content": "<x>"}],
        [{"id": VOCAB["at"], "content": "<x>"}, {"id": N, "content": "at"}],
        [{"id": N, "content": ""}, {"id": N, "content": "<y>"}],
        [{"id": N, "content": "<x"}, {"id": N + 1, "content": "<x>"}],
    ],
    ids=str,
)
def test_added_tokens_get_the_ids_that_tokenizers_gives_them(tmp_path: Path, added: list[dict[str, Any]]) -> None:
    """An added token that repeats an ordinary one was refused: "the merge … needs tokens that the vocabulary lacks"."""
    check(tmp_path, content(added))


def test_a_trained_file_whose_special_token_is_also_merged_opens(tmp_path: Path) -> None:
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(["the cat sat on the mat " * 9], 270, special_tokens=["at", "<s>"], show_progress=False)
    assert ["a", "t"] in json.loads(theirs.to_str())["model"]["merges"]
    check(tmp_path, json.loads(theirs.to_str()))


@pytest.mark.parametrize("shift", [1, 7, 101])
def test_ids_need_not_follow_the_order_of_the_merges(tmp_path: Path, shift: int) -> None:
    vocab = {token: (shift * id_ + 3) % N for token, id_ in VOCAB.items()}
    assert sorted(vocab.values()) == list(range(N))
    check(tmp_path, content([{"id": N, "content": "<x>"}], vocab))


def test_tokens_that_no_merge_creates_are_decoded_and_saved(tmp_path: Path) -> None:
    """RoBERTa's script leaves <s>, <pad> and so on in vocab.json without registering them as special tokens."""
    vocab = {"<s>": 0, "<pad>": 1, "cat sat": 2, "☃": 3} | {token: id_ + 4 for token, id_ in VOCAB.items()}
    check(tmp_path, content([], vocab), "the <s> cat sat<pad> ☃")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content([], vocab)))
    assert load_tokenizer(tmp_path).decode([0, 3, 70]) == theirs.decode([0, 3, 70]) == "<s>☃" + theirs.decode([70])


def test_an_added_token_whose_place_is_taken_keeps_its_own_id(tmp_path: Path) -> None:
    """A vocabulary with gaps, such as one whose special token has the id 0. tokenizers would give two tokens one id."""
    vocab = {token: id_ + 1 for token, id_ in VOCAB.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content([{"id": 0, "content": "<x>"}], vocab)))
    assert load_tokenizer(tmp_path).encode("a<x>") == [vocab["a"], 0]
    load_tokenizer(tmp_path).save(tmp_path / "again")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "again/tokenizer.json"))
    assert theirs.encode("a<x>").ids == [vocab["a"], 0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content([{"id": 5, "content": "<x>"}], vocab)))
    with pytest.raises(ValueError, match="added token '<x>' needs an id of its own, but got 5"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_added_tokens_encode_as_in_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = st.sampled_from(["<x>", "<y>", "<x", "at", "th", "the", "a", "Ġ", "ca", "mat", " ", "zz"])
    added = [
        {"id": data.draw(st.integers(0, N + 9)), "content": data.draw(names)}
        for _ in range(data.draw(st.integers(0, 5)))
    ]
    text = data.draw(st.lists(st.sampled_from([*"abcht <x>yĠz", "the", "at"]), max_size=20).map("".join))
    check(tmp_path_factory.mktemp("added"), content(added), text)
