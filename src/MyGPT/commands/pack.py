"""`mygpt pack`: store the packed weights of a model beside it."""

from __future__ import annotations

from MyGPT.config import Precision


def pack(model: str, precision: Precision = "auto") -> None:
    """Store the weights of a model in the form that generation on a CPU reads, in a file beside the model.

    mygpt generate, chat and serve then start faster. They use the file if they are started with the same precision, and if
    neither the model's files nor the kind of CPU has changed. Otherwise they ignore it and say why.

    Examples:
        mygpt pack --model gpt2 --precision int8
        mygpt pack --model runs/book

    Args:
        precision: Precision of the stored weights: fp32, bf16, int8 with a quarter of the bytes of fp32, or int4 with a seventh.
            auto keeps the precision of the model's files.
    """
    from MyGPT.acceleration.kernel import Build
    from MyGPT.acceleration.step import write_packed_model
    from MyGPT.files import reading
    from MyGPT.opening import find_model_files
    from MyGPT.weights.formats import open_checkpoint

    build = Build()
    with reading(model):
        files = find_model_files(model)
        if files.adapter is not None:
            way_out = "train it with --merge to get a complete model"
            raise ValueError(f"{model} is a LoRA adapter, and mygpt pack needs a complete model: {way_out}")
        path = write_packed_model(open_checkpoint(files.path), precision, build)
    print(path)
