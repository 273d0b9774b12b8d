"""Test what `import MyGPT.inside` offers and costs."""

from __future__ import annotations

import subprocess
import sys

from MyGPT import inside
from MyGPT.inside import tracing


def test_the_package_offers_every_public_name_of_tracing() -> None:
    defined = {name for name, value in vars(tracing).items() if getattr(value, "__module__", "") == tracing.__name__}
    assert set(inside.__all__) == {name for name in defined if not name.startswith("_")}
    for name in inside.__all__:
        assert getattr(inside, name) is getattr(tracing, name)
        assert name in dir(inside)
    assert not hasattr(inside, "no_such_name")


def test_importing_the_package_or_its_plots_does_not_import_torch() -> None:
    code = "import MyGPT.inside, MyGPT.inside.plots, sys; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
