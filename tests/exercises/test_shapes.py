# ruff: noqa: E501
"""Shapes that do not fit, in a student's program, are explained in one sentence with the shapes and the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.exercises.checking import check_file
from MyGPT.exercises.shapes import FailedCall, explain

START = "import torch\nimport torch.nn.functional as F\ndef attention(q, k, v, mask=None):\n    return "
# The first test calls attention with q, k and v of the shape (2, 3, 5, 4).
PROGRAMS = {
    "q @ k": "in the matrix product of the shapes (2, 3, 5, 4) and (2, 3, 5, 4), the last size of the first, 4, must equal the last "
    "but one of the second, 5 (it fits with its last two dimensions exchanged)",
    "q @ k[0, 0, :3]": "of the shapes (2, 3, 5, 4) and (3, 4), the last size of the first, 4,",
    "q @ k[0, 0, :, 0]": "of the shapes (2, 3, 5, 4) and (5,), the last size of the first, 4, must equal the size of the second, 5",
    "q[0, 0, 0] @ k[0, 0]": "in the matrix product of the shapes (4,) and (5, 4), the last size of the first, 4,",
    "torch.bmm(q[0], k[0])": "in the matrix product of the shapes (3, 5, 4) and (3, 5, 4), the last size of the first, 4,",
    "q @ k[:, :2].mT": "the shapes (2, 3) and (2, 2) do not fit: from the right, size number 1 is 3 and 2",
    "torch.nn.Linear(5, 2)(q)": "the linear layer reads tensors whose last size is 5, but the shape is (2, 3, 5, 4)",
    "torch.cat([k, v[:, :, :2]], dim=1)": "the shapes (2, 3, 5, 4) and (2, 3, 2, 4) can only be joined along dim=2, but dim=1 is given",
    "torch.cat((k, v[:, :, :2]))": "can only be joined along dim=2, but dim=0 is given",
    "torch.cat([k, v[:, :2, :2]], dim=1)": "joined along dim=1 may differ only there, but the shapes (2, 3, 5, 4) and (2, 2, 2, 4) "
    "differ in the dimensions 1 and 2",
    "torch.cat([k, v[0]])": "the shapes (2, 3, 5, 4) and (3, 5, 4) cannot be joined, because they differ in the number of dimensions",
    "torch.stack([k, v[:, :, :2]])": "stacked tensors must have the same shape, but the shapes are (2, 3, 5, 4) and (2, 3, 2, 4)",
    "q.view(2, 5, 13)": "the shape (2, 3, 5, 4) has 120 numbers, but (2, 5, 13) has 130",
    "q.reshape((2, -1, 7))": "has 120 numbers, which cannot be divided by 14, the product of the other sizes of (2, -1, 7)",
    "torch.reshape(q, shape=(7, 7))": "the shape (2, 3, 5, 4) has 120 numbers, but (7, 7) has 49",
    "q.view(-1, -1)": "only one size may be -1",
    "q + k[:, :, :2]": "the shapes (2, 3, 5, 4) and (2, 3, 2, 4) do not fit: from the right, size number 2 is 5 and 2, but sizes must be "
    "equal or 1",
    "(q @ k.mT).masked_fill(torch.ones(4, 4) == 0, 0)": "the shapes (2, 3, 5, 5) and (4, 4) do not fit: from the right, size number 1",
    "torch.where(torch.ones(7, 1) == 0, q, 0)": "the shapes (7, 1) and (2, 3, 5, 4) do not fit: from the right, size number 2 is 7 and 5",
    "q.expand(2, 3, 5, 8)": "a tensor of the shape (2, 3, 5, 4) does not fit into the shape (2, 3, 5, 8): from the right, size number 1",
    "torch.zeros(2, 4).copy_(q[0])": "the shapes (2, 4) and (3, 5, 4) do not fit: from the right, size number 2 is 2 and 5",
    "q.softmax(dim=4)": "dim=4 does not exist in a tensor of the shape (2, 3, 5, 4), where dim is from -4 to 3",
    "q.transpose(1, -5)": "dim=-5 does not exist in a tensor of the shape (2, 3, 5, 4), where dim is from -4 to 3",
    "q[:, :, 7]": "index 7 is out of bounds for dimension 2 with size 5; the shape is (2, 3, 5, 4)",
    "F.cross_entropy(q[0], q[0, ..., 0].long())": "the shapes are (3, 5, 4) and (3, 5), but cross_entropy expects (N, V) and (N)",
    "F.cross_entropy(q[0, 0], torch.full((5,), 9))": "Target 9 is out of bounds; the shapes are (5, 4) and (5,)",
    "F.embedding(torch.arange(9), q[0, 0])": "the table has 5 rows, and the ids are from 0 to 8",
    "torch.einsum('bhtd,bhsd->bhts', q, k[0])": "; the shapes are (2, 3, 5, 4) and (3, 5, 4)",
}  # fmt: skip


def sentence_of(source: str, directory: Path) -> str:
    """Return what the check of attention.py says about a file with this source."""
    path = directory / "attention.py"
    path.write_text(source, encoding="utf-8")
    return check_file(path, "attention").sentence


@pytest.mark.parametrize("expression", PROGRAMS)
def test_a_wrong_program_is_explained(expression: str, tmp_path: Path) -> None:
    sentence = sentence_of(START + expression + "\n", tmp_path)
    assert PROGRAMS[expression] in sentence
    assert re.search(r": line 4 of attention.py raises (RuntimeError|IndexError|ValueError): ", sentence)
    assert "\n" not in sentence and len(sentence) < 700


@pytest.mark.parametrize(
    "expression", ["q.long() @ k.mT", "q.transpose(1, 2).view(2, 5, 12)", "q + 'a'", "[q, k][2]", "1 / 0"]
)
def test_an_error_of_another_kind_gets_no_shapes(expression: str, tmp_path: Path) -> None:
    """Nor does an error that was caught before: each program first catches one."""
    body = "x = 0\n    try: q @ k\n    except RuntimeError: x = 1\n    return "
    sentence = sentence_of(START.replace("return ", body) + expression + "\n", tmp_path)
    place, _, message = sentence.partition(" raises ")
    assert place.endswith("line 7 of attention.py") and message and "(2, 3" not in message


def explanation(call: Callable[[], Tensor]) -> str | None:
    """Return the explanation of a call that fails, and None for one that does not."""
    failed = FailedCall()
    try:
        with failed:
            call()
    except Exception as error:
        return explain(error, failed)
    return None


def test_the_advice_is_right_for_random_shapes() -> None:
    """Where the explanation says that a dimension or an exchange would fit, torch accepts it."""
    generator = torch.Generator().manual_seed(0)

    def shape(n: int) -> list[int]:
        return torch.randint(1, 4, (n,), generator=generator).tolist()

    n_cat = n_matmul = n_sums = 0
    for _ in range(300):
        n, m = torch.randint(1, 5, (2,), generator=generator).tolist()
        a, b, c = torch.zeros(shape(n)), torch.zeros(shape(n)), torch.zeros(shape(m))
        text = explanation(lambda: torch.cat([a, b], dim=-1))  # noqa: B023
        if text is not None and (found := re.search(r"can only be joined along dim=(\d)", text)):
            torch.cat([a, b], dim=int(found[1]))
            n_cat += 1
        text = explanation(lambda: a @ c)  # noqa: B023
        if text is not None and "exchanged" in text:
            assert explanation(lambda: a @ c.mT) is None or "the shapes" in str(explanation(lambda: a @ c.mT))  # noqa: B023
            n_matmul += 1
        text = explanation(lambda: a + c)  # noqa: B023
        if text is not None:
            place = re.search(r"from the right, size number (\d) is (\d) and (\d)", text)
            assert place and (a.shape[-int(place[1])], c.shape[-int(place[1])]) == (int(place[2]), int(place[3]))
            n_sums += 1
    assert min(n_cat, n_matmul, n_sums) > 10


def test_a_function_that_fails_inside_another_is_reported_with_its_own_shapes() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x) @ torch.zeros(3, 3)

    text = explanation(lambda: Net()(torch.zeros(2, 5)))
    assert text is not None and "the shapes (2, 5) and (3, 3)" in text
