"""The ways in which GPT-2 was measured (Radford et al., 2019, section 3 and table 3): what is counted, on which text.

A perplexity without its protocol says little: by token or by word, on which spelling of the text, with how much context.
`PLAIN` takes a text as it is; the others are the paper's, as far as it tells them. A corpus that comes as tokens is first
written as people write, in a way that can be undone, so that the text's probability is the corpus's. The windows are in
perplexity.py; docs/evaluation.md says what others found with these protocols.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from MyGPT.config import GPT2_CONFIGS, GPTConfig
from MyGPT.data.sources import read_pieces
from MyGPT.data.tokens import compact_ids
from MyGPT.evaluation.perplexity import Result, continuation_logits, documents_loss
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer

# These keep their full stop; any other word's is a token of its own.
_ABBREVIATION = re.compile(
    r"(?:[^\W\d_]\.)+|(?:Mr|Mrs|Ms|Dr|St|Lt|Col|Gen|Maj|Capt|Sgt|Jr|Sr|Prof|Rev|Gov|Sen|Nos?|vs|etc|Inc|Ltd|Co|Corp|Mt|Ft)\.",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Detokenizer:
    """How the tokens of a corpus are written as text, and found again in it.

    A space is left out only where `split` puts it back: `split(join(tokens)) == tokens` if none of them is ambiguous.
    """

    closing: str
    """Tokens that follow without a space, such as commas; a regular expression, like the next two."""
    opening: str
    """Tokens that are followed without a space, such as brackets."""
    inner: str = "(?!)"
    """Characters inside a word that the corpus holds as tokens of their own, between two @."""

    def join(self, tokens: Sequence[str]) -> str:
        """One line of text."""
        words: list[list[str]] = []  # the tokens of each
        n_quotes = i = 0
        while i < len(tokens):
            new = list(tokens[i : i + 2] if _is_inner(tokens[i]) else tokens[i : i + 1])
            longer = [*words[-1], *new] if words and self._sticks(words[-1][-1], new[0], n_quotes % 2 == 1) else []
            if longer and self._split_word(_written(longer)) == longer:
                words[-1] = longer
            else:
                new = new[:1]
                words.append(new)
            n_quotes += new.count('"')
            i += len(new)
        return " ".join(map(_written, words))

    def split(self, text: str) -> list[str]:
        """The tokens of a line that `join` wrote."""
        return [token for word in _tokens(text) for token in self._split_word(word)]

    def is_ambiguous(self, token: str) -> bool:
        """Whether `split` would not find this token again."""
        return self._split_word(_written([token])) != [token]

    def _sticks(self, before: str, token: str, in_quotes: bool) -> bool:
        """Whether people write no space between the two."""
        if in_quotes and '"' in (before, token):
            return True
        return (
            _is_inner(token)
            or re.fullmatch(self.closing, token) is not None
            or re.fullmatch(self.opening, before) is not None
            or before == token == "="  # WikiText's headings
        )

    def _split_word(self, word: str) -> list[str]:
        if set(word) == {"="}:
            return list(word)
        before: list[str] = []
        after: list[str] = []
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


def _tokens(line: str) -> list[str]:
    """Separated by spaces alone: other white space, such as one that does not break, can be part of a token."""
    return [token for token in line.split(" ") if token]


def _is_inner(token: str) -> bool:
    return len(token) == 3 and token[0] == token[2] == "@"


def _written(tokens: Sequence[str]) -> str:
    """A word; an inner character that stands alone keeps its two @."""
    return "".join(token[1] if _is_inner(token) and len(tokens) > 1 else token for token in tokens)


# Moses' tokens: whatever follows an apostrophe between letters is apart.
WIKITEXT = Detokenizer(
    closing=r"\.\.\.|[,.:;!?)\]}%]|'[^\W\d_]+",
    opening=r"[(\[{$£€#]",
    inner=r"(?<=[^\W_])-(?=[^\W_])|(?<=\d)[.,](?=\d)",
)
# Mikolov's version: lower case, no punctuation; <unk> and N, for any number, stay, since nobody knows what they were.
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
"""English words that seldom end a story. The paper names no list."""


def _by_size(*figures: float) -> dict[str, float]:
    return dict(zip(("124M", "355M", "774M", "1558M"), figures, strict=True))


@dataclass(frozen=True)
class Protocol:
    """What is counted on which text."""

    title: str
    """The data set, as the paper calls it."""
    data: str
    """Which file it takes."""
    detokenizer: Detokenizer | None = None
    """For a corpus of space-separated tokens, whose ends of lines then count as words too."""
    by_line: bool = False
    """Whether each line is a text of its own."""
    last_word: bool = False
    """Whether only the last word of each text is to be predicted."""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The paper's figures, by what they measure and by the released size."""


