"""The check of loss.py: losses and gradients are compared with torch's cross_entropy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, Wrong, expect_tensor, require_type
from MyGPT.exercises.student import Student


def expected_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return torch's mean cross-entropy of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def mistakes(logits: Tensor, ids: Tensor) -> Mistakes:
    """Return the losses of programs with a common mistake."""
    B, T, V = logits.shape
    seen, targets = logits[:, :-1], ids[:, 1:]  # (B, T - 1, V), (B, T - 1)
    right = expected_of(logits, ids)
    not_shifted = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    rolled = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    backwards = F.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
    same_positions = F.cross_entropy(seen.flatten(0, 1), ids[:, :-1].flatten())
    last_positions = F.cross_entropy(logits[:, 1:].flatten(0, 1), targets.flatten())
    shift = "the loss is not shifted: the logits at position t must predict the id at position t + 1"
    losses = -seen.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)  # (B, T - 1)
    n = B * (T - 1)

    def picked(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(-1, targets[..., None]).mean()

    probabilities = seen.softmax(-1)
    return [
        (shift, not_shifted),
        (shift, same_positions),
        (shift, last_positions),
        ("the shift is backwards: drop the last position of the logits and the first id", backwards),
        ("the last position is counted: it has no next token (roll makes the first id its target)", rolled),
        ("the logarithm has base 2; use the natural logarithm", right / math.log(2)),
        ("the logarithm has base 10; use the natural logarithm", right / math.log(10)),
        ("the sign is missing: the loss is minus the log-probability", -right),
        ("the losses are summed, but their mean is expected", right * n),
        ("the sum is divided by B, but the mean over all B * (T - 1) predictions is expected", right * n / B),
        ("the sum is divided by T - 1, but the mean over all B * (T - 1) predictions is expected", right * n / (T - 1)),
        ("the sum is divided by B * T, but only B * (T - 1) positions have a next token", right * n / (B * T)),
        ("the sum is divided by V as well: take the mean over the B * (T - 1) predictions", right / V),
        (
            "the softmax runs over the tokens (dim=1), but it must run over the vocabulary (dim=-1)",
            picked(seen.log_softmax(1)),
        ),
        (
            "the softmax runs over the batch (dim=0), but it must run over the vocabulary (dim=-1)",
            picked(seen.log_softmax(0)),
        ),
        (
            "the softmax runs over the tokens (dim=1), but it must run over the vocabulary (dim=-1)",
            -logits.log_softmax(1)[:, :-1].gather(-1, targets[..., None]).mean(),
        ),
        ("the softmax is missing: minus the mean of the logits of the targets is returned", picked(seen)),
        ("the logarithm is missing: minus the mean probability is returned", picked(probabilities)),
        ("the logarithm is missing: the mean probability is returned", -picked(probabilities)),
        (
            "the logarithm of the mean probability is returned, but the mean of the logarithms is expected",
            -(-losses).exp().mean().log(),
        ),
        ("softmax is applied twice", picked(probabilities.log_softmax(-1))),
        (
            "the mean over the whole vocabulary is returned; pick the log-probability of each target",
            -seen.log_softmax(-1).mean(),
        ),
        ("the perplexity is returned, but the loss is expected", right.exp()),
        (
            "the mean is taken over the wrong dimension: one loss per token is returned, but the mean of all is expected",
            losses.mean(0),
        ),
        (
            "the mean is taken over the wrong dimension: one loss per sequence is returned, but the mean of all is expected",
            losses.mean(1),
        ),
        ("the mean is missing: one loss per prediction is returned", losses),
        ("the mean is missing: one loss per prediction is returned", losses.flatten()),
        ("only the last position is counted, but every position predicts a token", losses[:, -1].mean()),
        ("only the first sequence is counted", losses[0].mean()),
    ]


def check_loss(student: Student, logits: Tensor, ids: Tensor) -> None:
    """Raise Wrong unless the student's loss is torch's."""
    call = f"next_token_loss(logits, ids) with logits {tuple(logits.shape)}"
    got = student.call(call, student.function("next_token_loss"), logits, ids)
    require_type(call, got, Tensor, "a tensor, because gradients must flow through it")
    if not got.isfinite().all() and got.shape == ():
        cause = "exp of a large logit is infinite: use logsumexp or log_softmax, or subtract the maximum first"
        largest = f"logits up to {logits.abs().max():.4g}"
        problem = f"the result is {got.item()} for {largest}, but a finite number is expected"
        raise Wrong(f"{call}: {problem}; likely cause: {cause}")
    expect_tensor(call, got, expected_of(logits, ids), mistakes(logits, ids))


def example(B: int, T: int, V: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return random logits (B, T, V) and ids (B, T)."""
    generator = torch.Generator().manual_seed(T)
    return scale * torch.randn(B, T, V, generator=generator), torch.randint(V, (B, T), generator=generator)


def _case(B: int, T: int, V: int, scale: float = 2.0) -> Callable[[Student], None]:
    return lambda student: check_loss(student, *example(B, T, V, scale))


def _worked_example(student: Student) -> None:
    check_loss(student, torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [5.0, 5.0]]]), torch.tensor([[0, 1, 1]]))


def _equal(student: Student) -> None:
    logits, ids = example(2, 4, 7)
    check_loss(student, torch.zeros_like(logits), ids)


def _gradients(student: Student) -> None:
    logits, ids = example(3, 6, 5)
    ours = logits.clone().requires_grad_()
    expected_of(ours, ids).backward()
    call = "the gradient of next_token_loss(logits, ids)"
    next_token_loss = student.function("next_token_loss")

    def loss_of(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        return leaf, next_token_loss(leaf, ids)

    leaf, loss = student.call(call, loss_of, logits, ids)
    if not loss.requires_grad:
        raise Wrong(
            f"{call}: the loss has no gradient; likely cause: detach, item, no_grad or torch.tensor(...) cuts the gradient"
        )
    loss.backward()
    assert ours.grad is not None
    expect_tensor(call, leaf.grad, ours.grad, name="the gradient of logits")


def _perplexity(student: Student) -> None:
    perplexity = student.function("perplexity")
    for value in (math.log(20), 0.0, 3.7):
        loss = torch.tensor(value)
        call = f"perplexity(torch.tensor({value:.4g}))"
        got = student.call(call, perplexity, loss)
        known = [
            ("2 ** loss is computed, but a loss in nats needs exp(loss)", 2**loss),
            ("10 ** loss is computed, but a loss in nats needs exp(loss)", 10**loss),
            ("exp(-loss) is computed; the loss is already positive", (-loss).exp()),
            ("the loss itself is returned", loss),
            ("log(loss) is computed, but exp(loss) is expected", loss.log()),
            ("exp(loss / ln 2) is computed; the loss is in nats already", (loss / math.log(2)).exp()),
        ]
        expect_tensor(call, got, loss.exp(), known)


CHECK = Check(
    [
        ("gives torch's loss for 3 sequences of 6 tokens", _case(3, 6, 5)),
        ("computes the example", _worked_example),
        ("computes one prediction", _case(1, 2, 4)),
        ("handles equal logits", _equal),
        ("stays finite for logits in the thousands", _case(2, 5, 6, 3000.0)),
        ("gives torch's gradients", _gradients),
        ("computes the perplexity", _perplexity),
    ],
    library="loss.py (token_loss) and evaluation/perplexity.py",
)
"""The check of the task loss."""
