"""Run the steps of a check on one file, in this process, and return the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from MyGPT.exercises import check_of
from MyGPT.exercises.comparing import NotWritten, Wrong
from MyGPT.exercises.student import Printed, Student, seed_everything
from MyGPT.messages import printable

Status = Literal["solved", "not started", "wrong"]


@dataclass(frozen=True)
class Check:
    """The check of one task."""

    steps: Sequence[tuple[str, Callable[[Student], None]]]
    """The steps of the check: a few words about each, and a function that raises Wrong at the first difference."""
    library: str
    """The place in this library that does the same as the exercise."""
    after: str = ""
    """A sentence that follows a solved task, such as a command to try."""


@dataclass(frozen=True)
class Result:
    """The result of the check of one task."""

    task: str
    status: Status
    sentence: str = ""
    """The reason, as one sentence without its period; empty for a solved task."""
    passed: tuple[str, ...] = ()
    """The steps that passed, in words."""
    printed: str = ""
    """The beginning of what the student's file printed."""
    detail: str = ""
    """A remark that may differ from one run to the next, such as the line that was running when the time was over."""


def check_file(path: Path, task: str) -> Result:
    """Return the result of a task's check on a student's file. The student's code runs in this process."""
    printed = Printed()
    passed: list[str] = []
    status: Status = "solved"
    sentence = ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        seed_everything()
        try:
            student = Student(path)
            for title, step in check_of(task).steps:
                step(student)
                passed.append(title)
        except NotWritten as function:
            status, sentence = ("wrong", f"{function} is not written yet") if passed else ("not started", "")
        except Wrong as wrong:
            status, sentence = "wrong", str(wrong)
        except Exception as error:  # for example, the file has replaced a function of torch
            reason = f"the check failed with {type(error).__name__}: {printable(str(error))[:200]}"
            status, sentence = "wrong", f"{reason}; does {path.name} replace a function of Python or torch?"
    return Result(task, status, sentence, tuple(passed), printed.text)
