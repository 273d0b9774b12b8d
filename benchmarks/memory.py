"""The most memory that a process has while something runs, as Linux keeps count of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """`with Peak() as peak: …`; then peak.n_bytes is how far the resident memory rose, mapped files included.

    Inside the block it is the rise so far. Nothing runs meanwhile: a thread that looked would take part in what is timed.
    """

    def __enter__(self) -> Peak:
        CLEAR.write_text("5")  # the count begins anew (proc(5))
        self.before, self.most = self.resident("VmRSS"), None
        return self

    def __exit__(self, *_: Any) -> None:
        self.most = self.resident("VmHWM")

    @staticmethod
    def resident(field: str) -> int:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    @property
    def n_bytes(self) -> int:
        return (self.resident("VmHWM") if self.most is None else self.most) - self.before
