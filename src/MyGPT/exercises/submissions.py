"""A teacher's table: check the files of all students in a directory, and write one row per student to a CSV file."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from MyGPT.exercises.checking import Result
from MyGPT.exercises.running import check_files
from MyGPT.messages import error_message, printable

FIRST_COLUMNS = ("student", "solved")
TOTAL = "all students"
"""The first cell of the last row, which has the number of solved files of each task."""
_SKIPPED = ("__MACOSX", "__pycache__", "solutions")
"""Directories in a submission that have no files of the student."""
_FORMULA_STARTS = ("=", "+", "-", "@", "|", "%")


def find_students(directory: Path) -> list[Path]:
    """Return the subdirectories of `directory`, one per student, in the order of their names.

    Raises ValueError if there are none. "solutions" and names that begin with a dot or an underscore are left out.
    """
    if not directory.is_dir():
        raise ValueError(f"--submissions must be a directory with one subdirectory per student, got {str(directory)!r}")
    students = sorted(
        path for path in directory.iterdir() if path.is_dir() and path.name[0] not in "._" and path.name not in _SKIPPED
    )
    if not students:
        raise ValueError(
            f"{directory} has no subdirectories: give each student a subdirectory with the files of the exercises"
        )
    return students


def find_file(student: Path, task: str) -> Path:
    """Return a student's file of a task: the one in the student's directory, or else the only one below it.

    If there is none, the path at which it should be is returned. Raises ValueError if several files are found below, and OSError
    if the directory cannot be read.
    """
    direct = student / f"{task}.py"
    os.listdir(student)  # raises OSError if the directory cannot be read, which os.walk would pass over
    if os.path.lexists(direct):
        return direct
    found = sorted(_below(student, direct.name))
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(student)) for path in found[:2])
        raise ValueError(f"there are several files {direct.name}: {names}")
    return found[0] if found else direct


def write_marks(
    directory: Path, table: Path, tasks: Sequence[str], seconds: float
) -> Iterator[tuple[str, list[Result]]]:
    """Check every student's files, write the table, and yield each student's name and results after the row was written.

    The table has one row per student with the columns student, solved (the number of solved tasks) and, for each task, its
    result and the reason. The last row counts the solved files. Each row is written at once, so an interrupted run keeps
    its rows. An earlier table is replaced; any other file raises ValueError.
    """
    students = find_students(directory)
    _refuse_other_file(table)
    solved: Counter[str] = Counter()
    with open(table, "w", newline="", encoding="utf-8-sig") as file:  # spreadsheets recognise UTF-8 by the mark
        writer = csv.writer(file)

        def write(row: Sequence[object]) -> None:
            writer.writerow([as_text(cell) for cell in row])
            file.flush()

        write([*FIRST_COLUMNS, *(column for task in tasks for column in (task, f"{task}: reason"))])
        for student in students:
            results = check_student(student, tasks, seconds)
            solved.update(result.task for result in results if result.status == "solved")
            n_solved = sum(result.status == "solved" for result in results)
            cells = [cell for result in results for cell in (_mark(result), result.sentence)]
            write([student.name, n_solved, *cells])
            yield student.name, results
        write([TOTAL, solved.total(), *(cell for task in tasks for cell in (solved[task], ""))])


def check_student(student: Path, tasks: Sequence[str], seconds: float) -> list[Result]:
    """Return the results of a student's files, one for each task."""
    files, problems = {}, {}
    for task in tasks:
        try:
            files[task] = find_file(student, task)
        except (ValueError, OSError) as error:
            problems[task] = Result(task, "wrong", error_message(error))
    checked = {result.task: result for result in check_files(files, seconds)}
    return [problems.get(task) or checked[task] for task in tasks]


def as_text(cell: object) -> object:
    """Return a cell that a spreadsheet does not run as a formula: a text that begins like one gets an apostrophe before it.

    Control characters become escapes such as \\n.
    """
    if not isinstance(cell, str):
        return cell
    text = printable(cell, keep="")
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _mark(result: Result) -> str:
    return "pass" if result.status == "solved" else result.status


def _below(directory: Path, name: str) -> Iterator[Path]:
    """Yield the files with a name below a directory. Symbolic links to directories are not followed."""
    for parent, directories, names in os.walk(directory):
        directories[:] = [one for one in directories if one not in _SKIPPED and not one.startswith(".")]
        if name in names:
            yield Path(parent, name)


def _refuse_other_file(table: Path) -> None:
    """Raise an error if `table` is a directory, or another file than a table of an earlier run."""
    if table.is_dir():
        raise IsADirectoryError(
            f"{table} is a directory: give the name of a file with --csv, as in {table / 'marks.csv'}"
        )
    start = ",".join(FIRST_COLUMNS).encode()
    if table.exists() and not (table.is_file() and start in table.read_bytes()[:100]):
        raise ValueError(f"{table} exists and is not a table of mygpt check: give another name with --csv")
