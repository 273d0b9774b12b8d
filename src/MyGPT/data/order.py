"""The ways to walk through windows, named where neither torch nor numpy is needed to know them."""

from typing import Literal

Order = Literal["random", "shuffled", "sequential"]
