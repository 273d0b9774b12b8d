"""How many nats a model pays for a whole text, read through windows as long as its context.

A text of N targets is longer than the context L. Disjoint windows would leave a window's first targets almost without
context; windows that begin `stride` < L apart, each scoring only the targets that none before it has scored, leave every
target but the first ones at least L - stride tokens, for L / stride times the work. What is counted, words or bytes, and on
which text, is a protocol's business (protocols.py). B batch, T window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from MyGPT.data.tokens import TokenArray, compact_ids
from MyGPT.generation import evaluation_mode
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel

Item = TypeVar("Item")


@dataclass(frozen=True)
class Result:
    """What a model pays for a text."""

    total_nats: float
    """Negative log-likelihood of all targets together."""
    n_tokens: int
    """Targets counted; a text's first token is one only if something stood before it."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.total_nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss). Depends on the tokenizer, so only models that share one can be compared by it."""
        return _exp(self.loss)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Of a text of n_bytes in UTF-8. The same text, any tokenizer: these can be compared."""
        return self.total_nats / math.log(2) / n_bytes

    def word_perplexity(self, n_words: int) -> float:
        """exp(nats a word), for n_words as the text's authors count them; infinite past 1e308."""
        return _exp(self.total_nats / n_words)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def strided_loss(
    model: GPTModel,
    ids: Any,
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    bos_id: int | None = None,
    progress: bool = False,
) -> Result:
    """What the model pays for `ids` (a list, array, memory map or tensor), every target counted exactly once.

    Windows of max_length tokens (default and at most: the model's context) begin `stride` apart (default: max_length, disjoint).
    The last is moved back to end with the text, so that it is as long as the others. With bos_id, put before the text once,
    the first token is a target too. Sums over batches are in float64. Ids outside the vocabulary, a stride outside 1 to
    max_length and a text without a target are ValueErrors.

    transformers' guide to perplexity with windows of max_length + 1 does the same, but for the last window, and counts one
    target a window less where its windows do not overlap; lm-evaluation-harness does the same as the default with a bos_id.
    """
    return documents_loss(model, [ids], stride, max_length, batch_size, bos_id, progress)


def documents_loss(
    model: GPTModel,
    documents: Iterable[Any],
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    bos_id: int | None = None,
    progress: bool = False,
) -> Result:
    """The sum of `strided_loss` over texts of which none sees another; their windows share batches."""
    length = _window_length(model, max_length)
    stride = length if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= length:
        raise ValueError(f"stride must be a whole number from 1 to {length}, the length of a window, got {stride!r}")
    _check_batch_size(batch_size)
    vocab_size = model.config.vocab_size
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise ValueError(f"bos_id must be an id of the vocabulary, 0 to {vocab_size - 1}, got {bos_id!r}")
    texts = [_checked(ids, vocab_size, bos_id) for ids in documents]
    n_targets = sum(max(0, len(ids) - 1) for ids in texts)
    if not n_targets:
        n = max((len(ids) for ids in texts), default=0) - (bos_id is not None)
        needed = "2 tokens, or 1 after a bos_id" if bos_id is None else "1 token"
        raise ValueError(f"a text needs at least {needed}, got {max(0, n)}")
    device = model.lm_head.weight.device
    total, count = 0.0, 0
    windows = (window for ids in texts for window in _windows(ids, length, stride))
    with torch.no_grad(), evaluation_mode(model), tqdm(total=n_targets, unit="token", disable=not progress) as bar:
        for batch in _batches(windows, batch_size):
            inputs = pad_sequence([window for window, _ in batch], batch_first=True)  # (B, T)
            # Padding stands after the tokens, where no token looks, and is no target.
            targets = pad_sequence([targets for _, targets in batch], batch_first=True, padding_value=IGNORED)
            nats, n_counted = model.token_loss(inputs.to(device), targets.to(device))
            total, count = total + float(nats), count + int(n_counted)
            bar.update(int(n_counted))
    assert count == n_targets
    return Result(total, count)


def continuation_logits(
    model: GPTModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    progress: bool = False,
) -> Iterator[Tensor]:
    """For each (context, continuation) of ids the logits from which the continuation's n ids are predicted: (n, V).

    Both hold at least one id. Of a context that is too long the model sees the end.
    """
    _check_batch_size(batch_size)
    length, vocab_size = _window_length(model, None), model.config.vocab_size
    for context, continuation in pairs:
        if not len(context) or not 1 <= len(continuation) <= length:
            raise ValueError(
                f"a context needs a token and a continuation from 1 to {length}, the model's context; "
                f"they have {len(context)} and {len(continuation)}"
            )
        _checked([*context, *continuation], vocab_size, None)
    device = model.lm_head.weight.device
    with torch.no_grad(), evaluation_mode(model), tqdm(total=len(pairs), unit="text", disable=not progress) as bar:
        for batch in _batches(pairs, batch_size):
            rows = [torch.tensor([*context, *rest][-length - 1 : -1]) for context, rest in batch]
            logits = model(pad_sequence(rows, batch_first=True).to(device))  # (B, T, V)
            for row, (_, rest), of_row in zip(rows, batch, logits, strict=True):
                yield of_row[len(row) - len(rest) : len(row)]
            bar.update(len(batch))


def _windows(ids: TokenArray, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of each window, (T,) int64, targets that an earlier window has scored being -100."""
    n_targets, scored = len(ids) - 1, 0
    while scored < n_targets:
        end = min(scored + (stride if scored else length), n_targets)
        begin = max(0, end - length)
        window = torch.from_numpy(ids[begin : end + 1].astype(np.int64))
        targets = window[1:].clone()
        targets[: scored - begin] = IGNORED
        yield window[:-1], targets
        scored = end


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _window_length(model: GPTModel, max_length: int | None) -> int:
    context = model.config.context_length
    length = context if max_length is None else max_length
    if type(length) is not int or not 1 <= length <= context:
        raise ValueError(
            f"max_length must be a whole number from 1 to {context}, the model's context, got {max_length!r}"
        )
    return length


def _check_batch_size(batch_size: int) -> None:
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")


def _checked(ids: Any, vocab_size: int, bos_id: int | None) -> TokenArray:
    """The ids with bos_id before them."""
    array = compact_ids(ids)
    if len(array) and int(array.max()) >= vocab_size:
        raise ValueError(
            f"the text has the id {int(array.max())}, the model's ids are 0 to {vocab_size - 1}: "
            "its tokens must come from the model's tokenizer"
        )
    return array if bos_id is None else np.concatenate([compact_ids([bos_id]), array])
