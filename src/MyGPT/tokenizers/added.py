"""Added tokens: special tokens and words that are found in a text as a whole, before the rest is split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

# Unicode's White_Space, the characters that \s matches in the tokenizers library.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B))
)
MAX_ID = 2**31 - 1
"""The largest token id that a vocabulary may contain; real vocabularies are far smaller."""


@dataclass(frozen=True)
class AddedToken:
    """A token that `encode` finds in a text before it splits the rest of the text into other tokens.

    The fields are those of `tokenizer.json`.
    """

    content: str
    """The token's text."""
    id: int
    special: bool = True
    """True for a token with a meaning for the model, such as `<|endoftext|>`, which transformers leaves out of decoded
    text with skip_special_tokens=True. False for ordinary text, such as a word of a special field."""
    normalized: bool = False
    """True finds the token only in the text that the tokens with False leave."""
    single_word: bool = False
    """True finds the token only where no letter, digit or underscore touches it."""
    lstrip: bool = False
    """True removes white space before the token."""
    rstrip: bool = False
    """True removes white space after the token."""

    def __post_init__(self) -> None:
        if not isinstance(self.content, str) or not self.content:
            raise ValueError(f"a special token must be a string of at least one character, got {self.content!r}")
        for name in ("special", "normalized", "single_word", "lstrip", "rstrip"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(
                    f"{name} of the token {self.content!r} must be true or false, got {getattr(self, name)!r}"
                )


def added_token(entry: Mapping[str, Any], id_: int | None = None) -> AddedToken:
    """Return an added token from its entry in a JSON file. As in the tokenizers library, missing flags are false."""
    flags = {field.name: entry[field.name] for field in fields(AddedToken) if field.name in entry}
    return AddedToken(**flags) if id_ is None else AddedToken(**{**flags, "id": id_})


class AddedTokenSplitter:
    """Splits texts at added tokens. A tokenizer makes one for its tokens, because compiling the patterns takes time.

    Tokens are found as in Hugging Face's tokenizers library: at each position the longest one, first those that are not
    `normalized`, and then the others in the texts that are left.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        groups: dict[bool, dict[str, AddedToken]] = {False: {}, True: {}}
        for token in tokens:
            groups[token.normalized][token.content] = token
        self._groups = [(group, special_pattern(group)) for group in groups.values() if group]

    def split(self, text: str) -> list[str | AddedToken]:
        """Return the added tokens in a text, and the texts before, between and after them, in order."""
        parts: list[str | AddedToken] = [text]
        for group, pattern in self._groups:
            parts = [
                piece for part in parts for piece in (_find(part, group, pattern) if isinstance(part, str) else [part])
            ]
        return [part for part in parts if part != ""]


def _find(text: str, tokens: Mapping[str, AddedToken], pattern: re.Pattern[str]) -> Iterator[str | AddedToken]:
    """Yield the tokens that `pattern` matches in a text, and the texts between them. `tokens` maps texts to tokens."""
    end = 0
    for match in pattern.finditer(text):
        token, (start, stop) = tokens[match[0]], match.span()
        if token.single_word and re.search(r"\w", text[max(start - 1, 0) : start] + text[stop : stop + 1]):
            continue
        while token.lstrip and start > end and text[start - 1] in _WHITE_SPACE:
            start -= 1
        while token.rstrip and stop < len(text) and text[stop] in _WHITE_SPACE:
            stop += 1
        yield text[end:start]
        yield token
        end = stop
    yield text[end:]


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a regular expression that matches any of the tokens, and the longest one if several match.

    Its method `split` returns a list with the matched tokens at odd indices and the texts between them at even indices.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"((?!))")


def place_added_tokens(vocab: Mapping[str, int], added: Iterable[AddedToken]) -> list[AddedToken]:
    """Return the added tokens with the ids that Hugging Face's `tokenizers` library gives them.

    The library ignores the ids of added tokens in a file. A token of `vocab` keeps its id there, and the other tokens
    get the next ids in the order in which they are listed. If `vocab` has gaps, the next id can belong to another
    token. In this case only, the id in the file is used, or the first id above all others if the file has no id, which
    is written as -1. A repeated token counts once.

    Args:
        vocab: maps each token of the model to its id.
        added: the added tokens in the order of the file.

    Raises:
        ValueError: a token has no free id.
    """
    taken = set(vocab.values())
    placed: dict[str, AddedToken] = {}
    for token in added:
        id_ = vocab.get(token.content)
        if id_ is None and token.content not in placed:
            id_ = max(len(vocab), 1 + max((other.id for other in placed.values()), default=-1))
            if id_ in taken:
                id_ = max(taken) + 1 if token.id == -1 else token.id
            if type(id_) is not int or id_ < 0 or id_ in taken:
                raise ValueError(f"the added token {token.content!r} needs an id of its own, but got {token.id!r}")
            taken.add(id_)
        if id_ is not None:
            placed.setdefault(token.content, replace(token, id=id_))
    return list(placed.values())


def with_added(vocab: Mapping[str, int], added_tokens: Iterable[AddedToken]) -> dict[str, int]:
    """Return a vocabulary with the added tokens. An added token that has another id in `vocab` raises ValueError."""
    whole = dict(vocab)
    for token in added_tokens:
        if whole.setdefault(token.content, token.id) != token.id:
            raise ValueError(f"the token {token.content!r} has two ids, {whole[token.content]} and {token.id}")
    return whole
