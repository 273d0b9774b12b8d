"""Import scripts of benchmarks/, which is no package."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from places import ROOT


def load(name: str) -> ModuleType:
    """Return the module benchmarks/NAME.py. Its imports of other scripts work too."""
    directory = str(ROOT / "benchmarks")
    if directory not in sys.path:
        sys.path.append(directory)
    return importlib.import_module(name)
