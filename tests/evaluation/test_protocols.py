"""Test how corpora are rewritten as text and what is counted, on small cases with results by hand."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, SimpleTokenizer
from MyGPT.config import GPT2_CONFIGS
from MyGPT.data import sources
from MyGPT.evaluation.perplexity import strided_loss
from MyGPT.evaluation.protocols import (
    BILLION_WORDS,
    PENN_TREEBANK,
    PROTOCOLS,
    STOP_WORDS,
    WIKITEXT,
    Detokenizer,
    find_protocol,
    measure_last_words,
    measure_text,
    read_texts,
    released_size,
)
from oracles_model import transformers_twin

EXAMPLES = [
    (WIKITEXT, " = Robert Boulter = ", "= Robert Boulter ="),
    (WIKITEXT, " = = Career ( 2000 – 05 ) = = ", "== Career (2000 – 05) =="),
    (WIKITEXT, " = = = 1990s = = = ", "=== 1990s ==="),
    (WIKITEXT, " an English film , television and theatre actor . ", "an English film, television and theatre actor."),
    (WIKITEXT, " a guest @-@ starring role on M @-@ 82 ", "a guest-starring role on M-82"),
    (WIKITEXT, " state @-@ of @-@ the @-@ art ", "state-of-the-art"),
    (WIKITEXT, " $ 1 @,@ 234 @,@ 567 @.@ 5 ( 50 % ) ", "$1,234,567.5 (50%)"),
    (WIKITEXT, " the game 's hero didn 't die ; he 'll sleep ", "the game's hero didn't die; he'll sleep"),
    (WIKITEXT, ' said : " Well , no ! " ( " so what ? " ) ', 'said: "Well, no!" ("so what?")'),
    (WIKITEXT, ' the song " Kiss You " , by <unk> ', 'the song "Kiss You", by <unk>'),
    (WIKITEXT, " Mr. Smith of Washington , D.C. ", "Mr. Smith of Washington, D.C."),
    (WIKITEXT, " a lot of vitamin C . ", "a lot of vitamin C ."),  # "C." would be read as an abbreviation
    (WIKITEXT, " a @-@ ( b ) @-@ ", "a @-@ (b) @-@"),  # no word on both sides
    (WIKITEXT, "", ""),
    (PENN_TREEBANK, " no it was n't black monday ", "no it wasn't black monday"),
    (PENN_TREEBANK, " the companies ' <unk> said it 's $ N million ", "the companies' <unk> said it's $N million"),
    (PENN_TREEBANK, " mr. <unk> is chairman of <unk> n.v. ", "mr. <unk> is chairman of <unk> n.v."),
    (BILLION_WORDS, "He said \" it 's $ 3 \" , did n't he ?", "He said \"it's $3\", didn't he?"),
]


@pytest.mark.parametrize(("detokenizer", "line", "text"), EXAMPLES)
def test_tokens_are_rewritten_as_ordinary_text(detokenizer: Detokenizer, line: str, text: str) -> None:
    tokens = line.split()
    assert detokenizer.join(tokens) == text
    assert detokenizer.split(text) == tokens
    assert not any(map(detokenizer.is_ambiguous, tokens))


PARTS = [*" , . : ; ! ? ( ) [ ] { } $ % ' \" = @-@ @,@ @.@ ... 's 't n't 're ' - -- @ @@ <unk> N".split()]
PARTS += "a I C. U.S. Mr. St No 1 12 1990 don didn can e-mail 3.5 1,000 Kiss n' 's. é 中 == =. '\"".split()


@pytest.mark.slow
@pytest.mark.parametrize("detokenizer", [WIKITEXT, PENN_TREEBANK, BILLION_WORDS])
@given(
    tokens=st.lists(st.one_of(st.sampled_from(PARTS), st.text("a1.,'\"-@=(sn't", min_size=1, max_size=4)), max_size=12)
)
def test_split_recovers_the_tokens_that_join_wrote(detokenizer: Detokenizer, tokens: list[str]) -> None:
    clear = [token for token in tokens if not detokenizer.is_ambiguous(token)]
    assert detokenizer.split(detokenizer.join(clear)) == clear


def test_ambiguous_tokens_are_counted() -> None:
    """WikiText writes 3.5 as 3 @.@ 5, so `split` reads the text 3.5 as these three tokens."""
    assert WIKITEXT.split(WIKITEXT.join(["3.5"])) == ["3", "@.@", "5"]
    measured = measure_text(uniform_model(), bpe(), ["it 's 3.5 and 1,000 \n"], PROTOCOLS["wikitext2"])
    assert measured.n_ambiguous == 2


def test_only_spaces_and_newlines_separate_the_tokens_of_a_corpus(tmp_path: Path) -> None:
    """str.split and str.splitlines accept a dozen other separators, which would be lost."""
    corpus = " 5\u00a0km , a\u2028b . \n"
    (tmp_path / "a.txt").write_text(corpus, encoding="utf-8")
    assert list(read_texts([tmp_path / "a.txt"], by_line=True)) == [corpus]
    tokenizer = BPETokenizer.train("", 257, progress=False)
    measured = measure_text(uniform_model(), tokenizer, [corpus], PROTOCOLS["1bw"])
    assert measured.n_words == 5
    assert measured.result.n_tokens == len("5\u00a0km, a\u2028b.\n".encode())


def bpe() -> BPETokenizer:
    return BPETokenizer.train("the cat sat by the fire. it is 50% hot\n" * 9, 280, progress=False)


def uniform_model(vocab_size: int = 512) -> GPTModel:
    """Return a model that gives every token the probability 1 / vocab_size."""
    model = GPTModel(GPTConfig(vocab_size=vocab_size, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    nn.init.zeros_(model.lm_head.weight)
    return model


def test_word_perplexity_counts_the_words_and_line_ends_of_the_corpus() -> None:
    """The corpus has 3 + 0 + 6 words and 3 line ends; the model reads the shorter, rewritten text."""
    corpus = " = Hi = \n \n It cost 50 % , no \n"
    written = "= Hi =\n\nIt cost 50%, no\n"
    tokenizer = BPETokenizer.train("", 257, progress=False)  # one token per byte
    measured = measure_text(uniform_model(), tokenizer, [corpus], PROTOCOLS["wikitext103"])
    assert measured.result.n_tokens == len(written)
    assert measured.n_words == 12
    assert measured.n_bytes == len(corpus)
    assert measured.word_perplexity == pytest.approx(512 ** (len(written) / 12), rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(9 * len(written) / len(corpus), rel=1e-5)


def test_a_plain_text_is_measured_unchanged_after_endoftext(tiny_config: GPTConfig) -> None:
    tokenizer = bpe()
    model = lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    text = " the cat — naïve — sat ,\nby the fire . \n"
    measured = measure_text(model, tokenizer, [text], stride=3)
    assert measured.result == strided_loss(model, tokenizer.encode(text), 3, bos_id=tokenizer.eot_token)
    assert (measured.n_words, measured.n_bytes) == (11, len(text) + 5)  # — has three bytes, ï two
    assert measured.is_lossless and not measured.n_ambiguous


def test_without_endoftext_the_first_token_is_not_counted() -> None:
    tokenizer = CharTokenizer("abc ")
    assert measure_text(uniform_model(), tokenizer, ["ab ca", "a", "bb"]).result.n_tokens == 4 + 0 + 1


def expected_counts(pieces: list[list[bytes]], n_given: int) -> tuple[int, float]:
    """Return the numbers of predicted bytes and words of texts, given the words and white space of each text as bytes.

    The first n_given bytes of each text are not predicted. Each other byte of a word counts as its fraction of the word.
    """
    n_bytes, n_words = 0, 0.0
    for words in pieces:
        owners = [word for word in words for _ in word][n_given:]
        n_bytes += len(owners)
        n_words += sum(1 / len(word) for word in owners if word.decode().strip())
    return n_bytes, n_words


def cut(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(0, len(text), n)]


def pieces_of(text: str) -> list[bytes]:
    return [piece.encode() for piece in re.findall(r"\s+|\S+", text)]


@settings(deadline=None, max_examples=40)
@given(text=st.text("ab é中\n\u2003", min_size=2, max_size=40), n=st.integers(2, 40))
def test_only_predicted_characters_are_counted(text: str, n: int) -> None:
    texts = cut(text, n)
    tokenizer = CharTokenizer.from_text(text)
    measured = measure_text(uniform_model(16), tokenizer, texts)
    counted = [one for one in texts if len(one) > 1]
    expected = [expected_counts([pieces_of(one)], len(one[0].encode())) for one in counted]
    assert measured.result.n_tokens == len(text) - len(texts)
    assert measured.n_skipped == len(texts) - len(counted)
    assert measured.n_bytes == sum(n_bytes for n_bytes, _ in expected)
    assert measured.n_words == pytest.approx(sum(n_words for _, n_words in expected), abs=1e-9)
    if measured.n_bytes == measured.result.n_tokens:
        assert measured.bits_per_byte == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("n", [1, 3, 7, 40])
@pytest.mark.parametrize("special_tokens", [(), ("<|endoftext|>",)])
def test_bits_per_byte_of_a_tokenizer_of_bytes_are_its_bits_per_token(special_tokens: Any, n: int) -> None:
    """The first token of a text may be a part of a character."""
    tokenizer = BPETokenizer.train("", 256 + len(special_tokens), special_tokens, progress=False)
    texts = cut("中é the — \u2028 naïve\n\n  cat 🐈 sat ", n)
    measured = measure_text(uniform_model(512), tokenizer, texts)
    n_given = 0 if special_tokens else 1
    assert measured.bits_per_byte == pytest.approx(9, rel=1e-5)
    n_bytes, n_words = expected_counts([pieces_of(text) for text in texts if len(text.encode()) > n_given], n_given)
    assert (measured.n_bytes, measured.result.n_tokens) == (n_bytes, n_bytes)
    assert measured.n_words == pytest.approx(n_words, rel=1e-9)


def test_counts_equal_a_sum_over_predicted_tokens() -> None:
    """The tokenizer has merges and no end-of-text token; the loss is summed over one forward pass per text."""
    text = "the cat sat by the fire. it is 50% hot\n" * 3
    tokenizer = BPETokenizer.train(text, 290, special_tokens=(), progress=False)
    model = lively_model(GPTConfig(vocab_size=290, context_length=64, emb_dim=12, n_heads=3, n_layers=2)).double()
    for n in (len(text), 31, 8):
        nats, n_bytes, n_words = 0.0, 0, 0.0
        for one in cut(text, n):
            ids = tokenizer.encode(one)
            with torch.no_grad():
                log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
            nats -= sum(float(log_p[i, id_]) for i, id_ in enumerate(ids[1:]))
            n_given = len(tokenizer.decode_tokens_bytes(ids)[0])
            counts = expected_counts([pieces_of(one)], n_given)
            n_bytes, n_words = n_bytes + counts[0], n_words + counts[1]
        measured = measure_text(model, tokenizer, cut(text, n))
        assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)
        assert math.log(measured.word_perplexity) == pytest.approx(nats / n_words, rel=1e-12)


@pytest.mark.parametrize("texts", [["the cat sat by the fire"], ["the cat", " sat by\n", "the fire"]])
def test_word_perplexity_of_a_tokenizer_of_words_is_its_perplexity_per_token(texts: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["by", "cat", "fire", "sat", "the", "<|unk|>"])}
    measured = measure_text(uniform_model(), SimpleTokenizer(vocabulary), texts)
    assert measured.n_words == measured.result.n_tokens == 6 - len(texts)
    assert measured.word_perplexity == pytest.approx(512, rel=1e-4)


def test_the_bytes_of_a_first_word_are_counted_in_the_text() -> None:
    """An unknown word has another length than <|unk|>, and the white space before the first word is dropped."""
    tokenizer = SimpleTokenizer({"the": 0, ",": 1, "<|unk|>": 2})
    for text, n_bytes, n_words in (
        ("  naïve the", 4, 1),
        ("the, the", 5, 1.25),
        (", the", 4, 1),
        ("<|unk|>the", 3, 0.3),
    ):
        measured = measure_text(uniform_model(), tokenizer, [text])
        assert (measured.n_bytes, measured.n_words) == (n_bytes, pytest.approx(n_words)), text


@pytest.mark.parametrize(
    ("protocol", "corpus", "written", "n_words"),
    [
        ("wikitext2", " = Hi = \n it \n", "= Hi =\nit\n", 5),  # without the first =
        ("wikitext2", " \n = Hi = \n", "\n= Hi =\n", 4),  # without the first line end
        ("wikitext2", " well @-@ known \n", "well-known\n", 3.75),  # without a quarter of "well"
        ("wikitext2", " $ 5 ", "$5", 1),
        ("ptb", " n't it \n", "n't it\n", 2 + 2 / 3),
        (None, " well-known\n", " well-known\n", 1),
    ],
)
def test_only_predicted_words_of_a_corpus_are_counted(
    protocol: str | None, corpus: str, written: str, n_words: float
) -> None:
    measured = measure_text(uniform_model(), CharTokenizer.from_text(written), [corpus], find_protocol(protocol))
    assert measured.result.n_tokens == len(written) - 1
    assert measured.n_bytes == len(corpus) - 1
    assert measured.n_words == pytest.approx(n_words)


@pytest.mark.parametrize("tokenizer", [CharTokenizer(" \n"), BPETokenizer.train("", 257, progress=False)])
def test_a_text_without_words_has_no_perplexity_per_word(tokenizer: Any) -> None:
    measured = measure_text(uniform_model(), tokenizer, ["  \n", " "])
    assert measured.n_words == 0 and measured.bits_per_byte == pytest.approx(9, rel=1e-5)
    with pytest.raises(ValueError, match="a loss per unit needs a text with words, got 0"):
        print(measured.word_perplexity)


def test_texts_without_a_token_to_predict_are_skipped() -> None:
    words, chars = SimpleTokenizer.from_text("the cat"), CharTokenizer("abc ")
    for tokenizer, texts in ((words, ["the cat", " \n ", "", "the cat"]), (chars, ["a", "ab c", "", "ab c"])):
        measured = measure_text(uniform_model(), tokenizer, texts)
        alone = measure_text(uniform_model(), tokenizer, texts[1:2] if tokenizer is chars else texts[:1])
        assert (measured.n_skipped, alone.n_skipped) == (2, 0)
        assert (measured.n_bytes, measured.n_words) == (2 * alone.n_bytes, 2 * alone.n_words)
    with pytest.raises(ValueError, match="a text needs at least 2 tokens, or 1 after a bos_id, got 1"):
        measure_text(uniform_model(), chars, ["a", "", "b"])


def test_a_lossy_tokenizer_is_reported() -> None:
    tokenizer = SimpleTokenizer.from_text("the cat sat")
    assert measure_text(uniform_model(), tokenizer, ["the cat sat"]).is_lossless
    assert not measure_text(uniform_model(), tokenizer, ["the cat\nsat"]).is_lossless
    assert not measure_text(uniform_model(), tokenizer, ["the dog sat"]).is_lossless


def test_a_character_outside_the_vocabulary_raises_an_error() -> None:
    with pytest.raises(ValueError, match="character 'z' at position 2 is not in the vocabulary of 4 characters"):
        measure_text(uniform_model(), CharTokenizer("abc "), ["abz"])


def test_files_lines_and_records_are_separate_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 7)  # so that the files are read in several blocks
    plain, records, packed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
    plain.write_text("one two three four\n\nfive six\n")
    lines = json.dumps({"text": "a b\nc"}) + "\n" + json.dumps({"text": "d"}) + "\n"
    records.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    files = [plain, records, packed]
    assert list(read_texts(files)) == ["one two three four\n\nfive six\n", *["a b\nc", "d"] * 2]
    assert list(read_texts(files, by_line=True)) == ["one two three four\n", "five six\n", *["a b\nc", "d"] * 2]


class Chain(nn.Module):
    """A model that predicts the next id from two tables: logit 2 for the best id, 1 for the second, 0 for all others."""

    def __init__(self, vocab_size: int, best: dict[int, int], second: dict[int, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=8)
        self.lm_head = nn.Linear(1, 1)
        self.best, self.second = best, second

    def forward(self, ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, self.config.vocab_size, dtype=torch.float64)
        for table, logit in ((self.second, 1.0), (self.best, 2.0)):
            for place in (ids[..., None] == torch.tensor(list(table))).nonzero().tolist():
                logits[place[0], place[1], list(table.values())[place[2]]] = logit
        return logits


def test_last_words_equal_a_calculation_by_hand() -> None:
    """Each word is one token. The model predicts "sat" after "cat" and "ran" after "bird"; after "dog" it prefers the stop
    word "the" to "ran"."""
    tokenizer = SimpleTokenizer.from_text("the cat dog bird sat ran")
    ids = tokenizer.str_to_int
    chain: Any = Chain(
        tokenizer.n_vocab,
        {ids["cat"]: ids["sat"], ids["dog"]: ids["the"], ids["bird"]: ids["ran"]},
        {ids["dog"]: ids["ran"]},
    )
    assert "the" in STOP_WORDS and not {"cat", "dog", "bird", "sat", "ran"} & STOP_WORDS
    passages = ["the cat sat", "cat the dog ran\n", "the bird sat", "the cat the cat the cat the cat the cat sat"]
    measured = measure_last_words(chain, tokenizer, passages, batch_size=3)
    others = tokenizer.n_vocab
    after_cat = math.log((math.e**2 + others - 1) / math.e**2)
    after_dog = math.log((math.e**2 + math.e + others - 2) / math.e)
    after_bird = math.log(math.e**2 + others - 1)
    assert measured.total_nats == pytest.approx(2 * after_cat + after_dog + after_bird, rel=1e-12)
    assert measured.word_perplexity == pytest.approx(math.exp(measured.total_nats / 4), rel=1e-12)
    assert (measured.n_correct, measured.n_correct_filtered, measured.n_correct_tokens) == (2, 3, 2)


def test_a_last_word_is_correct_if_all_its_tokens_are() -> None:
    """The model predicts the letters a, b, c after a space: "abc" is correct, "xbc" only in its last two letters."""
    tokenizer = CharTokenizer("abcx ")
    a, b, c, _, space = range(5)
    chain: Any = Chain(5, {c: space, space: a, a: b, b: c}, {})
    measured = measure_last_words(chain, tokenizer, ["c abc", "c xbc", "c abx", "x abc"])
    assert (measured.n_passages, measured.n_correct, measured.n_correct_tokens) == (4, 1, 3)


def test_last_word_losses_equal_those_of_transformers() -> None:
    tokenizer = CharTokenizer("abcdefgh \n")
    model = lively_model(GPTConfig(vocab_size=10, context_length=12, emb_dim=12, n_heads=3, n_layers=2)).double()
    twin = transformers_twin(model)
    passages = ["ab cd ef", "a b", "abc\ndef gh", "ab cd ef gh ab cd ef gh abc", "a  bcd "]
    total, n_correct = 0.0, 0
    for passage in passages:
        word = " " + passage.rstrip().rpartition(" ")[2]
        ids = torch.tensor([tokenizer.encode(passage.rstrip())[-13:]])
        with torch.no_grad():
            log_p = twin(ids[:, :-1]).logits.log_softmax(-1)[0]
        word_log_p = log_p.gather(1, ids[0, 1:, None])[-len(word) :]
        total -= word_log_p.sum().item()
        n_correct += bool((log_p.argmax(1) == ids[0, 1:])[-len(word) :].all())
    measured = measure_last_words(model, tokenizer, passages, batch_size=2)
    assert measured.total_nats == pytest.approx(total, rel=1e-12)
    assert measured.n_correct == n_correct


@pytest.mark.parametrize("passage", ["word", " word ", "\n"])
def test_a_passage_of_one_word_raises_an_error(passage: str) -> None:
    with pytest.raises(ValueError, match="a passage needs a word before its last one, got"):
        measure_last_words(uniform_model(), bpe(), ["the cat", passage])


def test_no_text_raises_an_error() -> None:
    with pytest.raises(ValueError, match="there is no text to measure"):
        measure_text(uniform_model(), bpe(), [])
    with pytest.raises(ValueError, match="there is no passage to measure"):
        measure_last_words(uniform_model(), bpe(), [])


def test_an_unknown_protocol_raises_an_error_with_all_names() -> None:
    with pytest.raises(
        ValueError, match="unknown protocol 'wiki'; choose from wikitext2, wikitext103, ptb, 1bw, enwik8, text8"
    ):
        find_protocol("wiki")


def test_published_figures_improve_with_size_and_use_released_names() -> None:
    for protocol in PROTOCOLS.values():
        for name, figures in protocol.published.items():
            assert all(size in GPT2_CONFIGS for size in figures)
            values = list(figures.values())
            assert values == sorted(values, reverse=name != "accuracy")


def test_the_released_size_is_found_by_the_shape() -> None:
    assert released_size(GPT2_CONFIGS["gpt2"]) == "124M"
    assert released_size(GPT2_CONFIGS["gpt2-xl"]) == "1558M"
    assert released_size(GPTConfig(n_layers=11)) is None
