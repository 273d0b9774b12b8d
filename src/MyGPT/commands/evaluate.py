"""`mygpt evaluate`: loss, perplexity and bits per byte on a text."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from MyGPT.evaluation.protocols import LastWordMeasurement, Protocol, TextMeasurement

Row = tuple[str, str]
"""A line of the printed table: a label and a value."""


def evaluate(
    model: str,
    data: str | list[str],
    adapter: str | None = None,
    protocol: str | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    nproc: int = 1,
    with_: str | None = None,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on whole texts.

    The model reads each text in windows (sections as long as its context), and the loss of every token counts once. A
    protocol reproduces a measurement of the GPT-2 paper: wikitext2, wikitext103, ptb and 1bw (perplexity per word), enwik8 and
    text8 (bits per byte), lambada (accuracy and perplexity of the last word of each passage). docs/evaluation.md names the
    file that each protocol expects.

    Examples:
        mygpt evaluate --model runs/book --data book.txt --stride 32
        mygpt evaluate --model gpt2 --data wiki.test.tokens --protocol wikitext2

    Args:
        data: Text files (.txt), or files of records with a text (.jsonl, .ndjson, .json or .csv), optionally compressed
            as .gz or .zst, Parquet files (.parquet), patterns such as 'texts/*.txt', or one of the names alice (built in)
            and tinyshakespeare (downloaded).
        protocol: The paper's protocol for this data set. Default: measure the text unchanged.
        stride: Number of tokens between the starts of two windows. A smaller stride gives each token more context and takes
            longer. Default: the context length, so windows do not overlap.
        batch_size: Number of windows per forward pass.
        nproc: Number of processes (ranks) on this machine that divide the work, such as the number of GPUs.
    """
    from MyGPT import ranks
    from MyGPT.commands._model import report_tokenizer
    from MyGPT.config import require_positive
    from MyGPT.data.sources import find_files
    from MyGPT.evaluation.protocols import find_protocol, measure_last_words, measure_text, read_texts, released_size
    from MyGPT.opening import open_model

    require_positive(batch_size=batch_size, stride=1 if stride is None else stride, nproc=nproc)
    ranks.join()
    way = find_protocol(protocol)
    if way.last_word and stride is not None:
        reason = "which predicts one word per passage"
        raise ValueError(f"stride cannot be used with protocol {protocol}, {reason}, got {stride}")
    files = find_files(data, report=partial(print, file=sys.stderr))
    gpt, tokenizer = open_model(model, device, adapter, with_)
    report_tokenizer(tokenizer)
    texts = read_texts(files, way.by_line)
    if way.last_word:
        rows = last_word_rows(measure_last_words(gpt, tokenizer, texts, batch_size, True, divide=True))
    else:
        measured = measure_text(gpt, tokenizer, texts, way, stride, batch_size, True, divide=True)
        start = None if tokenizer.bos_token is None else tokenizer.token_of(tokenizer.bos_token)
        rows = text_rows(measured, way, gpt.config.context_length, stride, start)
    rows += published_rows(way, released_size(gpt.config))
    print("\n".join([f"{model} on {', '.join(map(str, files))}", *(f"  {label:<16} {value}" for label, value in rows)]))


def text_rows(
    measured: TextMeasurement, protocol: Protocol, context: int, stride: int | None, start: str | None
) -> list[Row]:
    """Return the labels and values to print for a text that was measured by `protocol` in windows of `context` tokens.

    `start` is the token after which the first token of each text was predicted, or None if the first token was not counted.
    """
    result = measured.result
    spelling = "text unchanged"
    if protocol.detokenizer is not None:
        spelling = f"de-tokenized; {measured.n_ambiguous:,} words of the corpus have no unique spelling"
    first = "first token not counted" if start is None else f"first token after {start}"
    n_words = f"{measured.n_words:,.1f}".removesuffix(".0")
    per_word = f"{measured.word_perplexity:.4f} per word" if measured.n_words else "not defined per word without words"
    rows = [
        ("loss", f"{result.loss:.6f} nats per token"),
        ("perplexity", f"{result.perplexity:.4f} per token, {per_word}"),
        ("bits per byte", f"{measured.bits_per_byte:.6f}"),
        ("counted", f"{result.n_tokens:,} tokens, {n_words} words, {measured.n_bytes:,} bytes"),
        ("protocol", f"windows of {context} tokens, stride {stride or context}; {first}; {spelling}"),
    ]
    if measured.n_skipped:
        rows.append(("skipped", f"{measured.n_skipped:,} texts without a token to predict"))
    warning = ("warning", "the tokenizer loses part of the text, so the values per word and per byte are too low")
    return rows if measured.is_lossless else [*rows, warning]


def last_word_rows(measured: LastWordMeasurement) -> list[Row]:
    """Return the labels and values to print for a measurement of predicted last words."""
    n = measured.n_passages
    return [
        ("perplexity", f"{measured.word_perplexity:.4f} per last word"),
        ("accuracy", f"{measured.n_correct / n:.4f} of last words (all of their tokens correct)"),
        ("", f"{measured.n_correct_filtered / n:.4f} of last words if stop words are not allowed"),
        ("", f"{measured.n_correct_tokens / n:.4f} of last tokens"),
        ("counted", f"{n:,} passages"),
        ("protocol", "the last word and the space before it are predicted greedily from the passage; text unchanged"),
    ]


def published_rows(protocol: Protocol, size: str | None) -> list[Row]:
    """Return the GPT-2 paper's results for a model size, such as "124M", as table lines, or [] if it has no results."""
    if size is None or not protocol.published:
        return []
    figures = ", ".join(f"{name} {of_size[size]:g}" for name, of_size in protocol.published.items())
    return [("published", f"for GPT-2 {size} on {protocol.title}: {figures} (Radford et al., 2019, table 3)")]
