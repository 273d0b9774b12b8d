"""DPO (Rafailov et al., 2023): of two answers to a prompt the model learns to prefer the one that people chose.

The loss compares how much more probable the chosen answer has become, against a reference, than the rejected one. The
reference is the same model with its LoRA adapter switched off: there is no second copy of the weights. B pairs, T time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.data.records import read_json_records
from MyGPT.generation import evaluation_mode
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel
from MyGPT.tokenizers.base import encode_with_specials

if TYPE_CHECKING:
    from peft import PeftModel

KEYS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Preferences:
    """What a step of DPO gives; all are means over the pairs."""

    loss: Tensor
    accuracy: float
    """How often the chosen answer has gained more than the rejected one."""
    margin: float
    """How much more, in rewards: beta times nats."""


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Preferences:
    """Equation 7 of the paper, from log-probabilities (B,) of the answers under the model and under the reference.

    beta, above 0, holds the model to the reference; label_smoothing, from 0 to below 0.5, is the share of pairs that are the
    wrong way round (Mitchell, 2023).
    """
    if not beta > 0:
        raise ValueError(f"beta must be a number above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be from 0 to below 0.5, got {label_smoothing}")
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))  # (B,)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return Preferences(loss.mean(), float((margin > 0).float().mean()), float(margin.detach().mean()))


def read_preferences(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The records of a JSON array or of JSON lines; one that is no pair is a ValueError with file, line and key."""
    return read_json_records(path, check_pair)


def check_pair(record: Any, where: str) -> None:
    """A ValueError that begins with `where` unless the record has the texts prompt, chosen and rejected."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object, got {record!r:.80}")
    for key in KEYS:
        if not isinstance(record.get(key), str):
            raise ValueError(f"{where}: {key!r} must be a text, got {record.get(key)!r:.80}")
    if not record["prompt"]:
        raise ValueError(f"{where}: the prompt is empty; an answer needs at least one token before it")


class PreferencePairs:
    """Records of prompt, chosen and rejected as ids: each answer after the prompt's own ids, and then the end of the text.

    The prompt is taken as it is: of a tuned model it is what its template makes of a question. Pairs of which one is longer
    than max_length are left out and counted in `n_too_long`. A record that is no pair is a ValueError with its number and key,
    and so is that no pair is left.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> None:
        if tokenizer.eot_token is None:
            raise ValueError("the tokenizer has no <|endoftext|>, with which a model says that its answer is over")
        self.pad_id: int = tokenizer.eot_token
        self.pairs: list[tuple[list[int], list[int], list[int]]] = []
        self.n_too_long = 0
        for number, record in enumerate(records, start=1):
            check_pair(record, f"record {number}")
            prompt, *answers = (encode_with_specials(tokenizer, record[key]) for key in KEYS)
            ended = [[*answer, self.pad_id] for answer in answers]
            if max(map(len, ended)) + len(prompt) > max_length + 1:
                self.n_too_long += 1
            else:
                self.pairs.append((prompt, ended[0], ended[1]))
        if not self.pairs:
            raise ValueError(
                f"there are no pairs to learn from: {len(records)} records, {self.n_too_long} too long for "
                f"max_length={max_length}"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, batch_size: int, seed: int, epochs: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of up to batch_size pairs in random order: see `batch`."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(len(self.pairs), generator=generator).split(batch_size):
                yield self.batch(part.tolist())

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some pairs, each (2 B, T) int64: first the chosen answers, then the rejected ones.

        Targets are -100 but for the answers. Padding stands on the right, where no token looks.
        """
        pairs = [self.pairs[index] for index in indices]
        rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
        T = max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
        inputs, targets = torch.full((len(rows), T), self.pad_id), torch.full((len(rows), T), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer) - 1
            inputs[row, :end] = torch.tensor([*prompt, *answer[:-1]])
            targets[row, len(prompt) - 1 : end] = torch.tensor(answer)
        return inputs, targets


def preferences(
    peft_model: PeftModel, inputs: Tensor, targets: Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> Preferences:
    """DPO's loss of a batch of `PreferencePairs`, the reference being the model without its adapter."""
    model = peft_model.get_base_model()
    if not isinstance(model, GPTModel):
        raise ValueError(f"DPO is for a PeftModel on a GPTModel, got one on {type(model).__name__}")
    with torch.no_grad(), evaluation_mode(model), peft_model.disable_adapter():
        reference_chosen, reference_rejected = (-model.row_losses(inputs, targets)).chunk(2)
    chosen, rejected = (-model.row_losses(inputs, targets)).chunk(2)
    return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing)


def train_dpo(
    peft_model: PeftModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> list[Preferences]:
    """One optimizer step for each batch; what each gave, before its step."""
    device = next(peft_model.parameters()).device
    steps = []
    for inputs, targets in batches:
        step = preferences(peft_model, inputs.to(device), targets.to(device), beta, label_smoothing)
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(Preferences(step.loss.detach(), step.accuracy, step.margin))
    return steps
