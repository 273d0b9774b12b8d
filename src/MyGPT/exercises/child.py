"""The process that runs a student's code: `python -m MyGPT.exercises.child SECONDS FILE TASK [FILE TASK …]`.

For each task, the process writes a line of JSON before the check starts and another with the result. The lines go to the
original standard output; whatever the student's code prints does not get there. If a check takes too long, a thread reports the
function that is running, and the process ends. running.py starts a new process for the remaining tasks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from MyGPT.exercises import check_of
from MyGPT.exercises.checking import Result, check_file


def main(arguments: list[str]) -> None:
    """Check the files in `arguments`, write the results, and end the process without waiting for a student's threads."""
    import torch

    torch.set_num_threads(1)
    seconds = float(arguments[0])
    sys.dont_write_bytecode = True
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # also what C code prints
        os.dup2(nowhere, descriptor)

    def write(record: dict[str, object]) -> None:
        output.write(json.dumps(record) + "\n")
        output.flush()

    for file, task in zip(arguments[1::2], arguments[2::2], strict=True):
        check_of(task)  # imports the modules of the check, which does not count as the student's time
        write({"started": task})

        def report(result: Result, ends: bool) -> None:
            write({**dataclasses.asdict(result), "ends": ends})

        watchdog = _Watchdog(seconds, Path(file), task, report)
        result = check_file(Path(file), task)
        if watchdog.stop():
            report(result, False)
        else:  # the watchdog has reported, and is ending the process
            time.sleep(60)
    os._exit(0)


class _Watchdog:
    """A thread that reports a check which takes too long, and then ends the process."""

    def __init__(self, seconds: float, path: Path, task: str, report: Callable[[Result, bool], None]) -> None:
        self._seconds, self._path, self._task, self._report = seconds, path, task, report
        self._main = threading.get_ident()
        self._is_decided = threading.Lock()
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> bool:
        """End the watch. Return False if the time was over already, so the result does not count."""
        self._done.set()
        return self._is_decided.acquire(blocking=False)

    def _run(self) -> None:
        if self._done.wait(self._seconds) or not self._is_decided.acquire(blocking=False):
            return
        function, line = _running(sys._current_frames().get(self._main), self._path)
        sentence = f"{function} had not ended after {self._seconds:g} s; likely cause: a loop without an end"
        detail = f"It was running line {line} of {self._path.name}." if line else ""
        self._report(Result(self._task, "wrong", sentence, detail=detail), True)
        os._exit(0)


def _running(frame: FrameType | None, path: Path) -> tuple[str, int]:
    """Return the outermost function of a student's file that is running, and the line at which the file is."""
    places = []
    while frame is not None:
        if frame.f_code.co_filename == str(path):
            places.append((frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    if not places:
        return f"the check of {path.name}", 0
    function = places[-1][0]
    return path.name if function == "<module>" else function, places[0][1]


if __name__ == "__main__":
    main(sys.argv[1:])
