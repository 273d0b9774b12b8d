"""`mygpt pack`: store the packed weights of a model beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from MyGPT.config import Precision

if TYPE_CHECKING:
    from torch import Tensor

    from MyGPT.tokenizers import Tokenizer


CALIBRATION_TOKENS = 4096
"""Number of tokens of the calibration text that are used."""


def pack(model: str, precision: Precision = "auto", calibrate: str | None = None) -> None:
    """Store the weights of a model in the form that generation on a CPU reads, in a file beside the model.

    mygpt generate, chat and serve then start faster. They use the file if they are started with the same precision, and if
    neither the model's files nor the kind of CPU has changed. Otherwise they ignore it and say why.

    Examples:
        mygpt pack --model gpt2 --precision int8
        mygpt pack --model runs/book
        mygpt pack --model runs/book --precision int4 --calibrate book.txt

    Args:
        precision: Precision of the stored weights: fp32, bf16, int8 with a quarter of the bytes of fp32, or int4 with a sixth.
            auto keeps the precision of the model's files.
        calibrate: Text file of the kind that the model will see, or alice. With int4, the weights are rounded so that the
            outputs on its first 4,096 tokens change least.
    """
    from MyGPT.acceleration.kernel import Build
    from MyGPT.acceleration.step import write_packed_model
    from MyGPT.files import reading
    from MyGPT.opening import find_model_files
    from MyGPT.weights.formats import open_checkpoint

    if calibrate is not None and precision != "int4":
        raise ValueError(f"--calibrate is for --precision int4, got {precision}: leave out --calibrate")
    build = Build()
    with reading(model):
        files = find_model_files(model)
        if files.adapter is not None:
            way_out = "train it with --merge to get a complete model"
            raise ValueError(f"{model} is a LoRA adapter, and mygpt pack needs a complete model: {way_out}")
        checkpoint = open_checkpoint(files.path)
        ids = None
        if calibrate is not None:
            config = checkpoint.known_config()
            ids = _calibration_ids(files.tokenizer(config.vocab_size), calibrate, config.context_length)
        path = write_packed_model(checkpoint, precision, build, ids)
    print(path)


def _calibration_ids(tokenizer: Tokenizer, text: str, context_length: int) -> Tensor:
    """Return the first CALIBRATION_TOKENS tokens of the text called `text` as sequences (B, T) int64."""
    import torch

    from MyGPT.data.sources import find_files
    from MyGPT.files import read_text

    ids: list[int] = []
    for path in find_files(text):
        if len(ids) < CALIBRATION_TOKENS:
            ids += tokenizer.encode(read_text(path))
    length = min(context_length, len(ids))
    if length == 0:
        raise ValueError(f"{text} contains no tokens: give a text that the model can read")
    n_rows = max(1, min(len(ids), CALIBRATION_TOKENS) // length)
    return torch.tensor(ids[: n_rows * length]).view(n_rows, length)
