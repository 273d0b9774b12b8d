"""`python -m MyGPT` is `mygpt`."""

import sys

from MyGPT.cli import main

sys.exit(main())
