"""Encode texts to compact arrays of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
"""Token ids in a compact array."""


def id_dtype(n_vocab: int) -> np.dtype[Any]:
    """Return the smallest dtype for the ids of a vocabulary of `n_vocab` tokens: uint16 if they fit, else uint32."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")
