"""Compare instruction tuning of a small GPT, with LoRA and of all weights, with transformers and PEFT on the same batches.

Usage: python benchmarks/finetuning.py --data alpaca.json [--text FILE] [--model DIR] [--epochs 1]
       [--directory runs/finetuning] [--out DIR]

Without --model, `mygpt train` first pretrains a GPT on --text, by default the built-in "Alice in Wonderland". MyGPT is
measured by runs of `mygpt finetune` in float32 without dropout. They train on the first 85% of the records; the next
10% are test records and the rest validation records. The comparison is a plain loop with torch's AdamW over the same
batches and learning rates. Its adapter is initialised from the same seed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import yaml
from measurements import Results, parse
from peft import LoraConfig, TaskType, get_peft_model
from tables import show
from transformers import AutoModelForCausalLM

from MyGPT import load_tokenizer
from MyGPT.cli import main as mygpt
from MyGPT.finetuning.examples import ExampleOptions, Examples, ExampleValidation
from MyGPT.training.metrics import read_metrics
from MyGPT.weights.formats.huggingface import read_config

PRETRAINED = (
    "--tokenizer bpe --tokenizer_size 2048 --context_length 256 --emb_dim 128 --n_heads 4 --n_layers 4 --batch_size 8 "
    "--max_steps 150 --learning_rate 2e-3 --eval_every 75 --eval_windows 40 --sample_every 0"
).split()
WAYS = {
    "LoRA": ["--lora.dropout", "0", "--learning_rate", "2e-3"],
    "all weights": ["--full", "--learning_rate", "5e-4"],
}


def pretrain(text: str, run: Path) -> Path:
    if mygpt(["train", "--data", text, "--out", str(run), *PRETRAINED]) != 0:
        raise SystemExit("the model could not be pretrained")
    return run / "model"


def tune(model: Path, options: argparse.Namespace, way: list[str], run: Path) -> list[dict[str, Any]]:
    """Run `mygpt finetune` and return its metrics."""
    arguments = ["--model", str(model), "--data", options.data, "--epochs", str(options.epochs), "--seed", "1"]
    arguments += [
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--eval_every",
        "25",
        "--sample_every",
        "100",
        "--out",
        str(run),
    ]
    if mygpt(["finetune", *arguments, *way]) != 0:
        raise SystemExit("mygpt finetune failed")
    return read_metrics(run)


def tune_theirs(model: Path, run: Path, metrics: list[dict[str, Any]], examples: Examples) -> list[dict[str, Any]]:
    """Return the losses of transformers and PEFT on the batches and learning rates of the MyGPT run in `run`."""
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(recipe["seed"])
    if not recipe["full"]:
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=recipe["lora"]["r"], lora_alpha=recipe["lora"]["alpha"], lora_dropout=0.0,
            target_modules=recipe["lora"]["targets"], fan_in_fan_out=True,
        )  # fmt: skip
        theirs = get_peft_model(theirs, lora)
    if not read_config(model).qkv_bias:  # transformers always has these biases; here they are zero and must stay so
        for name, parameter in theirs.named_parameters():
            if name.endswith("c_attn.bias"):
                parameter.requires_grad_(False)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), weight_decay=0.0)
    sampler, validation = examples.sampler(recipe["batch_size"], recipe["seed"]), examples.validation(examples.val)
    assert validation is not None
    found: list[dict[str, Any]] = []
    for record in metrics:
        if "loss" in record:
            theirs.train()
            optimizer.param_groups[0]["lr"] = record["learning_rate"]
            inputs, targets = sampler.batch(record["step"] - 1)
            loss = F.cross_entropy(theirs(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe["grad_clip"])
            optimizer.step()
            optimizer.zero_grad()
            found.append({"step": record["step"], "loss": loss.item()})
        elif "val_loss" in record:
            found.append({"step": record["step"], "val_loss": evaluate(theirs, validation)})
    return found


def evaluate(theirs: Any, validation: ExampleValidation) -> float:
    """Return the mean loss in nats per token of the answers."""
    theirs.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in validation.batches(True):
            logits = theirs(input_ids=inputs).logits.flatten(0, 1)
            total += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
            count += int((targets != -100).sum())
    return total / count


def series(metrics: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in metrics if key in record}


def report(untuned: float, found: dict[str, list[dict[str, Any]]], out: Path | None) -> None:
    results = Results("finetuning", packages=["transformers", "peft"])
    for name, metrics in found.items():
        losses = {0: untuned, **series(metrics, "val_loss")}
        results.add(name, "validation loss", "nats per token", *losses.values(), steps=list(losses))
    for name in WAYS:
        for key, measure in (("loss", "training loss"), ("val_loss", "validation loss")):
            ours, theirs = series(found[name], key), series(found[f"{name}, transformers"], key)
            most = max(abs(ours[step] - theirs[step]) for step in ours)
            results.add(name, f"largest difference of the {measure}", "nats", most)
    results.save(out)
    show(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", default="alice", help="a text file to pretrain on, or the name of a built-in text")
    parser.add_argument("--model", help="the directory of a pretrained model")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--directory", help="the directory in which the runs are kept")
    options = parse(parser)
    warnings.filterwarnings("ignore", module="peft|transformers")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.directory or temporary)
        model = Path(options.model) if options.model else pretrain(options.text, out / "pretrained")
        model = model / "model" if (model / "model").is_dir() else model
        examples = Examples(ExampleOptions(options.data), load_tokenizer(model), read_config(model).context_length)
        validation = examples.validation(examples.val)
        assert validation is not None
        untuned = evaluate(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), validation)
        found: dict[str, list[dict[str, Any]]] = {}
        for name, way in WAYS.items():
            run = out / name.replace(" ", "_")
            found[name] = tune(model, options, way, run)
            found[f"{name}, transformers"] = tune_theirs(model, run, found[name], examples)
        report(untuned, found, options.out)


if __name__ == "__main__":
    main()
