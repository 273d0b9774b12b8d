"""`mygpt prepare`: tokenize text files for training on large data sets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial

MAX_WORKERS = 1024
"""The largest number of processes. Each needs some tens of megabytes of memory."""
MAX_SHARD_MB = 1_000_000
"""The largest size of a shard in megabytes of text."""
SECONDS_TO_CONNECT = 10
"""Longest time to wait for the answer of a dask scheduler."""


def prepare(
    *files: str,
    out: str,
    tokenizer: str = "gpt2",
    tokenizer_size: int = 1024,
    text_key: str = "text",
    workers: int | None = None,
    scheduler: str | None = None,
    shard_mb: float | None = None,
    overwrite: bool = False,
) -> None:
    """Tokenize text files once and store the tokens in files, which mygpt train memory-maps.

    The output directory receives the tokens in shards (tokens-00000.bin and so on), tokens.json (counts and SHA-256)
    and the tokenizer. Give this directory to mygpt train as --data. If the command is interrupted or killed, repeat it
    to continue with the shards that are not yet finished.

    Example:
        mygpt prepare 'texts/*.txt' more.jsonl.gz --out data/mine --tokenizer gpt2
        mygpt prepare 'web/*.jsonl' --out data/web --scheduler tcp://10.0.0.1:8786

    Args:
        files: Text files (.txt), or files of records with a text (.jsonl, .ndjson, .json or .csv), optionally compressed
            as .gz or .zst, Parquet files (.parquet), directories of data sets saved by datasets, patterns such as
            'texts/*.txt', or one of the names alice (built in) and tinyshakespeare (downloaded).
        out: Directory for the tokens.
        tokenizer: The tokenizer: gpt2; chars, words or bpe, which are learned from the text; or a directory with a tokenizer.
        text_key: The key of the text in each record of a JSON file, or the column of the text in a table.
        workers: Number of processes. Default: one per CPU core.
        scheduler: Address of a dask scheduler, such as tcp://10.0.0.1:8786. Its workers encode the text, in place of
            processes on this machine. They need the same paths and the same versions of Python and mygpt.
        shard_mb: Megabytes of text files in a shard, about. Default: a 64th of all files, from 8 to 256. Compressed files,
            Parquet files, tables and JSON arrays are not divided.
        overwrite: Replace a data set that is already in the directory, and discard the unfinished work of a command with
            other files or options.
    """
    from MyGPT.config import require_positive
    from MyGPT.data.prepare import check_out
    from MyGPT.data.prepare import prepare as prepare_files
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.tokenizers import check_tokenizer, make_tokenizer

    require_positive(workers=1 if workers is None else workers)
    if workers is not None and workers > MAX_WORKERS:
        raise ValueError(f"workers must be at most {MAX_WORKERS}, got {workers}")
    if workers is not None and scheduler is not None:
        raise ValueError("workers is the number of processes on this machine: leave it out with --scheduler")
    shard_bytes = None
    if shard_mb is not None:
        shard_bytes = round(shard_mb * 1e6)
        if not 1 <= shard_bytes <= MAX_SHARD_MB * 1_000_000:
            raise ValueError(f"shard_mb must be greater than 0 and at most {MAX_SHARD_MB}, got {shard_mb}")
    check_tokenizer(tokenizer, tokenizer_size)
    check_out(out, overwrite)
    paths = find_files(files, report=partial(print, file=sys.stderr))
    coder = make_tokenizer(tokenizer, read_documents(paths, text_key), tokenizer_size)
    if workers is None:
        workers = os.cpu_count() or 1
    with dask_executor(scheduler) as executor:
        described = prepare_files(
            paths, out, coder, text_key, workers, overwrite, executor=executor, shard_bytes=shard_bytes
        )
    n_shards = len(described["shards"])
    print(
        f"{described['n_documents']:,} documents, {described['n_characters']:,} characters, "
        f"{described['n_tokens']:,} tokens ({described['dtype']}) in {n_shards} shard{'s' * (n_shards > 1)} in {out}"
    )


@contextmanager
def dask_executor(scheduler: str | None) -> Iterator[Executor | None]:
    """Yield an executor for the workers of a dask scheduler, or None if `scheduler` is None.

    Raises ValueError if dask is missing, and OSError if there is no scheduler at the address or its workers fail.
    """
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise ValueError("--scheduler needs dask: install it with pip install distributed") from None
    try:
        client = Client(scheduler, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise OSError(f"no dask scheduler answers at {scheduler}: {error}") from None
    with client:
        if not client.scheduler_info()["workers"]:
            print(f"waiting for workers of the dask scheduler at {scheduler}", file=sys.stderr)
        try:
            yield client.get_executor(pure=False)  # A task writes files, so dask must run it again in another call.
        except KilledWorker as error:
            reason = "several dask workers were killed during the same task, perhaps because their memory was full"
            raise OSError(f"{reason}; repeat the command to continue ({error})") from None
