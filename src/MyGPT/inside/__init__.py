"""Look inside a model: record and edit activations (tracing.py), find features (sae.py), draw figures and pages.

The functions of tracing.py and sae.py and the measures of features.py can be imported from here. These files import torch, so
each is loaded when one of its functions is first used. Drawing a loss curve with plots.py therefore does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from MyGPT.inside.features import AutoencoderQuality, measure_autoencoder
    from MyGPT.inside.sae import *  # noqa: F403
    from MyGPT.inside.tracing import *  # noqa: F403

_FILES = {
    "AutoencoderQuality": "features",
    "measure_autoencoder": "features",
    "SparseAutoencoder": "sae",
    "train_autoencoder": "sae",
}
"""The files of names that are not in tracing.py."""
__all__ = [  # noqa: F405
    "AutoencoderQuality", "SparseAutoencoder", "Trace", "ablate_heads", "ablate_mlps", "collect_activations", "edit",
    "induction_scores", "logit_lens", "measure_autoencoder", "nearest_tokens", "patch", "patching_effects", "places",
    "plain_attention", "trace", "train_autoencoder",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"MyGPT.inside.{_FILES.get(name, 'tracing')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
