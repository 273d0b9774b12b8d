"""Run the `mygpt` command as `python -m MyGPT`."""

import sys

from MyGPT.cli import main

sys.exit(main())
