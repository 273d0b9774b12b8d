"""`mygpt check`: test the student's exercise files, and explain the first difference."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.exercises import ORIGINALS, TASKS
from MyGPT.messages import did_you_mean, printable, quote

if TYPE_CHECKING:
    from MyGPT.exercises.checking import Result

OPTIONAL = ("task",)
MAX_PRINTED_LINES = 20
"""The number of lines that are shown of what a student's file prints."""


def check(
    *task: str,
    dir: str = "exercises",
    start: bool = False,
    timeout: float = 20.0,
    submissions: str | None = None,
    csv: str | None = None,
) -> int:
    """Test your solutions of the exercises, and explain the first difference in one sentence.

    Without a task, one line per task shows the state of all files. The exit status is 0 if every tested file is solved, and 1 if
    not. A teacher can test a directory with one subdirectory per student, and get a CSV table. The code in the files is executed
    with your rights: docs/guide/exercises.md shows how to isolate it.

    Examples:
        mygpt check --start
        mygpt check attention
        mygpt check --submissions handed_in --csv marks.csv

    Args:
        task: Tasks to test: bpe, windows, attention, block, loss, sampling, kv_cache, lora or induction_head, or the path of a
            file with such a name. Default: all.
        dir: The directory of the exercise files.
        start: Copy the exercise files into the directory. Existing files are kept.
        timeout: Time limit per task in seconds.
        submissions: A directory with one subdirectory per student.
        csv: The table to write, with one row per student. Needs --submissions.
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, got {timeout}")
    if start:
        if task or submissions or csv:
            raise ValueError(
                "--start copies the exercise files and tests nothing: use it without a task and other options"
            )
        copy_originals(Path(dir))
        return 0
    if (submissions is None) != (csv is None):
        raise ValueError(
            "--submissions and --csv belong together: give the directory of the submissions and the table to write"
        )
    if submissions is not None and csv is not None:
        tasks = list(dict.fromkeys(find_task(name) for name in task)) or list(TASKS)
        return _check_submissions(Path(submissions), Path(csv), tasks, timeout)
    return _check_own(task, Path(dir), timeout)


def find_task(name: str) -> str:
    """Return the task that a name or the path of a file means. Raises ValueError if there is none."""
    task = Path(name).stem if name.endswith(".py") else name
    if task not in TASKS:
        hint = did_you_mean(task, TASKS) or f"; the tasks are {', '.join(TASKS)}"
        raise ValueError(f"there is no task {task!r}{hint}")
    return task


def copy_originals(directory: Path) -> None:
    """Copy the exercise files that are missing into a directory, and print what was done."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ["README.md", *(f"{task}.py" for task in TASKS)]
    for name in names:
        target = directory / name
        if target.exists():
            print(f"kept {target}, which exists")
        else:
            shutil.copyfile(ORIGINALS / name, target)
            print(f"wrote {target}")
    first = directory / f"{TASKS[0]}.py"
    print(f"Open {first}, replace `raise NotImplementedError` by your code, and run: {_command(directory, TASKS[0])}")


def _check_own(names: Sequence[str], directory: Path, timeout: float) -> int:
    """Check the files of one student, print the results, and return the exit status."""
    from MyGPT.exercises.running import check_files

    files = {find_task(name): Path(name) if name.endswith(".py") else directory / f"{name}.py" for name in names}
    way_out = "mygpt check --start copies the exercise files"
    if not names and not directory.is_dir():
        raise ValueError(f"there is no directory {str(directory)!r}: {way_out}, or give another directory with --dir")
    for path in files.values():
        if not path.exists():
            raise ValueError(
                f"there is no file {str(path)!r}: {way_out} if they are missing, or give their directory with --dir"
            )
    files = files or {task: directory / f"{task}.py" for task in TASKS}
    results = []
    for result in check_files(files, timeout):
        results.append(result)
        print("\n".join(_report(result, files[result.task]) if names else [_line(result)]), flush=True)
    if not names:
        print(_summary(results, directory))
    return 0 if all(result.status == "solved" for result in results) else 1


def _line(result: Result) -> str:
    """Return one line about a task, for the list of all tasks."""
    text = {"solved": "done", "not started": "not started"}.get(result.status, f"wrong: {result.sentence}")
    if result.status == "not started" and result.sentence:
        text += f": {result.sentence}"
    return f"{result.task:<14} {printable(text)}"


def _summary(results: Sequence[Result], directory: Path) -> str:
    """Return the number of solved tasks, and the command for the first one that is not solved."""
    unsolved = [result.task for result in results if result.status != "solved"]
    counted = f"{len(results) - len(unsolved)} of {len(results)} tasks are done"
    return f"{counted}; next: {_command(directory, unsolved[0])}" if unsolved else f"{counted}."


def _report(result: Result, path: Path) -> list[str]:
    """Return the lines about one task: the passed steps, and then the next task or the first difference."""
    lines = []
    if result.printed:
        printed = result.printed.rstrip("\n").split("\n")
        lines = [f"{path.name} printed:", *(f"  {printable(line)}" for line in printed[:MAX_PRINTED_LINES])]
        lines += ["  …"] * (len(printed) > MAX_PRINTED_LINES)
    lines += [f"  ok    {step}" for step in result.passed]
    if result.status == "not started":
        return [*lines, f"{result.task}: not started: replace `raise NotImplementedError` in {path} by your code"]
    if result.status == "wrong":
        lines += [f"  wrong: {printable(result.sentence)}."]
        lines += [f"        {result.detail}"] if result.detail else []
        return [*lines, f"{result.task}: not solved yet"]
    return [*lines, f"{result.task}: solved", *_what_comes_next(result.task, path)]


def _what_comes_next(task: str, path: Path) -> list[str]:
    """Return lines that name where the library does the same, a command to try, and the next task."""
    from MyGPT.exercises import check_of

    solved = check_of(task)
    lines = [f"  The library does the same in src/MyGPT/{solved.library}"]
    if solved.after:
        lines.append(f"  {solved.after.format(path=quote(path))}")
    following = TASKS[TASKS.index(task) + 1 :]
    lines.append(f"  Next task: {path.with_name(following[0] + '.py')}" if following else "  This was the last task")
    return lines


def _command(directory: Path, task: str) -> str:
    """Return the command that checks a task in a directory."""
    option = "" if directory == Path("exercises") else f" --dir {quote(directory)}"
    return f"mygpt check {task}{option}"


def _check_submissions(submissions: Path, table: Path, tasks: Sequence[str], timeout: float) -> int:
    """Check the files of all students, print a line per student, and return the exit status."""
    from MyGPT.exercises.submissions import write_marks

    is_complete = True
    for name, results in write_marks(submissions, table, tasks, timeout):
        solved = [result.task for result in results if result.status == "solved"]
        is_complete = is_complete and len(solved) == len(tasks)
        print(f"{printable(name, keep='')}: {len(solved)} of {len(tasks)}", flush=True)
    print(table)
    return 0 if is_complete else 1
