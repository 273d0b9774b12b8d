"""Look inside a model: record and edit activations (tracing.py), draw figures (plots.py), explain a text as HTML (page.py).

The functions of tracing.py can be imported from here. tracing.py, which imports torch, is loaded when one of its functions
is first used, so drawing a loss curve with plots.py does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from MyGPT.inside.tracing import *  # noqa: F403

__all__ = [  # noqa: F405
    "Trace", "ablate_heads", "ablate_mlps", "edit", "induction_scores", "logit_lens", "nearest_tokens", "patch",
    "patching_effects", "places", "plain_attention", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("MyGPT.inside.tracing"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
