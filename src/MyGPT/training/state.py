"""The counters of a training run, and their conversion to and from the JSON of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from MyGPT.notebooks import Described

_RENAMED = {"n_waited": "evals_since_best", "usual_norm": "mean_grad_norm"}
"""Maps the names of counters in checkpoints of version 0.1 to their current names."""


class IncompatibleCheckpointError(ValueError):
    """Raised for an undamaged checkpoint that cannot be continued: another version wrote it, or the run has changed."""


@dataclass
class RunState(Described):
    """The progress of a training run: its counters, losses and moving averages, which each checkpoint stores."""

    step: int = 0
    """Number of optimizer steps so far, including skipped steps."""
    tokens_seen: int = 0
    """Number of input tokens in all steps so far, including padding."""
    best_loss: float = math.inf
    """Lowest validation loss so far; infinity before the first finite loss."""
    best_step: int | None = None
    """Step at which best_loss was measured; None before the first finite loss."""
    evaluated_step: int | None = None
    """Step of the latest evaluation; None before the first."""
    val_loss: float | None = None
    """Validation loss of the latest evaluation; None before the first."""
    evals_since_best: int = 0
    """Number of evaluations since the lowest validation loss so far."""
    n_skipped: int = 0
    """Number of steps that did not change the weights because the loss or the gradient was not finite."""
    mean_grad_norm: float | None = None
    """Exponential moving average of the gradient norm; None before the first finite gradient."""
    smoothed_loss: float | None = None
    """Exponential moving average of the training loss; None before the first finite loss."""

    def summary(self) -> dict[str, object]:
        """Return the numbers of steps and tokens, and the latest and the best losses."""
        best = "none yet" if self.best_step is None else f"{self.best_loss:.4f} (step {self.best_step:,})"
        losses = {"training loss (smoothed)": self.smoothed_loss, "validation loss": self.val_loss}
        return {"steps": self.step, "tokens": self.tokens_seen, **losses, "best validation loss": best}

    def add_to_means(self, loss: float, grad_norm: float, limit: float) -> float:
        """Update the moving averages of loss and gradient norm with the values of a step.

        Return grad_norm divided by its moving average before this update.


        A gradient norm above `limit` times its average is counted as `limit` times the average, so a single very large
        norm changes the average little.
        """
        self.smoothed_loss = loss if self.smoothed_loss is None else 0.9 * self.smoothed_loss + 0.1 * loss
        mean = grad_norm if self.mean_grad_norm is None else self.mean_grad_norm
        self.mean_grad_norm = 0.98 * mean + 0.02 * min(grad_norm, limit * mean)
        return grad_norm / mean if mean else 1.0

    def add_evaluation(self, loss: float, is_saved: bool = True) -> bool:
        """Store the validation loss of the current step, and return True if its model is the best model so far.

        `is_saved` is False if the loss is the lowest but the model could not be saved. The best model so far is then still
        the one on the disk, so that a later model which is better than that one is saved.
        """
        self.val_loss, self.evaluated_step = loss, self.step
        is_lowest = loss < self.best_loss
        self.evals_since_best = 0 if is_lowest else self.evals_since_best + 1
        if is_lowest and is_saved:
            self.best_loss, self.best_step = loss, self.step
        return is_lowest and is_saved

    def has_lost_patience(self, early_stop: int | None) -> bool:
        """Return True if the last early_stop evaluations did not lower the best loss. With None, return False."""
        return early_stop is not None and self.evals_since_best >= early_stop

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict of values that standard JSON can hold.

        Infinity and NaN, which JSON lacks, become the strings "inf", "-inf" and "nan". `val_loss` is None if the
        latest evaluation was at an earlier step, because keep_best compares the losses of the checkpoints' own steps.
        """
        values = vars(self) if self.evaluated_step == self.step else {**vars(self), "val_loss": None}
        non_finite = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
        return {**values, **non_finite}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunState:
        """Return a RunState from the values that `to_json` of this or an earlier version returned.

        Other keys are ignored.

        Raises:
            IncompatibleCheckpointError: a field is missing.
            ValueError: a value has the wrong type, or is impossible after this number of steps.
        """
        values = {_RENAMED.get(key, key): value for key, value in values.items()}
        if missing := [field.name for field in fields(cls) if field.name not in values]:
            raise IncompatibleCheckpointError(f"it lacks {', '.join(missing)}, so another version of MyGPT wrote it")
        state = cls(**{it.name: _from_json(values[it.name], str(it.type), it.name) for it in fields(cls)})
        for name in ("evaluated_step", "evals_since_best", "n_skipped"):
            if (getattr(state, name) or 0) > state.step:
                raise ValueError(f"{name} must be at most the step {state.step}, got {getattr(state, name)}")
        if math.isnan(state.best_loss) or state.best_loss == -math.inf:  # No later loss would be lower.
            raise ValueError(f"best_loss must be a number or inf, got {state.best_loss}")
        return state


def _from_json(value: Any, kind: str, name: str) -> Any:
    """Convert `value` from JSON to the type `kind` of the field `name`, for example "float | None"."""
    if value is None and (kind.endswith("None") or name == "best_loss"):
        return math.inf if name == "best_loss" else None  # Earlier versions wrote null for an infinite best_loss.
    if type(value) is int and 0 <= value < 2**63:
        return value if kind.startswith("int") else float(value)
    if kind.startswith("float") and (isinstance(value, float) or value in ("inf", "-inf", "nan")):
        return float(value)
    raise ValueError(f"{name} must be of type {kind}, got {value!r:.80}")
