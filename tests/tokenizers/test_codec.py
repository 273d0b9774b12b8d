"""Tests of the fast encoder: gigatoken's ids equal those of tiktoken for every text, and its cache stays bounded."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from MyGPT import BPETokenizer, CharTokenizer, SimpleTokenizer, get_tokenizer
from MyGPT.tokenizers import codec as codec_module
from MyGPT.tokenizers.added import AddedToken
from MyGPT.tokenizers.base import encode_without_end
from MyGPT.tokenizers.bpe import GPT2_PATTERN
from MyGPT.tokenizers.codec import Codec, gigatoken_version
from places import ALICE

FACTOR = int(os.environ.get("MYGPT_FUZZ", "1"))
gigatoken = pytest.importorskip("gigatoken")

SPECIALS = {"<|endoftext|>": 3000, "<|end|>": 3001, "<a>": 3002}


def make_trained() -> BPETokenizer:
    """Return a tokenizer whose ids have gaps and are in another order than its merges."""
    trained = BPETokenizer.train([ALICE[:40_000], " 中文 été 'll \n\n\n\t\t  1234 " * 50], 600, (), progress=False)
    ids = random.Random(0).sample(range(3000), len(trained._vocab))
    vocab = dict(zip(trained._vocab, ids, strict=True))
    added = [
        AddedToken("été", 3003, special=False, single_word=True),
        AddedToken("<m>", 3004, lstrip=True, rstrip=True),
    ]
    return BPETokenizer(vocab, trained.merges, SPECIALS, added_tokens=added)


GPT2, TRAINED = get_tokenizer("gpt2"), make_trained()
assert isinstance(GPT2, BPETokenizer)


@pytest.fixture(autouse=True)
def _always_gigatoken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(codec_module, "LOAD_CHARACTERS", 0)
    monkeypatch.setattr(codec_module, "MIN_CHARACTERS", 0)
    yield


TWIN = tiktoken.Encoding("twin", pat_str=GPT2_PATTERN, mergeable_ranks=GPT2._vocab, special_tokens={})
"""tiktoken's own encoding of ordinary text with GPT-2's vocabulary."""


def with_tiktoken(tokenizer: BPETokenizer, text: str) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_module, "LOAD_CHARACTERS", sys.maxsize)
        return tokenizer.encode(text)


def uses_gigatoken(tokenizer: BPETokenizer) -> bool:
    return tokenizer._codec._gigatoken is not None


WHITE_SPACE = "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u180e\ufeff"
ATOMS = [
    *WHITE_SPACE, "  ", "    ", "\r\n", "\n\n", " \n", "\u3000\u3000", "\xa0\xa0", "'s", "'S", "'ll", "'LL", "'ve", "'re", "'d",
    "'", "''", "’s", "é", "e\u0301", "\u0301", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "१२३", "٣", "Ⅷ", "½", "²", "中文", "日本語", "한국어",
    "ſ", "the", " the", "a", "1234567890", "...", "!!", "=====", "\x00", "\x7f", "\ufffd", "\uffff", "été", " été ", "<m>", "<a>",
    "<|endoftext|>", "<|end|>", "<|end", "oftext|>", "<|", "|>", "\u088f", "\ua7f1'll", "\U000323b0", "\U00011de0", "\U0010ffff",
]  # fmt: skip
TEXTS = st.lists(
    st.sampled_from(ATOMS)
    | st.characters(exclude_categories=["Cs"])
    | st.tuples(st.sampled_from([*WHITE_SPACE, "a", "é", "1", "=", "中"]), st.integers(1, 90)).map(
        lambda it: it[0] * it[1]
    ),
    max_size=30,
).map("".join)


@pytest.mark.slow
@settings(max_examples=60 * FACTOR, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=6), ends=st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_ids_of_random_texts_equal_tiktokens(texts: list[str], ends: list[bool]) -> None:
    assert [GPT2.encode_ordinary(text) for text in texts] == [TWIN.encode_ordinary(text) for text in texts]
    for tokenizer in (GPT2, TRAINED):
        expected = [with_tiktoken(tokenizer, text) for text in texts]
        assert [tokenizer.encode(text) for text in texts] == expected
        assert tokenizer.encode_batch(texts) == expected
        documents: list[int] = []
        for text, is_end in zip(texts, ends, strict=False):
            documents += (
                [*encode_without_end(tokenizer, text), tokenizer.eot_token] if is_end else tokenizer.encode(text)
            )
        array = tokenizer.encode_to_array([text.encode() for text in texts], ends[: len(texts)])
        assert array.dtype == np.uint16 and array.tolist() == documents
        assert uses_gigatoken(tokenizer)


@pytest.mark.slow
@settings(max_examples=60 * FACTOR, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=4), limits=st.tuples(st.integers(1, 30), st.integers(0, 20), st.integers(1, 40)))
def test_remembered_words_have_the_ids_of_the_whole_text(texts: list[str], limits: tuple[int, int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_module, "LOAD_CHARACTERS", sys.maxsize)
        for name, limit in zip(("PIECE_CHARACTERS", "MAX_WORD_CHARACTERS", "MAX_MEAN_WORD"), limits, strict=True):
            patch.setattr(codec_module, name, limit)
        assert [GPT2.encode_ordinary(text) for text in texts] == [TWIN.encode_ordinary(text) for text in texts]
        ids = [TRAINED._codec.encode(text) for text in texts]
        patch.setattr(codec_module, "MIN_CHARACTERS", sys.maxsize)
        assert ids == [TRAINED._codec.encode(text) for text in texts]


def test_remembered_words_need_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "LOAD_CHARACTERS", sys.maxsize)
    monkeypatch.setattr(codec_module, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(codec_module, "MAX_WORD_CHARACTERS", 500)
    codec = Codec(TRAINED._vocab, TRAINED.merges)
    text = ALICE[:5000]
    codec.encode(text)
    assert 0 < sum(map(len, codec._ids_of_words)) <= 500 + 100 < len(set(text.split())) * 4
    before = dict(codec._ids_of_words)
    codec.encode("a" * 5000)  # The ids of such a long word would be remembered for nothing.
    assert codec._ids_of_words == before
    assert pickle.loads(pickle.dumps(codec))._ids_of_words == {}


@pytest.mark.slow
def test_both_libraries_give_every_other_code_point_the_same_class() -> None:
    """A regular expression of tiktoken shows its classes, and the cuts of gigatoken show those of gigatoken.

    Only the characters that Unicode 17 added differ. Texts with them are encoded with tiktoken.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    letters, numbers, spaces = (
        tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for pattern in (r"\p{L}", r"\p{N}", r"\s")
    )
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        expected = (
            "a" if letters.encode_ordinary(character)
            else "1" if numbers.encode_ordinary(character)
            else " " if spaces.encode_ordinary(character)
            else "!"
        )  # fmt: skip
        joins = (before for before in "a1!" if len([*gigatoken.pretokenizer((before + character).encode())]) == 1)
        if next(joins, " ") != expected:
            assert codec_module.NEW_CHARACTERS.match(character), hex(code)
            data = character.encode()
            assert any(pattern.match(data) for pattern in codec_module._NEW_BYTES.values()), hex(code)


