"""The options of a training run. Python, YAML files and the command line all use this definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from MyGPT.config import TrainingPrecision, check_seed
from MyGPT.data import Order
from MyGPT.messages import did_you_mean

Schedule = Literal["cosine", "linear", "constant", "wsd"]
OptimizerName = Literal["adamw", "muon"]
Parallel = Literal["none", "ddp", "fsdp"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
_LARGEST = 10**12
"""The largest value of options that are whole numbers, except the seed. Much larger ones overflow in torch."""
_AT_LEAST_0 = (lambda value: 0 <= value < math.inf), "of at least 0"
_ABOVE_0 = (lambda value: 0 < value < math.inf), "above 0"
_BELOW_1 = (lambda value: 0 <= value < 1), "from 0 up to but not including 1"
_RANGES = {
    **dict.fromkeys(("learning_rate", "muon_learning_rate", "timeout_minutes"), _ABOVE_0),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum"), _BELOW_1),
    "decay_fraction": ((lambda value: 0 < value <= 1), "above 0 and at most 1"),
}
"""Maps float options to a test of the value and a text with the allowed range. Other floats must be at least 0."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run. Raises ValueError if a value is not allowed."""

    max_steps: int = 2000
    """Number of optimizer steps."""
    batch_size: int = 12
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass. The gradients of all passes are added. Default: the whole batch in one pass."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 1e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0 to its peak. If the run has no more steps than this, a tenth
    of the run is used instead."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate after the warmup. wsd (warmup, stable, decay) stays constant, then falls linearly."""
    decay_fraction: float = 0.2
    """Fraction of all steps, at the end of the run, in which wsd lowers the learning rate."""
    optimizer: OptimizerName = "adamw"
    """AdamW for all parameters, or Muon for the weight matrices of the blocks and AdamW for the other parameters."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon."""
    muon_momentum: float = 0.95
    """Momentum of Muon; use a lower value for runs of a few hundred steps."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; biases and LayerNorm parameters are not decayed."""
    beta1: float = 0.9
    """AdamW's decay rate for the running mean of the gradient."""
    beta2: float = 0.99
    """AdamW's decay rate for the running mean of the squared gradient."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down. 0 turns clipping off."""
    order: Order = "random"
    """Order of training sequences: random (drawn at random), shuffled (in each epoch) or sequential (as in the text)."""
    precision: TrainingPrecision = "auto"
    """Precision of matrix products: fp32, bf16, or auto, which uses bf16 where it is faster and fp32 elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, a third more compute."""
    compile: bool = False
    """Compile the blocks with torch.compile, which starts slowly and then makes steps faster. Ignored on a CPU."""
    parallel: Parallel | None = None
    """Storage of the weights: ddp keeps a copy on each rank, fsdp divides them among the ranks, none needs a single rank.
    Default: ddp on several ranks, none on one."""
    shard_size: int | None = None
    """Number of ranks that divide one copy of the weights with parallel: fsdp. Default: all ranks."""
    timeout_minutes: float = 10.0
    """End the run if a rank does not respond for this many minutes."""
    eval_every: int = 250
    """Steps between evaluations on the validation text."""
    eval_windows: int = 200
    """Validation sequences per evaluation; the last evaluation uses the whole validation text."""
    early_stop: int | None = None
    """Stop after this many evaluations without a new lowest validation loss. Default: never stop early."""
    sample_every: int = 500
    """Steps between sample texts. 0 turns sample texts off."""
    sample_tokens: int = 200
    """Length of a sample text in tokens."""
    sample_temperature: float = 0.8
    """Sampling temperature of the sample texts. 0 always takes the most likely token."""
    sample_to_end: bool = False
    """End a sample text at the end-of-text token."""
    sample_prompt: str = ""
    """Prompt of the sample texts. Default: the first tokens of the validation text."""
    log_every: int = 10
    """Steps between the entries in metrics.jsonl."""
    checkpoint_every: int = 250
    """Steps between checkpoints, from which --resume continues with identical results. 0 turns them off."""
    checkpoint_minutes: float = 10.0
    """Also save a checkpoint when this many minutes have passed since the last one. 0 turns this off."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; older checkpoints are deleted."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation loss that are also kept. model/ always holds the best model."""
    keep_every: int = 0
    """Steps between models that are kept for good in history/, for mygpt explain --replay. 0 turns this off."""
    max_skipped_steps: int = 10
    """Stop the run if more steps than this were skipped because their loss or gradient was not finite."""
    deterministic: bool = False
    """Use only deterministic algorithms. On a GPU, some are slower, others are missing (an error). CPUs always use them."""
    log_to: str | list[str] | None = None
    """Trackers that also receive the entries of metrics.jsonl, separated by commas: tensorboard, wandb, mlflow, trackio."""
    tensorboard: bool = False
    """Also write TensorBoard event files, as log_to: tensorboard does."""
    seed: int = 1337
    """Seed of the initial weights, the data order, dropout and the sample texts."""

    def __post_init__(self) -> None:
        at_least_0 = (
            "warmup_steps sample_every sample_tokens checkpoint_every keep_best keep_every max_skipped_steps seed"
        ).split()
        for field in fields(self):
            name, value, least = field.name, getattr(self, field.name), 0 if field.name in at_least_0 else 1
            if field.type == "int" or (field.type == "int | None" and value is not None):
                if type(value) is not int or value < least:
                    raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
                if name != "seed" and value > _LARGEST:
                    raise ValueError(f"{name} must be at most {_LARGEST:,}, got {value}")
            elif field.type == "float":
                is_allowed, allowed = _RANGES.get(name, _AT_LEAST_0)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_allowed(value):
                    raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
        check_seed(self.seed)
        if self.min_learning_rate > self.learning_rate:
            rates = f"{self.min_learning_rate} and {self.learning_rate}"
            raise ValueError(f"min_learning_rate must be at most learning_rate, got {rates}")
        kinds = {"schedule": Schedule, "optimizer": OptimizerName, "precision": TrainingPrecision, "order": Order}
        for name, choices in ((name, get_args(kind)) for name, kind in kinds.items()):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self.trackers()  # checks their names
        if self.parallel is not None and self.parallel not in get_args(Parallel):
            raise ValueError(f"parallel must be one of {', '.join(get_args(Parallel))}, got {self.parallel!r}")
        if self.shard_size is not None and self.parallel != "fsdp":
            raise ValueError(f"shard_size={self.shard_size} needs parallel: fsdp, got parallel: {self.parallel}")

    def trackers(self) -> tuple[str, ...]:
        """Return the names of the trackers in log_to, each once, with tensorboard if that option is True.

        Raises ValueError for an unknown name.
        """
        given = [self.log_to] if isinstance(self.log_to, str) else self.log_to or []
        if not all(isinstance(name, str) for name in given):
            raise ValueError(f"log_to must be a list of texts, got {self.log_to!r}")
        names = [name.strip() for text in given for name in text.split(",")] + ["tensorboard"] * self.tensorboard
        for name in names:
            if name not in get_args(TrackerName):
                hint = did_you_mean(name, get_args(TrackerName))
                raise ValueError(f"log_to must name some of {', '.join(get_args(TrackerName))}, got {name!r}{hint}")
        return tuple(dict.fromkeys(names))

    def shard_size_on(self, n_ranks: int) -> int | None:
        """Return the number of ranks that divide one copy of the weights, or None if the model is not distributed.

        Raises ValueError if the options do not fit n_ranks ranks.
        """
        parallel = self.parallel or ("ddp" if n_ranks > 1 else "none")
        if parallel == "none":
            if n_ranks > 1:
                raise ValueError(f"parallel must be ddp or fsdp on {n_ranks} ranks, got none")
            return None
        size = 1 if parallel == "ddp" else self.shard_size or n_ranks
        if n_ranks % size:
            raise ValueError(f"shard_size must divide the number of ranks, which is {n_ranks}, got {size}")
        return size
