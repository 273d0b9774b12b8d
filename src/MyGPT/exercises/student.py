"""Open a student's file and call its functions, with one clear sentence for whatever can go wrong there."""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import random
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT.exercises.comparing import NotWritten, Wrong
from MyGPT.exercises.shapes import FailedCall, explain
from MyGPT.files import refuse_pipe
from MyGPT.messages import printable

MAX_FILE_BYTES = 1 << 20
MAX_PRINTED = 4000
"""Number of characters that are kept of what a student's file prints."""
MAX_ERROR = 200
"""Number of characters that are shown of the message of an exception."""


class Printed(io.TextIOBase):
    """A text stream that keeps the first MAX_PRINTED characters and drops the others."""

    def __init__(self) -> None:
        self.text = ""
        self.n_dropped = 0

    def write(self, text: str) -> int:
        kept = text[: MAX_PRINTED - len(self.text)]
        self.text += kept
        self.n_dropped += len(text) - len(kept)
        return len(text)


class Student:
    """A student's file, opened as a module. Every error in it becomes a Wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, Any] = {}
        source = _read(path)
        self._source = source.decode("utf-8", "replace")
        try:
            code = compile(source, str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Wrong(_syntax_problem(path, error)) from None
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        with self._guarded(f"opening {path.name}"), _registered(module, path):
            exec(code, module.__dict__)
        self.names = vars(module)

    def function(self, name: str) -> Callable[..., Any]:
        """Return the function or class `name` of the file. Raises Wrong if it does not exist."""
        found = self.names.get(name)
        if not callable(found):
            problem = (
                f"has no function or class {name}"
                if name not in self.names
                else f"defines {name}, but not as a function"
            )
            raise Wrong(f"{self.path.name} {problem}: keep the names of the original file")
        return found

    def call(self, call: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the result of a student's function. `call` is the call in words, with which an error begins.

        Raises:
            NotWritten: the function raises NotImplementedError.
            Wrong: the function raises another exception, or changes a tensor or a list that it was given.
        """
        before = [_copy(argument) for argument in arguments]
        with self._guarded(call):
            result = function(*arguments, **options)
        for i, (argument, old) in enumerate(zip(arguments, before, strict=True)):
            if not _same(argument, old):
                raise Wrong(
                    f"{call}: argument number {i + 1} is changed in place; work on a copy, or use the functions without _"
                )
        return result

    @contextlib.contextmanager
    def _guarded(self, call: str) -> Iterator[None]:
        """Turn every exception of the block into a Wrong or a NotWritten, and refuse changes of torch's global state."""
        state, failed = _torch_state(), FailedCall()
        try:
            with failed:
                yield
        except NotImplementedError as error:
            frame = self._frame(error)
            if frame is not None and "NotImplementedError" in self._line(frame.lineno or 0):
                raise NotWritten(frame.name) from None
            raise Wrong(f"{call}: {self._problem(error, failed)}") from None
        except BaseException as error:
            raise Wrong(f"{call}: {self._problem(error, failed)}") from None
        finally:
            changed = [name for name, value in _torch_state().items() if value != state[name]]
            _restore(state)
        if changed:
            raise Wrong(
                f"{call}: it changes {changed[0]} for the whole program; remove this, or undo it with a `with` block"
            )

    def _frame(self, error: BaseException) -> traceback.FrameSummary | None:
        """Return the innermost place in the student's file at which an exception was raised."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]
        return frames[-1] if frames else None

    def _line(self, number: int) -> str:
        lines = self._source.splitlines()
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""

    def _problem(self, error: BaseException, failed: FailedCall) -> str:
        """Return a part of a sentence about an exception: its place, its type, its message, and the reason if it is known.

        `failed` is the last call of torch that failed.
        """
        frame = self._frame(error)
        where = f"line {frame.lineno} of {self.path.name}" if frame else f"the code of {self.path.name}"
        try:
            message = " ".join(printable(str(error)).split()).removesuffix(".")
        except Exception:  # a student's exception may have a __str__ that fails
            message = ""
        if isinstance(error, SystemExit):
            return f"{where} ends the program (sys.exit or exit); remove this"
        if isinstance(error, RecursionError):
            return f"{where} calls itself without an end (RecursionError)"
        message = message if len(message) <= MAX_ERROR else message[:MAX_ERROR] + "…"
        hint = _hint(error, message) or explain(error, failed)
        return f"{where} raises {type(error).__name__}{': ' if message else ''}{message}{f'; {hint}' if hint else ''}"


def seed_everything() -> None:
    """Set the seeds of the random generators that a student may use, so that a check always gives the same result."""
    torch.manual_seed(0)
    random.seed(0)


def _read(path: Path) -> bytes:
    try:
        refuse_pipe(path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Wrong(
                f"{path.name} has {path.stat().st_size:,} bytes, but an exercise has at most {MAX_FILE_BYTES:,}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not an ordinary file"
        raise Wrong(f"{path.name} cannot be read: {reason}") from None


def _syntax_problem(path: Path, error: BaseException) -> str:
    """Return a sentence about a file that Python cannot compile."""
    if isinstance(error, SyntaxError):
        line = f"line {error.lineno} of {path.name}" if error.lineno else path.name
        text = " ".join(printable(error.text or "").split())[:80]
        return f"{line} is not valid Python: {error.msg}{f', in: {text}' if text else ''}"
    return f"{path.name} is not valid Python: {printable(str(error))[:MAX_ERROR] or type(error).__name__}"


def _hint(error: BaseException, message: str) -> str:
    """Return an explanation of an exception that beginners often get, or an empty string."""
    if "is not contiguous" in message or "view size is not compatible" in message:
        return "use reshape instead of view after transpose"
    if isinstance(error, EOFError):
        return "a check cannot answer input()"
    if "leaf Variable that requires grad" in message:
        return "do not change an argument in place"
    return ""


@contextlib.contextmanager
def _registered(module: types.ModuleType, path: Path) -> Iterator[None]:
    """Make a module known to Python while it is executed, as dataclasses need, and let it import files beside it."""
    name, directory = module.__name__, str(path.parent)
    before = sys.modules.get(name)
    sys.modules[name] = module
    sys.path.append(directory)
    try:
        yield
    finally:
        if sys.modules.get(name) is module:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
        if directory in sys.path:
            sys.path.reverse()
            sys.path.remove(directory)
            sys.path.reverse()
        linecache.checkcache(str(path))


def _copy(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    return list(argument) if type(argument) is list else None


def _same(argument: Any, old: Any) -> bool:
    """Return True if an argument still equals its copy. Other arguments than tensors and lists are not compared."""
    if isinstance(argument, Tensor):
        return argument.shape == old.shape and torch.equal(argument.detach().nan_to_num(), old.nan_to_num())
    return type(argument) is not list or argument == old


def _torch_state() -> dict[str, Any]:
    """Return the settings of torch that hold for the whole program and that a check depends on."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "whether torch records gradients": torch.is_grad_enabled(),
        "the number of torch's threads": torch.get_num_threads(),
        "the working directory": os.getcwd(),
    }


def _restore(state: dict[str, Any]) -> None:
    dtype, device, grad, threads, directory = state.values()
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        # With "cpu", every later operation of torch would call a Python function.
        torch.set_default_device(None if device.type == "cpu" else device)
    torch.set_grad_enabled(grad)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if os.getcwd() != directory:
        os.chdir(directory)
