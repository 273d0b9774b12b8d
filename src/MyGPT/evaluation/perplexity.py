"""Compute the loss of a model on texts that are longer than its context.

The text is cut into windows of L tokens, and the model predicts each next token (target). If windows do not overlap, the
first targets of each window have little context. If windows start only `stride` < L tokens apart, they overlap, but each
target is still scored only once. After the first window, every target then has at least L - stride tokens of context. This
takes L / stride times as long. Shapes: B windows in a batch, T tokens of a window, V vocabulary size.
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

from MyGPT import ranks
from MyGPT.config import require_positive
from MyGPT.data.tokens import Tokens, compact_ids
from MyGPT.generation import evaluation_mode
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel
from MyGPT.notebooks import Described
from MyGPT.progress import progress_bar
from MyGPT.sampling import require_finite

Item = TypeVar("Item")
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Result(Described):
    """The summed loss of a model on one or several texts, and the number of predicted tokens (targets)."""

    total_nats: float
    """Summed negative log-likelihood of all targets, in nats."""
    n_tokens: int
    """Number of targets. The first token of a text is a target only if a beginning-of-text token (bos_id) precedes it."""

    def summary(self) -> dict[str, object]:
        """Return the loss, the perplexity and the number of targets."""
        return {"loss (nats per token)": self.loss, "perplexity": self.perplexity, "tokens": self.n_tokens}

    @property
    def loss(self) -> float:
        """The mean loss in nats per token."""
        return self.total_nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """The perplexity per token, exp(loss). It can be compared only between models that have the same tokenizer."""
        return _exp(self.loss)

    def bits_per_byte(self, n_bytes: int) -> float:
        """Return the loss in bits per byte, where n_bytes is the number of bytes of all targets.

        The first token of a text is a target only after a bos_id; without one, its bytes must not be counted either. The
        result does not depend on the number of tokens, so models with different tokenizers can be compared.
        """
        _require_some("bytes", n_bytes)
        return self.total_nats / math.log(2) / n_bytes

    def word_perplexity(self, n_words: float) -> float:
        """Return the perplexity per word, exp(total_nats / n_words), where n_words is the number of words of all targets.

        A word of which only a part is a target counts as a fraction. The result is infinity if it is too large for a float.
        """
        _require_some("words", n_words)
        return _exp(self.total_nats / n_words)


def _require_some(units: str, n: float) -> None:
    """Raise ValueError unless a number of bytes or words, by which a loss is divided, is above 0."""
    if not n > 0:
        raise ValueError(f"a loss per unit needs a text with {units}, got {n} {units}")


def _exp(x: float) -> float:
    """Return exp(x), or infinity if exp(x) would overflow."""
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
    """Compute the loss of the model on a text in windows; every predicted token (target) is scored exactly once.

    If the text is longer than a window, the last window ends with the text and is as long as the others. Losses of batches
    are summed in float64. With the default stride and a bos_id, the result agrees with lm-evaluation-harness. The code in
    the perplexity guide of transformers, with windows of max_length + 1 tokens, gives another loss for the last window. If
    windows do not overlap, that code also skips one target per window.

    Args:
        model: the model to evaluate. It runs in evaluation mode without gradients. Afterwards, its former mode is restored.
        ids: token ids of the text as a list, array, memory map, ShardedTokens or tensor.
        stride: tokens between the starts of two windows, from 1 to max_length. Default: max_length (no overlap).
        max_length: tokens per window, at most the model's context length. Default: the model's context length.
        batch_size: windows per forward pass.
        bos_id: a beginning-of-text id that is put before the text, so the first token is a target too. Default: no id.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range, an id is outside the vocabulary, or the text is too short for a target.
        FloatingPointError: the loss is NaN or infinite.
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
    divide: bool = False,
) -> Result:
    """Compute the loss of the model, summed over several independent texts.

    `documents` contains the token ids of each text. Each window belongs to one text, so a text is never the context of
    another text, but a batch may contain windows of several texts. `divide=True` divides the windows among the ranks of
    torch.distributed, which must all call this function, and returns the sum of all ranks. `strided_loss` explains the
    other arguments and the errors.
    """
    context, vocab_size = model.config.context_length, model.config.vocab_size
    length = context if max_length is None else max_length
    if type(length) is not int or not 1 <= length <= context:
        raise ValueError(
            f"max_length must be a whole number from 1 to {context}, the model's context, got {max_length!r}"
        )
    stride = length if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= length:
        raise ValueError(f"stride must be a whole number from 1 to {length}, the length of a window, got {stride!r}")
    require_positive(batch_size=batch_size)
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise ValueError(f"bos_id must be an id of the vocabulary, 0 to {vocab_size - 1}, got {bos_id!r}")
    texts = [_checked(ids, vocab_size, bos_id) for ids in documents]
    n_targets = sum(max(0, len(ids) - 1) for ids in texts)
    if not n_targets:
        n = max((len(ids) for ids in texts), default=0) - (bos_id is not None)
        needed = "2 tokens, or 1 after a bos_id" if bos_id is None else "1 token"
        raise ValueError(f"a text needs at least {needed}, got {max(0, n)}")
    device, total, count = model.lm_head.weight.device, 0.0, 0
    windows = (window for ids in texts for window in _windows(ids, length, stride))
    n_ranks = ranks.world_size() if divide else 1
    with torch.no_grad(), evaluation_mode(model), progress_bar(progress, total=n_targets, unit="token") as bar:
        for batch in _batches(islice(windows, ranks.rank() if divide else 0, None, n_ranks), batch_size):
            inputs = pad_sequence([window for window, _ in batch], batch_first=True)  # (B, T)
            # Padding follows the tokens, so no token attends to it, and it is not a target.
            targets = pad_sequence([targets for _, targets in batch], batch_first=True, padding_value=IGNORED)
            nats, n_counted = model.token_loss(inputs.to(device), targets.to(device))
            require_finite(f"the loss of tokens {count + 1:,} to {count + int(n_counted):,}", nats)
            total, count = total + float(nats), count + int(n_counted)
            bar.update(n_ranks * int(n_counted))
    if divide:
        total, number = ranks.sum_numbers([total, count])
        count = int(number)
    assert count == n_targets
    return Result(total, count)


