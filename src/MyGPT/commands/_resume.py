"""What --resume means: the options of the run that goes on are those it began with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def with_options_of_run(arguments: Sequence[str]) -> list[str]:
    """The arguments, after those of the config.yaml of the run that they resume; the later ones win."""
    run = run_to_resume(_value(arguments, "resume"), _value(arguments, "out"))
    if run is None:
        return list(arguments)
    config = run / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"no run to resume at {run}: it has no config.yaml")
    return ["--config", str(config), *arguments]


def run_to_resume(resume: str | None, out: str | None) -> Path | None:
    """The run that --resume names; with "auto" the one in --out, if it has got as far as a checkpoint; else None."""
    if resume is None:
        return None
    if resume != "auto":
        if out is not None and Path(out).resolve() != Path(resume).resolve():
            raise ValueError(f"a run goes on in its own directory, {resume}: leave out --out {out}")
        return Path(resume)
    if out is None:
        raise ValueError("--resume auto needs --out, the directory of the run that it begins or goes on with")
    from MyGPT.training.checkpoint import has_checkpoint

    return Path(out) if has_checkpoint(Path(out)) else None


def choose_run(out: str | None, resume: str | None, overwrite: bool) -> tuple[Path, dict[str, Any]]:
    """The run's directory (default runs/ and the time), and whether the Trainer is to resume it or may write over it.

    A directory that can be neither is an error now, before the work of reading the data.
    """
    from MyGPT.training.run import check_run_directory, is_empty_run

    going_on = run_to_resume(resume, out)
    if going_on is not None:
        return going_on, {"resume": True}
    run = Path(out or time.strftime("runs/%Y%m%d-%H%M%S"))
    overwrite = overwrite or (resume == "auto" and is_empty_run(run))
    check_run_directory(run, overwrite)
    return run, {"overwrite": overwrite}


def _value(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option among arguments that are not parsed yet."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
