"""`mygpt prepare`: tokenize text files for training on large data sets."""

from __future__ import annotations

import os
import sys
from functools import partial

MAX_WORKERS = 1024
"""The largest number of processes. Each needs some tens of megabytes of memory."""


def prepare(
    *files: str,
    out: str,
    tokenizer: str = "gpt2",
    tokenizer_size: int = 1024,
    text_key: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Tokenize text files once and store the tokens in a file, which mygpt train memory-maps.

    The output directory receives tokens.bin, tokens.json (counts and SHA-256) and the tokenizer. Give this
    directory to mygpt train as --data.

    Example:
        mygpt prepare 'texts/*.txt' more.jsonl.gz --out data/mine --tokenizer gpt2

    Args:
        files: Text files (.txt), or files of records with a text (.jsonl, .ndjson, .json or .csv), optionally compressed
            as .gz, patterns such as 'texts/*.txt', or one of the names alice (built in) and tinyshakespeare
            (downloaded).
        out: Directory for the tokens.
        tokenizer: The tokenizer: gpt2; chars, words or bpe, which are learned from the text; or a directory with a tokenizer.
        text_key: The key of the text in each record of a JSON file, or the column of the text in a table.
        workers: Number of processes. Default: one per CPU core.
        overwrite: Replace a data set that is already in the directory.
    """
    from MyGPT.config import require_positive
    from MyGPT.data.prepare import check_out
    from MyGPT.data.prepare import prepare as prepare_files
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.tokenizers import check_tokenizer, make_tokenizer

    require_positive(workers=1 if workers is None else workers)
    if workers is not None and workers > MAX_WORKERS:
        raise ValueError(f"workers must be at most {MAX_WORKERS}, got {workers}")
    check_tokenizer(tokenizer, tokenizer_size)
    check_out(out, overwrite)
    paths = find_files(files, report=partial(print, file=sys.stderr))
    coder = make_tokenizer(tokenizer, read_documents(paths, text_key), tokenizer_size)
    if workers is None:
        workers = os.cpu_count() or 1
    described = prepare_files(paths, out, coder, text_key, workers, overwrite)
    print(
        f"{described['n_documents']:,} documents, {described['n_characters']:,} characters, "
        f"{described['n_tokens']:,} tokens ({described['dtype']}) in {out}"
    )
