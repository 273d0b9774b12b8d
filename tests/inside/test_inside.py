"""Test what `import MyGPT.inside` offers and costs."""

from __future__ import annotations

import subprocess
import sys

from MyGPT import inside
from MyGPT.inside import features, sae, tracing


def test_the_package_offers_every_public_name_of_tracing_and_sae_and_the_measures() -> None:
    defined = {
        name: value
        for module in (tracing, sae)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    defined |= {name: getattr(features, name) for name in ("AutoencoderQuality", "measure_autoencoder")}
    assert set(inside.__all__) == {*defined} - {"check_number"}  # which the other modules of the package share
    for name in inside.__all__:
        assert getattr(inside, name) is defined[name]
        assert name in dir(inside)
    assert not hasattr(inside, "no_such_name")


def test_importing_the_package_or_its_plots_does_not_import_torch() -> None:
    code = "import MyGPT.inside, MyGPT.inside.plots, sys; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
