"""Convert text files of any size to files of token ids (shards), with limited memory and parallel processes.

Each task encodes the texts of one shard (see plan.py), writes the shard, and returns only counts and hashes. The main
process handles neither text nor ids, so the tasks can run on any executor, also on other machines that share the directory.
A finished shard stays when the work is interrupted, and the next call continues with it.

The directory for the work (see `resumable_directory`) contains:

- `data`, which becomes the data set
- `parts`, with the shards that are being written
- `records`, with a JSON file for each finished shard: counts and hashes, and a key for everything the shard depends on
- `running-…`, an empty file: all tasks of this call end soon after it is removed

This module does not import torch, so worker processes start quickly.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from MyGPT.config import require_positive
from MyGPT.data.plan import Shard, default_shard_bytes, plan_shards, read_shard, shard_key
from MyGPT.data.sources import TOKEN_END, Piece, read_pieces
from MyGPT.data.tokens import TokenArray, describe_shard, id_dtype
from MyGPT.files import (
    atomic_write,
    check_output_directory,
    json_text,
    read_json,
    restore_directory,
    resumable_directory,
    sha256_of,
)
from MyGPT.progress import progress_bar
from MyGPT.tokenizers import Tokenizer

BATCH_CHARACTERS = 1 << 19
"""Smallest number of characters that are encoded in one call. The last batch of a shard may be smaller."""
_VERSION = 1
"""Part of the key of each shard. A new number makes the unfinished work of earlier versions invalid."""
_SECONDS_TO_STOP = 30.0
"""Longest time to wait for running tasks after an error. Usually they end within a second, after their current batch."""


def prepare(
    paths: Iterable[Path],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    text_key: str = "text",
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
    executor: Executor | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Encode text files, write their token ids to the directory `out`, and return the content of its `tokens.json`.

    Each document is followed by the tokenizer's end-of-text token, if it has one. A document that already ends with this
    token, perhaps before white space, does not get a second one. The ids do not depend on the number of workers or the
    size of the shards.

    `out` does not change until the new data set is complete. If an error occurs or the process is killed, the finished
    shards stay in a hidden directory beside `out`, and the next call with the same arguments continues with them.

    Args:
        paths: text files, each one document, or JSON files with one document per record (see sources.py)
        out: the directory for the ids (`tokens-00000.bin` and so on), their description (`tokens.json`) and
            `tokenizer.json`
        tokenizer: the tokenizer that encodes the text
        text_key: key of the text in each record of a JSON file
        workers: number of processes. Each needs some tens of megabytes of memory, or up to a gigabyte with gigatoken,
            for files of any size. With more than one process, call this function under `if __name__ == "__main__":`, as
            multiprocessing requires.
        overwrite: allow `out` to contain files and replace the data set there, and discard the unfinished work of a call
            with other arguments
        progress: show a progress bar, and print messages about the finished shards of an earlier call
        executor: runs the tasks in place of `workers` processes, for example the executor of a dask cluster. All its
            workers must see the text files and the directory of `out` under the same paths.
        shard_bytes: about how many bytes of text files are in a shard (default: see `default_shard_bytes`). Archives,
            tables and JSON arrays are never divided.

    Raises:
        FileExistsError: `overwrite` is False, and `out` is not empty or there is unfinished work of another call.
        BlockingIOError: another process is writing `out`.
        ValueError: a file is damaged, there is no text, or a special token contains a space.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    require_positive(workers=workers, shard_bytes=1 if shard_bytes is None else shard_bytes)
    check_out(out, overwrite)
    _refuse_split_specials(tokenizer)
    if executor is not None:
        paths = [path.absolute() for path in paths]  # Workers may have another current directory.
    with resumable_directory(out, replaces=("tokens.bin", "tokens-*.bin")) as work:
        try:
            tasks = _plan(paths, work, tokenizer, text_key, shard_bytes)
            records = _finished_records(tasks, work, out, overwrite, progress)
            tokenizer.save(work / "data")
            _write_shards(tasks, records, tokenizer, workers, executor, progress)
            description = _description([records[task.number] for task in tasks], work / "data", tokenizer)
            if not description["n_tokens"]:
                shutil.rmtree(work / "records")
                raise ValueError(
                    f"there is no text in {', '.join(map(str, paths[:5]))}{' …' if len(paths) > 5 else ''}"
                )
            description["files"] = [path.name for path in paths]
            (work / "data" / "tokens.json").write_text(json_text(description, indent=1) + "\n", encoding="utf-8")
        except BaseException:
            if not any((work / "records").glob("*.json")):
                shutil.rmtree(work, ignore_errors=True)  # There is nothing with which a call could continue.
            raise
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
    pieces = chain.from_iterable(read_pieces(path, text_key) for path in paths)
    parts = [ids for ids, _, _ in _encode(pieces, tokenizer)]
    return np.concatenate([*parts, np.empty(0, id_dtype(tokenizer.n_vocab))])


def _refuse_split_specials(tokenizer: Tokenizer) -> None:
    """Raise ValueError if an added token contains or removes a space, where a long text may be cut into pieces."""
    for token in tokenizer.added_tokens:
        if TOKEN_END.search(token.content) or token.lstrip or token.rstrip:
            what = "contains a space" if TOKEN_END.search(token.content) else "removes the spaces beside it"
            raise ValueError(f"the special token {token.content!r} {what}, where a long text may be split")


class _Task(NamedTuple):
    """The work on one shard, as it is sent to a worker."""

    number: int
    shard: Shard
    key: str
    """A hash of everything that the ids depend on."""
    text_key: str
    work: Path
    marker: Path
    """The file whose removal ends the task."""

    @property
    def name(self) -> str:
        return f"tokens-{self.number:05d}"

    @property
    def n_bytes(self) -> int:
        """The number of bytes to read from text files."""
        return sum(span.stop - span.start for span in self.shard)


Record = dict[str, Any]
"""The description of a finished shard: its entry in `tokens.json`, the numbers of documents and characters, and its key."""


def _plan(
    paths: Sequence[Path], work: Path, tokenizer: Tokenizer, text_key: str, shard_bytes: int | None
) -> list[_Task]:
    """Return the tasks for all shards, and create the subdirectories of `work`."""
    for name in ("data", "parts", "records"):
        (work / name).mkdir(exist_ok=True)
    marker = work / f"running-{secrets.token_hex(4)}"
    settings = [_VERSION, _tokenizer_hash(tokenizer), text_key]
    shards = plan_shards(paths, default_shard_bytes(paths) if shard_bytes is None else shard_bytes)
    return [
        _Task(number, shard, shard_key(shard, settings), text_key, work, marker) for number, shard in enumerate(shards)
    ]


def _tokenizer_hash(tokenizer: Tokenizer) -> str:
    content = json_text([tokenizer.to_json(), tokenizer.eot_token])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _finished_records(
    tasks: Sequence[_Task], work: Path, out: Path, overwrite: bool, progress: bool
) -> dict[int, Record]:
    """Return the records of the shards that an earlier call finished, by number, and remove all other files.

    Raises FileExistsError if some of them belong to a call with other arguments and `overwrite` is False.
    """
    keys = {f"{task.name}.json": task for task in tasks}
    records, foreign, damaged = dict[int, Record](), list[Path](), list[Path]()
    for path in sorted((work / "records").glob("*.json")):
        task, record = keys.get(path.name), _read_record(path)
        if record is None or task is None or record["key"] != task.key:
            foreign.append(path)
        elif _is_intact(work / "data" / record["file"], record):
            records[task.number] = record
        else:
            damaged.append(path)
    if foreign and not overwrite:
        what = f"{len(foreign)} finished shards of an earlier call with other files, options or tokenizer"
        raise FileExistsError(
            f"{work} has {what}, or their text files have changed: repeat that call to complete {out}, or allow "
            "overwrite to discard them"
        )
    kept = {record["file"] for record in records.values()}
    for path in (*foreign, *damaged, *(work / "parts").iterdir(), *(work / "data").iterdir()):
        if path.name not in kept:
            path.unlink()
    if records:
        _print(progress, f"continuing: {len(records)} of {len(tasks)} shards are finished")
    if foreign:
        _print(progress, f"{len(foreign)} shards of an earlier call with other files or options are discarded")
    if damaged:
        _print(progress, f"{len(damaged)} shards were damaged after they were written, and are encoded again")
    return records


def _read_record(path: Path) -> Record | None:
    """Return the content of the record of a shard, or None if it is not valid."""
    try:
        record = read_json(path)
        numbers = [record[name] for name in ("n_tokens", "n_documents", "n_characters", "n_bytes")]
        texts = [record[name] for name in ("key", "file", "sha256", "sampled_sha256")]
    except (ValueError, LookupError, TypeError):
        return None
    is_valid = all(type(number) is int and number >= 0 for number in numbers) and all(
        type(text) is str for text in texts
    )
    return record if is_valid and record["file"] == f"{path.stem}.bin" else None


def _is_intact(path: Path, record: Record) -> bool:
    """Return True if a shard has the size and the SHA-256 in its record. A shard without tokens needs no file."""
    return not record["n_tokens"] or (
        path.is_file() and path.stat().st_size == record["n_bytes"] and sha256_of(path) == record["sha256"]
    )


def _print(progress: bool, message: str) -> None:
    if progress and sys.stderr is not None:
        print(message, file=sys.stderr, flush=True)


def _write_shards(
    tasks: Sequence[_Task],
    records: dict[int, Record],
    tokenizer: Tokenizer,
    workers: int,
    executor: Executor | None,
    progress: bool,
) -> None:
    """Run the tasks that are not in `records`, and add their records, by number.

    After an error, the tasks that are running are stopped, and the error of the first shard is raised.
    """
    missing = [task for task in tasks if task.number not in records]
    if not missing:
        return
    for marker in missing[0].work.glob("running-*"):
        marker.unlink()  # It belongs to a killed call, whose tasks may still run on other machines.
    missing[0].marker.touch()
    total = sum(task.n_bytes for task in tasks)
    done = total - sum(task.n_bytes for task in missing)
    with (
        open_executor(executor, min(workers, len(missing))) as (pool, shares_memory),
        progress_bar(progress, total=total, initial=done, unit="B", unit_scale=True) as bar,
    ):
        coder = tokenizer if shares_memory else pickle.dumps(tokenizer)
        futures: dict[Future[Record], _Task] = {}
        try:
            with _without_sigint():  # `submit` starts the processes
                for task in missing:
                    futures[pool.submit(_write_shard, task, coder)] = task
            for future in as_completed(futures):
                task = futures[future]
                records[task.number] = future.result()
                if not (task.work / "data" / f"{task.name}.bin").is_file():
                    raise FileNotFoundError(f"{task.work} is another directory on a worker: all machines must share it")
                bar.update(task.n_bytes)
        except BaseException as error:
            missing[0].marker.unlink(missing_ok=True)
            for future in futures:
                future.cancel()
            wait(futures, _SECONDS_TO_STOP)
            _add_state(error, tasks, progress)
            if (first := _first_error(futures, error)) is error:
                raise
            raise first from error


def _add_state(error: BaseException, tasks: Sequence[_Task], progress: bool) -> None:
    """Say how many shards are finished: in the message of a KeyboardInterrupt, and otherwise on stderr."""
    n_finished = len(list((tasks[0].work / "records").glob("*.json")))
    if n_finished:
        state = f"{n_finished} of {len(tasks)} shards are finished; repeat the command to continue"
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"interrupted: {state}",)
        else:
            _print(progress, f"{state} when the cause of the error is removed")


def _first_error(futures: Iterable[Future[Any]], error: BaseException) -> BaseException:
    """Return the error of the first task that failed by itself, or `error` if it came from the main process."""
    if not isinstance(error, Exception):
        return error
    if isinstance(error, BrokenExecutor):
        advice = "if the memory was full, lower workers"
        return ChildProcessError(f"a worker process was killed: {advice}, and repeat the command to continue")
    errors = (future.exception() for future in futures if future.done() and not future.cancelled())
    return next((one for one in errors if one is not None and not isinstance(one, _Stopped)), error)


@contextmanager
def open_executor(
    executor: Executor | None, workers: int, only_threads: bool = False
) -> Iterator[tuple[Executor, bool]]:
    """Yield an executor, and whether its tasks run in this process.

    This is `executor` itself if it is given. Otherwise it is a thread if `workers` is 1, and else `workers` new processes,
    or threads if `only_threads` is True.
    """
    if executor is not None:
        yield executor, False
    elif workers == 1 or only_threads:
        with ThreadPoolExecutor(workers) as threads:
            yield threads, True
    else:
        # A forked copy of a process that has used torch's threads can hang, so processes are spawned.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker) as processes:
            yield processes, False


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


def _start_worker() -> None:
    """Make a worker process end when its parent is killed. Otherwise it would wait for tasks forever."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # None in a test that calls the function in the main process
        parent.join()
        os._exit(1)


