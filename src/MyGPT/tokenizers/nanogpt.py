"""nanoGPT's `meta.pkl`: the table of characters that its data/*_char/prepare.py pickles beside the token ids.

A pickle can run any code when it is loaded. This module accepts only the instructions that build dicts of str and int.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from MyGPT.tokenizers.chars import CharTokenizer

META = "meta.pkl"
"""The name of the file."""
MAX_META_BYTES = 1 << 22
"""Size in bytes of the largest file that is read: 200,000 characters. nanoGPT's file has 1 kB."""
_HARMLESS = frozenset(
    """PROTO FRAME STOP MARK POP EMPTY_DICT DICT SETITEM SETITEMS INT BININT BININT1 BININT2 LONG LONG1 UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET""".split()
)
"""The names of the pickle instructions that build dicts, str and int. None of them imports or calls anything."""


class _PlainUnpickler(pickle.Unpickler):
    """A reader of pickles that refuses every class and function."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module_name}.{global_name}")


def read_meta(path: Path) -> CharTokenizer:
    """Return the character tokenizer in a `meta.pkl` file of nanoGPT, with the same ids.

    Raises ValueError, with a way to convert the file, if it contains anything but a dict with the entries stoi (from
    characters to ids), itos (from ids to characters) and vocab_size.
    """
    try:
        return CharTokenizer(_characters(_load(path)))
    except ValueError as error:
        save = f"CharTokenizer(itos[i] for i in range(len(itos))).save({str(path.parent)!r})"
        way_out = f"if you trust it, load it with pickle and save its characters in order of their ids with {save}"
        raise ValueError(f"{path} is not a table of characters as nanoGPT writes it: {error}; {way_out}") from None


def _load(path: Path) -> Any:
    """Return the value in a pickle that consists of dicts, str and int. Any other file raises ValueError."""
    if path.stat().st_size > MAX_META_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, the limit is {MAX_META_BYTES:,}")
    content = path.read_bytes()
    value = None
    try:
        problem = _problem(content)
        if problem is None:
            value = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises many types of errors
        problem = f"it is damaged: {' '.join(str(error).split()):.100}"
    if problem is not None:
        raise ValueError(problem)
    return value


def _problem(content: bytes) -> str | None:
    """Return why a pickle must not be loaded, or None. A damaged pickle raises ValueError."""
    for i, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if instruction.name not in _HARMLESS:
            return "it contains more than dicts of str and int"
        # A large number of a memo entry would make the unpickler allocate as many entries.
        if instruction.name.endswith("PUT") and int(argument or 0) > i:
            return f"it is damaged: memo entry {argument} does not exist"
    return None


def _characters(meta: Any) -> list[str]:
    """Return the characters in the order of their ids. Raises ValueError if `meta` is not a table of characters."""
    stoi, itos = (meta.get(name) if isinstance(meta, dict) else None for name in ("stoi", "itos"))
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise ValueError("it must contain a dict with the dicts stoi and itos")
    ids, characters = [*stoi.values(), *itos], [*stoi, *itos.values()]
    if any(type(id_) is not int for id_ in ids) or any(type(character) is not str for character in characters):
        raise ValueError("stoi must be a dict from str to int, and itos one from int to str")
    if {id_: character for character, id_ in stoi.items()} != itos or len(stoi) != len(itos):
        raise ValueError("stoi and itos are not inverses of each other")
    if sorted(itos) != list(range(len(itos))):
        raise ValueError("the ids must be 0, 1, 2, … without gaps")
    if meta.get("vocab_size", len(itos)) != len(itos):
        raise ValueError(f"vocab_size is {meta['vocab_size']!r:.80}, but there are {len(itos)} characters")
    return [itos[id_] for id_ in range(len(itos))]
