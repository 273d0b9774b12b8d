"""Tests of the common interface of all tokenizers, and of the word and character tokenizers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import MyGPT.tokenizers.bpe
import tokenizers
from MyGPT import CharTokenizer, SimpleTokenizer, get_tokenizer, load_tokenizer
from MyGPT.tokenizers import Tokenizer, make_tokenizer
from MyGPT.tokenizers.added import MAX_ID
from MyGPT.tokenizers.base import ids_without_token
from oracles import book_words
from places import ALICE
from texts import TEXTS


def opened_by_transformers(tokenizer: Tokenizer, directory: Path) -> PreTrainedTokenizerFast:
    tokenizer.save(directory)
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


# --- words and characters --------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_words_are_split_by_the_books_rule(text: str) -> None:
    """Special tokens are an exception: MyGPT recognises them even without a space around them."""
    assume("<|unk|>" not in text and "<|endoftext|>" not in text)
    tokenizer = SimpleTokenizer.from_text(text)
    assert tokenizer.encode(text) == [tokenizer.str_to_int[word] for word in book_words(text)]
    assert list(tokenizer.str_to_int) == [*sorted(set(book_words(text))), "<|endoftext|>", "<|unk|>"]


def test_the_worked_example_of_words() -> None:
    tokenizer = SimpleTokenizer.from_text("It's the last he painted, you know,\" Mrs. Gisburn said -- with pride.")
    assert tokenizer.decode(tokenizer.encode("Mrs. Gisburn, said the pride")) == "Mrs. Gisburn, said the pride"
    unknown, end = tokenizer.str_to_int["<|unk|>"], tokenizer.eot_token
    assert tokenizer.encode("Hello you<|endoftext|>Gisburn") == [
        unknown,
        tokenizer.str_to_int["you"],
        end,
        tokenizer.str_to_int["Gisburn"],
    ]


def test_an_unknown_word_without_an_unknown_token_is_refused() -> None:
    with pytest.raises(ValueError, match="'there' is not in the vocabulary of 2 tokens"):
        SimpleTokenizer({"hello": 0, ",": 1}).encode("hello, there")


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_characters_have_ids_in_sorted_order_and_decode_to_the_text(text: str) -> None:
    if not text:
        return
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.encode(text) == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (len(set(text)), None)


def test_an_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(ValueError, match="character 'é' at position 2 is not in the vocabulary of 3 characters"):
        CharTokenizer("abc").encode("abéc")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SimpleTokenizer({}), "the vocabulary is empty"),
        (lambda: SimpleTokenizer({"a": 0, "b": 0}), "'a' and 'b' have the same id 0|'b' and 'a' have the same id 0"),
        (lambda: SimpleTokenizer({"a": -1}), "'a' must be a whole number"),
        (lambda: SimpleTokenizer({"a": "0"}), "'a' must be a whole number"),
        (lambda: CharTokenizer.from_text(""), "the vocabulary is empty"),
        (lambda: CharTokenizer(["ab"]), "single characters, got 'ab'"),
        (lambda: CharTokenizer("aba"), "each character once"),
    ],
)
def test_an_invalid_vocabulary_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- all tokenizers -----------------------------------------------------------------------------------------------------

KINDS = ["words", "chars", "bpe", "gpt2"]


@pytest.fixture(scope="module")
def each() -> dict[str, Tokenizer]:
    return {kind: make_tokenizer(kind, [ALICE], 500, progress=False) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_opens_in_transformers_and_here_with_equal_ids(
    each: dict[str, Tokenizer], kind: str, tmp_path: Path
) -> None:
    ours = each[kind]
    theirs = opened_by_transformers(ours, tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(ours)

    @settings(max_examples=60, deadline=None)
    @given(text=TEXTS if kind != "chars" else st.text(sorted(set(ALICE)), max_size=60))
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert again.encode(text) == ids

    check()
    for text in (ALICE, "Alice<|endoftext|>Alice, \x1c\x85said" if kind != "chars" else ALICE[:99]):
        assert theirs(text)["input_ids"] == ours.encode(text) == again.encode(text)
    assert again.n_vocab == ours.n_vocab and again.eot_token == ours.eot_token
    if kind != "words":
        assert theirs.decode(ours.encode(ALICE[:500])) == ALICE[:500]


def test_a_file_of_the_tokenizers_library_opens(tmp_path: Path) -> None:
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([ALICE], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    text = ALICE[:3000] + "<|endoftext|> é"
    assert load_tokenizer(tmp_path).encode(text) == theirs.encode(text).ids


@pytest.mark.slow
def test_gpt2s_merges_are_recognised_in_any_file_and_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking GPT-2's merges would delay the start of every command by half a second or more."""
    gpt2 = get_tokenizer("gpt2")
    gpt2.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    checked = []
    monkeypatch.setattr(MyGPT.tokenizers.bpe, "_check_merge_order", lambda *_: checked.append(True))
    assert load_tokenizer(tmp_path).encode(ALICE) == gpt2.encode(ALICE)
    assert not checked
    last = content["model"]["merges"].pop()
    del content["model"]["vocab"]["".join(last.split(" ") if isinstance(last, str) else last)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    load_tokenizer(tmp_path)
    assert checked == [True]


@pytest.mark.parametrize("kind", [*KINDS[:3], pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_id_without_a_token_is_skipped_as_in_transformers(
    each: dict[str, Tokenizer], kind: str, tmp_path: Path
) -> None:
    """Models often have more ids than the tokenizer has tokens, because their number was rounded up."""
    ours, theirs = each[kind], opened_by_transformers(each[kind], tmp_path)
    ids = [1, ours.n_vocab, 2, 10**6, 3, MAX_ID, 3]
    expected = theirs.decode(ids)
    assert ours.decode(ids) == ours.decode([1, 2, 3, 3])
    if kind != "words":  # transformers keeps the space before a punctuation mark
        assert ours.decode(ids) == expected
    assert ids_without_token(ours, ours.n_vocab + 3) == list(range(ours.n_vocab, ours.n_vocab + 3))
    assert ids_without_token(theirs, ours.n_vocab + 3) == list(range(ours.n_vocab, ours.n_vocab + 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("id_", [-1, MAX_ID + 1, 2**32, 2**70])
def test_a_number_that_is_no_id_is_refused_by_its_value(each: dict[str, Tokenizer], kind: str, id_: int) -> None:
    with pytest.raises(ValueError, match=f"{id_} is not a token id"):
        each[kind].decode([1, id_])
    with pytest.raises(TypeError, match="whole numbers"):
        each[kind].decode([1.0])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_not_a_string_raises_type_error(each: dict[str, Tokenizer], kind: str) -> None:
    for value in (None, b"bytes", 3, ["a"]):
        with pytest.raises(TypeError, match="a tokenizer encodes a str"):
            each[kind].encode(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_a_lone_surrogate_is_refused(each: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at position 2"):
        each[kind].encode("ab\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_can_be_sent_to_another_process(each: dict[str, Tokenizer], kind: str) -> None:
    again = pickle.loads(pickle.dumps(each[kind]))
    assert again.encode(ALICE[:300]) == each[kind].encode(ALICE[:300])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_raises_value_error_with_its_name_or_gives_a_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(["words", "chars", "bpe"]))
    make_tokenizer(kind, ["the cat sat"], 260, progress=False).save(directory)
    content = bytearray((directory / "tokenizer.json").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (directory / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        assert "tokenizer.json" in str(error)
    else:
        assert tokenizer.n_vocab > 0


@pytest.mark.parametrize(
    "content", ["null", "[]", "3", "{}", '{"model": 1}', '{"model": {"type": "BPE"}}', "[" * 100_000]
)
def test_other_json_raises_value_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
