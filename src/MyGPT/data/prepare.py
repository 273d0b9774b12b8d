"""Convert text files of any size to one file of token ids, with limited memory and parallel processes.

This module does not import torch, so worker processes start quickly.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from MyGPT.config import require_positive
from MyGPT.data.sources import TOKEN_END, Piece, read_pieces
from MyGPT.data.tokens import TokenArray, id_dtype, sampled_sha256
from MyGPT.files import atomic_directory, check_output_directory, json_text, restore_directory, sha256_of
from MyGPT.progress import progress_bar
from MyGPT.tokenizers import Tokenizer

TASK_CHARACTERS = 1 << 20
"""Smallest number of characters in a task, the amount of text that a worker process encodes at a time."""


def prepare(
    paths: Iterable[Path],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    text_key: str = "text",
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode text files, write their token ids to the directory `out`, and return the content of its `tokens.json`.

    Each document is followed by the tokenizer's end-of-text token, if it has one. A document that already ends with this
    token, perhaps before white space, does not get a second one. If an error occurs, `out` does not
    change.

    Args:
        paths: text files, each one document, or JSON files with one document per record (see sources.py)
        out: the directory for `tokens.bin` (the ids), `tokens.json` (their description) and `tokenizer.json`
        tokenizer: the tokenizer that encodes the text
        text_key: key of the text in each record of a JSON file
        workers: number of processes. Each needs some tens of megabytes of memory, for files of any size. With more than
            one process, call this function under `if __name__ == "__main__":`, as multiprocessing requires.
        overwrite: allow `out` to contain files, and replace the data set there
        progress: show a progress bar

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is False.
        ValueError: a file is damaged, there is no text, or a special token contains a space.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    require_positive(workers=workers)
    check_out(out, overwrite)
    _refuse_split_specials(tokenizer)
    digest = hashlib.sha256()
    n_tokens = n_documents = n_characters = 0
    with (
        atomic_directory(out) as directory,
        progress_bar(progress, total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True) as bar,
    ):
        with open(directory / "tokens.bin", "wb") as file:
            for ids, documents, characters in _encode_all(_tasks(paths, text_key, bar), tokenizer, workers):
                file.write(ids.data)
                digest.update(ids.data)
                n_tokens, n_documents = n_tokens + len(ids), n_documents + documents
                n_characters += characters
        if not n_tokens:
            raise ValueError(f"there is no text in {', '.join(map(str, paths[:5]))}{' …' if len(paths) > 5 else ''}")
        tokenizer.save(directory)
        description = {
            "n_tokens": n_tokens,
            "n_documents": n_documents,
            "n_characters": n_characters,
            "n_vocab": tokenizer.n_vocab,
            "dtype": id_dtype(tokenizer.n_vocab).name,
            "sha256": digest.hexdigest(),
            "sampled_sha256": sampled_sha256(directory / "tokens.bin"),
            "tokenizer": "tokenizer.json",
            "tokenizer_sha256": sha256_of(directory / "tokenizer.json"),
            "files": [path.name for path in paths],
        }
        (directory / "tokens.json").write_text(json_text(description, indent=1) + "\n", encoding="utf-8")
    return description


def check_out(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise OSError if `prepare` cannot write the directory `out`, or may not replace the files in it."""
    check_output_directory(out)
    restore_directory(out)
    if not overwrite and Path(out).exists() and any(Path(out).iterdir()):
        raise FileExistsError(f"{out} is not empty: choose another directory, or allow overwrite")


def tokenize(paths: Iterable[Path], tokenizer: Tokenizer, text_key: str = "text") -> TokenArray:
    """Encode text files and return the token ids as one array in memory, equal to the ids that `prepare` writes.

    `text_key` is the key of the text in each record of a JSON file.
    """
    _refuse_split_specials(tokenizer)
    parts = [_encode(tokenizer, task)[0] for task in _tasks(paths, text_key, tqdm(disable=True))]
    return np.concatenate([*parts, np.empty(0, id_dtype(tokenizer.n_vocab))])


def _refuse_split_specials(tokenizer: Tokenizer) -> None:
    """Raise ValueError if an added token contains or removes a space, where a long text may be cut into pieces."""
    for token in tokenizer.added_tokens:
        if TOKEN_END.search(token.content) or token.lstrip or token.rstrip:
            what = "contains a space" if TOKEN_END.search(token.content) else "removes the spaces beside it"
            raise ValueError(f"the special token {token.content!r} {what}, where a long text may be split")


Encoded = tuple[TokenArray, int, int]
"""A tuple: the token ids of several text pieces, the number of documents that end in these pieces, and the number of
characters in these pieces."""


def _encode_all(tasks: Iterable[list[Piece]], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Encode tasks (lists of text pieces) in parallel, and yield the results in the order of the tasks.

    Only about 2 * workers tasks are read ahead of the next result, so memory does not grow with the amount of text.
    """
    pool, encode = _pool(workers, tokenizer)
    with pool:
        pending: deque[Future[Encoded]] = deque()
        try:
            for task in tasks:
                with _without_sigint():  # `submit` starts the processes
                    pending.append(pool.submit(encode, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _without_sigint() -> Iterator[None]:
    """Delay Ctrl-C (SIGINT) until the end of a `with` block. Processes that start within the block never receive it.

    A terminal sends Ctrl-C to all processes, but only the main process must answer, by ending its workers.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[Any] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # A new process inherits the mask.
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(*received[0])


def _pool(workers: int, tokenizer: Tokenizer) -> tuple[Executor, Callable[[list[Piece]], Encoded]]:
    """Return an executor, and the function that encodes a task when the executor calls it.

    If `workers` is 1, the executor is a thread of this process. Otherwise it starts `workers` new processes.
    """
    if workers == 1:
        return ThreadPoolExecutor(1), partial(_encode, tokenizer)
    # A forked copy of a process that has used torch's threads can hang, so processes are spawned. The tokenizer is sent
    # to each process once, not with every task.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer,))
    return pool, _encode_in_worker


def _tasks(paths: Iterable[Path], text_key: str, bar: tqdm[Any]) -> Iterator[list[Piece]]:
    """Yield the text pieces of files in lists of at least TASK_CHARACTERS characters; the last list may be shorter.

    `text_key` is the key of the text in each record of a JSON file. The progress bar `bar` counts the bytes read.
    """
    task, size = [], 0
    for path in paths:
        for piece in read_pieces(path, text_key, bar.update):
            task.append(piece)
            size += len(piece.text)
            if size >= TASK_CHARACTERS:
                yield task
                task, size = [], 0
    if task:
        yield task


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    """Store the tokenizer in a global variable of a new worker process, so that it need not be sent with every task.

    The worker process also ends when its parent is killed. Otherwise it would wait for tasks forever.
    """
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None in a test that calls the function in the main process
        parent.join()
        os._exit(1)


def _encode_in_worker(task: list[Piece]) -> Encoded:
    return _encode(_worker_tokenizer, task)


def _encode(tokenizer: Tokenizer, task: list[Piece]) -> Encoded:
    """Encode text pieces. Return (token ids, number of documents that end in the pieces, number of characters).

    The tokenizer's end-of-text token, if it has one, follows each document, once if the document already ends with it.
    """
    ids = tokenizer.encode_to_array([piece.text for piece in task], [piece.ends_document for piece in task])
    documents = sum(piece.ends_document for piece in task)
    return ids, documents, sum(len(piece.text) for piece in task)
