"""The option --resume of train and finetune: a resumed run keeps the options that it started with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
    """Return the directory of the run to resume, or None for a new run.

    resume="auto" selects the run in `out` if it has a checkpoint.
    """
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


def choose_run(out: str | None, resume: str | None, overwrite: bool) -> tuple[Path, dict[str, Any]]:
    """Return the run directory, and the Trainer's arguments that resume or overwrite the run in it.

    The default directory is runs/ and the current time. The directory is checked here, before the data is read.
    """
    from MyGPT.training.directory import check_run_directory, is_empty_run

    resumed = run_to_resume(resume, out)
    if resumed is not None:
        return resumed, {"resume": True}
    run = Path(out or time.strftime("runs/%Y%m%d-%H%M%S"))
    overwrite = overwrite or (resume == "auto" and is_empty_run(run))
    check_run_directory(run, overwrite)
    return run, {"overwrite": overwrite}


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option in arguments that are not parsed yet."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
