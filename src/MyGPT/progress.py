"""The progress of long work on stderr: a bar in a terminal or a notebook, and otherwise a line every few seconds."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 15.0
"""Time between two lines. Work that takes less time prints nothing."""


class ProgressLines(tqdm):  # type: ignore[type-arg]
    """A progress display for files and pipes: whole lines without control characters instead of a bar."""

    _shown: float | None = None
    """The number of finished units in the latest line, or None before the first line."""

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

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the state as a line."""
        super().display(msg, pos)
        self._shown = self.n

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text at the end of the line, and print the line unless the text is empty."""
        super().set_postfix_str(s, refresh and bool(s))

    def moveto(self, n: int) -> None:
        """Do nothing, because a file has no cursor."""

    def close(self) -> None:
        """End the display. If lines were printed, the last one shows the final state. tqdm would print control characters."""
        if not self.disable:
            if self._shown not in (None, self.n):
                self.display()
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]


def is_notebook() -> bool:
    """Return True if this process runs the cells of a Jupyter notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(get_ipython()).__mro__)


def bar_class() -> type[tqdm[Any]]:
    """Return the class of progress bars for a terminal, or for a notebook: a widget if ipywidgets is installed, or a text."""
    if not is_notebook():
        return tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm warns if ipywidgets is missing.
        from tqdm.auto import tqdm as notebook_bar
    return notebook_bar


def progress_bar(progress: bool, **options: Any) -> tqdm[Any]:
    """Return a progress display with tqdm's `options`, such as total and unit. If `progress` is False, it is silent."""
    if not progress or sys.stderr is None:
        return tqdm(**options, disable=True)
    return bar_class()(**options) if is_notebook() or sys.stderr.isatty() else ProgressLines(**options)