def continuation_logits(
    model: GPTModel, pairs: Sequence[Pair], batch_size: int = 8, progress: bool = False
) -> Iterator[Tensor]:
    """Yield, for each pair (context ids, continuation ids), the logits that predict the continuation's n tokens.

    The logits have the shape (n, vocabulary size). Each context and each continuation needs at least one token. If a pair
    is too long for the model, the first tokens of its context are left out. Each forward pass reads batch_size pairs. If
    `progress` is true, a progress bar is shown.

    The model runs in evaluation mode without gradients, but only during a forward pass: the code of the caller, which runs
    between two results, finds the model in the training or evaluation mode that the caller had set.
    """
    require_positive(batch_size=batch_size)
    length = model.config.context_length
    for context, continuation in pairs:
        if not len(context) or not 1 <= len(continuation) <= length:
            raise ValueError(
                f"a context needs at least 1 token and a continuation 1 to {length}, the model's context; "
                f"got {len(context)} and {len(continuation)}"
            )
        _checked([*context, *continuation], model.config.vocab_size, None)
    with progress_bar(progress, total=len(pairs), unit="text") as bar:
        for batch in _batches(pairs, batch_size):
            # Evaluation mode ends before each `yield`, because the caller's code runs between two results.
            yield from _batch_logits(model, batch, length)
            bar.update(len(batch))


@torch.no_grad()
def _batch_logits(model: GPTModel, batch: list[Pair], length: int) -> list[Tensor]:
    """Return, for each pair (context, continuation), the logits (n, V) that predict the continuation's n tokens.

    V is the vocabulary size. One forward pass computes all logits. The model reads each pair without its final token, which
    is only predicted, and at most the last `length` tokens of the rest.
    """
    rows = [torch.tensor([*context, *rest][-length - 1 : -1]) for context, rest in batch]
    with evaluation_mode(model):
        logits = model(pad_sequence(rows, batch_first=True).to(model.lm_head.weight.device))  # (B, T, V)
    return [of_row[len(row) - len(rest) : len(row)] for row, (_, rest), of_row in zip(rows, batch, logits, strict=True)]


def _windows(ids: Tokens, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs and the targets of each window of a text, both (T,) int64 with T at most `length`.

    Each window ends `stride` tokens after the one before, and the last window ends with the text. Targets
    that an earlier window has scored are -100, which the loss ignores.
    """
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
    """Yield all items in order, in lists of `size` items; the last list may be shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _checked(ids: Any, vocab_size: int, bos_id: int | None) -> Tokens:
    """Return the ids as an integer array, which starts with bos_id unless bos_id is None.

    Raises ValueError if one of the ids is not in the vocabulary of vocab_size tokens.
    """
    array = compact_ids(ids)
    if len(array) and int(array.max()) >= vocab_size:
        raise ValueError(
            f"the text has the id {int(array.max())}, the model's ids are 0 to {vocab_size - 1}: "
            "encode the text with the model's tokenizer"
        )
    return array if bos_id is None else np.concatenate([compact_ids([bos_id]), array])
