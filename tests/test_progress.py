"""The progress display of a process that writes to a pipe."""

from __future__ import annotations

import subprocess
import sys

import pytest

from MyGPT.progress import progress_bar


def test_the_first_display_of_a_process_can_be_closed() -> None:
    """tqdm creates its lock with the first bar of a class. A test that ran before may have created that of tqdm itself."""
    code = "from MyGPT.progress import progress_bar\nwith progress_bar(True, total=2) as bar:\n    bar.update()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_last_line_shows_the_final_state(capsys: pytest.CaptureFixture[str]) -> None:
    """A finished download once ended with "1.00k/300k", the line that was printed before its second request."""
    with progress_bar(True, total=4, desc="file") as bar:
        bar.update(1)
        bar.set_postfix_str("retrying")
        bar.set_postfix_str("")
        bar.update(3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "1/4" in lines[0] and "retrying" in lines[0] and "4/4" in lines[1]
