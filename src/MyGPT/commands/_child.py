"""Run `mygpt` as the child of another process: `python -m MyGPT.commands._child train …`.

If the parent ends, even by a kill, the child saves a checkpoint and ends too. The child notices this because its standard
input is a pipe whose other end the parent holds open.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

SECONDS_TO_STOP = 60.0
"""The longest time to wait until a run has saved its checkpoint."""


def main() -> None:
    """Run the command in sys.argv, and exit with its status."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    runpy.run_module("MyGPT", run_name="__main__")


def _stop_with_parent() -> None:
    while os.read(0, 4096):  # sys.stdin would be locked when Python exits.
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os._exit(1)


if __name__ == "__main__":
    main()
