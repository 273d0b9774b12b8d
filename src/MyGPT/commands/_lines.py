"""Read the lines that a user types: with editing and a history in a terminal, plainly from a file or a pipe.

Editing and history come from Python's module readline, which Windows lacks. There, the terminal itself edits lines.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from MyGPT.files import atomic_write

MAX_HISTORY = 1000
"""The number of lines that the history keeps."""
_PASTED_NEWLINE = "\u2028"
"""Replaces line ends inside an entry of the history file, which has one entry per line."""


def history_file() -> Path:
    """Return the path of the chat's history: mygpt/chat_history in $XDG_STATE_HOME, which is ~/.local/state by default."""
    state = os.environ.get("XDG_STATE_HOME", "")  # The XDG specification ignores relative paths.
    directory = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return directory / "mygpt" / "chat_history"


class LineReader:
    """Reads lines from sys.stdin. `read` returns a line, or None at the end of the input.

    In a terminal, lines can be edited, and the up key recalls earlier lines, also from earlier conversations. A text of
    several lines that is pasted is one line of input, and so is a line that ends with a backslash with the line after it.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._readline: Any = None
        if self.is_terminal:
            with contextlib.suppress(ImportError):  # Windows, and some builds of Python
                import readline

                self._readline = readline
        self._history = history_file() if history is None else history
        self._previous = ""
        if self._readline is not None:
            self._readline.set_auto_history(False)
            if "libedit" not in (self._readline.__doc__ or ""):
                # Python turns this off by default. Without it, each line of a pasted text would be a question of its own.
                self._readline.parse_and_bind("set enable-bracketed-paste on")
            self._load()

    def read(self, prompt: str) -> str | None:
        """Return the next line without its end, or None at the end of the input. A terminal shows `prompt` before it.

        Raises KeyboardInterrupt after Ctrl-C, and ValueError if the line is not text in the encoding of the terminal.
        """
        line = self._read(prompt)
        while self.is_terminal and line is not None and line.endswith("\\"):
            following = self._read("." * (len(prompt) - 1) + " ")
            if following is None:
                break
            line = f"{line[:-1]}\n{following}"
        if line is not None and line.strip():
            self._remember(line)
        return line

    def _read(self, prompt: str) -> str | None:
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            if sys.stdout.isatty():
                return input(prompt)
            print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for the answers alone
            return input()
        except EOFError:
            print(file=sys.stderr)
            return None

    def _load(self) -> None:
        """Read the history file, shorten it if it is too long, and make it readable by its owner only."""
        try:
            lines = self._history.read_text(encoding="utf-8", errors="replace").split("\n")
            os.chmod(self._history, 0o600)
            lines = [line for line in lines if line]
            if len(lines) > 2 * MAX_HISTORY:
                with atomic_write(self._history) as file:
                    file.writelines(f"{line}\n" for line in lines[-MAX_HISTORY:])
        except OSError:  # There is no history yet, or it cannot be read.
            return
        for line in lines[-MAX_HISTORY:]:
            self._readline.add_history(line.replace(_PASTED_NEWLINE, "\n"))
        self._previous = lines[-1] if lines else ""

    def _remember(self, line: str) -> None:
        """Add a line to the history and at once to its file, so that a killed process loses nothing."""
        entry = line.strip().replace("\n", _PASTED_NEWLINE)
        if self._readline is None or entry == self._previous:
            return
        self._readline.add_history(line.strip())
        self._previous = entry
        with contextlib.suppress(OSError):  # The history is a convenience: without it, the conversation continues.
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a", encoding="utf-8", errors="replace", newline="\n") as file:
                file.write(f"{entry}\n")
