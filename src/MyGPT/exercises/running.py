"""Check a student's files in a process of their own, with a time limit for each task.

An endless loop, os._exit or a crash in a student's code ends only the task in which it happens: the remaining tasks run in a new
process. This is no sandbox. The code has the rights of the user who starts the check.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from MyGPT.exercises.checking import Result

START_SECONDS = 120.0
"""The longest time in which a process must start, which includes the import of torch."""
GRACE_SECONDS = 3.0
"""The time after the limit in which the process can report itself that a task took too long."""


def check_files(files: Mapping[str, Path], seconds: float) -> Iterator[Result]:
    """Yield the result of each task in `files`, which maps tasks to a student's files, in this order.

    A missing file counts as not started. `seconds` is the time limit per task.
    """
    present = {task: path.absolute() for task, path in files.items() if os.path.lexists(path)}
    results = _results(present, seconds)
    for task, path in files.items():
        missing = Result(task, "not started", f"there is no file {path.name}")
        yield next(results) if task in present else missing


def _results(files: Mapping[str, Path], seconds: float) -> Iterator[Result]:
    """Yield the results of all tasks. After a task that ended its process, start another process for the others."""
    waiting = list(files)
    while waiting:
        with _Process({task: files[task] for task in waiting}, seconds) as process:
            while waiting and process.is_usable:
                yield process.result(waiting.pop(0))


class _Process:
    """A process that checks the files of one student, in a temporary working directory. Use it in a `with` block."""

    def __init__(self, files: Mapping[str, Path], seconds: float) -> None:
        self.is_usable = True
        """False after the process ended, or must be ended, before all tasks were checked."""
        self._seconds = seconds
        self._files = files
        self._directory = tempfile.TemporaryDirectory(prefix="mygpt-check-", ignore_cleanup_errors=True)
        # -P: Python must not import modules from the working directory, into which a student's code may write.
        command = [sys.executable, "-P", "-m", "MyGPT.exercises.child", str(seconds)]
        for task, path in files.items():
            command += [str(path), task]
        package = str(Path(__file__).parents[2])  # the directory that contains MyGPT
        paths = [
            package,
            *(os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path),
        ]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            cwd=self._directory.name,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that the processes which a student's code starts can be ended too
        )
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors = b""
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_records, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(os, "killpg"):
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for reader, pipe in zip(self._readers, (self._process.stdout, self._process.stderr), strict=True):
            reader.join(1.0)  # a process that has left the group may still hold the pipe open
            if pipe is not None and not reader.is_alive():
                pipe.close()
        self._directory.cleanup()

    def result(self, task: str) -> Result:
        """Wait for the result of a task, which must be the next one."""
        name = self._files[task].name
        if self._next_record("started", task, START_SECONDS) is None:
            raise RuntimeError(
                f"the process that checks {name} did not start: {self._errors.decode(errors='replace')[-2000:]}"
            )
        record = self._next_record("task", task, self._seconds + GRACE_SECONDS)
        if record is not None:
            self.is_usable = not record["ends"]
            fields = {key: value for key, value in record.items() if key != "ends"}
            return Result(**{**fields, "passed": tuple(fields["passed"])})
        self.is_usable = False
        code = self._process.poll()
        if code is None:
            sentence = f"{name} had not ended after {self._seconds:g} s, and did not react; likely cause: a loop without an end"
        else:
            sentence = f"{name} ended the process that checks it: {_ending(code)}"
        return Result(task, "wrong", sentence)

    def _next_record(self, key: str, task: str, seconds: float) -> dict[str, Any] | None:
        """Return the next record in which `key` has the value `task`, or None if the process ends or the time is over."""
        end = time.monotonic() + seconds
        has_ended = False
        while time.monotonic() < end:
            try:
                record = self._records.get(timeout=0.1)
            except queue.Empty:
                if has_ended:  # the last records have been read
                    return None
                has_ended = self._process.poll() is not None
                continue
            if record is None:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)
                return None
            if record.get(key) == task:
                return record
        return None

    def _read_records(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                self._records.put(json.loads(line))
        self._records.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors = self._process.stderr.read()


def _ending(code: int) -> str:
    """Return how a process with this exit status has ended, in words."""
    if code >= 0:
        return f"it called os._exit, or compiled code did (exit status {code})"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    causes = {
        "SIGSEGV": "a crash in compiled code",
        "SIGABRT": "a crash in compiled code",
        "SIGKILL": "perhaps it filled the memory",
    }
    return f"{causes.get(name, 'the process was ended')} ({name})"
