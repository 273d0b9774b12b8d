"""A real terminal for tests: a command runs with a pseudo-terminal as its controlling terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

# The first process of a session makes its standard input the terminal whose Ctrl-C it receives.
_START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command that runs in a terminal of 24 lines and 80 columns. `received` is everything that it has printed."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        os.close(slave)
        self.received = b""

    def type(self, text: str) -> None:
        """Send text to the terminal as if it were typed. "\\x03" is Ctrl-C, and "\\x04" is Ctrl-D."""
        os.write(self._master, text.encode())

    def wait_until(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        """Read what the command prints until `happened` returns True. Raise AssertionError if it ends before."""
        deadline = time.monotonic() + seconds
        os.set_blocking(self._master, False)
        while not happened():
            assert time.monotonic() < deadline, self.received
            try:
                part = os.read(self._master, 65536)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except OSError:  # Linux reports the end of a terminal as an error.
                part = b""
            assert part or happened(), self.received
            self.received += part
        os.set_blocking(self._master, True)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read what the command prints until it contains `text`."""
        self.wait_until(lambda: text.encode() in self.received, seconds)

    def end(self) -> int:
        """Read what the command prints until it ends, close the terminal, and return the exit status."""
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:
                part = b""
            if not part:
                break
            self.received += part
        os.close(self._master)
        return self.process.wait()


def run_in_terminal(command: list[str], **environment: str) -> tuple[int, bytes]:
    """Run a command in a terminal, and return its exit status and everything that it printed there."""
    terminal = Terminal(command, **environment)
    status = terminal.end()
    return status, terminal.received
