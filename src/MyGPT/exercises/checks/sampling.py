"""The check of sampling.py: probabilities are compared with this library's filters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, Wrong, expect_tensor
from MyGPT.exercises.student import Student
from MyGPT.sampling import SamplingConfig, filter_logits, keep_top_k, keep_top_p

Options = dict[str, float | int | None]


def expected_of(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities after this library's filters."""
    filtered = filter_logits(logits, SamplingConfig(temperature, top_k, top_p))
    if temperature == 0:
        return torch.nn.functional.one_hot(filtered.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return filtered.softmax(-1)


def keep(p: Tensor, kept: Tensor) -> Tensor:
    """Return probabilities (B, V) with those that are not kept set to 0, so that each row sums to 1."""
    p = p * kept
    return p / p.sum(-1, keepdim=True)


def softmax_mistakes(logits: Tensor) -> Mistakes:
    """Return the probabilities of programs with a mistake in the softmax."""
    p = logits.softmax(-1)
    return [
        ("the softmax is applied twice", p.softmax(-1)),
        ("the softmax is missing: logits are returned, but probabilities are expected", logits),
        ("the logarithms of the probabilities are returned", p.log()),
        (
            "the softmax runs over the sequences (dim=0), but it must run over the vocabulary (dim=-1)",
            logits.softmax(0),
        ),
    ]


def temperature_mistakes(logits: Tensor, t: float) -> Mistakes:
    """Return the probabilities of programs with a mistake in the temperature."""
    p = logits.softmax(-1)
    return [
        ("the logits are multiplied by the temperature, but they must be divided", (logits * t).softmax(-1)),
        ("the temperature is ignored", p),
        ("the temperature is applied after the softmax: divide the logits, not the probabilities", p / t),
        ("the probabilities are divided by the temperature, but it must divide the logits", (p / t).softmax(-1)),
    ]


def top_k_mistakes(logits: Tensor, k: int) -> Mistakes:
    """Return the probabilities of programs with a mistake in top-k."""
    p = logits.softmax(-1)
    kept = keep_top_k(logits, k).isfinite()
    least = ~keep_top_k(logits, logits.shape[-1] - k).isfinite()
    threshold = logits[:1].topk(k).values[:, -1:]
    compact = logits.topk(k).values
    return [
        ("top_k is ignored", p),
        (
            "the k-th token is dropped: keep logits that are equal to the threshold",
            keep(p, keep_top_k(logits, max(k - 1, 1)).isfinite()),
        ),
        ("k + 1 tokens are kept", keep(p, keep_top_k(logits, k + 1).isfinite())),
        ("the k least likely tokens are kept", keep(p, least)),
        ("the k most likely tokens are removed", keep(p, ~kept)),
        ("the probabilities are not divided by their sum after filtering", p * kept),
        ("excluded logits are set to 0, but they must be minus infinity", logits.masked_fill(~kept, 0).softmax(-1)),
        ("the threshold of the first sequence is used for all", keep(p, logits >= threshold)),
        ("only the k kept tokens are returned; the result must be (B, V), with 0 for the others", compact.softmax(-1)),
        (
            "the first k tokens of the vocabulary are kept, not the most likely ones",
            keep(p, torch.arange(logits.shape[-1]) < k),
        ),
        (
            "the kept probabilities are returned in descending order, not at the places of their tokens",
            keep(p, kept).sort(-1, descending=True).values,
        ),
    ]


def top_p_mistakes(logits: Tensor, top_p: float) -> Mistakes:
    """Return the probabilities of programs with a mistake in top-p."""
    p = logits.softmax(-1)
    ordered, order = p.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the sum of the tokens before each

    def back(kept: Tensor) -> Tensor:
        """Bring a decision from the descending order to the order of the vocabulary."""
        return torch.zeros_like(kept).scatter(-1, order, kept)

    kept = before < top_p
    up, up_order = p.sort(-1)
    least = torch.zeros_like(kept).scatter(-1, up_order, up.cumsum(-1) - up < top_p)
    drops = "the token that crosses p is dropped: keep a token if the sum of the tokens BEFORE it is less than p"
    without = ordered.cumsum(-1) <= top_p
    safe = without.clone()
    safe[:, 0] = True
    one_more = torch.cat([torch.ones_like(kept[:, :1]), kept[:, :-1]], -1)
    flat = p.flatten().sort(descending=True)
    together = torch.zeros(p.numel(), dtype=torch.bool).scatter(
        0, flat.indices, flat.values.cumsum(0) - flat.values < top_p
    )
    return [
        ("top_p is ignored", p),
        (drops, keep(p, back(without))),
        (drops, keep(p, back(safe))),
        ("one token too many is kept: the token that crosses p is the last", keep(p, back(one_more))),
        ("the least likely tokens are kept: sort in descending order", keep(p, least)),
        ("the decisions are made in sorted order and not brought back to the order of the vocabulary", keep(p, kept)),
        ("the decisions are made in sorted order and not brought back to the order of the vocabulary", keep(p, safe)),
        (
            "the probabilities are summed in the order of the vocabulary: sort them first",
            keep(p, p.cumsum(-1) - p < top_p),
        ),
        ("the sorted order is undone with gather; use scatter", keep(p, kept.gather(-1, order))),
        ("the probabilities are not divided by their sum after filtering", p * back(kept)),
        ("tokens with a probability of at least p are kept; the sum of the probabilities decides", keep(p, p >= top_p)),
        (
            "tokens with a probability of at least p are kept; the sum of the probabilities decides",
            keep(p, (p >= top_p) | (p == p.amax(-1, keepdim=True))),
        ),
        (
            "tokens with a probability of at least 1 - p are kept; the sum of the probabilities decides",
            keep(p, p >= 1 - top_p),
        ),
        ("the tokens that should be removed are kept, and the others are removed", keep(p, ~back(kept))),
        (
            "excluded logits are set to 0, but they must be minus infinity",
            logits.masked_fill(~back(kept), 0).softmax(-1),
        ),
        ("the probabilities are returned in descending order, not at the places of their tokens", keep(ordered, kept)),
        ("all sequences are filtered together: cumsum needs dim=-1", keep(p, together.view_as(p))),
    ]


def combined_mistakes(logits: Tensor, t: float, k: int, p: float) -> Mistakes:
    """Return the probabilities of programs that combine the filters in a wrong way."""
    cooled = logits / t
    reads_before = "top-p reads the probabilities before top-k: filter by top-k first, and compute the softmax again"
    return [
        (reads_before, keep_top_k(keep_top_p(cooled, p), k).softmax(-1)),
        (
            "the temperature is applied after the filters, but it comes first",
            (keep_top_p(keep_top_k(logits, k), p) / t).softmax(-1),
        ),
        ("the temperature is ignored if a filter is used", keep_top_p(keep_top_k(logits, k), p).softmax(-1)),
        ("top-k is ignored if top-p is used", keep_top_p(cooled, p).softmax(-1)),
        ("top-p is ignored if top-k is used", keep_top_k(cooled, k).softmax(-1)),
    ]


def mistakes(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Mistakes:
    """Return the probabilities of programs with a mistake that these options can show."""
    V = logits.shape[-1]
    found: list[tuple[str, Tensor]] = []
    if top_k is not None and top_p is not None and temperature:
        found += combined_mistakes(logits, temperature, top_k, top_p)
    if temperature not in (0.0, 1.0):
        found += temperature_mistakes(logits, temperature)
    cooled = logits / (temperature or 1.0)
    if top_k is not None and top_k < V and top_p is None:
        found += top_k_mistakes(cooled, top_k)
    if top_p is not None and top_k is None:
        found += top_p_mistakes(cooled, top_p)
    found += softmax_mistakes(cooled)
    return found


def check_probabilities(student: Student, logits: Tensor, **options: float | int | None) -> None:
    """Raise Wrong unless the student's probabilities are right."""
    shown = "".join(f", {name}={value}" for name, value in options.items())
    call = f"next_probabilities(logits{shown}) with logits {tuple(logits.shape)}"
    got = student.call(call, student.function("next_probabilities"), logits, **options)
    if isinstance(got, Tensor) and got.isnan().any() and options.get("temperature") == 0:
        raise Wrong(f"{call}: the result has nan; likely cause: the logits are divided by the temperature 0")
    known: Options = options
    expected = expected_of(logits, **known)  # type: ignore[arg-type]
    expect_tensor(call, got, expected, mistakes(logits, **known), tolerance=1e-5)  # type: ignore[arg-type]


def random_logits(B: int = 3, V: int = 9) -> Tensor:
    """Return random logits (B, V)."""
    return torch.randn(B, V, generator=torch.Generator().manual_seed(5))


def _case(**options: float | int | None) -> Callable[[Student], None]:
    return lambda student: check_probabilities(student, random_logits(), **options)


def _example(student: Student) -> None:
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    for options in ({"top_k": 2}, {"top_p": 0.7}, {"top_p": 0.4}):
        check_probabilities(student, logits, **options)


def _edges(student: Student) -> None:
    logits = random_logits()
    check_probabilities(student, logits, top_k=1)
    check_probabilities(student, logits, top_k=100)
    check_probabilities(student, logits, top_p=0.001)
    check_probabilities(student, logits, top_p=1.0)
    check_probabilities(student, logits[:1, :1], temperature=0.5, top_k=1, top_p=0.5)
    check_probabilities(student, torch.tensor([[1000.0, 999.0, -1000.0]]), temperature=0.5)


def _equal(student: Student) -> None:
    """Check equal logits. Which of the equal tokens top-p keeps is free, so the sorted probabilities are compared."""
    logits = torch.zeros(2, 4)
    check_probabilities(student, logits)
    call = "next_probabilities(logits, top_p=0.6) with four equal logits"
    got = student.call(call, student.function("next_probabilities"), logits, top_p=0.6)
    if isinstance(got, Tensor):
        got = got.sort(-1, descending=True).values
    third = 1 / 3
    known = [
        ("the token that crosses p is dropped", torch.tensor([[0.5, 0.5, 0, 0]] * 2)),
        (
            "all tokens that are as likely as the last one are kept; count the tokens by their sorted places",
            torch.full((2, 4), 0.25),
        ),
    ]
    expect_tensor(
        call, got, torch.tensor([[third, third, third, 0]] * 2), known, name="the sorted result", tolerance=1e-5
    )


def _one_step(student: Student) -> None:
    check_probabilities(student, random_logits(), temperature=0)
    check_probabilities(student, random_logits(), temperature=0, top_k=3, top_p=0.9)


CHECK = Check(
    [
        ("returns the softmax without options", _case()),
        ("divides by the temperature", _case(temperature=0.5)),
        ("keeps the top k", _case(top_k=4)),
        ("keeps the top p", _case(top_p=0.7)),
        ("computes the example", _example),
        ("applies temperature, top-k and top-p in this order", _case(temperature=1.7, top_k=5, top_p=0.75)),
        ("takes the most likely token at temperature 0", _one_step),
        ("keeps at least one token, and all where the options allow", _edges),
        ("handles equal logits", _equal),
    ],
    library="sampling.py (filter_logits)",
)
"""The check of the task sampling."""
