"""The protocols by which GPT-2 was evaluated on each data set (Radford et al., 2019, section 3 and table 3).

A perplexity depends on its protocol: on what is counted (tokens or words), on the spelling of the text and on the length
of the context. `PLAIN` measures a text unchanged. The other protocols follow the paper as far as the paper describes them.
A corpus that is split into tokens, such as WikiText, is first rewritten as ordinary text (detokenized). The original tokens
can be recovered from this text, so corpus and text have the same probability. docs/evaluation.md compares these protocols
with the protocols of other projects.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from MyGPT import ranks
from MyGPT.config import GPT2_CONFIGS, GPTConfig
from MyGPT.data.formats import format_of
from MyGPT.data.sources import read_pieces
from MyGPT.data.tokens import compact_ids
from MyGPT.evaluation.perplexity import Result, continuation_logits, documents_loss
from MyGPT.messages import did_you_mean
from MyGPT.model import GPTModel
from MyGPT.notebooks import Described
from MyGPT.sampling import require_finite
from MyGPT.tokenizers import Tokenizer

# Words that keep their full stop; after all other words the full stop is a token.
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)+|(?:Mr|Mrs|Ms|Dr|St|Lt|Col|Gen|Maj|Capt|Sgt|Jr|Sr|Prof|Rev|Gov|Sen|Nos?|vs|etc|Inc|Ltd|Co|Corp|Mt|Ft)\.",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Detokenizer:
    """Rules that turn the tokens of a corpus into ordinary text (detokenize), and split such text into tokens again.

    >>> WIKITEXT.join(["a", "well", "@-@", "known", "fact", "(", "1", ")", "."])
    'a well-known fact (1).'

    `join` omits a space only if `split` can separate the two tokens again. Therefore split(join(tokens)) == tokens, unless
    a token is ambiguous (see `is_ambiguous`).
    """

    closing: str
    """A regular expression for tokens that are written without a space before them, such as commas."""
    opening: str
    """A regular expression for tokens that are written without a space after them, such as opening brackets."""
    inner: str = "(?!)"
    """A regular expression for characters in a word that become tokens such as @-@ for "-". The default matches none."""

    def join(self, tokens: Sequence[str]) -> str:
        """Return the tokens of a line as ordinary text: ["Yes", ",", "sir"] becomes "Yes, sir"."""
        words: list[list[str]] = []  # the tokens of each word
        n_quotes = i = 0
        while i < len(tokens):
            new = list(tokens[i : i + 2] if _is_inner(tokens[i]) else tokens[i : i + 1])
            longer = [*words[-1], *new] if words and self._is_attached(words[-1][-1], new[0], n_quotes % 2 == 1) else []
            if longer and self._split_word(_write_word(longer)) == longer:
                words[-1] = longer
            else:
                new = new[:1]
                words.append(new)
            n_quotes += new.count('"')
            i += len(new)
        return " ".join(map(_write_word, words))

    def split(self, text: str) -> list[str]:
        """Return the tokens of a line of text that `join` returned."""
        return [token for word in _split_spaces(text) for token in self._split_word(word)]

    def is_ambiguous(self, token: str) -> bool:
        """Return True if `split` turns the text of this token into other tokens, so that split(join([token])) != [token]."""
        return self._split_word(_write_word([token])) != [token]

    def _is_attached(self, before: str, token: str, in_quotes: bool) -> bool:
        """Return True if `token` can be written directly after the token `before`, without a space between them.

        in_quotes says whether `token` follows an opening quotation mark that has not been closed.
        """
        return (
            (in_quotes and '"' in (before, token))
            or _is_inner(token)
            or before == token == "="  # WikiText's headings
            or bool(re.fullmatch(self.closing, token) or re.fullmatch(self.opening, before))
        )

    def _split_word(self, word: str) -> list[str]:
        """Return the tokens of a word: "(well-known)," gives ["(", "well", "@-@", "known", ")", ","]."""
        if set(word) == {"="}:
            return list(word)
        before, after = list[str](), list[str]()
        while (match := re.match(f'(?:{self.opening}|")', word)) and match.end() < len(word):
            before.append(match[0])
            word = word[match.end() :]
        while (match := re.search(rf'(?:{self.closing}|")\Z', word)) and match.start() > 0:
            if match[0] == "." and _ABBREVIATION.fullmatch(word):
                break
            after.insert(0, match[0])
            word = word[: match.start()]
        parts = re.split(f"({self.inner})", word)
        return [*before, *(f"@{part}@" if i % 2 else part for i, part in enumerate(parts)), *after]


def _split_spaces(line: str) -> list[str]:
    """Split a line at spaces only, because other white space, such as a no-break space, can be part of a token."""
    return [token for token in line.split(" ") if token]


def _is_inner(token: str) -> bool:
    """Return True for a token such as @-@, which stands for a character inside a word."""
    return len(token) == 3 and token[0] == token[2] == "@"


def _write_word(tokens: Sequence[str]) -> str:
    """Return the text of one word: ["well", "@-@", "known"] becomes "well-known". A single "@-@" stays unchanged."""
    return "".join(token[1] if _is_inner(token) and len(tokens) > 1 else token for token in tokens)


# Tokens of the Moses tokenizer: an apostrophe and the letters after it are one token.
WIKITEXT = Detokenizer(
    closing=r"\.\.\.|[,.:;!?)\]}%]|'[^\W\d_]+",
    opening=r"[(\[{$£€#]",
    inner=r"(?<=[^\W_])-(?=[^\W_])|(?<=\d)[.,](?=\d)",
)
# Mikolov's version is in lower case, without punctuation. <unk> and N (any number) stay, because the originals are unknown.
PENN_TREEBANK = Detokenizer(closing=r"n't|'(?:s|re|ve|ll|d|m)?", opening=r"\$")
BILLION_WORDS = Detokenizer(closing=r"\.\.\.|[,.:;!?)\]%]|n't|'(?:s|re|ve|ll|d|m)", opening=r"[(\[$£]")

STOP_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being below between both but by
    can could did do does doing down during each few for from further had has have having he her here hers herself him
    himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or other
    our ours ourselves out over own same she should so some such than that the their theirs them themselves then there
    these they this those through to too under until up very was we were what when where which while who whom why will
    with would you your yours yourself yourselves""".split()
)
"""Frequent English words that rarely end a passage. The GPT-2 paper does not list its stop words, so they may differ."""


