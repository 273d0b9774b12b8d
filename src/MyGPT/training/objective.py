"""Objectives: the losses that a Trainer minimizes. Pretraining and fine-tuning use the loss of the next token.

finetuning/preference.py and finetuning/classification.py define the objectives of DPO and of classifiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from MyGPT.loss import IGNORED


class Objective(Protocol):
    """An interface for losses. A batch is a tuple of tensors, whose first dimension a Trainer splits into micro-batches."""

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the quantities that are measured beside the loss, such as "accuracy"."""

    def count(self, *batch: Tensor) -> Tensor | int:
        """Return the number of terms in the loss of a batch, such as its targets or its sequences."""

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor | int]:
        """Return sums over the terms of a batch, and the number of terms.

        The sums are a float tensor (1 + len(scores),) with the loss first, or a scalar tensor if there are no scores.
        """


@dataclass(frozen=True)
class NextToken:
    """The cross-entropy of the next token in nats. Its terms are the targets that are not -100."""

    model: Any
    """A GPTModel."""
    scores: ClassVar[tuple[str, ...]] = ()

    def count(self, *batch: Tensor) -> Tensor:
        """Return the number of targets, the second tensor of a batch, that are not -100."""
        return (batch[1] != IGNORED).sum()

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats and the number of counted targets."""
        total, count = self.model.token_loss(*batch)
        return total, count
