"""Train a model with direct preference optimization (DPO, Rafailov et al., 2023) to prefer chosen to rejected answers.

The loss compares the log-probabilities of both answers under the trained model and under a reference model. The reference
model is the same model with its LoRA adapter disabled, so no second copy of the weights is needed.

Records have the forms that TRL accepts: texts, conversations, and pairs whose prompt is the common beginning of both answers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from MyGPT.data.conversions import converted
from MyGPT.data.instructions import encode_prompt
from MyGPT.data.records import Record, check_record, is_missing, read_items
from MyGPT.data.templates import ALPACA, Template
from MyGPT.data.tokens import fingerprint
from MyGPT.data.windows import Batch
from MyGPT.generation import evaluation_mode
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel
from MyGPT.notebooks import Described
from MyGPT.sampling import require_finite
from MyGPT.tokenizers.base import encode_without_end, require_end_token

if TYPE_CHECKING:
    from peft import PeftModel

ANSWERS = ("chosen", "rejected")
PLAIN = replace(ALPACA, asks="prompt")
"""The template of `PreferencePairs` by default. A prompt that is a text is used unchanged."""


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
    check_beta(beta, label_smoothing)
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))  # (B,)
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return Preferences(loss.mean(), float((margin > 0).float().mean()), float(margin.detach().mean()))


def check_beta(beta: float, label_smoothing: float) -> None:
    """Raise ValueError if an argument of `dpo_loss` is out of range."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a number above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be from 0 to below 0.5, got {label_smoothing}")


