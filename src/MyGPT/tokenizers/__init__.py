"""Tokenizers for words, characters and byte-level BPE, all of which can be trained, and the tokenizer of GPT-2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from MyGPT.files import read_json
from MyGPT.messages import did_you_mean, near_path
from MyGPT.tokenizers import chars, words
from MyGPT.tokenizers.added import added_token, place_added_tokens
from MyGPT.tokenizers.base import ENDOFTEXT as ENDOFTEXT  # "import X as X" marks X as public for type checkers.
from MyGPT.tokenizers.base import UNKNOWN as UNKNOWN
from MyGPT.tokenizers.base import Tokenizer as Tokenizer
from MyGPT.tokenizers.bpe import BPETokenizer as BPETokenizer
from MyGPT.tokenizers.bpe import check_vocab_size, from_visible
from MyGPT.tokenizers.chars import CharTokenizer as CharTokenizer
from MyGPT.tokenizers.directory import (
    READABLE_FILES,
    find_directory,
    find_files,
    read_vocab_and_merges,
)
from MyGPT.tokenizers.gpt2 import gpt2_tokenizer, has_gpt2_merges, read_openai_vocabulary
from MyGPT.tokenizers.nanogpt import META, read_meta
from MyGPT.tokenizers.settings import named_tokens, read_end_ids, read_settings
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
    that `load_tokenizer` opens.
    """
    if name_or_dir in _GPT2_NAMES:
        return gpt2_tokenizer()
    if find_directory(name_or_dir) is None:
        known = f"{', '.join(_GPT2_NAMES)}, or a directory with {READABLE_FILES}"
        hint = did_you_mean(str(name_or_dir), _GPT2_NAMES) or near_path(name_or_dir)
        raise ValueError(f"there is no tokenizer {str(name_or_dir)!r}: give {known}{hint}")
    return load_tokenizer(name_or_dir)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer in the directory of a tokenizer, a model, an adapter or a training run.

    The first of these files that exist are read: tokenizer.json; vocab.json and merges.txt; OpenAI's encoder.json and
    vocab.bpe; nanoGPT's meta.pkl. MyGPT supports the tokenizers that `Tokenizer.save` writes, and every byte-level BPE
    that splits text by GPT-2's pattern. `source` of the result names the files. `described` adds what the directory says
    about special tokens.

    Raises:
        FileNotFoundError: the directory has no file of a tokenizer.
        ValueError: a file is damaged or missing, or MyGPT does not support the tokenizer. The message names the path.
    """
    place = find_directory(directory)
    if place is None:
        raise FileNotFoundError(f"{directory} has no tokenizer: neither {READABLE_FILES}")
    files = find_files(place)
    path = place / files[0]
    try:
        tokenizer = described(_READERS[files[0]](place), place)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid {files[0]}: {type(error).__name__}: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(place) in str(error) else f"{path}: {error}") from None
    tokenizer.source = f"{' and '.join(files)} in {place}"
    return tokenizer


def described(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer with the special tokens that the other files in its directory name.

    tokenizer_config.json and special_tokens_map.json come first. If they do not name the token that ends a text,
    generation_config.json and config.json do.
    """
    return tokenizer.with_settings(read_settings(directory)).ending_with(read_end_ids(directory))


def _read_tokenizer_json(directory: Path) -> Tokenizer:
    """Return the tokenizer in a directory with a tokenizer.json."""
    return _from_json(read_json(directory / "tokenizer.json"), read_settings(directory))


def _from_json(data: dict[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer described by `data`, the content of a tokenizer.json file.

    As in transformers, a token that `settings` name as a special token is special, even if it is an ordinary token of the
    vocabulary.
    """
    model, pre_tokenizer = data["model"], data["pre_tokenizer"] or {}
    kind = model.get("type") or ("BPE" if "merges" in model else None)  # Older files have no type.
    if kind not in ("BPE", "WordLevel"):
        raise ValueError(f"MyGPT does not support a {kind} tokenizer")
    listed = [added_token(token) for token in data["added_tokens"] if token["content"] != ""]
    listed += [token for token in named_tokens(settings) if token.content in model["vocab"]]
    added = place_added_tokens(model["vocab"], listed)
    if kind == "BPE":
        _require_gpt2_rules(data)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return from_visible(model["vocab"], merges, added, known=has_gpt2_merges(merges))
    if kind == "WordLevel" and pre_tokenizer == words.PRE_TOKENIZER:
        return SimpleTokenizer(model["vocab"], added)
    if kind == "WordLevel" and pre_tokenizer == chars.PRE_TOKENIZER:
        in_order = sorted(model["vocab"], key=model["vocab"].__getitem__)
        if sorted(model["vocab"].values()) != list(range(len(in_order))):
            raise ValueError("the ids of a character vocabulary must be 0, 1, 2, … without gaps")
        return CharTokenizer(in_order, added)
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


_READERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.json": _read_tokenizer_json,
    "vocab.json": read_vocab_and_merges,
    "encoder.json": read_openai_vocabulary,
    META: lambda place: read_meta(place / META),
}
"""Maps the first file of each kind of tokenizer (see READABLE) to the function that reads a directory of this kind."""


def check_tokenizer(kind: str, vocab_size: int = 1024) -> None:
    """Raise ValueError if `make_tokenizer` accepts no such `kind` or, for the kind "bpe", no such `vocab_size`.

    The check needs no texts, so a command makes it before it reads any.
    """
    names = (*_LEARNED, *_GPT2_NAMES)
    if kind not in names and find_directory(kind) is None:
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
