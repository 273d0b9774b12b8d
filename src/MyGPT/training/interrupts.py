"""Signals that end a training run after its current step, so that a checkpoint can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from MyGPT import ranks

SIGPIPE = 13
"""The number of the signal SIGPIPE on every system that has it. Windows has not, and Python ignores the signal itself."""


class Stopped(KeyboardInterrupt):
    """Raised when the signal signal_number has stopped a training run and everything has been saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Collect SIGINT (Ctrl-C), SIGTERM and SIGHUP in the yielded list instead of interrupting the `with` block.

    SIGHUP arrives when the terminal or the ssh connection closes. A process that ignores SIGHUP, as nohup arranges,
    keeps ignoring it. A second Ctrl-C interrupts at once, unless there are several ranks. Outside the main thread the
    list stays empty, because Python allows no signal handlers there.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has no SIGHUP.
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)

    def remember(number: int, frame: Any) -> None:
        signals.append(number)
        if ranks.world_size() == 1:  # torchrun passes on a Ctrl-C that the terminal has already sent to all ranks
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, remember)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
