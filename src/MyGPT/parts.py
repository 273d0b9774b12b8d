"""Custom parts of a model: a Python file of the user that replaces the attention, the MLP or the block of GPT-2.

`load_parts` runs the file, `Parts.install` puts its parts into a new model, and `check_parts` finds common mistakes, such
as attention that looks ahead. A saved model stores a copy of the file, but opening the model never runs this copy: the user
names the file to run. B batch size, H heads, T new tokens, S all tokens so far, C embedding width, D = C // H.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from MyGPT.files import read_json, refuse_pipe
from MyGPT.messages import FileWarning, error_message, quote

if TYPE_CHECKING:
    from torch import Tensor, nn

PARTS_FILE = "parts.py"
"""The name of the copy of the user's file in the directory of a model or a run."""
MODEL_TYPE = "mygpt"
"""The model_type in config.json of a model with custom parts. transformers does not know this type and refuses the model."""
KEY = "custom_parts"
"""The key in config.json under which the names of the parts and the hash of their file are stored."""
CLASSES = {"CausalSelfAttention": "config, layer", "MLP": "config", "Block": "config, layer"}
"""The classes that a file may define, with the arguments from which an object of the class is made."""
NAMES = ("attention", *CLASSES)
"""The names of all parts that a file may define. `attention` is a function, the others are classes."""
MAX_FILE_BYTES = 1 << 20
_SHOWN: dict[str, str] = {}
"""Maps the absolute path of every file that was run to the path that the user gave."""


class PartsError(ValueError):
    """Error raised if custom parts are missing, cannot be used, or contain a mistake."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a model that replace those of GPT-2. Each is None if GPT-2's part is used."""

    attention: Callable[..., Tensor] | None = None
    """A function of q (B, H, T, D), k and v (B, H, S, D) and a mask, which returns (B, H, T, D).

    The mask is a bool tensor, broadcastable to (B, H, T, S), that is True where a query may attend to a key. It is None for
    plain causal attention, in which the queries are the last T of S tokens.
    """
    CausalSelfAttention: type[nn.Module] | None = None
    """A class with the method forward(x, mask, cache) -> (B, T, C)."""
    MLP: type[nn.Module] | None = None
    """A class with the method forward(x) -> (B, T, C)."""
    Block: type[nn.Module] | None = None
    """A class with the method forward(x, mask, cache) -> (B, T, C)."""
    path: str = "the custom parts"
    """The path of the file that defines the parts, as the user gave it, for messages."""
    source: bytes | None = field(default=None, repr=False)
    """The content of the file, of which saved models store a copy. None if the parts are not from a file."""
    used: tuple[str, ...] = ()
    """The names of the parts that `install` has put into a model."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts that the file defines."""
        return tuple(name for name in NAMES if getattr(self, name) is not None)

    @property
    def sha256(self) -> str | None:
        """The SHA-256 hash of the file, or None if the parts are not from a file."""
        return None if self.source is None else hashlib.sha256(self.source).hexdigest()

    @property
    def description(self) -> str:
        """A text for messages, such as "attention from my_attention.py"."""
        return f"{' and '.join(self.used or self.names)} from {self.path}"

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of config.json that record these parts. Programs that do not know them refuse the model."""
        file = None if self.source is None else Path(self.path).name
        record = {"names": list(self.used), "file": file, "sha256": self.sha256}
        return {"architectures": ["GPTModel"], "model_type": MODEL_TYPE, KEY: record}

    def install(self, model: Any, standard: Mapping[str, type[nn.Module]]) -> Parts:
        """Replace the parts of a GPTModel by these parts, and return these parts with the names of those that are used.

        A Block of the file replaces every block. The other parts replace GPT-2's parts, also inside of such a Block.
        `standard` maps the names in `CLASSES` to GPT-2's classes. Random numbers that the parts draw depend on torch's seed,
        but the initial weights of the model that are drawn afterwards do not depend on the parts.
        """
        import torch

        of_type: dict[type, tuple[str, Callable[..., nn.Module]]] = {}
        if self.attention is not None:
            calling = _calls(self.attention, self, standard["CausalSelfAttention"])
            of_type[standard["CausalSelfAttention"]] = "attention", calling
        for name in ("CausalSelfAttention", "MLP"):
            if getattr(self, name) is not None:
                of_type[standard[name]] = name, getattr(self, name)
        used = set()
        blocks, config = model.transformer.h, model.config
        devices = [torch.cuda.current_device()] if torch.get_default_device().type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**62, (), device="cpu")))
            for layer in range(len(blocks)):
                if self.Block is not None:
                    blocks[layer] = self._make("Block", self.Block, config, layer)
                    used.add("Block")
                for place, module in list(blocks[layer].named_modules()):
                    if type(module) in of_type:
                        name, kind = of_type[type(module)]
                        arguments = (config,) if name == "MLP" else (config, layer)
                        blocks[layer].set_submodule(place, self._make(name, kind, *arguments))
                        used.add(name)
        return replace(self, used=tuple(name for name in NAMES if name in used))

    def _make(self, name: str, kind: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
        """Return a new module of the class `kind`, which checks the shape of its output."""
        with self.reporting_errors():
            module = kind(*arguments)
        if name != "attention":  # which has a check of its own
            module.register_forward_hook(lambda _, args, output: self.check_output(name, output, args[0].shape))
        return module

    def check_output(self, name: str, output: Any, shape: tuple[int, ...]) -> None:
        """Raise PartsError unless `output`, which the part `name` has returned, is a tensor of this shape."""
        found = getattr(output, "shape", None)
        if found != shape:
            returned = type(output).__name__ if found is None else tuple(found)
            raise PartsError(f"{self.path}: {name} returned {returned}, expected {tuple(shape)}")

    @contextmanager
    def reporting_errors(self, hint: str = "") -> Iterator[None]:
        """Raise PartsError, with the file, the line and `hint`, for any other error in the `with` block."""
        try:
            yield
        except PartsError:
            raise
        except Exception as error:
            raise PartsError(f"{describe_error(error) or f'{self.path}: {_named(error)}'}{hint}") from error


def _calls(calling_function: Callable[..., Tensor], parts: Parts, standard: Any) -> type[nn.Module]:
    """Return a class that differs from GPT-2's CausalSelfAttention, `standard`, only in calling a function."""

    class OwnAttention(standard):  # type: ignore[misc]
        # Not called as a method: the function has no `self`.
        function = staticmethod(calling_function)

        def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
            y = self.function(q, k, v, mask)
            parts.check_output("attention", y, q.shape)
            return y

    return OwnAttention


