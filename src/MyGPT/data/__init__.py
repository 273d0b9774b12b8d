"""Training data: text files, token files, windows, fine-tuning records, and samplers that make batches."""

from typing import Literal

Order = Literal["random", "shuffled", "sequential"]
"""The orders in which a WindowSampler visits windows. Importing the name needs neither torch nor numpy."""
