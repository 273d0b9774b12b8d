"""Train a model with direct preference optimization (DPO, Rafailov et al., 2023) to prefer chosen to rejected answers.

The loss compares the log-probabilities of both answers under the trained model and under a reference model. The reference
model is the same model with its LoRA adapter disabled, so no second copy of the weights is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from MyGPT.data.records import read_json_records
from MyGPT.data.windows import Batch
from MyGPT.generation import evaluation_mode
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel
from MyGPT.sampling import require_finite
from MyGPT.tokenizers.base import encode_with_specials, encode_without_end

if TYPE_CHECKING:
    from peft import PeftModel

KEYS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Preferences:
    """The results of DPO on a batch of pairs of a chosen and a rejected answer; each value is a mean over the pairs."""

    loss: Tensor
    """The DPO loss, a scalar tensor."""
    accuracy: float
    """The fraction of pairs in which the chosen answer has the higher reward (see `margin`)."""
    margin: float
    """The reward of the chosen answer minus the reward of the rejected answer. The reward of an answer is
    beta * (its log-probability under the model - its log-probability under the reference)."""


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Preferences:
    """Compute the DPO loss (Rafailov et al., 2023, equation 7) from the log-probabilities of the answers of B pairs.

    Args:
        chosen, rejected: log-probabilities of the answers under the trained model, each (B,).
        reference_chosen, reference_rejected: log-probabilities of the answers under the reference model, each (B,).
        beta: a number above 0. A larger beta keeps the model closer to the reference model.
        label_smoothing: expected fraction of pairs whose labels "chosen" and "rejected" are swapped by mistake, from 0 to
            below 0.5 (Mitchell, 2023).
    """
    if not beta > 0:
        raise ValueError(f"beta must be a number above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be from 0 to below 0.5, got {label_smoothing}")
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))  # (B,)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return Preferences(loss.mean(), float((margin > 0).float().mean()), float(margin.detach().mean()))


def read_preferences(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Return the records of a JSON or JSON Lines file of preference pairs.

    Raises ValueError, with the file, line and key in its message, if `check_pair` refuses a record.
    """
    return read_json_records(path, check_pair)


def check_pair(record: Any, where: str) -> None:
    """Raise ValueError unless the record has the texts prompt, chosen and rejected. The message starts with `where`."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object, got {record!r:.80}")
    for key in KEYS:
        if not isinstance(record.get(key), str):
            raise ValueError(f"{where}: {key!r} must be a text, got {record.get(key)!r:.80}")
    if not record["prompt"]:
        raise ValueError(f"{where}: the prompt is empty; it must have at least one token")


class PreferencePairs:
    """A preference data set as token ids: prompts, each with a chosen and a rejected answer that end with `<|endoftext|>`.

    Args:
        records: dicts with the texts prompt, chosen and rejected. Prompts are encoded unchanged. If the model was
            fine-tuned with a prompt template, apply the template first.
        tokenizer: a tokenizer with `<|endoftext|>`.
        max_length: maximum number of tokens of a prompt with its answer. Longer pairs are skipped and counted in
            `n_too_long`.

    Raises:
        ValueError: a record is invalid, no pair is left, or the tokenizer has no `<|endoftext|>`.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> None:
        if tokenizer.eot_token is None:
            raise ValueError("the tokenizer has no <|endoftext|>, which marks the end of an answer")
        self.pad_id: int = tokenizer.eot_token
        self.pairs: list[tuple[list[int], list[int], list[int]]] = []
        self.n_too_long = 0
        for number, record in enumerate(records, start=1):
            check_pair(record, f"record {number}")
            prompt = encode_with_specials(tokenizer, record["prompt"])
            ended = [[*encode_without_end(tokenizer, record[key]), self.pad_id] for key in KEYS[1:]]
            if max(map(len, ended)) + len(prompt) > max_length + 1:
                self.n_too_long += 1
            else:
                self.pairs.append((prompt, ended[0], ended[1]))
        if not self.pairs:
            counts = f"{len(records)} records, {self.n_too_long} too long for max_length={max_length}"
            raise ValueError(f"there are no pairs to train on: {counts}")

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, batch_size: int, seed: int, epochs: int = 1) -> Iterator[Batch]:
        """Yield the pairs in batches of at most batch_size pairs (see `batch`), all pairs in each of `epochs` epochs.

        Each epoch has a new random order, which depends on the seed.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(len(self.pairs), generator=generator).split(batch_size):
                yield self.batch(part.tolist())

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the inputs and the targets of the B pairs with these indices, each (2 B, T) int64.

        The first B sequences are the prompts with their chosen answers, the others the prompts with their rejected answers.
        Sequences are padded on the right. Targets are -100, which the loss ignores, in prompts and padding.
        """
        pairs = [self.pairs[index] for index in indices]
        rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
        inputs = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer in rows]
        targets = [torch.tensor([IGNORED] * (len(prompt) - 1) + answer) for prompt, answer in rows]
        return pad_sequence(inputs, True, self.pad_id), pad_sequence(targets, True, IGNORED)


def preferences(
    peft_model: PeftModel, inputs: Tensor, targets: Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> Preferences:
    """Compute the DPO loss of a batch. The reference model is the model without its adapter.

    `inputs` and `targets` come from `PreferencePairs.batch`. `dpo_loss` explains beta and label_smoothing.
    """
    model = peft_model.get_base_model()
    if not isinstance(model, GPTModel):
        raise ValueError(f"DPO needs a PeftModel of a GPTModel, got a PeftModel of a {type(model).__name__}")
    with torch.no_grad(), evaluation_mode(model), peft_model.disable_adapter():
        reference_chosen, reference_rejected = (-model.row_losses(inputs, targets)).chunk(2)
    chosen, rejected = (-model.row_losses(inputs, targets)).chunk(2)
    return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing)


def train_dpo(
    peft_model: PeftModel,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> list[Preferences]:
    """Take one optimizer step per batch, and return the `Preferences` of each batch, computed before its update.

    `batches` comes from `PreferencePairs.batches`. `dpo_loss` explains beta and label_smoothing. A loss that is NaN or
    infinite raises FloatingPointError before its update, so it does not change the weights.
    """
    device = next(peft_model.parameters()).device
    steps: list[Preferences] = []
    for inputs, targets in batches:
        step = preferences(peft_model, inputs.to(device), targets.to(device), beta, label_smoothing)
        require_finite(f"the loss of step {len(steps)}", step.loss.detach())
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(Preferences(step.loss.detach(), step.accuracy, step.margin))
    return steps
