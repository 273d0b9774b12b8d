"""Find and read the tokenizer in a directory. Every function and command that opens a tokenizer calls `find_files`.

A tokenizer is one file or two. A directory with files of a tokenizer that MyGPT cannot read is refused: another
tokenizer, such as GPT-2's, would give the model's ids to other texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from MyGPT.files import present_directory
from MyGPT.tokenizers.added import AddedToken, added_token, place_added_tokens
from MyGPT.tokenizers.base import ENDOFTEXT
from MyGPT.tokenizers.bpe import BPETokenizer, from_visible
from MyGPT.tokenizers.gpt2 import has_gpt2_merges, read_merges
from MyGPT.tokenizers.nanogpt import META
from MyGPT.tokenizers.settings import CHAT_TEMPLATES, ROLES, named_tokens, read_object, read_settings, token_name

READABLE = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), (META,))
"""The files of each kind of tokenizer that MyGPT reads. The first kind that a directory contains is used."""
READABLE_FILES = ", ".join(" with ".join(files) for files in READABLE)
"""The list of these files for messages."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATES[0])
"""Files that describe a tokenizer, but do not contain its vocabulary."""
OTHERS = (
    "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken.json", "vocab.txt", "dict.txt", "bpe.codes", "vocab.pkl",
    "*tokenizer.bin", "tokenizer.pkl", "tokenizer.pickle", "tokenizer.pt",
)  # fmt: skip
"""The names of files of other tokenizers, such as SentencePiece, BERT's, tiktoken's, nanochat's and llm.c's."""
_DEFAULT_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT)
"""The special tokens of GPT2Tokenizer if the settings do not name them."""
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")
"""The classes of transformers that split text as GPT-2 does, as far as MyGPT reads their settings."""


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file with this name belongs to a tokenizer, also to one that MyGPT cannot read."""
    return name in SETTINGS or any(name in files for files in READABLE) or any(fnmatch(name, other) for other in OTHERS)


def find_files(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of the files of the tokenizer in a directory, or an empty tuple if there are none.

    Raises ValueError if a file is missing, or if there are only files of a tokenizer that MyGPT cannot read.
    """
    directory = Path(directory)
    names = sorted(entry.name for entry in directory.iterdir() if not entry.is_dir()) if directory.is_dir() else []
    found = next((files for files in READABLE if all(name in names for name in files)), None)
    if found is not None:
        return found
    for files in READABLE:
        for name in set(files) & set(names):
            missing = next(other for other in files if other not in names)
            raise ValueError(f"{directory / name} is half of a tokenizer: {missing} is missing there")
    for name in names:
        if name in SETTINGS or any(fnmatch(name, pattern) for pattern in OTHERS):
            problem = "has no vocabulary" if name in SETTINGS else "is a tokenizer that MyGPT does not read"
            way_out = "add tokenizer.json, which transformers writes, or vocab.json and merges.txt"
            raise ValueError(f"{directory / name} {problem}: {way_out}")
    return ()


def find_directory(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory that contains the tokenizer of `path`, or None if there is no tokenizer.

    `path` is the directory of a tokenizer, a model, an adapter or a training run, or a file beside the tokenizer's files.
    """
    path = Path(path)
    directory = present_directory(path.parent if path.is_file() else path)
    is_model = (directory / "config.json").is_file()
    places = [directory] if is_model else [directory, directory / "model", directory / "adapter"]
    return next((place for place in map(present_directory, places) if find_files(place)), None)


def read_vocab_and_merges(directory: Path) -> BPETokenizer:
    """Return the tokenizer in a directory with `vocab.json` and `merges.txt`, as the transformers library reads it.

    Special tokens and added tokens come from `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
    """
    vocab, merges = read_object(directory / "vocab.json"), read_merges(directory / "merges.txt")
    settings = read_settings(directory)
    _require_gpt2_settings(settings)
    listed = [*_listed_tokens(settings, directory), *named_tokens({**_DEFAULT_NAMES, **settings})]
    tokenizer = from_visible(vocab, merges, place_added_tokens(vocab, listed), known=has_gpt2_merges(merges))
    named = {token_name(settings, role) for role in ROLES}
    if ENDOFTEXT not in vocab and ENDOFTEXT not in named:
        tokenizer.optional_tokens = frozenset([ENDOFTEXT])
    return tokenizer


def _listed_tokens(settings: Mapping[str, Any], directory: Path) -> Iterator[AddedToken]:
    """Yield the added tokens that the files list with their ids, in the order of the ids."""
    if "added_tokens_decoder" in settings:
        entries = {int(id_): entry for id_, entry in settings["added_tokens_decoder"].items()}
        for id_, entry in sorted(entries.items()):
            yield added_token(entry, id_)
        return
    special = {token.content for token in named_tokens({**_DEFAULT_NAMES, **settings})}
    for content, id_ in sorted(read_object(directory / "added_tokens.json").items(), key=lambda item: item[1]):
        yield AddedToken(content, id_, special=content in special, normalized=content not in special)


def _require_gpt2_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a tokenizer_config.json has a setting that would change the ids and is not supported."""
    kind = settings.get("tokenizer_class")
    if kind is not None and kind not in _GPT2_CLASSES:
        reason = "vocab.json and merges.txt are read only for GPT2Tokenizer; save tokenizer.json with transformers"
        raise ValueError(f"tokenizer_config.json names the class {kind!r}: {reason}")
    for option in ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"):
        if settings.get(option):
            raise ValueError(f"the option {option} in tokenizer_config.json is not supported")
