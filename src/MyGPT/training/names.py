"""The names of files in the directory of a run that several modules read. This module does not import torch."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"
"""The directory of the checkpoints."""
HISTORY = "history"
"""The directory of the models that the option keep_every keeps, each in a subdirectory such as step-000064."""
LOCK = ".lock"
"""The file that the training process locks."""
PROCESS = ".process"
"""The file that names the process which locked the directory last, such as "process 123 on host"."""
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
"""In a checkpoint: the counters, and the sizes of all files. Beside the checkpoints: the name of the newest one."""


def step_name(step: int) -> str:
    """Return the name of the subdirectory for a checkpoint or a kept model, such as "step-000064"."""
    return f"step-{step:06d}"


def by_step(directory: Path) -> dict[int, Path]:
    """Return a dict from the step to the path of each subdirectory such as step-000064, in ascending order of the steps."""
    paths = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdecimal()}
    return dict(sorted(paths.items()))