PLAIN = Protocol("", "any text")
PROTOCOLS = {
    "wikitext2": Protocol(
        "WikiText2",
        "wiki.test.tokens of WikiText-2",
        WIKITEXT,
        published={"word perplexity": _by_size(29.41, 22.76, 19.93, 18.34)},
    ),
    "wikitext103": Protocol(
        "WikiText103",
        "wiki.test.tokens of WikiText-103",
        WIKITEXT,
        published={"word perplexity": _by_size(37.50, 26.37, 22.05, 17.48)},
    ),
    "ptb": Protocol(
        "PTB",
        "ptb.test.txt in Mikolov's version",
        PENN_TREEBANK,
        published={"word perplexity": _by_size(65.85, 47.33, 40.31, 35.76)},
    ),
    "1bw": Protocol(
        "1BW",
        "held-out sentences of the One Billion Word benchmark",
        BILLION_WORDS,
        by_line=True,
        published={"word perplexity": _by_size(75.20, 55.72, 44.575, 42.16)},
    ),
    "enwik8": Protocol(
        "enwik8",
        "the last 5,000,000 bytes of enwik8",
        published={"bits per byte": _by_size(1.16, 1.01, 0.97, 0.93)},
    ),
    "text8": Protocol(
        "text8",
        "the last 5,000,000 characters of text8",
        published={"bits per byte": _by_size(1.17, 1.06, 1.02, 0.98)},
    ),
    "lambada": Protocol(
        "LAMBADA",
        "the test passages, one a line, or .jsonl",
        by_line=True,
        last_word=True,
        published={
            "perplexity": _by_size(35.13, 15.60, 10.87, 8.63),
            "accuracy": _by_size(0.4599, 0.5548, 0.6012, 0.6324),
        },
    ),
}


def find_protocol(name: str | None) -> Protocol:
    """The protocol of that name, `PLAIN` for None."""
    if name is None:
        return PLAIN
    if name not in PROTOCOLS:
        raise ValueError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def released_size(config: GPTConfig) -> str | None:
    """The released GPT-2 that has this model's shape, such as "124M"; whether it has its weights nobody can see."""
    shape = (config.vocab_size, config.context_length, config.emb_dim, config.n_heads, config.n_layers)
    for name, known in GPT2_CONFIGS.items():
        if shape == (known.vocab_size, known.context_length, known.emb_dim, known.n_heads, known.n_layers):
            return name
    return None


def read_texts(paths: Iterable[Path], by_line: bool = False) -> Iterator[str]:
    """The texts of the files: a file's, each of its lines', or each record's of a .jsonl."""
    for path in paths:
        is_jsonl = ".jsonl" in path.suffixes[-2:]
        text = ""
        for piece in read_pieces(path):
            text += piece.text
            if piece.ends_document:
                yield from (line for line in io.StringIO(text) if line.strip()) if by_line and not is_jsonl else [text]
                text = ""