def read_preferences(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file of preference pairs, as they are in the file.

    Raises ValueError, with the file, line and key in its message, if `with_answers` refuses a record.
    """
    items = list(read_items(path))
    for where, record in items:
        with_answers(record, where)
    return [record for _, record in items]


def with_answers(record: Any, where: str, asks: str = "prompt") -> tuple[Record, Record]:
    """Return a preference pair as two fine-tuning records: the prompt with the chosen answer, and with the rejected one.

    Args:
        record: a dict with the answers "chosen" and "rejected", which are both texts or both conversations (lists of
            messages), and with the prompt: "prompt", a text or a conversation; "messages" or "conversations"; or
            "instruction" with an optional "input". Without a prompt, or with whole conversations beside a text as prompt, the
            prompt is the longest common beginning of both answers, as in TRL.
        where: the name of the record, with which error messages start.
        asks: the kind of record to which a prompt that is a text is converted: instruction, messages or prompt.

    Raises:
        ValueError: the record has none of these forms, its prompt is empty, or an answer has more than one message.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object, got {record!r:.80}")
    record = {key: value for key, value in converted(record, where).items() if not is_missing(value)}
    if "completion" in record and "label" in record and not any(answer in record for answer in ANSWERS):
        rule = "DPO needs a chosen and a rejected answer to each prompt"
        raise ValueError(f"{where}: the record has one answer with a label (unpaired preference), but {rule}")
    for answer in ANSWERS:
        if answer not in record:
            raise ValueError(f"{where}: the key {answer!r} is missing; there are {', '.join(map(str, record))}")
    chosen, rejected = (_answer(record.get(key), f"{where}: {key!r}") for key in ANSWERS)
    is_conversation = isinstance(chosen, list)
    if is_conversation != isinstance(rejected, list):
        raise ValueError(f"{where}: 'chosen' and 'rejected' must be both texts or both conversations")
    key = next((key for key in ("prompt", "messages", "conversations") if key in record), None)
    if key is None and "instruction" in record and not is_conversation:
        question = {key: record[key] for key in ("instruction", "input") if key in record}
        check_record(question, where, needs_answer=False)
        return {**question, "output": chosen}, {**question, "output": rejected}
    prompt = "" if key is None else _answer(record[key], f"{where}: {key!r}")
    if key is None or (isinstance(prompt, str) and is_conversation and len(chosen) > 1):
        n = _common_length(chosen, rejected)
        if not n:
            ways = "give the key 'prompt', or answers with a common beginning"
            raise ValueError(f"{where}: the prompt is missing: {ways}; the record has {', '.join(map(str, record))}")
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty; it must have at least one token")
    form = "messages" if is_conversation else asks
    first, second = (_example(prompt, _last_message(answer, where), form) for answer in (chosen, rejected))
    check_record(first, where, needs_answer=False)
    return first, second


def _example(prompt: Any, answer: str, asks: str) -> Record:
    """Return a fine-tuning record with a prompt and its answer. A prompt that is a text gives a record of the kind `asks`."""
    if isinstance(prompt, str) and asks == "prompt":
        return {"prompt": prompt, "completion": answer}
    if isinstance(prompt, str) and asks == "instruction":
        return {"instruction": prompt, "output": answer}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def _answer(value: Any, where: str) -> Any:
    """Return a prompt or an answer: a text, or a list of messages with `role` and `content`, to which one message is converted.

    Messages may have ShareGPT's keys. Another value raises ValueError, whose message starts with `where`.
    """
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if isinstance(messages, list) and messages:
        return check_record({"conversations": messages}, where, needs_answer=False)["messages"]
    raise ValueError(f"{where} must be a text or a list of messages, got {value!r:.80}")


def _common_length(chosen: Any, rejected: Any) -> int:
    """Return the length of the longest common beginning of two texts or conversations, by TRL's rule.

    In texts, a space at its end belongs to the answers.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    n = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    return n - 1 if isinstance(chosen, str) and chosen[:n].endswith(" ") else n


def _last_message(answer: Any, where: str) -> str:
    """Return the text of an answer, which is a text or a list with one message of the assistant."""
    if isinstance(answer, str):
        return answer
    if [message["role"] for message in answer] != ["assistant"]:
        roles = ", ".join(message["role"] for message in answer) or "none"
        rule = "after the common prompt, each answer must be one message of the assistant"
        raise ValueError(f"{where}: {rule}, got messages with the roles: {roles}")
    text: str = answer[0]["content"]
    return text


class PreferencePairs(Described):
    """A preference data set as token ids: prompts, each with a chosen and a rejected answer.

    Both answers end with the tokenizer's end-of-text token.

    Args:
        records: dicts as described at `with_answers`, for example with the texts prompt, chosen and rejected.
        tokenizer: a tokenizer with an end-of-text token.
        max_length: maximum number of tokens of a prompt with its answer. Longer pairs are skipped and counted in
            `n_too_long`.
        template: adds text around the messages of conversations and the fields of instructions. A prompt that is a text
            becomes a record of the kind `template.asks`; by default it is used unchanged.
        names: the name of each record in error messages. Default: "record 1", "record 2" and so on.

    Raises:
        ValueError: a record is invalid, no pair is left, or the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        max_length: int,
        template: Template = PLAIN,
        names: Sequence[str] | None = None,
    ) -> None:
        require_end_token(tokenizer, "DPO")
        self.pad_id: int = tokenizer.eot_token
        self.max_length = max_length
        self.pairs: list[tuple[list[int], list[int], list[int]]] = []
        self.n_too_long = 0
        for number, record in enumerate(records):
            where = f"record {number + 1}" if names is None else names[number]
            both = with_answers(record, where, template.asks)
            try:
                prompt = encode_prompt(both[0], tokenizer, template)
                answers = [self._encode_answer(one, tokenizer, template) for one in both]
            except ValueError as error:  # The tokenizer does not know a character.
                raise ValueError(f"{where}: {error}") from None
            if not prompt:
                raise ValueError(f"{where}: the prompt is empty; it must have at least one token")
            if max(map(len, answers)) + len(prompt) > max_length + 1:
                self.n_too_long += 1
            else:
                self.pairs.append((prompt, answers[0], answers[1]))
        if not self.pairs:
            counts = f"{len(records)} records, {self.n_too_long} too long for max_length={max_length}"
            raise ValueError(f"there are no pairs to train on: {counts}")
        self.lengths = np.array([len(prompt) + max(len(one), len(other)) - 1 for prompt, one, other in self.pairs])
        """Number of input tokens in the longer sequence of each pair: an integer array (n_pairs,)."""

    def _encode_answer(self, record: Record, tokenizer: Any, template: Template) -> list[int]:
        """Return the token ids of a record's answer. They end with one end-of-text id."""
        n_prompt_parts = len(template.parts(record, with_answer=False))
        answer = template.parts(record)[n_prompt_parts:]
        return [*(id_ for part in answer for id_ in encode_without_end(tokenizer, part.text)), self.pad_id]

    def summary(self) -> dict[str, object]:
        """Return the numbers of pairs, tokens in the longest answer with its prompt, and pairs that were left out."""
        return {"pairs": len(self), "longest": int(self.lengths.max()), "too_long": self.n_too_long}

    def describe(self) -> str:
        """Return a one-line summary: the numbers of pairs, of their longest tokens, and of pairs that were left out."""
        text = f"{len(self):,} pairs, the longest has {self.lengths.max():,} tokens"
        if self.n_too_long:
            text += f"; {self.n_too_long:,} more left out because they are longer than {self.max_length:,} tokens"
        return text

    def fingerprint(self) -> str:
        """Return a hash of all pairs, with which a resumed training run detects changed data."""
        parts = [np.array(part, np.uint32) for pair in self.pairs for part in pair]
        return fingerprint(np.array([len(part) for part in parts]), np.concatenate(parts))

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

    def examples(self, indices: Sequence[int]) -> Batch:
        """Return the inputs and the targets of the B pairs with these indices, each (B, 2, T) int64: a pair in each row."""
        inputs, targets = (part.unflatten(0, (2, -1)).transpose(0, 1) for part in self.batch(indices))
        return inputs, targets


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


@dataclass(frozen=True)
class PreferenceLoss:
    """The DPO loss as the objective of a Trainer. Its terms are pairs; the reference is the model without its adapter.

    A batch has the inputs and the targets of B pairs from `PreferencePairs.examples`, each (B, 2, T).
    """

    peft_model: PeftModel
    beta: float = 0.1
    label_smoothing: float = 0.0
    scores: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")

    def count(self, *batch: Tensor) -> int:
        """Return the number of pairs."""
        return len(batch[0])

    def __call__(self, *batch: Tensor) -> tuple[Tensor, int]:
        """Return the sums of loss, accuracy and margin over the pairs (see `Preferences`), (3,), and the number of pairs."""
        n = len(batch[0])
        # Each becomes (2 B, T), with the chosen answers first.
        inputs, targets = (part.transpose(0, 1).flatten(0, 1) for part in batch)
        found = preferences(self.peft_model, inputs, targets, self.beta, self.label_smoothing)
        return n * torch.stack([found.loss, *found.loss.new_tensor([found.accuracy, found.margin])]), n
