"""OpenAI's released GPT-2 models as files: which there are, where they lie, how long they are.

Reading them is openai.py's. Of the seven files `model.ckpt.meta`, TensorFlow's graph, is the one that nothing here needs:
it is not downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from MyGPT.config import GPT2_CONFIGS
from MyGPT.download import DownloadError, address_of, download
from MyGPT.tokenizers.gpt2 import VOCABULARY_SHA256

SERVERS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",  # OpenAI's own
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",  # the book's copy
)
FILES = (  # short ones first: a wrong address shows before gigabytes have come
    "checkpoint",
    "hparams.json",
    "encoder.json",
    "vocab.bpe",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",
)
DATA_BYTES = {"124M": 497_759_232, "355M": 1_419_292_672, "774M": 3_096_120_320, "1558M": 6_230_444_800}
"""Length of the data file: the checkpoint holds the parameters and nothing else, four bytes each."""


def download_gpt2(
    size: str,
    models_dir: str | os.PathLike[str],
    base_url: str | None = None,
    *,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 5,
) -> Path:
    """The directory `models_dir`/124M (or the size's name) with OpenAI's files, downloaded where they are not there yet.

    size is 124M, 355M, 774M, 1558M, or gpt2, gpt2-medium, gpt2-large, gpt2-xl. With `base_url`, or MYGPT_GPT2_URL in the
    environment, `base_url`/124M/`file` is asked and nobody else. Files that are there and whole cost no network call.
    """
    size = released_size(size)
    base_url = base_url or os.environ.get("MYGPT_GPT2_URL")
    servers = [base_url.rstrip("/")] if base_url else list(SERVERS)
    directory = Path(models_dir) / size
    for name in FILES:
        try:
            download(
                [f"{server}/{size}/{name}" for server in servers],
                directory / name,
                sha256=VOCABULARY_SHA256.get(name),
                size=DATA_BYTES[size] if ".data-" in name else None,
                progress=progress,
                timeout=timeout,
                attempts=attempts,
            )
        except DownloadError as error:
            missing = [name for name in FILES if not (directory / name).is_file()]
            raise DownloadError(
                f"{error}; {directory} still lacks {', '.join(missing)}, "
                f"and MYGPT_GPT2_URL can name a server that has them under {size}/"
            ) from None
        found_at = address_of(directory / name) or ""
        servers.sort(key=lambda server: not found_at.startswith(server))
    return directory


def released_size(name: str) -> str:
    """124M, 355M, 774M or 1558M for itself or for Hugging Face's name of it; anything else is a ValueError."""
    if name not in GPT2_CONFIGS:
        raise ValueError(f"there is no GPT-2 of the size {name!r}; there are {', '.join(GPT2_CONFIGS)}")
    return next(size for size in DATA_BYTES if GPT2_CONFIGS[size] == GPT2_CONFIGS[name])
