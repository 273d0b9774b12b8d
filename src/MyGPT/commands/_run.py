"""The options of the training commands for starting and resuming a run, which writes into a directory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MyGPT.config import GPTConfig, require_positive
from MyGPT.messages import OPTION_SYNONYMS, did_you_mean, quote
from MyGPT.training.config import TrainConfig

RUNS = "runs"
"""The directory in which commands put runs without the option --out."""


@dataclass(frozen=True)
class RunOptions:
    """Options of the training commands for the run directory, for resuming a run, and for the device."""

    out: str | None = None
    """Directory for the run. Default: runs/ and the current time."""
    device: str = "auto"
    nproc: int = 1
    """Number of processes (ranks) on this machine that train together, such as the number of GPUs."""
    max_restarts: int = 0
    """Number of times that all ranks are restarted after one of them has failed. Use it with --resume auto."""
    overwrite: bool = False
    """Replace a run that is already in the directory."""
    resume: str | None = None
    """Directory of a run to resume with its stored options; auto resumes the run in --out if it has a checkpoint, and
    otherwise starts it."""
    allow_changed: str | list[str] | None = None
    """Names of options whose values may differ from the values in the resumed run, such as max_steps or epochs to extend a
    finished run. Repeat the option for several names. data_content also allows other data, and model_content other weights of
    the base model."""

    def __post_init__(self) -> None:
        require_positive(nproc=self.nproc)

    def for_trainer(self, training: TrainConfig) -> dict[str, Any]:
        """Join the other ranks, if there are any, and return the keyword arguments of Trainer for these options.

        Raises an error if the device or the directory cannot be used, or if a tracker in training.log_to is not installed.
        """
        from MyGPT import ranks
        from MyGPT.training.trackers import require_trackers

        require_trackers(training.trackers())
        ranks.join(training.timeout_minutes)
        training.shard_size_on(ranks.world_size())  # checks the options before anything is read or written
        return ranks.on_first_rank(self._keywords)

    def _keywords(self) -> dict[str, Any]:
        """Choose the directory of the run. Another rank might see files that this one has changed in the meantime."""
        from MyGPT.devices import pick_device
        from MyGPT.training.directory import check_run_directory, is_empty_run

        options = {"device": pick_device(self.device), "allow_changed": self.allow_changed or ()}
        resumed = run_to_resume(self.resume, self.out)
        if resumed is not None:
            self._check_allowed(resumed)
            return {**options, "run_dir": resumed, "resume": True}
        run = Path(self.out or time.strftime(f"{RUNS}/%Y%m%d-%H%M%S"))
        overwrite = self.overwrite or (self.resume == "auto" and is_empty_run(run))
        check_run_directory(run, overwrite)
        return {**options, "run_dir": run, "overwrite": overwrite}

    def _check_allowed(self, run: Path) -> None:
        """Raise ValueError if --allow_changed names no option of the run in the directory `run`."""
        from MyGPT.commands._recipe import read_recipe

        options = {*read_recipe(run / "config.yaml"), *TrainConfig.__annotations__, *GPTConfig.__annotations__}
        known = sorted({*options, "with", "data_content", "model_content"} - {"vocab_size"})
        for name in [self.allow_changed] if isinstance(self.allow_changed, str) else self.allow_changed or []:
            if name not in known:
                hint = did_you_mean(name, known, OPTION_SYNONYMS)
                raise ValueError(f"--allow_changed {quote(name)} names no option of the run in {run}{hint}")


def with_options_of_run(arguments: Sequence[str], command: str) -> list[str]:
    """Return the command-line arguments. If they resume a run, --config with the config.yaml of this run comes first.

    The given options follow --config, so they override the run's stored options. The stored option --with is left out,
    because a run, which may come from a stranger, must not name a file that is run. Raises an error if there is no such run,
    or if it is a run of another command than `command`, such as "train".
    """
    run = run_to_resume(value_of(arguments, "resume"), value_of(arguments, "out"))
    if run is None:
        return list(arguments)
    from MyGPT.commands._recipe import read_recipe

    config = run / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"no run to resume at {run}: it has no config.yaml")
    recipe = read_recipe(config)
    own = command_of_recipe(recipe)
    if own != command:
        raise ValueError(f"{run} is a run of mygpt {own}: resume it with mygpt {own} --resume {quote(run)}")
    return ["--config", str(config), *(["--with", "null"] if "with" in recipe else []), *arguments]


def command_of_run(config: Path) -> str:
    """Return the name of the command that wrote the config.yaml of a run."""
    from MyGPT.commands._recipe import read_recipe

    return command_of_recipe(read_recipe(config))


def command_of_recipe(recipe: Iterable[str]) -> str:
    """Return the name of the training command to which these options belong."""
    names = {*recipe}
    typical = {"classify": "train_only", "dpo": "beta", "finetune": "lora"}
    found = (
        command
        for command, option in typical.items()
        if option in names or any(name.startswith(f"{option}.") for name in names)
    )
    return next(found, "finetune" if "model" in names else "train")


def run_to_resume(resume: str | None, out: str | None) -> Path | None:
    """Return the directory of the run to resume, or None to start a new run.

    `resume` and `out` are the values of the options --resume and --out. If `resume` is "auto", return `out` if this
    directory has a checkpoint, and None otherwise. Any other `resume` is itself the directory of the run.
    """
    if resume is None:
        return None
    if resume != "auto":
        if out is not None and Path(out).resolve() != Path(resume).resolve():
            raise ValueError(
                f"--resume {quote(resume)} continues in the directory of that run: leave out --out {quote(out)}"
            )
        return Path(resume)
    if out is None:
        raise ValueError("--resume auto needs --out, the directory of the run to start or resume")
    from MyGPT.training.checkpoint import has_checkpoint

    return Path(out) if has_checkpoint(Path(out)) else None


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of the option --name in unparsed arguments, or None if the option is not given."""
    value = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