class _Stopped(Exception):
    """Raised in a task after its marker was removed, because another task failed or the call was interrupted."""


@lru_cache(maxsize=2)
def _unpickle(tokenizer: bytes) -> Tokenizer:
    """Return the tokenizer that the main process sent. Each worker needs it many times."""
    unpickled = pickle.loads(tokenizer)
    assert isinstance(unpickled, Tokenizer)
    return unpickled


def _write_shard(task: _Task, tokenizer: Tokenizer | bytes) -> Record:
    """Encode the texts of a shard and write its ids and its record. Return the record.

    The result is complete or absent, also if the process is killed, and two workers may do the same task at the same time.
    """
    if isinstance(tokenizer, bytes):
        tokenizer = _unpickle(tokenizer)
    if not (task.work / "parts").is_dir():
        if not task.work.parent.is_dir():
            raise FileNotFoundError(
                f"{socket.gethostname()} has no directory {task.work.parent}: all machines must share it"
            )
        raise _Stopped
    part = task.work / "parts" / f"{task.name}.{secrets.token_hex(4)}"
    digest = hashlib.sha256()
    n_tokens = n_documents = n_characters = 0
    try:
        with open(part, "xb") as file:
            for ids, documents, characters in _encode(read_shard(task.shard, task.text_key), tokenizer):
                if not task.marker.exists():
                    raise _Stopped
                file.write(ids.data)
                digest.update(ids.data)
                n_tokens, n_documents = n_tokens + len(ids), n_documents + documents
                n_characters += characters
            file.flush()
            os.fsync(file.fileno())
        path = task.work / "data" / f"{task.name}.bin"
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    record = {
        **describe_shard(path, n_tokens, digest.hexdigest()),
        "n_documents": n_documents,
        "n_characters": n_characters,
        "n_bytes": path.stat().st_size,
        "key": task.key,
    }
    with atomic_write(task.work / "records" / f"{task.name}.json") as file:
        file.write(json_text(record))
    return record


