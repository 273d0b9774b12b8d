"""Measure the peak resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """A context manager whose `n_bytes` is the rise of the resident memory inside the block, mapped files included.

    Inside the block, `n_bytes` is the rise so far. Linux keeps the count, so no sampling thread disturbs a measurement of time.
    """

    def __enter__(self) -> Peak:
        CLEAR.write_text("5")  # resets VmHWM, see proc(5)
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