def _by_size(*figures: float) -> dict[str, float]:
    """Return a dict from the GPT-2 sizes 124M, 355M, 774M and 1558M to the four figures, which are given in this order."""
    return dict(zip(("124M", "355M", "774M", "1558M"), figures, strict=True))


@dataclass(frozen=True)
class Protocol:
    """The rules for evaluating a model on one data set, and the results that the GPT-2 paper reports for it."""

    title: str
    """The name of the data set in the GPT-2 paper."""
    data: str
    """A description of the file to evaluate on, such as "wiki.test.tokens of WikiText-2"."""
    detokenizer: Detokenizer | None = None
    """Rules for a corpus of tokens separated by spaces, where each line end counts as a word. None for ordinary text."""
    by_line: bool = False
    """True if each line of the file is a separate text."""
    last_word: bool = False
    """True if the model predicts only the last word of each text."""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The results in the GPT-2 paper, for example published["word perplexity"]["124M"]."""


PLAIN = Protocol("", "any text")
PROTOCOLS = {
    "wikitext2": Protocol("WikiText2", "wiki.test.tokens of WikiText-2", WIKITEXT,
                          published={"word perplexity": _by_size(29.41, 22.76, 19.93, 18.34)}),
    "wikitext103": Protocol("WikiText103", "wiki.test.tokens of WikiText-103", WIKITEXT,
                            published={"word perplexity": _by_size(37.50, 26.37, 22.05, 17.48)}),
    "ptb": Protocol("PTB", "ptb.test.txt in Mikolov's version", PENN_TREEBANK,
                    published={"word perplexity": _by_size(65.85, 47.33, 40.31, 35.76)}),
    "1bw": Protocol("1BW", "held-out sentences of the One Billion Word benchmark", BILLION_WORDS, by_line=True,
                    published={"word perplexity": _by_size(75.20, 55.72, 44.575, 42.16)}),
    "enwik8": Protocol("enwik8", "the last 5,000,000 bytes of enwik8",
                       published={"bits per byte": _by_size(1.16, 1.01, 0.97, 0.93)}),
    "text8": Protocol("text8", "the last 5,000,000 characters of text8",
                      published={"bits per byte": _by_size(1.17, 1.06, 1.02, 0.98)}),
    "lambada": Protocol("LAMBADA", "the test passages, one per line, or .jsonl", by_line=True, last_word=True,
                        published={"perplexity": _by_size(35.13, 15.60, 10.87, 8.63),
                                   "accuracy": _by_size(0.4599, 0.5548, 0.6012, 0.6324)}),
}  # fmt: skip


def find_protocol(name: str | None) -> Protocol:
    """Return the protocol with this name from `PROTOCOLS`, or `PLAIN` if the name is None."""
    if name is None:
        return PLAIN
    if name not in PROTOCOLS:
        raise ValueError(
            f"unknown protocol {name!r}; choose from {', '.join(PROTOCOLS)}{did_you_mean(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def released_size(config: GPTConfig) -> str | None:
    """Return the size, such as "124M", of the released GPT-2 whose layers have the same sizes as in `config`.

    Return None if there is no such model. Weights are not compared, so a model with other weights also gives a size.
    """
    shape = attrgetter("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
    return next((name for name, known in GPT2_CONFIGS.items() if shape(known) == shape(config)), None)


def read_texts(paths: Iterable[Path], by_line: bool = False) -> Iterator[str]:
    """Yield each text file as one text or, if by_line is true, each of its lines that is not blank as one text.

    A JSON, Parquet or Arrow file always yields the text of each record.
    """
    for path in paths:
        is_json, text = format_of(path) in ("json", "lines", "parquet", "arrow"), ""
        for piece in read_pieces(path):
            text += piece.text
            if piece.ends_document:
                yield from (line for line in io.StringIO(text) if line.strip()) if by_line and not is_json else [text]
                text = ""


@dataclass(frozen=True)
class TextMeasurement(Described):
    """The loss of a model on texts, and the numbers of bytes and words by which the loss is divided."""

    result: Result
    """The summed loss and the number of predicted tokens."""
    n_bytes: int
    """Number of predicted bytes of the original texts in UTF-8, before detokenization. These are all bytes if the
    tokenizer has a token with which each text starts, and otherwise all bytes except those of each text's first token."""
    n_words: float
    """Number of predicted words, separated by white space. If the protocol has a detokenizer, each line end counts as a
    word. A word counts as a fraction if the first token of the text, which is not predicted, is a part of it."""
    n_ambiguous: int
    """Number of corpus tokens that `Detokenizer.split` does not restore from the detokenized text."""
    is_lossless: bool
    """True if decoding the token ids returns the same texts. If False, the tokenizer loses characters that the model then
    does not predict, so the loss per word and per byte is too low."""
    n_skipped: int
    """Number of texts without a predicted token, such as a text of one token that no other token precedes."""

    def summary(self) -> dict[str, object]:
        """Return the loss per byte and per word, and the numbers of tokens, bytes and words."""
        losses = {"bits per byte": self.bits_per_byte, "perplexity per word": self.word_perplexity}
        return {**self.result.summary(), **losses, "bytes": self.n_bytes, "words": self.n_words}

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of the original texts."""
        return self.result.bits_per_byte(self.n_bytes)

    @property
    def word_perplexity(self) -> float:
        """The perplexity per word of the original texts, exp(summed loss / n_words)."""
        return self.result.word_perplexity(self.n_words)


def measure_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    protocol: Protocol = PLAIN,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
    divide: bool = False,
) -> TextMeasurement:
    """Compute the loss of the model on one or several independent texts.

    The model reads the tokenizer's beginning-of-text token, such as `<|endoftext|>`, before each text. If there is none, the
    first token of each text is not predicted, and its bytes and its part of a word are not counted. The protocol defines
    how texts are detokenized and how words are counted. `strided_loss` explains stride, batch_size and progress, and
    `documents_loss` explains divide.

    Raises:
        ValueError: there is no text, no text has a token to predict, or the tokenizer cannot encode a text.
    """
    documents, is_lossless = [], True
    n_bytes, n_words, n_ambiguous, n_skipped = 0, 0.0, 0, 0
    for text in texts:
        written, text_words = text, len(text.split())
        if protocol.detokenizer is not None:
            lines = [_split_spaces(line) for line in text.split("\n")]
            written = "\n".join(map(protocol.detokenizer.join, lines))
            text_words = sum(map(len, lines)) + text.count("\n")
            n_ambiguous += sum(map(protocol.detokenizer.is_ambiguous, (token for line in lines for token in line)))
        ids = tokenizer.encode(written)
        is_lossless = is_lossless and tokenizer.decode(ids) == written
        documents.append(compact_ids(ids))
        if len(ids) < (1 if tokenizer.bos_token is not None else 2):
            n_skipped += 1
            continue
        n_given = 0 if tokenizer.bos_token is not None else tokenizer.first_token_bytes(written, ids)
        n_bytes += len(text.encode()) - n_given
        n_words += text_words - _words_in(written, n_given, protocol.detokenizer)
    if not documents:
        raise ValueError("there is no text to measure")
    result = documents_loss(
        model, documents, stride, batch_size=batch_size, bos_id=tokenizer.bos_token, progress=progress, divide=divide
    )
    return TextMeasurement(result, n_bytes, n_words, n_ambiguous, is_lossless, n_skipped)


def _words_in(text: str, n_bytes: int, detokenizer: Detokenizer | None) -> float:
    """Return the number of words in the first n_bytes bytes of a text. The last word may be a fraction.

    With a detokenizer, the words are the tokens of the corpus, as in `measure_text`.
    """
    n_words, start = 0.0, 0
    pieces = _pieces(text, detokenizer)
    while start < n_bytes:
        piece, is_word = next(pieces)
        length = len(piece.encode())
        n_words += is_word * min(1.0, (n_bytes - start) / length)
        start += length
    return n_words


def _pieces(text: str, detokenizer: Detokenizer | None) -> Iterator[tuple[str, bool]]:
    """Yield the words of a text and the white space between them, each with True if it counts as a word."""
    if detokenizer is None:
        yield from ((match[0], not match[0].isspace()) for match in re.finditer(r"\s+|\S+", text))
        return
    for part in re.split("([ \n])", text):
        if part in (" ", "\n"):
            yield part, part == "\n"  # a line end is a word of the corpus
            continue
        tokens = detokenizer._split_word(part) if part else []
        yield from ((token[1] if _is_inner(token) and len(tokens) > 1 else token, True) for token in tokens)


@dataclass(frozen=True)
class LastWordMeasurement(Described):
    """The results of a model that predicts the last word of each passage."""

    n_passages: int
    """Number of passages."""
    total_nats: float
    """Summed negative log-likelihood of the last words, in nats."""
    n_correct: int
    """Number of passages in which every token of the last word is predicted correctly."""
    n_correct_filtered: int
    """Number of correct last words if the model may not predict a stop word, such as "the", as the first token."""
    n_correct_tokens: int
    """Number of passages whose final token is predicted correctly from all tokens before it."""

    def summary(self) -> dict[str, object]:
        """Return the accuracy, the perplexity and the number of passages."""
        accuracy = self.n_correct / self.n_passages
        return {"accuracy": accuracy, "perplexity per word": self.word_perplexity, "passages": self.n_passages}

    @property
    def word_perplexity(self) -> float:
        """The perplexity per last word, exp(total_nats / n_passages)."""
        return Result(self.total_nats, self.n_passages).perplexity


def measure_last_words(
    model: GPTModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    batch_size: int = 8,
    progress: bool = False,
    divide: bool = False,
) -> LastWordMeasurement:
    """Measure how well the model predicts the last word of each passage from the text before this word.

    The predicted text is the space before the last word, followed by this word. A forward pass reads batch_size passages.
    If `progress` is true, a progress bar is shown. `divide=True` divides the passages among the ranks of torch.distributed,
    which must all call this function.

    Raises:
        ValueError: there is no passage, or a passage has only one word.
    """
    pairs = []
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        if not context.strip():
            raise ValueError(f"a passage needs a word before its last one, got {text!r}")
        pairs.append((tokenizer.encode(context), tokenizer.encode(" " + word)))
    if not pairs:
        raise ValueError("there is no passage to measure")
    stop_ids = _stop_ids(tokenizer)
    nats: list[float] = []
    n_passages = len(pairs)
    if divide:
        pairs = pairs[ranks.rank() :: ranks.world_size()]
    n_correct = n_filtered = n_tokens = 0
    for (_, word_ids), logits in zip(pairs, continuation_logits(model, pairs, batch_size, progress), strict=True):
        log_p = (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(dim=1)  # (n, V)
        of_word = log_p[range(len(word_ids)), word_ids]
        require_finite(f"the log-probability of the last word of passage {len(nats) + 1}", of_word)
        nats.append(-math.fsum(of_word.tolist()))
        predicted = log_p.argmax(dim=1).tolist()
        log_p[0, stop_ids] = -math.inf
        filtered = log_p.argmax(dim=1).tolist()
        n_correct += predicted == word_ids
        n_filtered += filtered == word_ids
        n_tokens += predicted[-1] == word_ids[-1]
    sums = [math.fsum(nats), n_correct, n_filtered, n_tokens]
    total, *counts = ranks.sum_numbers(sums) if divide else sums
    return LastWordMeasurement(n_passages, total, *map(int, counts))


def _stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of all tokens that consist of a space and one of `STOP_WORDS`."""
    found = []
    for word in sorted(STOP_WORDS):
        with contextlib.suppress(ValueError):  # a small vocabulary cannot encode every stop word
            ids = tokenizer.encode(" " + word)
            if len(ids) == 1 and tokenizer.decode(ids).strip() == word:
                found += ids
    return found
