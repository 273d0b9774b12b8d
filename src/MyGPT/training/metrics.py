"""The measurements of a run in `metrics.jsonl`, one JSON object per line. Plots and tables are made from this file."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from MyGPT.files import parse_json, read_text


class MetricsLog:
    """Appends records to `metrics.jsonl` in the directory `run`, and to TensorBoard event files if requested.

    `after` is the step from which the run is resumed, or None for a new run. TensorBoard ignores the events of steps
    after `after` that the interrupted process wrote, because the resumed run writes them again.
    """

    def __init__(self, run: Path, tensorboard: bool = False, after: int | None = None) -> None:
        self._path = run / "metrics.jsonl"
        self._writer = _summary_writer(run, after) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """Append `step` and the named values, which were measured after this step, to metrics.jsonl as one record.

        If TensorBoard files were requested, the values are also added to them.
        """
        with open(self._path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the TensorBoard event files, if there are any."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records in metrics.jsonl of the directory `run`, in the order of their lines.

    An incomplete last line, left by a killed process, is ignored.

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
            record = parse_json(line, path, number)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is damaged: {line[:80]!r}") from None
        if not isinstance(record, dict) or not _is_int64(record.get("step")) or record["step"] < 0:
            raise ValueError(f"{path}, line {number} has no valid step: {line[:80]!r}")
        for name in ("loss", "val_loss"):
            value = record.get(name, 0.0)
            if not isinstance(value, float) and not _is_int64(value):  # A diverging run writes infinity and NaN.
                raise ValueError(f"{path}, line {number}: {name} must be a number, got {line[:80]!r}")
        records.append(record)
    return records


def evaluations_after(run: Path, n_bytes: int, last_step: int) -> list[dict[str, Any]]:
    """Return the evaluations of steps up to `last_step` that metrics.jsonl contains after its first `n_bytes` bytes.

    A finished run records them after its last checkpoint. Damaged lines are ignored, because a run that is resumed from
    this checkpoint removes everything after the first `n_bytes` bytes.
    """
    path = run / "metrics.jsonl"
    evaluations = []
    for line in path.read_bytes()[n_bytes:].splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line, path)
            if not isinstance(record, dict) or not _is_int64(record.get("step")) or record["step"] > last_step:
                continue
            if any(isinstance(record.get(name), float) for name in ("val_loss", "final_val_loss")):
                evaluations.append(record)
    return evaluations


def _is_int64(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63


def require_tensorboard() -> None:
    """Raise ValueError if tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ValueError(
            "tensorboard is not installed: install it with pip install 'mygpt[tensorboard]', or set tensorboard=false"
        ) from None


def _summary_writer(run: Path, after: int | None) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=None if after is None else after + 1)
