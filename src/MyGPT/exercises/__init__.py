"""Exercises that check themselves: the original files (tasks/), their checks (checks/) and `mygpt check`'s machinery.

A check compares a student's functions with torch, tiktoken or this library, and explains the first difference. student.py
opens a student's file, comparing.py finds the likely cause of a difference, checking.py runs the steps of one check, running.py
does so in a process of its own, and submissions.py makes a table for a teacher. tasks/ is the only source of the exercise
files; `mygpt check --start` copies them to the student's directory.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from MyGPT.exercises.checking import Check

TASKS = ("bpe", "windows", "attention", "block", "loss", "sampling", "kv_cache", "lora", "induction_head")
"""The names of the tasks, in the order in which they are meant to be solved."""

ORIGINALS = Path(__file__).parent / "tasks"
"""The directory with the exercise files as a student gets them."""


def check_of(task: str) -> Check:
    """Return the check of a task, whose module imports torch."""
    check: Check = import_module(f"MyGPT.exercises.checks.{task}").CHECK
    return check
