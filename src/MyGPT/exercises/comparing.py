"""Compare a student's result with the expected one, and find the likely cause of a difference.

The likely cause comes from a list of common mistakes. Each is a pair: a sentence, and the result that a program with this
mistake gives for the same input. If the student's numbers are those of a mistake, the mistake is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Mistakes = Sequence[tuple[str, Any]]
"""Pairs of the description of a mistake and the result with this mistake, a tensor or a list of ids or pairs."""


class Wrong(Exception):
    """The first difference between a student's result and the expected one. The message is a sentence without its period."""


class NotWritten(Exception):
    """Raised if a student's function still raises NotImplementedError. The message is the name of the function."""


def expect_tensor(
    call: str,
    got: Any,
    expected: Tensor,
    mistakes: Mistakes | Callable[[], Mistakes] = (),
    *,
    name: str = "the result",
    tolerance: float = 1e-4,
) -> None:
    """Raise Wrong unless `got` is a tensor with the shape, the dtype and, up to rounding, the numbers of `expected`.

    Args:
        call: the student's call in words, with which the sentence begins.
        got: the student's result.
        expected: the right result.
        mistakes: results of common mistakes, or a function that computes them when `got` is wrong. The first one that equals
            `got` is named.
        name: the name of the result in the sentence.
        tolerance: largest allowed difference, relative to the size of the expected number if that is above 1.
    """
    require_type(call, got, Tensor, "a tensor", name)
    got = got.detach()
    if got.is_sparse or got.is_meta:
        raise Wrong(
            f"{call}: {name} is a {'sparse' if got.is_sparse else 'meta'} tensor, but an ordinary one is expected"
        )
    if got.shape == expected.shape and got.dtype == expected.dtype and _close(got, expected, tolerance):
        return
    known = mistakes() if callable(mistakes) else mistakes
    cause = next((text for text, wrong in known if _close(got, wrong, tolerance)), "")
    if got.shape != expected.shape:
        cause = cause or _cause_of_shape(got, expected)
        raise _wrong(call, f"{name} has the shape {tuple(got.shape)}, but {tuple(expected.shape)} is expected", cause)
    if got.is_complex() or got.is_floating_point() != expected.is_floating_point():
        raise _wrong(call, f"{name} has the dtype {_dtype(got)}, but {_dtype(expected)} is expected", cause)
    place = _first_difference(got, expected, tolerance)
    if place is not None:
        where = f" at [{', '.join(map(str, place))}]" if place else ""
        have, want = _numbers(got[place], expected[place])
        unknown = "no common mistake gives these numbers; work the example at the top of the file through by hand"
        raise _wrong(call, f"{name}{where} is {have}, but {want} is expected", cause, unknown)
    if got.dtype != expected.dtype:
        raise Wrong(f"{call}: {name} has the dtype {_dtype(got)}, but {_dtype(expected)} is expected, as in the input")


def expect_list(call: str, got: Any, expected: list[Any], mistakes: Mistakes = (), *, name: str = "the result") -> None:
    """Raise Wrong unless `got` is a list that equals `expected`, whose elements are ints or pairs of ints."""
    require_type(call, got, list, "a list", name)
    pairs = bool(expected) and isinstance(expected[0], tuple)
    if pairs:
        got = [tuple(item) if type(item) is list else item for item in got]
    for i, item in enumerate(got):
        is_pair = type(item) is tuple and len(item) == 2 and all(type(part) is int for part in item)
        if not (is_pair if pairs else type(item) is int):
            kind = "a pair of ints" if pairs else "an int"
            raise Wrong(f"{call}: {name} at [{i}] is {_shown(item)}, but {kind} is expected")
    if got == expected:
        return
    cause = next((text for text, wrong in mistakes if got == wrong), "")
    place = next((i for i, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), None)
    if place is not None:
        what = f"{name} at [{place}] is {got[place]}, but {expected[place]} is expected"
    else:
        count = f"{len(expected)} {'is' if len(expected) == 1 else 'are'} expected"
        what = f"{name} has {len(got)} element{'s' * (len(got) != 1)}, but {count}"
    unknown = "no common mistake gives this list; work the example at the top of the file through by hand"
    raise _wrong(call, what, cause, unknown)


def require_type(call: str, got: Any, kind: type, article: str, name: str = "the result") -> None:
    """Raise Wrong unless `got` is of the type `kind`. `article` is its name with an article, such as "a tensor"."""
    if isinstance(got, kind):
        return
    if got is None:
        raise _wrong(call, f"{name} is None, but {article} is expected", "a return statement is missing")
    cause = "a comma at the end of a line makes a tuple" if type(got) is tuple and len(got) == 1 else ""
    if inspect.isgenerator(got):
        cause = "the function contains yield or returns a generator expression"
    raise _wrong(call, f"{name} is of the type {type(got).__name__}, but {article} is expected", cause)


def _wrong(call: str, what: str, cause: str, unknown: str = "") -> Wrong:
    """Return a Wrong whose sentence ends with the likely cause, or with the text `unknown` if no cause is known."""
    end = f"; likely cause: {cause}" if cause else f"; {unknown}" if unknown else ""
    return Wrong(f"{call}: {what}{end}")


def _close(got: Tensor, wrong: Any, tolerance: float) -> bool:
    return isinstance(wrong, Tensor) and got.shape == wrong.shape and _first_difference(got, wrong, tolerance) is None


def _first_difference(got: Tensor, expected: Tensor, tolerance: float) -> tuple[int, ...] | None:
    """Return the index of the first number that differs by more than the tolerance, or None. NaN equals NaN."""
    one, other = got.detach().to(torch.float64), expected.detach().to(torch.float64)
    near = (one - other).abs() <= tolerance * other.abs().clamp_min(1)
    wrong = ~(near | (one == other) | (one.isnan() & other.isnan()))
    if not wrong.any():
        return None
    return tuple(int(i) for i in wrong.nonzero()[0])


def _cause_of_shape(got: Tensor, expected: Tensor) -> str:
    if sorted(got.shape) == sorted(expected.shape):
        return "two dimensions are exchanged"
    if got.squeeze().shape == expected.squeeze().shape:
        return "a dimension of size 1 is missing or left over"
    return ""


def _numbers(got: Tensor, expected: Tensor) -> tuple[str, str]:
    """Return two different numbers with as few digits as show the difference, at least four."""
    one, other = got.item(), expected.item()
    pairs = ((f"{one:.{digits}g}", f"{other:.{digits}g}") for digits in (4, 6, 8, 12))
    return next(((have, want) for have, want in pairs if have != want), (repr(one), repr(other)))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shown(item: Any) -> str:
    return (
        f"{item!r}" if type(item) in (int, float, str, bytes, bool, tuple, type(None)) else f"a {type(item).__name__}"
    )
