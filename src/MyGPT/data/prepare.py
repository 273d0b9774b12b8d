"""Convert text files to one file of token ids, in bounded memory and in parallel processes.

This module does not import torch, so worker processes start quickly.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from MyGPT.config import require_positive
from MyGPT.data.sources import TOKEN_END, Piece, read_pieces
from MyGPT.data.tokens import TokenArray, id_dtype, sampled_sha256
from MyGPT.files import atomic_directory, restore_directory, sha256_of
from MyGPT.tokenizers import BPETokenizer, Tokenizer

TASK_CHARACTERS = 1 << 20
"""Characters that a worker encodes at a time."""


def prepare(
    paths: Iterable[Path],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    text_key: str = "text",
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode all documents, write the ids to the directory `out`, and return the content of its `tokens.json`.

    `paths` are text files or .jsonl files with a text under `text_key` in each line, also compressed as .gz. Each
    document is followed by `<|endoftext|>` if the tokenizer has this token. Each of the `workers`
    processes needs some tens of megabytes, for files of any size. With more than one, call this function under
    `if __name__ == "__main__":`, as multiprocessing requires. If an error occurs, `out` stays as it was.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is False.
        ValueError: a file is damaged, there is no text, or a special token contains a space.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    require_positive(workers=workers)
    restore_directory(out)
    if not overwrite and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: choose another directory, or allow overwrite")
    _refuse_split_specials(tokenizer)
    digest = hashlib.sha256()
    n_tokens = n_documents = n_characters = 0
    with (
        atomic_directory(out) as directory,
        tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, disable=not progress) as bar,
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
        (directory / "tokens.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def tokenize(paths: Iterable[Path], tokenizer: Tokenizer, text_key: str = "text") -> TokenArray:
    """Return the ids that `prepare` would write, as one array in memory."""
    _refuse_split_specials(tokenizer)
    parts = [_encode(tokenizer, task)[0] for task in _tasks(paths, text_key, tqdm(disable=True))]
    return np.concatenate([*parts, np.empty(0, id_dtype(tokenizer.n_vocab))])


def _refuse_split_specials(tokenizer: Tokenizer) -> None:
    """Raise ValueError if a special token contains a space after a character, where long documents may be split."""
    for token in tokenizer.special_tokens if isinstance(tokenizer, BPETokenizer) else ():
        if TOKEN_END.search(token):
            raise ValueError(f"the special token {token!r} contains a space, where a long text may be split")


Encoded = tuple[TokenArray, int, int]
"""The ids of a task, and its numbers of documents and of characters."""


def _encode_all(tasks: Iterable[list[Piece]], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Yield the encoded tasks in order. To bound memory, at most two tasks per worker wait at a time."""
    pool, encode = _pool(workers, tokenizer)
    with pool:
        pending: deque[Future[Encoded]] = deque()
        for task in tasks:
            pending.append(pool.submit(encode, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _pool(workers: int, tokenizer: Tokenizer) -> tuple[Executor, Callable[[list[Piece]], Encoded]]:
    """Return an executor and the function for its tasks: a thread for one worker, else processes."""
    if workers == 1:
        return ThreadPoolExecutor(1), partial(_encode, tokenizer)
    # A forked copy of a process that has used torch's threads can hang, so processes are spawned. The tokenizer is sent
    # to each process once, not with every task.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer,))
    return pool, _encode_in_worker


def _tasks(paths: Iterable[Path], text_key: str, bar: tqdm[Any]) -> Iterator[list[Piece]]:
    """Yield lists of pieces of about a million characters, so that small documents do not cost one message each."""
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
    """Store the tokenizer in a new worker process. The process serves one call of `prepare` only."""
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(task: list[Piece]) -> Encoded:
    return _encode(_worker_tokenizer, task)


def _encode(tokenizer: Tokenizer, task: list[Piece]) -> Encoded:
    """Return the ids of a task, with `<|endoftext|>` after each document, and its document and character counts."""
    ids: list[int] = []
    for piece in task:
        ids += tokenizer.encode(piece.text)
        if piece.ends_document and tokenizer.eot_token is not None:
            ids.append(tokenizer.eot_token)
    documents = sum(piece.ends_document for piece in task)
    return np.array(ids, dtype=id_dtype(tokenizer.n_vocab)), documents, sum(len(piece.text) for piece in task)