@pytest.mark.slow
def test_every_character_of_the_first_plane_has_tiktokens_ids() -> None:
    texts = [f"a{chr(code)}'ll 1{chr(code)}1 " for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    expected = np.concatenate([TWIN.encode_ordinary(text) for text in texts])
    assert np.array_equal(GPT2._codec.encode_joined(texts, [-1] * len(texts)), expected)


N = 200_000
EXTREMES = {
    "letters": "a" * N,
    "random letters": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=N)),
    "digits": "0123456789" * (N // 10),
    "punctuation": "=-" * (N // 2),
    "spaces": " " * N + "a",
    "spaces at the end": "a" + " " * N,
    "new lines": "a" + "\n" * N + "b",
    "CRLF": "a\r\n" * (N // 3),
    "ideographic spaces": "\u3000" * N + "z",
    "separators": "\x1c\x1f" * N,
    "combining marks": "e" + "\u0301" * N,
    "contractions": "'s'S'll'LL'" * (N // 11),
    "noncharacters": "a\U0010ffffb " * 1000,
    "nothing": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_texts_have_tiktokens_ids(name: str) -> None:
    for text in (EXTREMES[name], f"Hello {EXTREMES[name]} world's end"):
        for tokenizer in (GPT2, TRAINED):
            assert tokenizer.encode(text) == with_tiktoken(tokenizer, text)


def test_a_long_text_is_encoded_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "CALL_CHARACTERS", 100)
    text = ALICE[:20_000] + "x" * 500 + " \n" * 200 + "中" * 300
    assert TRAINED.encode(text) == with_tiktoken(TRAINED, text)
    assert TRAINED.encode_batch(["a", text, "", text[:99]]) == [
        with_tiktoken(TRAINED, part) for part in ("a", text, "", text[:99])
    ]
    calls = list(codec_module._in_calls([text, "b"], [-1, 7]))
    assert "".join(part for texts, _ in calls for part in texts) == text + "b"
    assert len(calls) > 150


def test_options_for_special_tokens_are_those_of_encode() -> None:
    text = "a<|endoftext|>b<|end|>"
    for options in (
        {},
        {"allowed_special": {"<|end|>"}, "disallowed_special": ()},
        {"allowed_special": (), "disallowed_special": ()},
    ):
        assert TRAINED.encode_batch([text, "c"], **options) == [
            TRAINED.encode(text, **options),
            TRAINED.encode("c", **options),
        ]
    with pytest.raises(ValueError, match=r"contains the special token '<\|end\|>'"):
        TRAINED.encode_batch(["a", text], allowed_special={"<|endoftext|>"})


def test_wrong_texts_are_refused() -> None:
    for tokenizer in (GPT2, CharTokenizer.from_text("ab")):
        with pytest.raises(ValueError, match="lone surrogate U\\+D800 at position 1"):
            GPT2.encode_to_array(["a\ud800"])
        with pytest.raises(ValueError, match="utf-8"):
            tokenizer.encode_to_array([b"a\xff"])
        with pytest.raises(ValueError, match="zip"):
            tokenizer.encode_to_array(["a"], [True, False])


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text("ab c"), SimpleTokenizer.from_text("a b c")])
def test_the_other_tokenizers_make_arrays_too(tokenizer: CharTokenizer | SimpleTokenizer) -> None:
    texts = ["a b", b"b<|endoftext|> ", "", "c a"] if tokenizer.eot_token is not None else ["a b", b"b", "", "c a"]
    expected: list[int] = []
    for text, is_end in zip(texts, (True, True, False, True), strict=True):
        text = text if isinstance(text, str) else text.decode()
        end = [tokenizer.eot_token] if is_end and tokenizer.eot_token is not None else []
        expected += [*(encode_without_end if is_end else type(tokenizer).encode)(tokenizer, text), *end]
    array = tokenizer.encode_to_array(texts, [True, True, False, True])
    assert array.dtype == np.uint16 and array.tolist() == expected


def test_an_end_token_that_merges_also_make_is_not_repeated() -> None:
    """The end token is then not an added token, so it may stand at the end of ordinary text."""
    trained = BPETokenizer.train("abab " * 50, 260, (), progress=False).with_settings({"eos_token": "ab"})
    assert trained.eot_token is not None
    assert trained.encode_to_array(["x ab", "ab", "b"]).tolist() == [
        *(id_ for text in ("x ab", "ab", "b") for id_ in (*encode_without_end(trained, text), trained.eot_token))
    ]


@pytest.mark.slow
def test_small_amounts_do_not_load_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tokenizer = BPETokenizer.train(ALICE[:5000], 300, progress=False)
    tokenizer.encode(ALICE)
    assert not uses_gigatoken(tokenizer)
    tokenizer.encode("a " * codec_module.LOAD_CHARACTERS)
    assert uses_gigatoken(tokenizer)


@pytest.mark.parametrize("reason", ["missing", "too new", "switched off", "broken", "separator"])
def test_tiktoken_is_the_fallback(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    if reason == "missing":
        monkeypatch.setattr(metadata, "version", missing)
    elif reason == "too new":
        monkeypatch.setattr(metadata, "version", lambda name: "0.11.0")
    elif reason == "switched off":
        monkeypatch.setenv("MYGPT_GIGATOKEN", "0")
    elif reason == "broken":
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    else:
        text = "\U0010ffff\U0010ffff " * 9
    gigatoken_version.cache_clear()
    try:
        tokenizer = BPETokenizer.train(text if reason == "separator" else ALICE[:5000], 290, progress=False)
        assert tokenizer.encode_to_array(["the cat"]).tolist() == [
            *with_tiktoken(tokenizer, "the cat"),
            tokenizer.eot_token,
        ]
        assert not uses_gigatoken(tokenizer)
        assert (gigatoken_version() is None) == (reason != "separator")
    finally:
        gigatoken_version.cache_clear()


def test_the_cache_is_emptied_when_memory_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(TRAINED._vocab, TRAINED.merges)
    codec.encode("start")
    encoder = codec._gigatoken
    assert encoder is not None
    first, memory = encoder._encoder, encoder._memory
    assert memory is not None
    monkeypatch.setattr(codec_module, "MAX_CACHE_BYTES", 1000)
    monkeypatch.setattr(codec_module, "_resident_bytes", lambda: memory + 1000)
    codec.encode("word " * 100)
    assert encoder._encoder is first  # The process has not grown by more than the limit.
    monkeypatch.setattr(codec_module, "_resident_bytes", lambda: memory + 1001)
    assert codec.encode(ALICE[:2000]) == TRAINED._codec.encode(ALICE[:2000])
    assert encoder._encoder is not first
    second = encoder._encoder
    codec.encode("word")  # The cache cannot have grown by 1,000 bytes again.
    assert encoder._encoder is second
    monkeypatch.setattr(codec_module, "_resident_bytes", lambda: None)  # as on macOS
    codec.encode("word " * 100)
    assert encoder._encoder is not second


def test_a_tokenizer_with_gigatoken_can_be_pickled_and_used_in_threads() -> None:
    texts = [ALICE[i : i + 3000] for i in range(0, 30_000, 3000)]
    expected = [with_tiktoken(TRAINED, text) for text in texts]
    TRAINED.encode(texts[0])
    copy = pickle.loads(pickle.dumps(TRAINED))
    assert not uses_gigatoken(copy)
    results: dict[int, list[list[int]]] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: copy.encode_batch(texts)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), expected)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_loads_its_own_encoder() -> None:
    program = (
        "import os; from MyGPT import get_tokenizer; from MyGPT.tokenizers import codec; codec.LOAD_CHARACTERS = 0\n"
        "tokenizer = get_tokenizer('gpt2'); text = 'some words ' * 1000; first = tokenizer.encode(text)\n"
        "parent = tokenizer._codec._gigatoken; pid = os.fork()\n"
        "if pid == 0: os._exit(tokenizer.encode(text) != first or tokenizer._codec._gigatoken is parent)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