def as_parts(parts: str | os.PathLike[str] | ModuleType | Mapping[str, Any] | Parts | None) -> Parts | None:
    """Return the parts in a Python file, a module, or a dict such as {"attention": function}. None stays None."""
    if parts is None or isinstance(parts, Parts):
        return parts
    if isinstance(parts, Mapping):
        if unknown := [name for name in parts if name not in NAMES]:
            raise PartsError(f"unknown part {unknown[0]!r}: the parts are {', '.join(NAMES)}")
        return _of_namespace(parts, "the custom parts", None)
    if isinstance(parts, ModuleType):
        file = getattr(parts, "__file__", None)
        if file is None:
            return _of_namespace(vars(parts), parts.__name__, None)
        _SHOWN[os.path.abspath(file)] = os.path.basename(file)
        return _of_namespace(vars(parts), os.path.basename(file), Path(file).read_bytes())
    return load_parts(parts)


def load_parts(path: str | os.PathLike[str]) -> Parts:
    """Run the Python file at `path`, and return the parts that it defines.

    The bytes that are run are those that are hashed and saved. Python's cache of compiled files is not used.

    Raises:
        OSError: the file cannot be read.
        PartsError: the file is no Python file, running it fails, or it defines no part.
    """
    file = os.path.abspath(path)
    if os.path.isdir(file):
        raise PartsError(f"{path} is a directory, not a Python file with parts of a model")
    refuse_pipe(path)
    source = Path(path).read_bytes()
    if len(source) > MAX_FILE_BYTES:
        raise PartsError(
            f"{path} has {len(source):,} bytes, a file with parts of a model has at most {MAX_FILE_BYTES:,}"
        )
    _SHOWN[file] = str(path)
    module = ModuleType(f"mygpt_parts_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses and pickle look modules up there
    try:
        exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        raise PartsError(describe_error(error) or f"{path}: {_named(error)}") from error
    return _of_namespace(vars(module), str(path), source)


def _of_namespace(namespace: Mapping[str, Any], path: str, source: bytes | None) -> Parts:
    """Return the parts among the names of a module or dict. GPT-2's own classes, which a file may import, do not count."""
    from torch import nn

    found = {name: namespace[name] for name in NAMES if namespace.get(name) is not None}
    found = {name: value for name, value in found.items() if getattr(value, "__module__", "") != "MyGPT.model"}
    for name, value in found.items():
        if name == "attention" and (not callable(value) or isinstance(value, (type, nn.Module))):
            raise PartsError(
                f"{path}: attention must be a function of q, k, v and mask, got {_kind(value)}; a class of attention is "
                "called CausalSelfAttention"
            )
        if name != "attention" and not (isinstance(value, type) and issubclass(value, nn.Module)):
            raise PartsError(f"{path}: {name} must be a class derived from torch.nn.Module, got {_kind(value)}")
    if not found:
        classes = [f"{name}({arguments})" for name, arguments in CLASSES.items()]
        raise PartsError(
            f"{path} defines no part of a model: it must define a function attention(q, k, v, mask), or a class "
            f"{', '.join(classes[:-1])} or {classes[-1]}"
        )
    return Parts(**found, path=path, source=source)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def describe_error(error: BaseException) -> str | None:
    """Return one line with the user's file, the line number, the function and the error.

    An example is "my_attention.py, line 12, in attention: TypeError: …". The last line of a user's file that was running is
    named. Return None if the error did not happen in such a file.
    """
    if isinstance(error, SyntaxError) and error.filename in _SHOWN:
        return f"{_SHOWN[error.filename]}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(code, line) for code, line in frames if code.co_filename in _SHOWN]
    if not own:
        return None
    code, line = own[-1]
    function = "" if code.co_name == "<module>" else f", in {code.co_name}"
    return f"{_SHOWN[code.co_filename]}, line {line}{function}: {_named(error)}"


def _named(error: BaseException) -> str:
    """Return the type and the message of an error as one line."""
    return f"{type(error).__name__}: {error_message(error)}".removesuffix(": ")


@dataclass(frozen=True)
class PartsRecord:
    """The record of a model's custom parts in config.json."""

    names: tuple[str, ...]
    file: str | None
    sha256: str | None


def read_record(config_json: Path) -> PartsRecord | None:
    """Return the record of custom parts in the file config.json, or None for a model with GPT-2's parts.

    A damaged file counts as a model with GPT-2's parts, because reading its config reports the damage.
    """
    try:
        return record_of(read_json(config_json), config_json)
    except PartsError:
        raise
    except ValueError:
        return None


def record_of(content: Any, config_json: Path) -> PartsRecord | None:
    """Return the record of custom parts in `content`, which was read from the file config.json, or None if it has none."""
    if not isinstance(content, dict) or KEY not in content:
        return None
    values = content[KEY] if isinstance(content[KEY], dict) else {}
    names, file, sha256 = values.get("names"), values.get("file"), values.get("sha256")
    are_texts = all(isinstance(text, (str, type(None))) for text in (file, sha256))
    if not are_texts or not isinstance(names, list) or not names or not all(name in NAMES for name in names):
        raise PartsError(f"{config_json} does not say which parts the model has: {KEY} is {content[KEY]!r:.80}")
    return PartsRecord(tuple(names), file, sha256)


def require_parts(record: PartsRecord, directory: Path, parts: Parts | None) -> None:
    """Check that `parts` can stand for the parts in the record of the model in `directory`.

    Other code with the same parts is accepted with a FileWarning, because it may compute the same.

    Raises PartsError if `parts` is None or lacks a part. The message names the copy of the code, which is not run.
    """
    names = " and ".join(record.names)
    if parts is None:
        copy = directory / PARTS_FILE
        code = f"read the code in {copy}, and then pass --with {quote(copy)}"
        if not copy.is_file():
            code = "pass --with and the file with their code"
        raise PartsError(
            f"the model in {directory} has its own {names}, and MyGPT runs code of a model only if you name it: {code} "
            "(mygpt generate, chat, serve, evaluate, explain and plot have this option, and open_model in Python has parts=; "
            "other commands do not accept such a model)"
        )
    if missing := [name for name in record.names if name not in parts.names]:
        raise PartsError(f"the model in {directory} has its own {missing[0]}, but {parts.path} does not define it")
    if parts.sha256 != record.sha256:
        reason = "is not the file with which the model was trained, so the results may differ"
        warnings.warn(f"{parts.path} {reason} ({directory / PARTS_FILE} is a copy of it)", FileWarning, stacklevel=2)


def refuse_parts(model: Any, user: str) -> None:
    """Raise PartsError if the model has custom parts, which `user`, such as "an ONNX file", does not compute."""
    if getattr(model, "parts", None) is not None:
        raise PartsError(f"{user} computes only GPT-2's parts, but this model has {model.parts.description}")


def check_parts(model: Any) -> None:
    """Run a GPTModel with custom parts on a few tokens, and raise PartsError for a mistake that makes its results meaningless.

    The mistakes are an error or a wrong shape, other results in a second pass (dropout in evaluation mode), an output that
    depends on later tokens or on other sequences, and other results with a KV cache. A FileWarning reports parts that ignore
    the mask of padding. Random states and the mode of the model stay as they are.
    """
    import torch

    parts, context = model.parts, model.config.context_length
    device = model.transformer.wte.weight.device
    if parts is None or device.type == "meta":
        return
    T = max(
        1, min(7, context - 1)
    )  # not a power of two, as the width of a head often is, so that wrong shapes are found
    ids = torch.arange(2 * T, device=device).view(2, T) % model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + model.config.vocab_size // 2) % model.config.vocab_size
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), parts.reporting_errors():
        try:
            model.eval()
            hidden = model.transformer(ids)  # (2, T, C)
            tolerance = hidden.abs().max().item() * (1e-3 if hidden.dtype == torch.float32 else 5e-2)

            def differ(other: Tensor, own: Tensor) -> bool:
                return bool((other - own).abs().max() > tolerance) if own.numel() else False

            if differ(model.transformer(ids), hidden):
                way_out = "give dropout the argument training=self.training, and leave other random numbers out"
                raise PartsError(f"{parts.path} gives other results for the same tokens a second time: {way_out}")
            moved = model.transformer(changed)
            if differ(moved[1], hidden[1]):
                raise PartsError(
                    f"{parts.path} mixes the sequences of a batch: each must be computed as if it were alone"
                )
            if differ(moved[0, :-1], hidden[0, :-1]):
                way_out = "let a query attend only to the keys up to its own position"
                raise PartsError(
                    f"{parts.path} looks ahead, so the loss would have no meaning: another last token changes the outputs "
                    f"before it; {way_out}"
                )
            way_out = "with a cache, the queries are the last T of S tokens, and a class must call cache.append"
            with parts.reporting_errors(f" (computed with a KV cache: {way_out})"):
                if T > 2 and differ(_in_pieces(model, ids), hidden):
                    raise PartsError(
                        f"{parts.path} gives other results with a KV cache, so generated text would be wrong: {way_out}"
                    )
            if context > T:
                padded = torch.cat([ids[:, :1], ids], dim=1)  # (2, T + 1)
                mask = (torch.arange(T + 1, device=device) > 0).long().expand(2, T + 1)
                if differ(model.transformer(padded, mask)[:, 1:], hidden):
                    warnings.warn(
                        f"{parts.path} gives other results after padding, so prompts of unequal length are continued wrongly "
                        "in a batch: attend only to the keys for which the mask is True",
                        FileWarning,
                        stacklevel=3,
                    )
        finally:
            for module, mode in modes.items():
                module.training = mode


def _in_pieces(model: Any, ids: Tensor) -> Tensor:
    """Return the hidden states of ids (B, T), computed with a KV cache: the first half, the rest, and the last token."""
    import torch

    T, cache = ids.shape[1], model.new_cache(len(ids))
    pieces = (ids[:, : T // 2], ids[:, T // 2 : T - 1], ids[:, T - 1 :])
    return torch.cat([model.transformer(piece, cache=cache) for piece in pieces if piece.shape[1]], dim=1)
