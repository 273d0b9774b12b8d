"""The progress display of a process that writes to a pipe."""

from __future__ import annotations

import subprocess
import sys


def test_the_first_display_of_a_process_can_be_closed() -> None:
    """tqdm creates its lock with the first bar of a class. A test that ran before may have created that of tqdm itself."""
    code = "from MyGPT.progress import progress_bar\nwith progress_bar(True, total=2) as bar:\n    bar.update()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