@dataclass(frozen=True)
class TextMeasurement:
    """What a model paid for texts, and what there is to divide it by."""

    result: Result
    n_bytes: int
    """Of the texts as they were read, in UTF-8."""
    n_words: int
    """Words between white space; with a detokenizer a line's end is one too."""
    n_ambiguous: int
    """Words of a tokenized corpus that its written text does not give back."""
    is_lossless: bool
    """Whether the model's tokenizer gives the texts back; if not, part of them has cost nothing."""

    @property
    def bits_per_byte(self) -> float:
        return self.result.bits_per_byte(self.n_bytes)

    @property
    def word_perplexity(self) -> float:
        return self.result.word_perplexity(self.n_words)


def measure_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    protocol: Protocol = PLAIN,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> TextMeasurement:
    """What the model pays for each text on its own, `<|endoftext|>` before it where the tokenizer has one.

    A text that the tokenizer cannot encode is a ValueError.
    """
    documents = []
    n_bytes = n_words = n_ambiguous = 0
    is_lossless = True
    for text in texts:
        n_bytes += len(text.encode())
        written = text
        if protocol.detokenizer is None:
            n_words += len(text.split())
        else:
            lines = [_tokens(line) for line in text.split("\n")]
            written = "\n".join(map(protocol.detokenizer.join, lines))
            n_words += sum(map(len, lines)) + text.count("\n")
            n_ambiguous += sum(map(protocol.detokenizer.is_ambiguous, (token for line in lines for token in line)))
        ids = tokenizer.encode(written)
        is_lossless = is_lossless and tokenizer.decode(ids) == written
        documents.append(compact_ids(ids))
    if not documents:
        raise ValueError("there is no text to measure")
    result = documents_loss(
        model, documents, stride, batch_size=batch_size, bos_id=tokenizer.eot_token, progress=progress
    )
    return TextMeasurement(result, n_bytes, n_words, n_ambiguous, is_lossless)


@dataclass(frozen=True)
class LastWordMeasurement:
    """How well a model predicts the last word of passages from what stands before it."""

    n_passages: int
    total_nats: float
    """Negative log-likelihood of all the last words."""
    n_right: int
    """Passages whose last word, all its tokens, is what the model finds most likely at each."""
    n_right_filtered: int
    """The same if the model may not begin with a stop word."""
    n_right_tokens: int
    """Passages whose very last token is, given what stands before it, of the word too."""

    @property
    def word_perplexity(self) -> float:
        """exp(nats a last word)."""
        return Result(self.total_nats, self.n_passages).perplexity


def measure_last_words(
    model: GPTModel, tokenizer: Tokenizer, texts: Iterable[str], batch_size: int = 8, progress: bool = False
) -> LastWordMeasurement:
    """The passages' last words, each with the space before it; a passage of one word is a ValueError."""
    pairs = []
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        if not context.strip():
            raise ValueError(f"a passage needs a word before its last one, got {text!r}")
        pairs.append((tokenizer.encode(context), tokenizer.encode(" " + word)))
    if not pairs:
        raise ValueError("there is no passage to measure")
    stop_ids = _stop_ids(tokenizer)
    nats = []
    n_right = n_filtered = n_tokens = 0
    for (_, word_ids), logits in zip(pairs, continuation_logits(model, pairs, batch_size, progress), strict=True):
        log_p = (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(dim=1)  # (n, V)
        nats.append(-math.fsum(log_p[range(len(word_ids)), word_ids].tolist()))
        predicted = log_p.argmax(dim=1).tolist()
        log_p[0, stop_ids] = -math.inf
        filtered = log_p.argmax(dim=1).tolist()
        n_right += predicted == word_ids
        n_filtered += filtered == word_ids
        n_tokens += predicted[-1] == word_ids[-1]
    return LastWordMeasurement(len(pairs), math.fsum(nats), n_right, n_filtered, n_tokens)


def _stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that are a stop word with the space before it."""
    found = []
    for word in sorted(STOP_WORDS):
        with contextlib.suppress(ValueError):  # no vocabulary need have them all
            ids = tokenizer.encode(" " + word)
            if len(ids) == 1 and tokenizer.decode(ids).strip() == word:
                found += ids
    return found
