"""The progress of long work on stderr: a bar in a terminal, and otherwise a line every few seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 15.0
"""Time between two lines. Work that takes less time prints nothing."""


class ProgressLines(tqdm):  # type: ignore[type-arg]
    """A progress display for files and pipes: whole lines without control characters instead of a bar."""

    def __init__(self, **options: Any) -> None:
        limits = {"mininterval": SECONDS_PER_LINE, "maxinterval": SECONDS_PER_LINE, "delay": SECONDS_PER_LINE}
        super().__init__(**{**options, **limits, "ncols": 0})

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Return the function with which tqdm prints its status to `file`, here as a line of its own."""

        def print_line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return print_line

    def moveto(self, n: int) -> None:
        """Do nothing, because a file has no cursor."""

    def close(self) -> None:
        """End the display. tqdm would print control characters here."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]


def progress_bar(progress: bool, **options: Any) -> tqdm[Any]:
    """Return a progress display with tqdm's `options`, such as total and unit. If `progress` is False, it is silent."""
    if not progress or sys.stderr is None:
        return tqdm(**options, disable=True)
    return tqdm(**options) if sys.stderr.isatty() else ProgressLines(**options)
