"""The options of train and finetune about the run itself. A resumed run keeps the options that it started with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunOptions:
    """The options of train and finetune about the directory and the device of the run."""

    out: str | None = None
    """Directory of the run; without it, runs/ and the current time."""
    device: str = "auto"
    overwrite: bool = False
    """Replace a run that is already in the directory."""
    resume: str | None = None
    """Directory of a run to resume with its own options; auto resumes the run in --out, or starts it if it has no
    checkpoint."""
    allow_changed: str | list[str] | None = None
    """Options that may differ from those of the resumed run."""

    def for_trainer(self) -> dict[str, Any]:
        """Return arguments of Trainer. The device and the directory are checked here, before the data is read."""
        from MyGPT.devices import pick_device
        from MyGPT.training.directory import check_run_directory, is_empty_run

        options = {"device": pick_device(self.device), "allow_changed": self.allow_changed or ()}
        resumed = run_to_resume(self.resume, self.out)
        if resumed is not None:
            return {**options, "run_dir": resumed, "resume": True}
        run = Path(self.out or time.strftime("runs/%Y%m%d-%H%M%S"))
        overwrite = self.overwrite or (self.resume == "auto" and is_empty_run(run))
        check_run_directory(run, overwrite)
        return {**options, "run_dir": run, "overwrite": overwrite}


def with_options_of_run(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, preceded by the config.yaml of the run that they resume. Later options override earlier ones."""
    run = run_to_resume(_value(arguments, "resume"), _value(arguments, "out"))
    if run is None:
        return list(arguments)
    config = run / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"no run to resume at {run}: it has no config.yaml")
    return ["--config", str(config), *arguments]


def run_to_resume(resume: str | None, out: str | None) -> Path | None:
    """Return the directory of the run to resume, or None for a new run. "auto" selects `out` if it has a checkpoint."""
    if resume is None:
        return None
    if resume != "auto":
        if out is not None and Path(out).resolve() != Path(resume).resolve():
            raise ValueError(f"--resume {resume} continues in the directory of that run: leave out --out {out}")
        return Path(resume)
    if out is None:
        raise ValueError("--resume auto needs --out, the directory of the run to start or resume")
    from MyGPT.training.checkpoint import has_checkpoint

    return Path(out) if has_checkpoint(Path(out)) else None


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option in arguments that are not parsed yet."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
