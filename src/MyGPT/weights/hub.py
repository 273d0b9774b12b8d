"""Downloads from the Hugging Face hub, with the optional library huggingface_hub.

That library resumes, retries and verifies downloads, and uses another server if HF_ENDPOINT is set.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from MyGPT.weights.formats.huggingface import INDEX_SUFFIX, WEIGHTS, find_weights

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER_FILES = """config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json
    merges.txt encoder.json vocab.bpe template.json""".split()
_UNFINISHED = ".mygpt-unfinished-download"
"""An empty file that exists in the directory until every file has been downloaded."""


def download_from_hub(repo_id: str, directory: str | os.PathLike[str]) -> Path:
    """Download the model or LoRA adapter in a repository such as openai-community/gpt2, and return `directory`.

    A directory that is already complete, downloaded or copied by hand, needs no network.

    Args:
        repo_id: the repository, as user/model.
        directory: where the files are stored.

    Raises:
        OSError: the repository cannot be downloaded, or contains neither a model nor an adapter.
        ValueError: huggingface_hub is not installed, or `repo_id` is not a valid name.
    """
    directory = Path(directory)
    unfinished = directory / _UNFINISHED
    if not unfinished.exists() and _is_complete(directory):
        return directory
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ValueError(
            f"downloading {repo_id} needs the library huggingface_hub: pip install 'mygpt[hub]', "
            f"or copy the repository's files to {directory}"
        ) from None
    try:
        info = HfApi().model_info(repo_id)
        files = _choose_files([file.rfilename for file in info.siblings or []])
        directory.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        snapshot_download(repo_id, revision=info.sha, allow_patterns=files, local_dir=directory)
        missing = [name for name in files if not (directory / name).is_file()]  # it only warns if the connection fails
        if missing:
            raise OSError(f"{', '.join(missing)} could not be downloaded")
    except HFValidationError:
        raise
    except Exception as error:  # raised by huggingface_hub, requests or httpx, depending on the version
        raise OSError(
            f"cannot download {repo_id} ({error}): try again, or copy the repository's files to {directory}"
        ) from error
    unfinished.unlink(missing_ok=True)
    return directory


def _is_complete(directory: Path) -> bool:
    """Return whether the directory contains a config and all weights, of a model or of an adapter."""
    if (directory / ADAPTER_CONFIG).is_file() and any((directory / name).is_file() for name in _ADAPTER_WEIGHTS):
        return True
    try:
        return (directory / "config.json").is_file() and find_weights(directory).is_file()
    except FileNotFoundError:
        return False


def _choose_files(names: list[str]) -> list[str]:
    """Return the files of a repository that MyGPT or transformers needs, with the weights in one format only."""
    names = [name for name in names if re.fullmatch(r"[\w.-]+", name)]  # not in subdirectories
    weights: list[str] = []
    for name in WEIGHTS if "config.json" in names else ():
        if name in names:
            weights = [name]
        elif f"{name}{INDEX_SUFFIX}" in names:
            shards = "-*-of-*".join(os.path.splitext(name))
            weights = [f"{name}{INDEX_SUFFIX}", *(file for file in names if fnmatch(file, shards))]
        if weights:
            break
    adapter = [name for name in _ADAPTER_WEIGHTS if name in names][:1] if ADAPTER_CONFIG in names else []
    if not weights and not adapter:
        raise OSError(f"it has neither config.json with {' or '.join(WEIGHTS)} nor {ADAPTER_CONFIG} with an adapter")
    if adapter and not weights:
        weights = [ADAPTER_CONFIG, *adapter]
    return [*weights, *(name for name in _OTHER_FILES if name in names)]