def _description(records: Sequence[Record], directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokens.json`. Files without tokens are removed from the data set's directory."""
    for record in records:
        if not record["n_tokens"]:
            (directory / record["file"]).unlink(missing_ok=True)
    totals = {name: sum(record[name] for record in records) for name in ("n_tokens", "n_documents", "n_characters")}
    names = ("file", "n_tokens", "sha256", "sampled_sha256")
    return {
        **totals,
        "n_vocab": tokenizer.n_vocab,
        "dtype": id_dtype(tokenizer.n_vocab).name,
        "shards": [{name: record[name] for name in names} for record in records if record["n_tokens"]],
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": sha256_of(directory / "tokenizer.json"),
    }


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[TokenArray, int, int]]:
    """Encode text pieces. Yield batches: the ids, and the numbers of characters and of documents that end in the batch.

    The tokenizer's end-of-text token, if it has one, follows each document, once if the document already ends with it.
    """
    batch, n_characters = list[Piece](), 0
    for piece in chain(pieces, [None]):
        if piece is not None:
            batch.append(piece)
            n_characters += len(piece.text)
        if n_characters >= BATCH_CHARACTERS or (piece is None and batch):
            ends = [piece.ends_document for piece in batch]
            yield tokenizer.encode_to_array([piece.text for piece in batch], ends), sum(ends), n_characters
            batch, n_characters = [], 0
