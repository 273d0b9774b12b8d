"""Measure how far MyGPT's logits differ from those of OpenAI's code, transformers and CTranslate2 with the same weights.

Usage: python benchmarks/parity.py [--size 124M] [--directory DIR]

OpenAI's logits were computed by its own code, with TensorFlow, for the small checkpoint in tests/fixtures. The other
programs open a random model of the given size, saved by MyGPT, whose logits are as large as a trained model's. All
logits are float32 unless stated otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from MyGPT import GPT2_CONFIGS, GPTModel, get_tokenizer

OPENAI = Path(__file__).parents[1] / "tests/fixtures/openai_gpt2_tf"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M")
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="a directory with enough space for two copies of the model"
    )
    options = parser.parse_args()

    reference = np.load(OPENAI / "reference.npz")
    ids, theirs = torch.from_numpy(reference["ids"]).long(), torch.from_numpy(reference["logits"])
    report("OpenAI's code, small checkpoint", GPTModel.from_pretrained(OPENAI)(ids), theirs)

    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        saved, converted = f"{name}/model", f"{name}/converted"
        write_model(options.size, saved)
        torch.manual_seed(1)
        ids = torch.randint(50257, (2, 128))
        ours = GPTModel.from_pretrained(saved)(ids)
        report("transformers", ours, AutoModelForCausalLM.from_pretrained(saved)(ids).logits)
        ctranslate2.converters.TransformersConverter(saved).convert(converted)
        engine = ctranslate2.Generator(converted, device="cpu", compute_type="float32")
        found = np.array(engine.forward_batch(ids.tolist(), return_log_probs=False)).astype(np.float32)
        report("ctranslate2", ours, torch.from_numpy(found))
        exact = GPTModel.from_pretrained(saved, dtype=torch.float64)(ids)
        report("transformers, both in float64", exact, in_float64(saved, ids))
        report("(MyGPT in float32 and in float64)", ours, exact)


def in_float64(saved: str, ids: Tensor) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64)(ids).logits
    return logits


def write_model(size: str, directory: str) -> None:
    torch.manual_seed(0)
    model = GPTModel(GPT2_CONFIGS[size])
    for parameter in model.parameters():
        # Biases and gains other than 0 and 1 reveal a lost tensor, and larger embeddings give larger logits.
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory, get_tokenizer("gpt2"))


def report(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).abs().max())
    print(f"{name:<44} {difference:.1e}, logits up to {float(theirs.abs().max()):.1f}", flush=True)


if __name__ == "__main__":
    main()
