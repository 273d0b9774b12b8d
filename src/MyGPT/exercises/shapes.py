"""Explain the errors that torch raises for tensors whose shapes do not fit.

torch's messages name sizes, but rarely the tensors to which they belong. `FailedCall` remembers the tensors of the call that
failed, and `explain` compares their shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]


class FailedCall(TorchFunctionMode):
    """The last call of a function of torch that raised an exception in the `with` block."""

    error: Exception | None = None
    name = ""
    arguments: Sequence[Any] = ()
    options: Mapping[str, Any] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        try:
            return function(*args, **(kwargs or {}))
        except Exception as error:
            self.error, self.name = error, getattr(function, "__name__", "")
            self.arguments, self.options = args, kwargs or {}
            raise

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that was given by its position or by its name."""
        return self.arguments[position] if len(self.arguments) > position else self.options.get(name, default)

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of all tensors among the arguments, also of those in lists and tuples."""
        return [tuple(tensor.shape) for tensor in _tensors([*self.arguments, *self.options.values()])]


def explain(error: BaseException, call: FailedCall) -> str:
    """Return why the shapes of a call of torch do not fit, or "" if `error` does not come from `call` or has another reason."""
    if error is not call.error or not isinstance(error, (RuntimeError, IndexError, ValueError)) or not call.shapes:
        return ""
    message, shapes = " ".join(str(error).split()), call.shapes
    if re.search("dtype|scalar type|requires grad|not contiguous|view size is not compatible", message):
        return ""
    if found := re.search(
        r"Dimension out of range \(expected to be in range of \[(-?\d+), (\d+)\], but got (-?\d+)", message
    ):
        first, last, given = found.groups()
        return f"dim={given} does not exist in a tensor of the shape {shapes[0]}, where dim is from {first} to {last}"
    if found := re.search(r"Target sizes: \[(.*?)\]. Tensor sizes: \[(.*?)\]", message):
        target, own = (tuple(int(size) for size in sizes.split(",") if size) for sizes in found.groups())
        return f"a tensor of the shape {own} does not fit into the shape {target}: {_conflict(own, target)}"
    if "out of bounds" in message:  # a wrong index
        return _list(shapes)
    return _RULES.get(call.name, _no_rule)(call) or _broadcasting(call, message) or _list(shapes)


def _matrix_product(call: FailedCall) -> str:
    if len(call.shapes) < 2 or not all(call.shapes[-2:]):
        return ""
    one, other = call.shapes[-2:]
    rows = other[-2] if len(other) > 1 else other[0]
    if one[-1] == rows:
        return ""  # the dimensions before the last two do not fit, or the numbers have different types
    place = "the last but one of the second" if len(other) > 1 else "the size of the second"
    exchanged = " (it fits with its last two dimensions exchanged)" if len(other) > 1 and one[-1] == other[-1] else ""
    return (
        f"in the matrix product of the shapes {one} and {other}, the last size of the first, {one[-1]}, must equal "
        f"{place}, {rows}{exchanged}"
    )


def _linear(call: FailedCall) -> str:
    if len(call.shapes) < 2 or len(call.shapes[1]) != 2 or call.shapes[0][-1:] == call.shapes[1][1:]:
        return ""
    return f"the linear layer reads tensors whose last size is {call.shapes[1][1]}, but the shape is {call.shapes[0]}"


def _cat(call: FailedCall) -> str:
    dim = call.argument(1, "dim", 0)
    shapes = [shape for shape in call.shapes if shape != (0,)]  # torch leaves such tensors out
    sizes = {len(shape) for shape in shapes}
    if len(sizes) > 1:
        return f"tensors of the shapes {_and(shapes)} cannot be joined, because they differ in the number of dimensions"
    different = [i for i in range(sizes.pop()) if len({shape[i] for shape in shapes}) > 1]
    if len(different) == 1:
        return (
            f"tensors of the shapes {_and(shapes)} can only be joined along dim={different[0]}, but dim={dim} is given"
        )
    return (
        f"tensors that are joined along dim={dim} may differ only there, but the shapes {_and(shapes)} differ in "
        f"the dimensions {_and(different)}"
    )


def _stack(call: FailedCall) -> str:
    return f"stacked tensors must have the same shape, but the shapes are {_and(call.shapes)}"


def _view(call: FailedCall) -> str:
    sizes = call.arguments[1:] or [call.options.get("shape", call.options.get("size", ()))]
    wanted = tuple(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes)
    if not all(isinstance(size, int) for size in wanted):
        return ""
    own, known = math.prod(call.shapes[0]), math.prod(size for size in wanted if size != -1)
    if wanted.count(-1) > 1:
        return "only one size may be -1"
    has = f"the shape {call.shapes[0]} has {own} numbers"
    if -1 in wanted:
        return f"{has}, which cannot be divided by {known}, the product of the other sizes of {wanted}"
    return f"{has}, but {wanted} has {known}"


def _embedding(call: FailedCall) -> str:
    ids, table = call.argument(0, "input"), call.argument(1, "weight")
    if not isinstance(ids, Tensor) or not isinstance(table, Tensor) or table.dim() != 2 or not ids.numel():
        return ""
    return f"the table has {len(table)} rows, and the ids are from {ids.min().item()} to {ids.max().item()}"


def _cross_entropy(call: FailedCall) -> str:
    return (
        f"the shapes are {_and(call.shapes[:2])}, but cross_entropy expects (N, V) and (N), as after flatten(0, 1) of "
        "logits (B, T, V) and flatten() of targets (B, T)"
    )


def _no_rule(call: FailedCall) -> str:
    return ""


_RULES: dict[str, Callable[[FailedCall], str]] = {
    **dict.fromkeys(
        ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm", "baddbmm"), _matrix_product
    ),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("view", "reshape"), _view),
    "linear": _linear,
    "stack": _stack,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
}
"""Maps the name of a function of torch to a function that says why its shapes do not fit."""


def _broadcasting(call: FailedCall, message: str) -> str:
    """Return why the shapes of an operation on single numbers, such as +, do not fit, or "" for another operation."""
    if "must match the size of tensor b" not in message:
        return ""
    shapes = [shape[:-2] for shape in call.shapes] if _RULES.get(call.name) is _matrix_product else call.shapes
    pairs = ((one, other) for i, one in enumerate(shapes) for other in shapes[i + 1 :])
    reasons = (
        f"the shapes {one} and {other} do not fit: {conflict}"
        for one, other in pairs
        if (conflict := _conflict(one, other))
    )
    return next(reasons, "")


def _conflict(one: Shape, other: Shape) -> str:
    """Return which sizes of two shapes do not fit, or "" if all do. torch compares them from the last dimension on."""
    pairs = list(zip(reversed(one), reversed(other), strict=False))
    wrong = next((i for i, (a, b) in enumerate(pairs) if a != b and 1 not in (a, b)), None)
    if wrong is None:
        return ""
    return f"from the right, size number {wrong + 1} is {pairs[wrong][0]} and {pairs[wrong][1]}, but sizes must be equal or 1"


def _list(shapes: Sequence[Shape]) -> str:
    return f"the shape is {shapes[0]}" if len(shapes) == 1 else f"the shapes are {_and(shapes)}"


def _and(items: Sequence[object]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
