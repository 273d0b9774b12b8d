"""GPT-2's tokenizer, built from OpenAI's `vocab.bpe`, which is part of this package.

OpenAI's second file, `encoder.json`, can be computed from `vocab.bpe`: ids 0 to 255 are the bytes, ids 256 to 50255 are
the results of the merges in order, and id 50256 is `<|endoftext|>`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from MyGPT.files import read_json, read_text
from MyGPT.tokenizers.added import AddedToken
from MyGPT.tokenizers.base import ENDOFTEXT
from MyGPT.tokenizers.bpe import BYTE_TO_CHARACTER, BPETokenizer, from_visible

VOCABULARY_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""Maps the names of the two files of OpenAI's GPT-2 tokenizer to their SHA-256. tiktoken checks the same values."""


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> BPETokenizer:
    """Return the tokenizer of the released GPT-2 models: 50,257 tokens, with `<|endoftext|>` at id 50256."""
    path = Path(str(resources.files("MyGPT"))) / "assets" / "gpt2" / "vocab.bpe"
    merges = read_merges(path)
    if not has_gpt2_merges(merges):
        way_out = "install mygpt again with pip install --force-reinstall --no-deps mygpt"
        raise ValueError(f"{path} is damaged, its SHA-256 is not {VOCABULARY_SHA256['vocab.bpe']}: {way_out}")
    return from_visible(gpt2_vocabulary(merges), merges, [AddedToken(ENDOFTEXT, 50256)], known=True)


def gpt2_vocabulary(merges: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return the content of OpenAI's `encoder.json`: a dict from tokens, written in visible characters, to ids."""
    tokens = [*BYTE_TO_CHARACTER.values(), *("".join(merge) for merge in merges), ENDOFTEXT]
    return {token: id_ for id_, token in enumerate(tokens)}


def has_gpt2_merges(merges: Iterable[Sequence[str]]) -> bool:
    """Return True if `merges` are the merges in OpenAI's `vocab.bpe`, in the same order."""
    lines = "".join(f"{' '.join(merge)}\n" for merge in merges)
    return hashlib.sha256(f"#version: 0.2\n{lines}".encode()).hexdigest() == VOCABULARY_SHA256["vocab.bpe"]


def read_openai_vocabulary(directory: Path) -> BPETokenizer:
    """Return the tokenizer in a directory with OpenAI's `encoder.json` (tokens and ids) and `vocab.bpe` (merges)."""
    try:
        vocab = read_json(directory / "encoder.json")
        merges = read_merges(directory / "vocab.bpe")
        if not isinstance(vocab, dict):
            raise ValueError("encoder.json must be a JSON object of tokens and ids")
        special = [AddedToken(ENDOFTEXT, vocab[ENDOFTEXT])] if ENDOFTEXT in vocab else []
        return from_visible(vocab, merges, special, known=has_gpt2_merges(merges))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} has no valid encoder.json and vocab.bpe: {error}") from None


def read_merges(path: Path) -> list[tuple[str, ...]]:
    """Return the pair of tokens on each line of `vocab.bpe` or `merges.txt`. A first line with the version is skipped."""
    lines = read_text(path).rstrip("\n").split("\n")
    if lines[0].startswith("#version") or lines == [""]:
        del lines[0]
    merges = [tuple(line.split(" ")) for line in lines]
    for merge in merges:
        if len(merge) != 2:
            raise ValueError(f"a merge in {path.name} must have two tokens, got the line {' '.join(merge)!r}")
    return merges
