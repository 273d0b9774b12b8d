"""How a model is trained, as data: the same object feeds Python, YAML and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from MyGPT.data import Order

Schedule = Literal["cosine", "linear", "constant", "wsd"]
OptimizerName = Literal["adamw", "muon"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """A training run. A value out of range is a ValueError."""

    max_steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 12
    """Sequences a step."""
    micro_batch_size: int | None = None
    """Sequences in memory at a time; the gradients of a step add up over them. Default: the whole batch."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to learning_rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls: along a cosine, a line, not at all, or after a plateau (wsd: warmup, stable, decay)."""
    decay_fraction: float = 0.2
    """Part of the steps in which wsd decays."""
    optimizer: OptimizerName = "adamw"
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest."""
    muon_learning_rate: float = 0.02
    """Highest learning rate of Muon."""
    muon_momentum: float = 0.95
    """Muon's decay of the mean gradient; a run of few hundred steps wants less."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; biases and LayerNorms are not decayed."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.99
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the gradient, 0 for any."""
    order: Order = "random"
    """Which windows a step sees: random ones, shuffled epochs, or the text in sequence."""
    precision: Precision = "auto"
    """Arithmetic of the matrix products; auto takes bf16 where the machine gains from it."""
    gradient_checkpointing: bool = False
    """Compute each block anew on the way back instead of keeping its activations: less memory, a third more work."""
    compile: bool = False
    """Compile the blocks with torch.compile: a wait at the start, then faster steps."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_windows: int = 200
    """Windows of the fixed set that each evaluation uses; the last evaluation uses the whole validation text."""
    early_stop: int | None = None
    """Stop after so many evaluations without a new best."""
    sample_every: int = 500
    """Steps between live samples, 0 for none."""
    sample_tokens: int = 200
    """Tokens of a live sample."""
    sample_temperature: float = 0.8
    """Temperature of live samples, 0 for greedy ones."""
    sample_to_end: bool = False
    """End live samples where the model ends them."""
    sample_prompt: str = ""
    """What live samples begin with; default: the first tokens of the validation text."""
    log_every: int = 10
    """Steps between the entries in metrics.jsonl."""
    checkpoint_every: int = 250
    """Steps between checkpoints, from which --resume goes on as if nothing had happened; 0 for none by steps."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is one in any case; 0 for none by time."""
    keep_last: int = 2
    """Checkpoints that are kept, the newest ones."""
    keep_best: int = 0
    """Checkpoints kept beside those for their low validation loss; the best model is in model/ in any case."""
    max_skipped_steps: int = 10
    """Steps that may be left out because their loss or gradient is not finite; with one more the run stops."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms alone. A processor's are anyway; on a GPU some are slower, some missing."""
    tensorboard: bool = False
    """Write TensorBoard's event files beside metrics.jsonl."""
    seed: int = 1337
    """Governs the initial weights, the order of the data, dropout and samples."""

    def __post_init__(self) -> None:
        positive = (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "eval_every",
            "eval_windows",
            "early_stop",
            "log_every",
            "keep_last",
        )
        natural = (
            "warmup_steps",
            "sample_every",
            "sample_tokens",
            "checkpoint_every",
            "keep_best",
            "max_skipped_steps",
        )
        for name in (*positive, *natural, "seed"):
            value, least = getattr(self, name), 1 if name in positive else 0
            if value is None and name in ("micro_batch_size", "early_stop"):
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if kind == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name} must be a number, got {value!r}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}")
        for name in ("min_learning_rate", "weight_decay", "grad_clip", "sample_temperature", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 up to but not including 1, got {getattr(self, name)!r}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be above 0 and at most 1, got {self.decay_fraction!r}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be at most learning_rate, got {self.min_learning_rate} and {self.learning_rate}"
            )
        for name, allowed in (
            ("schedule", Schedule),
            ("optimizer", OptimizerName),
            ("precision", Precision),
            ("order", Order),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
