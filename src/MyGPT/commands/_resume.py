"""What --resume means: the options of the run that goes on are those it began with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from MyGPT.files import restore_directory


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
    return Path(out) if any((Path(out) / "checkpoints").glob("step-*")) else None


def begins_again(run: Path, resume: str | None) -> bool:
    """Whether --resume auto finds a run that was stopped before there was anything to keep, and so may be written over."""
    kept = [run / name for name in ("model", "adapter")]
    for directory in kept:
        restore_directory(directory)
    return resume == "auto" and (run / "config.yaml").is_file() and not any(place.exists() for place in kept)


def _value(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option among arguments that are not parsed yet."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
