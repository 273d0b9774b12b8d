"""The check of windows.py: windows are compared with torch's `unfold`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, Wrong, expect_tensor, require_type
from MyGPT.exercises.student import Student


def cut(ids: Tensor, length: int, stride: int, shift: int = 1, n_dropped: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, in which targets are `shift` positions later and the last n_dropped windows are missing."""
    starts = range(0, len(ids) - length, stride)[: -n_dropped or None]
    inputs = [ids[start : start + length] for start in starts]
    targets = [ids.roll(-shift)[start : start + length] for start in starts]
    empty = ids.new_empty(0, length)
    return (torch.stack(inputs), torch.stack(targets)) if inputs else (empty, empty)


def mistakes(ids: Tensor, length: int, stride: int, part: int) -> Mistakes:
    """Return the inputs (part 0) or the targets (part 1) of programs with a common mistake."""
    right = cut(ids, length, stride)
    stops = "the last window is missing: the last possible start is len(ids) - length - 1, and range must include it"
    found = [
        (stops, cut(ids, length, stride, n_dropped=1)[part]),
        ("the stride is ignored: windows start at every position", cut(ids, length, 1)[part]),
        ("the stride is ignored: windows start at multiples of the length", cut(ids, length, length)[part]),
    ]
    if part == 0:
        return [*found, ("inputs and targets are exchanged", right[1])]
    return [
        ("the targets are not shifted: they must be the ids one position after the inputs", right[0]),
        ("the targets are shifted by two positions, but one is expected", cut(ids, length, stride, shift=2)[1]),
        (
            "the targets are shifted backwards: they are the ids before the inputs",
            cut(ids, length, stride, shift=-1)[1],
        ),
        ("there is only one target per window, but one per position is expected", right[1][:, -1:]),
        ("there is only one target per window, but one per position is expected", right[1][:, -1]),
        ("the targets are one id longer than the inputs", ids.unfold(0, length + 1, stride)),
        *found,
    ]


def check_windows(student: Student, ids: Tensor, length: int, stride: int) -> None:
    """Raise Wrong unless the student's inputs and targets are right."""
    call = f"make_windows({len(ids)} ids, length={length}, stride={stride})"
    got = student.call(call, student.function("make_windows"), ids, length, stride)
    require_type(call, got, tuple, "a tuple of two tensors")
    if len(got) != 2:
        raise Wrong(f"{call}: the result is a tuple of {len(got)} elements, but two tensors are expected")
    windows = ids.unfold(0, length + 1, stride)  # (W, length + 1)
    for part, name in enumerate(("inputs", "targets")):
        expected = windows[:, :-1] if part == 0 else windows[:, 1:]
        known = mistakes(ids, length, stride, part)
        expect_tensor(call, got[part], expected, known, name=name)


def _case(n: int, length: int, stride: int) -> Callable[[Student], None]:
    def step(student: Student) -> None:
        generator = torch.Generator().manual_seed(n)
        check_windows(student, torch.randperm(10 * n, generator=generator)[:n], length, stride)

    return step


def _example(student: Student) -> None:
    check_windows(student, torch.arange(10, 17), 3, 2)


def _too_short(student: Student) -> None:
    call = "make_windows(3 ids, length=3, stride=1)"
    make_windows = student.function("make_windows")

    def outcome(ids: Tensor, length: int, stride: int) -> str:
        try:
            make_windows(ids, length, stride)
        except Exception as error:
            return f"raises {type(error).__name__}"
        return "returns a result"

    got = student.call(call, outcome, torch.arange(3), 3, 1)
    if got != "raises ValueError":
        raise Wrong(f"{call}: it {got}, but ValueError is expected, because one window needs length + 1 = 4 ids")


CHECK = Check(
    [
        ("cuts the example", _example),
        ("cuts windows that overlap", _case(23, 5, 2)),
        ("cuts windows that end at the end of the text", _case(21, 4, 4)),
        ("cuts windows with gaps between them", _case(26, 4, 7)),
        ("cuts one window from length + 1 ids", _case(7, 6, 6)),
        ("cuts windows of one id", _case(5, 1, 1)),
        ("refuses a text that is too short", _too_short),
    ],
    library="data/windows.py (gather_windows and GPTDataset)",
)
"""The check of the task windows."""
