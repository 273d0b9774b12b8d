"""Look inside a model: its activations (tracing.py), pictures of them (plots.py) and a web page about a text (page.py).

The names of tracing.py can be imported from here. They are loaded at first use, so drawing a loss curve needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from MyGPT.inside.tracing import *  # noqa: F403

__all__ = [  # noqa: F405
    "Trace", "ablate_heads", "ablate_mlps", "edit", "induction_scores", "logit_lens", "nearest_tokens", "patch",
    "patching_effects", "places", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("MyGPT.inside.tracing"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
