"""Compare opening a GPT-2 checkpoint with MyGPT, transformers and, if --tensorflow names its Python, TensorFlow.

Usage: python benchmarks/loading.py [--sizes 124M 1558M] [--rounds 5] [--directory DIR] [--tensorflow PYTHON]

The script writes random checkpoints in OpenAI's format and as model directories (0.5 GB and 6.2 GB, each twice). Each
program opens them in its own process, in turn. The time runs from the call until all weights are summed in memory
order, so that no memory-mapped page stays unread. Imports are not counted. Memory is the peak of the process minus its
memory before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import Peak


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="a directory with enough space for the checkpoints"
    )
    parser.add_argument("--tensorflow", help="the path of a Python that has TensorFlow")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            write_checkpoints(size, Path(name))
            compare(size, Path(name), options.rounds, options.tensorflow)


def compare(size: str, directory: Path, rounds: int, tensorflow: str | None) -> None:
    programs: dict[str, list[str]] = {
        f"{program} <- {kind}": [sys.executable, __file__, "--child", program, str(directory / kind)]
        for program, kind in (
            ("MyGPT", "hf"),
            ("transformers", "hf"),
            ("MyGPT", "tf"),
            ("MyGPT as arrays", "tf"),
            ("MyGPT bf16", "hf"),
            ("transformers bf16", "hf"),
            ("MyGPT bf16", "tf"),
        )
    }
    if tensorflow:
        programs["TensorFlow as arrays <- tf"] = [
            tensorflow,
            str(Path(__file__).with_name("loading_tensorflow.py")),
            str(directory / "tf/model.ckpt"),
        ]
    found: dict[str, list[list[float]]] = {name: [] for name in programs}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for turn in range(rounds + 1):  # the first round fills the page cache
        for name, command in programs.items():
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            if turn:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    n_bytes = (directory / "tf/model.ckpt.data-00000-of-00001").stat().st_size
    print(f"\n{size}: {n_bytes / 1e9:.2f} GB in float32, {rounds} rounds, medians")
    for name, results in found.items():
        times, peaks = zip(*results, strict=True)
        print(
            f"{name:<34} {statistics.median(times):7.2f} s ({min(times):.2f} to {max(times):.2f})   "
            f"peak {statistics.median(peaks) / 1e9:6.2f} GB, {statistics.median(peaks) / n_bytes:.2f} times the float32 size"
        )


if __name__ == "__main__":
    main()
