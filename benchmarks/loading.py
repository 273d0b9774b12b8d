"""Compare opening a GPT-2 checkpoint with MyGPT, transformers and, if --tensorflow names its Python, TensorFlow.

Usage: python benchmarks/loading.py [--sizes 124M 1558M] [--rounds 5] [--directory DIR] [--tensorflow PYTHON] [--out DIR]

The script writes random checkpoints in OpenAI's format and as model directories (0.5 GB and 6.2 GB, each twice). Each
program opens them in its own process, in turn. The time runs from the call until all weights are summed in memory
order, so that no memory-mapped page stays unread. Imports are not counted. Memory is the peak of the process minus its
memory before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measurements import Results, in_a_process, parse, rounds
from memory import Peak
from tables import show

PROGRAMS = (
    ("MyGPT", "hf"), ("transformers", "hf"), ("MyGPT", "tf"), ("MyGPT as arrays", "tf"), ("MyGPT bf16", "hf"),
    ("transformers bf16", "hf"), ("MyGPT bf16", "tf"),
)  # fmt: skip
"""Each program, and the kind of files that it opens: a model directory or OpenAI's files."""


def measure(program: str, path: str) -> list[float]:
    """Return the seconds and the peak bytes of opening `path` in this process."""
    import time

    import torch

    if program == "transformers":
        from transformers import GPT2LMHeadModel as Model
    else:
        from MyGPT import GPTModel as Model  # type: ignore[assignment]
    from MyGPT import load_gpt2_params_from_tf_ckpt
    from MyGPT.weights.formats.openai import read_settings

    with Peak() as peak, torch.no_grad():
        start = time.perf_counter()
        if program == "MyGPT as arrays":
            params = load_gpt2_params_from_tf_ckpt(f"{path}/model.ckpt", read_settings(path))
            weights = [torch.from_numpy(array) for array in arrays_of(params)]
        else:
            model = Model.from_pretrained(path, dtype=torch.bfloat16 if program.endswith("bf16") else torch.float32)
            weights = list(model.parameters())
        sum(float((weight if weight.is_contiguous() else weight.T).sum()) for weight in weights)
        seconds = time.perf_counter() - start
    return [seconds, peak.n_bytes]


def arrays_of(params: Any) -> list[Any]:
    if isinstance(params, dict):
        params = list(params.values())
    return [array for inner in params for array in arrays_of(inner)] if isinstance(params, list) else [params]


def write_checkpoints(size: str, directory: Path) -> None:
    """Write random weights of the given size as a model directory and in OpenAI's format."""
    import torch

    from MyGPT import GPT2_CONFIGS, GPTModel

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from bundle_writer import stored, write_bundle
    from MyGPT.weights.layout import openai_shapes

    config = GPT2_CONFIGS[size]
    with torch.device("meta"):
        model = GPTModel(config)
    model.to_empty(device="cpu")
    model.lm_head.weight = model.transformer.wte.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.save_pretrained(directory / "hf")
    del model
    tf = directory / "tf"
    tf.mkdir()
    tensors = {name: stored(torch.rand(shape).numpy()) for name, shape in openai_shapes(config).items()}
    write_bundle(tf / "model.ckpt", tensors)
    (tf / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    sizes = (config.vocab_size, config.context_length, config.emb_dim, config.n_heads, config.n_layers)
    settings = dict(zip(("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"), sizes, strict=True))
    (tf / "hparams.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["124M", "1558M"])
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="a directory with enough space for the checkpoints"
    )
    parser.add_argument("--tensorflow", help="the path of a Python that has TensorFlow")
    options = parse(parser, measure, rounds=5)
    results = Results("loading", packages=["transformers"])
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            write_checkpoints(size, Path(name))
            compare(size, Path(name), options, results)
    show(results)


def compare(size: str, directory: Path, options: argparse.Namespace, results: Results) -> None:
    """Measure all programs in turn. The first round fills the page cache."""
    n_bytes = (directory / "tf/model.ckpt.data-00000-of-00001").stat().st_size
    results.settings[f"bytes in float32, {size}"] = n_bytes
    for turn in rounds(options, warm_up=True, share=1 / len(options.sizes)):
        for program, kind in PROGRAMS:
            found = in_a_process(measure, program=program, path=str(directory / kind))
            if turn:
                store(results, f"{program} <- {kind}", size, *found)
        if options.tensorflow:
            command = [options.tensorflow, str(Path(__file__).with_name("loading_tensorflow.py"))]
            environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
            done = subprocess.run(
                [*command, str(directory / "tf/model.ckpt")],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            if turn:
                store(results, "TensorFlow as arrays <- tf", size, *json.loads(done.stdout.splitlines()[-1]))
        results.save(options.out)


def store(results: Results, name: str, size: str, seconds: float, n_bytes: int) -> None:
    results.add(name, f"opening, {size}", "s", seconds)
    results.add(name, f"memory, {size}", "bytes", n_bytes)


if __name__ == "__main__":
    main()
