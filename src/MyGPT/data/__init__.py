"""Training data: reading texts and fine-tuning records, converting them to token ids, and making batches."""

from typing import Literal

Order = Literal["random", "shuffled", "sequential"]
"""Allowed values of WindowSampler.order. They are defined here, because this module imports neither torch nor numpy."""
