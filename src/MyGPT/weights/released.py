"""OpenAI's released GPT-2 models: their files and servers, and how to download them.

The file `model.ckpt.meta` of a release is not downloaded, because it contains only TensorFlow's graph.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from MyGPT.config import GPT2_CONFIGS
from MyGPT.download import DownloadError, address_of, download
from MyGPT.messages import MODEL_SYNONYMS, did_you_mean
from MyGPT.tokenizers.gpt2 import VOCABULARY_SHA256
from MyGPT.weights.formats.openai import load_gpt2_params_from_tf_ckpt, read_settings
from MyGPT.weights.tensorflow.bundle import latest_checkpoint

SERVERS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",  # OpenAI's own
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",  # the mirror that the book uses
)
# Short files first, so that a wrong address fails before gigabytes are downloaded.
FILES = "checkpoint hparams.json encoder.json vocab.bpe model.ckpt.index model.ckpt.data-00000-of-00001".split()
DATA_BYTES = {"124M": 497_759_232, "355M": 1_419_292_672, "774M": 3_096_120_320, "1558M": 6_230_444_800}
"""The number of bytes of each model's data file, which contains the parameters in float32 and nothing else."""


def download_gpt2(
    size: str, models_dir: str | os.PathLike[str], base_url: str | None = None, *, progress: bool = True
) -> Path:
    """Download OpenAI's files of one model that are missing or incomplete, and return their directory.

    Args:
        size: 124M, 355M, 774M or 1558M, or gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        models_dir: the files are stored in its subdirectory 124M, 355M, 774M or 1558M.
        base_url: the URL of a server with the files at `base_url`/124M/hparams.json and so on. Default: the environment
            variable MYGPT_GPT2_URL if it is set, else the public servers.
        progress: show a progress bar.

    Raises:
        DownloadError: a file could not be downloaded; the message lists the missing files.
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
            )
        except DownloadError as error:
            missing = ", ".join(name for name in FILES if not (directory / name).is_file())
            way_out = f"set MYGPT_GPT2_URL to a server that has these files under {size}/"
            raise DownloadError(f"{error}; {directory} still lacks {missing}: {way_out}") from None
        found_at = address_of(directory / name) or ""
        servers.sort(key=lambda server: not found_at.startswith(server))
    return directory


def download_and_load_gpt2(
    model_size: str, models_dir: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Download a released model if necessary, and return its settings and weights for `load_weights_into_gpt`.

    The settings are the contents of hparams.json. The weights are nested dicts of arrays, as
    `load_gpt2_params_from_tf_ckpt` returns them.

    Args:
        model_size: 124M, 355M, 774M or 1558M, or gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        models_dir: the files are stored in its subdirectory 124M, 355M, 774M or 1558M.
    """
    directory = download_gpt2(model_size, models_dir)
    settings = read_settings(directory)
    return settings, load_gpt2_params_from_tf_ckpt(latest_checkpoint(directory), settings)


def released_size(name: str) -> str:
    """Return OpenAI's name of a released model: "124M" for "124M" or "gpt2". Raises ValueError for an unknown name."""
    if name not in GPT2_CONFIGS:
        hint = did_you_mean(name, GPT2_CONFIGS, MODEL_SYNONYMS)
        raise ValueError(f"there is no GPT-2 of the size {name!r}; the sizes are {', '.join(GPT2_CONFIGS)}{hint}")
    return next(size for size in DATA_BYTES if GPT2_CONFIGS[size] == GPT2_CONFIGS[name])
