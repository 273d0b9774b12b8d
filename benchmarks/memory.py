"""The most memory that a process has while something runs, looked at every few milliseconds (Linux)."""

from __future__ import annotations

import os
import threading
from typing import Any


class Peak:
    """`with Peak() as peak: …`; then peak.n_bytes is how far the resident memory rose, mapped files included."""

    def __enter__(self) -> Peak:
        self.before = self.most = self.resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.003):
            self.most = max(self.most, self.resident())

    @staticmethod
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def n_bytes(self) -> int:
        return max(self.most, self.resident()) - self.before
