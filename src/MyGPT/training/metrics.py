"""The single record of a run: `metrics.jsonl`, a line an event, from which plots and tables are made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from MyGPT.files import parse_json, read_text


class MetricsLog:
    """Appends records to `metrics.jsonl` of a run, and to TensorBoard on request."""

    def __init__(self, run: Path, tensorboard: bool = False, after: int | None = None) -> None:
        """`after` is the step after which a resumed run goes on; TensorBoard forgets what it was told beyond that."""
        self._path = run / "metrics.jsonl"
        self._writer = _summary_writer(run, after) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """One record: after how many steps, and what was measured."""
        with open(self._path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run in order. A last line that a kill cut short is left out; any other damage is a ValueError."""
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
        if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**63:
            raise ValueError(f"{path}, line {number} has no step: {line[:80]!r}")
        for name in ("loss", "val_loss"):
            if name in record and not _is_loss(record[name]):
                raise ValueError(f"{path}, line {number}: {name} must be a number, got {line[:80]!r}")
        records.append(record)
    return records


def _is_loss(value: object) -> bool:
    """Any float, infinite or no number too, as a run that diverges writes them."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _summary_writer(run: Path, after: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard is not installed: pip install 'mygpt[tensorboard]', or tensorboard=false"
        ) from None
    return SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=None if after is None else after + 1)
