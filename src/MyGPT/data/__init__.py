"""Training data: reading texts and fine-tuning records, converting them to token ids, and making batches."""

from typing import Literal

Order = Literal["random", "shuffled", "sequential"]
"""Allowed values of WindowSampler.order. This module imports neither torch nor numpy, so training/config.py can import
the values without loading these libraries."""
