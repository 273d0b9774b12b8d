"""Any number of text files to one memory-mapped file of token ids, in bounded memory and parallel processes.

This module needs no torch, so that worker processes start at once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from MyGPT.data.sources import TOKEN_END, Piece, read_pieces
from MyGPT.data.tokens import TokenArray, id_dtype, sampled_sha256
from MyGPT.files import atomic_directory, restore_directory, sha256_of
from MyGPT.tokenizers import BPETokenizer, Tokenizer

TASK_CHARACTERS = 1 << 20


def prepare(
    paths: Iterable[Path],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    text_key: str = "text",
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the ids of all documents to the directory `out` and returns what `tokens.json` says of them.

    Every document is followed by `<|endoftext|>` where the tokenizer has it. Memory is some tens of megabytes a worker,
    whatever the size of the files, as long as no single stretch without a space is longer. With several workers, call
    it under `if __name__ == "__main__":`, as multiprocessing asks. An existing data set is a FileExistsError unless
    `overwrite`; on any error nothing stands under `out` that did not before.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
    restore_directory(out)
    if not overwrite and out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: choose another directory, or allow overwrite")
    _require_whole_specials(tokenizer)
    dtype = id_dtype(tokenizer.n_vocab)
    digest = hashlib.sha256()
    n_tokens = n_documents = n_characters = 0
    with (
        atomic_directory(out) as directory,
        tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        with open(directory / "tokens.bin", "wb") as file:
            for ids, documents, characters in _encode_all(paths, tokenizer, text_key, workers, bar):
                data = ids.tobytes()
                file.write(data)
                digest.update(data)
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
            "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
            "sha256": digest.hexdigest(),
            "sampled_sha256": sampled_sha256(directory / "tokens.bin"),
            "tokenizer": "tokenizer.json",
            "tokenizer_sha256": sha256_of(directory / "tokenizer.json"),
            "files": [path.name for path in paths],
        }
        (directory / "tokens.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def tokenize(paths: Iterable[Path], tokenizer: Tokenizer, text_key: str = "text") -> TokenArray:
    """The ids that `prepare` would write, in memory."""
    _require_whole_specials(tokenizer)
    parts = [_encode(tokenizer, task)[0] for task in _tasks(paths, text_key, tqdm(disable=True))]
    return np.concatenate([*parts, np.empty(0, id_dtype(tokenizer.n_vocab))])


def _require_whole_specials(tokenizer: Tokenizer) -> None:
    """A ValueError if a special token could be cut in two where long documents are cut into pieces."""
    for token in tokenizer.special_tokens if isinstance(tokenizer, BPETokenizer) else ():
        if TOKEN_END.search(token):
            raise ValueError(f"the special token {token!r} has a space in it, where a long text may be cut")


Encoded = tuple[TokenArray, int, int]


def _encode_all(
    paths: list[Path], tokenizer: Tokenizer, text_key: str, workers: int, bar: tqdm[Any]
) -> Iterator[Encoded]:
    """Encoded tasks in order. At most two a worker are under way, which bounds the memory."""
    with _pool(workers, tokenizer) as pool:
        under_way: deque[Future[Encoded]] = deque()
        for task in _tasks(paths, text_key, bar):
            under_way.append(pool.submit(_encode_in_worker, task))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _pool(workers: int, tokenizer: Tokenizer) -> Executor:
    if workers == 1:
        return ThreadPoolExecutor(1, initializer=_remember, initargs=(tokenizer,))
    # Spawned, since a forked copy of a process that has run torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_remember, initargs=(tokenizer,))


def _tasks(paths: Iterable[Path], text_key: str, bar: tqdm[Any]) -> Iterator[list[Piece]]:
    """Pieces gathered to about a million characters, so that small documents do not cost a message each."""
    task: list[Piece] = []
    size = 0
    for path in paths:
        for piece in read_pieces(path, text_key, bar.update):
            task.append(piece)
            size += len(piece.text)
            if size >= TASK_CHARACTERS:
                yield task
                task, size = [], 0
    if task:
        yield task


_tokenizer: Tokenizer


def _remember(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _encode_in_worker(task: list[Piece]) -> Encoded:
    return _encode(_tokenizer, task)


def _encode(tokenizer: Tokenizer, task: list[Piece]) -> Encoded:
    ids: list[int] = []
    for piece in task:
        ids += tokenizer.encode(piece.text)
        if piece.ends_document and tokenizer.eot_token is not None:
            ids.append(tokenizer.eot_token)
    documents = sum(piece.ends_document for piece in task)
    return np.array(ids, dtype=id_dtype(tokenizer.n_vocab)), documents, sum(len(piece.text) for piece in task)
