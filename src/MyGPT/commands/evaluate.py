"""mygpt evaluate"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from MyGPT.evaluation.protocols import LastWordMeasurement, Protocol, TextMeasurement

Row = tuple[str, str]


def evaluate(
    model: str,
    data: str | list[str],
    adapter: str | None = None,
    protocol: str | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Measure a model on whole texts: loss, perplexity and bits per byte, and how they were measured.

    Each text is read through windows as long as the model's context, every token counted once. A protocol is one of the
    paper's on GPT-2: wikitext2, wikitext103, ptb, 1bw (perplexity by word), enwik8, text8 (bits per byte), lambada (the last
    word of each passage). docs/evaluation.md says which file each takes.
    Example: mygpt evaluate --model runs/book --data book.txt --stride 32

    Args:
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        data: text files (.txt, .jsonl, .gz, patterns such as 'texts/*.txt'), or the name of a text: alice (built in),
            tinyshakespeare (downloaded)
        adapter: an adapter's directory, or a run of mygpt finetune
        protocol: how GPT-2 was measured on this data set; without one the text is taken as it is
        stride: tokens from a window to the next; fewer than the context give every token more context and cost more time
        batch_size: windows that are computed at a time
        device: auto, cpu, cuda or mps
    """
    from MyGPT.data.sources import find_files
    from MyGPT.evaluation.protocols import find_protocol, measure_last_words, measure_text, read_texts, released_size
    from MyGPT.opening import open_model

    way = find_protocol(protocol)
    if way.last_word and stride is not None:
        raise ValueError(f"protocol {protocol} predicts one word a passage and has no stride, got {stride}")
    files = find_files(data)
    gpt, tokenizer = open_model(model, device, adapter)
    texts = read_texts(files, way.by_line)
    show_progress = sys.stderr.isatty()
    if way.last_word:
        rows = last_word_rows(measure_last_words(gpt, tokenizer, texts, batch_size, show_progress))
    else:
        measured = measure_text(gpt, tokenizer, texts, way, stride, batch_size, show_progress)
        has_start = tokenizer.eot_token is not None
        rows = text_rows(measured, way, gpt.config.context_length, stride, has_start)
    rows += published_rows(way, released_size(gpt.config))
    print("\n".join([f"{model} on {', '.join(map(str, files))}", *(f"  {label:<16} {value}" for label, value in rows)]))


def text_rows(
    measured: TextMeasurement, protocol: Protocol, context: int, stride: int | None, has_start: bool
) -> list[Row]:
    """The table of a measured text."""
    result = measured.result
    spelling = "text as it is"
    if protocol.detokenizer is not None:
        spelling = f"de-tokenized, {measured.n_ambiguous:,} words of the corpus cannot be told from the text"
    first = "first token after <|endoftext|>" if has_start else "first token not counted"
    by_word = f"{measured.word_perplexity:.4f} by word"
    rows = [
        ("loss", f"{result.loss:.6f} nats a token"),
        ("perplexity", f"{result.perplexity:.4f} by token, {by_word}"),
        ("bits per byte", f"{measured.bits_per_byte:.6f}"),
        ("counted", f"{result.n_tokens:,} tokens, {measured.n_words:,} words, {measured.n_bytes:,} bytes"),
        ("protocol", f"windows of {context} tokens, stride {stride or context}; {first}; {spelling}"),
    ]
    if not measured.is_lossless:
        rows.append(("beware", "the tokenizer loses part of the text, so the figures by word and byte are too low"))
    return rows


def last_word_rows(measured: LastWordMeasurement) -> list[Row]:
    """The table of predicted last words."""
    n = measured.n_passages
    return [
        ("perplexity", f"{measured.word_perplexity:.4f} by last word"),
        ("accuracy", f"{measured.n_correct / n:.4f} of last words, all their tokens"),
        ("", f"{measured.n_correct_filtered / n:.4f} if stop words are refused"),
        ("", f"{measured.n_correct_tokens / n:.4f} of last tokens"),
        ("counted", f"{n:,} passages"),
        ("protocol", "the last word, with the space before it, is predicted greedily from the passage; text as it is"),
    ]


def published_rows(protocol: Protocol, size: str | None) -> list[Row]:
    """The paper's figures for a model of this size."""
    if size is None or not protocol.published:
        return []
    figures = ", ".join(f"{name} {of_size[size]:g}" for name, of_size in protocol.published.items())
    return [("published", f"for GPT-2 {size} on {protocol.title}: {figures} (Radford et al., 2019, table 3)")]
