"""Tokenizers for words, characters and byte-level BPE, all of which can be trained, and the tokenizer of GPT-2."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from MyGPT.files import read_json
from MyGPT.messages import did_you_mean, near_path
from MyGPT.tokenizers import chars, words
from MyGPT.tokenizers.base import ENDOFTEXT as ENDOFTEXT  # "import X as X" marks X as public for type checkers.
from MyGPT.tokenizers.base import UNKNOWN as UNKNOWN
from MyGPT.tokenizers.base import Tokenizer as Tokenizer
from MyGPT.tokenizers.bpe import BPETokenizer as BPETokenizer
from MyGPT.tokenizers.bpe import check_vocab_size, from_visible, place_added_tokens
from MyGPT.tokenizers.chars import CharTokenizer as CharTokenizer
from MyGPT.tokenizers.gpt2 import gpt2_tokenizer, has_gpt2_merges, read_openai_vocabulary
from MyGPT.tokenizers.words import SimpleTokenizer as SimpleTokenizer

_GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_LEARNED = ("chars", "words", "bpe")
_SYNONYMS = {
    "chars": "character characters char-level ascii",
    "words": "word-level simple whitespace",
    "bpe": "byte-bpe byte-level sentencepiece subword",
    "gpt2": "tiktoken r50k_base",
}


def get_tokenizer(name_or_dir: str | os.PathLike[str] = "gpt2") -> Tokenizer:
    """Return GPT-2's tokenizer, or the tokenizer in a directory.

    `name_or_dir` is "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl", which all have the same tokenizer; or a directory
    with `tokenizer.json`, or with OpenAI's `encoder.json` and `vocab.bpe`.
    """
    if name_or_dir in _GPT2_NAMES:
        return gpt2_tokenizer()
    directory = Path(name_or_dir)
    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(directory)
    if (directory / "encoder.json").is_file() and (directory / "vocab.bpe").is_file():
        return read_openai_vocabulary(directory)
    known = f"{', '.join(_GPT2_NAMES)}, or a directory with tokenizer.json or with encoder.json and vocab.bpe"
    hint = did_you_mean(str(name_or_dir), _GPT2_NAMES) or near_path(name_or_dir)
    raise ValueError(f"there is no tokenizer {str(name_or_dir)!r}: give {known}{hint}")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer in the `tokenizer.json` of a directory.

    MyGPT supports the tokenizers that `Tokenizer.save` writes, and every byte-level BPE that splits text by GPT-2's
    pattern. Any other tokenizer raises ValueError with the path.
    """
    path = Path(directory) / "tokenizer.json"
    try:
        return _from_json(read_json(path))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json: {type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_json(data: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer described by `data`, the content of a tokenizer.json file."""
    model, pre_tokenizer = data["model"], data["pre_tokenizer"] or {}
    added = [(token["content"], token["id"]) for token in data["added_tokens"]]
    kind = model.get("type") or ("BPE" if "merges" in model else None)  # Older files have no type.
    if kind == "BPE":
        _require_gpt2_rules(data)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        special = place_added_tokens(model["vocab"], added)
        return from_visible(model["vocab"], merges, special, known=has_gpt2_merges(merges))
    if kind == "WordLevel" and pre_tokenizer == words.PRE_TOKENIZER:
        return SimpleTokenizer(model["vocab"])
    if kind == "WordLevel" and pre_tokenizer == chars.PRE_TOKENIZER:
        in_order = sorted(model["vocab"], key=model["vocab"].__getitem__)
        if sorted(model["vocab"].values()) != list(range(len(in_order))):
            raise ValueError("the ids of a character vocabulary must be 0, 1, 2, … without gaps")
        return CharTokenizer(in_order)
    raise ValueError(f"MyGPT does not support a {kind} tokenizer with this pre_tokenizer")


def _require_gpt2_rules(data: dict[str, Any]) -> None:
    """Raise ValueError if `data`, the `tokenizer.json` of a byte-level BPE, has an unsupported setting."""
    pre_tokenizer = data["pre_tokenizer"] or {}
    if (
        pre_tokenizer.get("type") != "ByteLevel"
        or pre_tokenizer.get("add_prefix_space")
        or not pre_tokenizer.get("use_regex", True)
        or data.get("normalizer")
    ):
        raise ValueError("only byte-level BPE with GPT-2's pattern, without normalizer and prefix space, is supported")
    post = data.get("post_processor") or {"type": "ByteLevel"}
    adds_nothing = post["type"] == "TemplateProcessing" and all("Sequence" in part for part in post["single"])
    if post["type"] != "ByteLevel" and not adds_nothing:
        raise ValueError(f"the post_processor {post['type']} adds tokens to every text, which is not supported")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if data["model"].get(option):
            raise ValueError(f"the option {option}={data['model'][option]!r} is not supported")
    for token in data["added_tokens"]:
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise ValueError(f"the option {option} of the token {token['content']!r} is not supported")


def check_tokenizer(kind: str, vocab_size: int = 1024) -> None:
    """Raise ValueError if `make_tokenizer` accepts no such `kind` or, for the kind "bpe", no such `vocab_size`.

    The check needs no texts, so a command makes it before it reads any.
    """
    names = (*_LEARNED, *_GPT2_NAMES)
    if kind not in names and not Path(kind).is_dir():
        known = (
            f"{', '.join(_LEARNED)} (learned from the text), {', '.join(_GPT2_NAMES)}, or a directory with a tokenizer"
        )
        hint = did_you_mean(kind, names, _SYNONYMS) or near_path(kind)
        raise ValueError(f"there is no tokenizer {kind!r}: give {known}{hint}")
    if kind == "bpe":
        check_vocab_size(vocab_size)


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int = 1024, progress: bool = True) -> Tokenizer:
    """Train a tokenizer on texts, or open an existing one.

    `kind` is "words", "chars" or "bpe" to train a tokenizer; any other value is the name or directory of an existing
    tokenizer, see `get_tokenizer`. Only "bpe" uses `vocab_size`, the number of tokens, and `progress`. If
    `progress` is True, a progress bar is shown.
    """
    check_tokenizer(kind, vocab_size)
    if kind == "words":
        return SimpleTokenizer.from_text(" ".join(texts))
    if kind == "chars":
        return CharTokenizer(sorted(set(chain.from_iterable(texts))))
    if kind == "bpe":
        return BPETokenizer.train(texts, vocab_size, progress=progress)
    return get_tokenizer(kind)
