"""A generator of damaged and malicious files, made by changing valid ones.

`damaged(content, kind)` is a hypothesis strategy of bytes. JSON and YAML are changed as trees (values are replaced, keys are
removed, repeated or renamed) and as bytes (flipped, cut, inserted, repeated). In safetensors the JSON header is changed and its
length is updated.
"""

from __future__ import annotations

import json
import string
import struct
from typing import Any, Literal

from hypothesis import strategies as st

Kind = Literal["bytes", "text", "json", "jsonl", "yaml", "safetensors"]


class Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, so that a key can occur twice."""


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return value.text if isinstance(value, Raw) else json.dumps(value)


class Raw:
    """A JSON text that is written unchanged, because json.dumps would not produce it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Raw({self.text[:40]!r})"


_RAW = [
    *("NaN", "-Infinity", "1e999", "-0.0", "1E5", "9" * 400, "-" + "9" * 30, "9" * 5000, "4294967295", "2147483648"),
    *(
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"\\u0000"',
        '"\\u001b[2J"',
        '"' + "a" * 20_000 + '"',
        '"../../x"',
        '"/dev/zero"',
    ),
    *("[" * n + "]" * n for n in (50, 98, 101, 900, 990, 5000)),
    *('{"a":' * n + "1" + "}" * n for n in (90, 950, 100_000)),
]
_RAW_YAML = [
    *(
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/name:os.system",
        "!!binary '*'",
        "!!int ''",
        "!!int x",
    ),
    *(
        "!!float ''",
        "!!bool x",
        "!!timestamp x",
        "2026-13-45",
        "!!set {a}",
        "!!omap [a: 1]",
        "&a [*a]",
        "*none",
        "0b",
        "1:90",
    ),
    *("0x", "~", "yes", "1_0", ".inf", "<<: 1", "{? [a] : 1}", "!!null x", "!local x", '"\\x00"', "!!str [a]", "- -"),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.text(string.printable, max_size=12)
    | st.sampled_from(["", "gpt2", "BPE", "ByteLevel", "bfloat16", "all-linear", ".*", "<|endoftext|>"])
)
VALUES = st.recursive(
    SCALARS | st.sampled_from(_RAW).map(Raw),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(st.text(max_size=4), inner), max_size=3).map(Pairs),
    max_leaves=5,
)


def _places(value: Any, place: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Return the path to every value in a tree; the path of the root is ()."""
    inner = [item[1] for item in value] if isinstance(value, Pairs) else value if isinstance(value, list) else []
    return [place, *(found for i, item in enumerate(inner) for found in _places(item, (*place, i)))]


def _changed(value: Any, place: tuple[int, ...], change: Any) -> Any:
    """Return a copy of the tree in which change(list, index) was applied to the value at a path."""
    if not place:
        root = [value]
        change(root, 0)
        return root[0] if root else None
    copy: Any = type(value)(value)
    i, *rest = place
    if not rest:
        change(copy, i)
    elif isinstance(copy, Pairs):
        copy[i] = (copy[i][0], _changed(copy[i][1], tuple(rest), change))
    else:
        copy[i] = _changed(copy[i], tuple(rest), change)
    return copy


@st.composite
def trees(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """Draw one to three changes and return the changed document."""
    for _ in range(draw(st.integers(1, 3))):
        # Change only the first and last entries of long lists (merges, ids), because the others are alike.
        places = _places(document)
        place = draw(st.sampled_from(places if len(places) < 300 else [*places[:200], *places[-100:]]))
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "twice", "key"]))
        value, key = draw(values), draw(st.text(max_size=8))

        def change(items: Any, i: int, what: str = what, value: Any = value, key: str = key) -> None:
            is_pair = isinstance(items, Pairs)
            if what == "delete":
                del items[i]
            elif what == "twice":
                items.append((items[i][0], value) if is_pair else items[i])
            elif what == "key" and is_pair:
                items[i] = (key, items[i][1])
            else:
                items[i] = (items[i][0], value) if is_pair else value

        document = _changed(document, place, change)
    return document


@st.composite
def raw_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a change of the bytes: flipped, truncated, removed, inserted or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        n = draw(st.integers(1, 8) | st.integers(1, max(1, len(data))))
        what = draw(st.sampled_from(["flip", "flip", "cut off", "cut out", "insert", "repeat"]))
        if what == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut off":
            del data[at:]
        elif what == "cut out":
            del data[at : at + n]
        elif what == "insert":
            data[at:at] = draw(
                st.binary(max_size=8) | st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"])
            )
        elif what == "repeat":
            data[at:at] = data[at : at + n] * draw(st.integers(1, 3))
    return bytes(data)


def _spellings(text: str) -> st.SearchStrategy[bytes]:
    """Draw an encoding of the text: UTF-8, or another one that programs use."""
    plain = text.encode("utf-8", "surrogatepass")
    return st.sampled_from(
        [plain] * 6 + [b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n"), plain + b"\0", plain + b"\xff"]
    )


def _parse(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, kind: Kind) -> bytes:
    """Draw a damaged version of a file of this kind."""
    if kind == "bytes" or (kind != "safetensors" and draw(st.integers(0, 3)) == 0):
        return draw(raw_bytes(content))
    if kind == "text":
        lines = content.decode().split("\n")
        i = draw(st.integers(0, len(lines) - 1))
        lines[i : i + draw(st.integers(0, 2))] = draw(st.lists(st.text(max_size=20), max_size=3))
        return draw(_spellings("\n".join(lines)))
    if kind == "json":
        return draw(_spellings(dump(draw(trees(_parse(content))))))
    if kind == "jsonl":
        documents = [_parse(line) for line in content.decode().splitlines()]
        i = draw(st.integers(0, len(documents) - 1))
        documents[i] = draw(trees(documents[i]))
        return draw(_spellings("\n".join([*map(dump, documents), ""])))
    if kind == "yaml":  # JSON is YAML
        values = VALUES | st.sampled_from(_RAW_YAML).map(Raw)
        return draw(_spellings(dump(draw(trees(_parse(content), values)))))
    n_header = struct.unpack("<Q", content[:8])[0]
    header, tensors = content[8 : 8 + n_header], content[8 + n_header :]
    what = draw(st.integers(0, 5))
    if what == 0:
        return draw(raw_bytes(content))
    if what == 1:
        return (
            struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.sampled_from([2**30, 10**8, 2**63])))
            + header
            + tensors
        )
    new = dump(draw(trees(_parse(header)))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + tensors
