"""Which tokenizer a directory contains. Every function and command that opens a tokenizer asks `find_files`.

A tokenizer is one file or two. A directory with files of a tokenizer that MyGPT cannot read is refused: another
tokenizer, such as GPT-2's, would give the model's ids to other texts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from MyGPT.files import read_json
from MyGPT.tokenizers.base import ENDOFTEXT
from MyGPT.tokenizers.bpe import BPETokenizer, from_visible, place_added_tokens
from MyGPT.tokenizers.gpt2 import has_gpt2_merges, read_merges
from MyGPT.tokenizers.nanogpt import META

READABLE = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), (META,))
"""The files of each kind of tokenizer that MyGPT reads. The first kind that a directory contains is used."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that describe a tokenizer, but do not contain its vocabulary."""
OTHERS = (
    "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken.json", "vocab.txt", "dict.txt", "bpe.codes", "vocab.pkl",
    "*tokenizer.bin", "tokenizer.pkl", "tokenizer.pickle", "tokenizer.pt",
)  # fmt: skip
"""The names of files of other tokenizers, such as SentencePiece, BERT's, tiktoken's, nanochat's and llm.c's."""
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")


def find_files(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of the files of the tokenizer in a directory, or an empty tuple if there are none.

    Raises ValueError if a file is missing, or if there are only files of a tokenizer that MyGPT cannot read.
    """
    directory = Path(directory)
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file()) if directory.is_dir() else []
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
    directory = path.parent if path.is_file() else path
    is_model = (directory / "config.json").is_file()
    places = [directory] if is_model else [directory, directory / "model", directory / "adapter"]
    return next((place for place in places if find_files(place)), None)


def read_vocab_and_merges(directory: Path) -> BPETokenizer:
    """Return the tokenizer in a directory with `vocab.json` and `merges.txt`, as the transformers library reads it.

    Special tokens and added tokens come from `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
    """
    vocab = _read_object(directory / "vocab.json")
    merges = read_merges(directory / "merges.txt")
    added = place_added_tokens(vocab, _added_tokens(directory))
    return from_visible(vocab, merges, added, known=has_gpt2_merges(merges))


def _added_tokens(directory: Path) -> list[tuple[str, int | None]]:
    """Return the tokens that are added to vocab.json, with their ids in the files, in the order of transformers."""
    settings = _read_object(directory / "tokenizer_config.json")
    _require_gpt2_settings(settings)
    if "added_tokens_decoder" in settings:
        listed = sorted((int(id_), _content(token)) for id_, token in settings["added_tokens_decoder"].items())
    else:
        settings |= _read_object(directory / "special_tokens_map.json")
        listed = sorted((id_, token) for token, id_ in _read_object(directory / "added_tokens.json").items())
    roles = {**dict.fromkeys(_ROLES[:3], ENDOFTEXT), **settings}
    others = [name for name in settings if name.endswith("_token") and name not in _ROLES and name != "add_bos_token"]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = [roles.get(name) for name in (*_ROLES, *others)]
    named += extra.values() if isinstance(extra, Mapping) else extra
    return [(token, id_) for id_, token in listed] + [(_content(token), None) for token in named if token is not None]
