"""The check of induction_head.py: the model must continue repeated random tokens, with an induction head in layer 1."""

from __future__ import annotations

import torch
from torch import Tensor

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Wrong, require_type
from MyGPT.exercises.student import Student
from MyGPT.inside import induction_scores, trace
from MyGPT.model import GPTModel

CALL = "build_model()"
MIN_VOCAB, MIN_CONTEXT = 32, 16
MIN_SCORE = 0.5
"""The smallest induction score that counts as an induction head. Repetitions in the random tokens keep a perfect head below 1."""
MIN_PREVIOUS = 0.9
"""The smallest mean attention of a head to the previous token that counts as a previous-token head."""
N_SEQUENCES = 16


def build(student: Student) -> GPTModel:
    """Return the student's model. Raises Wrong if its sizes do not fit the task."""
    model = student.call(CALL, student.function("build_model"))
    require_type(CALL, model, GPTModel, "a GPTModel")
    config = model.config
    for name, value, smallest in (
        ("vocab_size", config.vocab_size, MIN_VOCAB),
        ("context_length", config.context_length, MIN_CONTEXT),
    ):
        if value < smallest:
            raise Wrong(f"{CALL}: {name} is {value}, but at least {smallest} is expected")
    if config.n_layers != 2:
        raise Wrong(f"{CALL}: the model has n_layers={config.n_layers}, but two layers are expected")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise Wrong(f"{CALL}: the parameter {name} has nan or inf; were all parameters set, for example to zero?")
    return model.eval()


def _builds(student: Student) -> None:
    build(student)


def half_length(model: GPTModel) -> int:
    """Return the number of tokens that are repeated once."""
    return min(model.config.context_length, model.config.vocab_size, 64) // 2


def repeated(model: GPTModel) -> Tensor:
    """Return sequences of different random tokens that are repeated once, (N_SEQUENCES, 2 n)."""
    n, generator = half_length(model), torch.Generator().manual_seed(0)
    rows = [torch.randperm(model.config.vocab_size, generator=generator)[:n] for _ in range(N_SEQUENCES)]
    once = torch.stack(rows)
    return torch.cat([once, once], dim=1)


@torch.no_grad()
def diagnosis(model: GPTModel, ids: Tensor) -> str:
    """Return what the attention of the heads says about the reason for a wrong prediction."""
    n = ids.shape[1] // 2
    weights = trace(model, ids).attention  # (layers, N, heads, 2 n, 2 n)
    times = torch.arange(1, 2 * n)
    second = torch.arange(n, 2 * n - 1)

    def mean(layer: int, queries: Tensor, keys: Tensor) -> float:
        return float(weights[layer][..., queries, keys].mean((0, 2)).max())  # of the best head

    previous, itself = mean(0, times, times - 1), mean(0, times, times)
    induction, match, own = (mean(1, second, keys) for keys in (second - n + 1, second - n, second))
    if previous < MIN_PREVIOUS:
        if itself > MIN_PREVIOUS:
            return "the head of layer 0 attends to the token itself: the query of position t must match the key of position t - 1"
        spread = "make the weights of its queries larger, or check ln_1 and which numbers c_attn reads"
        return f"no head of layer 0 attends to the previous token (its mean weight there is {previous:.2f}); {spread}"
    if induction < MIN_SCORE:
        if match > MIN_SCORE / 2:
            place = "the first occurrence of the token, not to the token after it"
            return f"the head of layer 1 attends to {place}: its key must read what layer 0 wrote"
        if own > MIN_SCORE:
            return "the head of layer 1 attends to the token itself: its key must read only what layer 0 wrote"
        spread = "its query must read the token, and its key what layer 0 wrote, in the same order"
        return f"no head of layer 1 attends to the token after the first occurrence (mean weight {induction:.2f}); {spread}"
    return "the heads attend to the right tokens, but the output is not the token found there: check values, c_proj and ln_f"


def _predicts(student: Student) -> None:
    model = build(student)
    ids = repeated(model)
    n = ids.shape[1] // 2
    with torch.no_grad():
        logits = student.call("the forward pass of the model", model, ids)
    if not logits.isfinite().all():
        raise Wrong(f"{CALL}: the model gives logits that are nan or infinite; are the weights too large?")
    predicted = logits[:, n:-1].argmax(-1)  # (N_SEQUENCES, n - 1)
    wrong = predicted != ids[:, n + 1 :]
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    if wrong[:, 1:].any():
        cause = diagnosis(model, ids)
    else:
        cause = "position 0 has no token before it, so layer 0 copies itself; make its key in layer 1 useless"
    right = 1 - wrong.double().mean()
    where = f"{right:.0%} of the second half is predicted; at position {n + column} after token {ids[row, n + column]}"
    raise Wrong(
        f"{CALL}: {where}, the model predicts {predicted[row, column]}, but {ids[row, n + column + 1]} is expected; "
        f"likely cause: {cause}"
    )


def _scores(student: Student) -> None:
    model = build(student)
    n = half_length(model)
    for length in (n, n - 2):  # a head that looks back by a fixed distance scores high at one length only
        score = float(induction_scores(model, length=length)[1].max())
        if score < MIN_SCORE:
            cause = diagnosis(model, repeated(model))
            raise Wrong(
                f"{CALL}: the best induction score of layer 1 is {score:.2f} for {length} repeated tokens, "
                f"but at least {MIN_SCORE} is expected; likely cause: {cause}"
            )


CHECK = Check(
    [
        ("builds a model with two layers", _builds),
        ("predicts repeated random tokens", _predicts),
        ("has a head with an induction score of at least 0.5", _scores),
    ],
    library="inside/tracing.py (induction_scores)",
    after="Measure the heads of a model that you trained: docs/guide/inside.md shows how",
)
"""The check of the task induction_head."""
