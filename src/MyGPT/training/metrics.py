"""The measurements of a run in `metrics.jsonl`, one JSON object per line. Plots and tables are made from this file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from MyGPT.files import json_text, parse_json, read_text
from MyGPT.messages import error_message
from MyGPT.training.trackers import TrackerThreads


class AppendedFile:
    """A text file to which a run appends. A failed write neither ends the run nor leaves half a record.

    The text of a failed write is kept in memory, and the next call of `write` or `flush` tries again. `report` is called
    with the first error of each series of failures.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self.failure: OSError | None = None
        """The error of the last attempt; None if the file is complete."""
        self._report = report
        self._waiting = ""

    def write(self, text: str) -> None:
        """Append `text`, after the text of earlier calls that failed."""
        self._waiting += text
        self.flush()

    def flush(self) -> None:
        """Try again to append the text of earlier calls that failed."""
        if not self._waiting:
            return
        length = None
        try:
            with open(self.path, "ab") as file:
                length = file.tell()
                file.write(self._waiting.encode())
        except OSError as error:
            if length is not None:  # A part may have been written. A full disk still allows to remove it.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, length)
            if self.failure is None:
                self._report(
                    f"{self.path} could not be written, and the next write tries again: {error_message(error)}"
                )
            self.failure = error
        else:
            self._waiting, self.failure = "", None


class MetricsLog:
    """Appends records to `metrics.jsonl` in the directory `run`, and hands them over to the trackers of the run.

    `report` is called with a message about records that cannot be written (see AppendedFile).
    """

    def __init__(self, run: Path, report: Callable[[str], None], trackers: TrackerThreads | None = None) -> None:
        self.file, self._trackers = AppendedFile(run / "metrics.jsonl", report), trackers

    def write(self, step: int, **values: float) -> None:
        """Append `step` and the named values, which were measured after this step, to metrics.jsonl as one record.

        A value that is not finite is written as the string "nan", "inf" or "-inf", because JSON has no such numbers. The
        trackers get the value itself.
        """
        self.file.write(json_text({"step": step, **values}) + "\n")
        if self._trackers is not None:
            self._trackers.log(step, values)


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records in metrics.jsonl of the directory `run`, in the order of their lines.

    An incomplete last line, left by a killed process, is ignored. The strings "nan", "inf" and "-inf" become floats.
    Early versions of MyGPT wrote NaN and Infinity, which are also accepted.

    Raises:
        FileNotFoundError: the directory has no metrics.jsonl.
        ValueError: another line is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no run at {run}: it has no metrics.jsonl")
    lines = read_text(path).split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = _parse_record(line, path, number)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is damaged: {line[:80]!r}") from None
        if not isinstance(record, dict) or not _is_int64(record.get("step")) or record["step"] < 0:
            raise ValueError(f"{path}, line {number} has no valid step: {line[:80]!r}")
        for name in ("loss", "val_loss"):
            value = record.get(name, 0.0)
            if not isinstance(value, float) and not _is_int64(value):
                raise ValueError(f"{path}, line {number}: {name} must be a number, got {line[:80]!r}")
        records.append(record)
    return records


def read_evaluations(run: Path, n_bytes: int = 0, last_step: int = 2**63) -> list[dict[str, Any]]:
    """Return the evaluations of steps up to `last_step` that metrics.jsonl contains after its first `n_bytes` bytes.

    Their values `val_loss` and `final_val_loss` are floats. Damaged lines, such as those that a power failure leaves at the
    end, are ignored, so a run with such lines can be resumed.
    """
    path = run / "metrics.jsonl"
    evaluations = []
    for line in path.read_bytes()[n_bytes:].splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = _parse_record(line, path)
            if (
                not isinstance(record, dict)
                or not _is_int64(record.get("step"))
                or not 0 <= record["step"] <= last_step
            ):
                continue
            losses = [record[name] for name in ("val_loss", "final_val_loss") if name in record]
            if losses and all(isinstance(loss, float) for loss in losses):
                evaluations.append(record)
    return evaluations


def _parse_record(line: str | bytes, path: Path, number: int | None = None) -> Any:
    """Return the value in a line of metrics.jsonl. In an object, the strings "nan", "inf" and "-inf" become floats."""
    record = parse_json(line, path, number)
    if not isinstance(record, dict):
        return record
    return {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in record.items()}


def _is_int64(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63
