"""Model directories from the Hugging Face hub, through its own library, which is optional.

It resumes, retries and checks by itself, and takes another server from HF_ENDPOINT.
"""

from __future__ import annotations

import os
from pathlib import Path

FILES = ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors")
REQUIRED = ("config.json", "model.safetensors")


def download_from_hub(repo_id: str, directory: str | os.PathLike[str]) -> Path:
    """`directory` with the model files of a repository such as openai-community/gpt2.

    Files that are there already are left alone, and if all are, the network is not asked. A repository without
    config.json or model.safetensors, or one that cannot be had, is an OSError; a missing huggingface_hub a ValueError.
    """
    directory = Path(directory)
    missing = [name for name in FILES if not (directory / name).is_file()]
    if not missing:
        return directory
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"downloading {repo_id} needs the library huggingface_hub: pip install 'mygpt[hub]', "
            f"or copy {', '.join(missing)} to {directory}"
        ) from None
    for name in missing:
        try:
            hf_hub_download(repo_id, name, local_dir=directory)
        except HFValidationError:
            raise
        except Exception as error:  # its own, requests' or httpx's, by version
            not_in_repository = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if not_in_repository and name not in REQUIRED:
                continue
            raise OSError(
                f"cannot download {name} of {repo_id} ({error}); get it elsewhere and copy it to {directory}"
            ) from error
    return directory
