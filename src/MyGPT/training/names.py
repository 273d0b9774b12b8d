"""The names of files in the directory of a run that several modules read. This module does not import torch."""

from __future__ import annotations

CHECKPOINTS = "checkpoints"
"""The directory of the checkpoints."""
LOCK = ".lock"
"""The file that the training process locks."""
PROCESS = ".process"
"""The file that names the process which locked the directory last, such as "process 123 on host"."""
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
"""In a checkpoint: the counters, and the sizes of all files. Beside the checkpoints: the name of the newest one."""
