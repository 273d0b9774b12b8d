"""mygpt finetune"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from MyGPT.commands._resume import choose_run, with_options_of_run
from MyGPT.finetuning.examples import ExampleOptions
from MyGPT.finetuning.lora import LoraOptions
from MyGPT.training.config import TrainConfig

DEFAULTS = {
    "batch_size": 8,
    "learning_rate": 2e-4,
    "min_learning_rate": 0.0,
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "eval_every": 50,
    "sample_every": 50,
    "sample_tokens": 64,
    "sample_temperature": 0.0,
    "sample_to_end": True,
    "log_every": 1,
}
HIDDEN = ("max_steps", "order", "eval_windows", "sample_prompt", "compile")
NESTED = ("lora",)
EXPAND = with_options_of_run


def finetune(
    model: str,
    examples: ExampleOptions,
    training: TrainConfig,
    lora: LoraOptions,
    full: bool = False,
    merge: bool = False,
    epochs: float = 2.0,
    frozen_dtype: Literal["fp32", "bf16"] = "fp32",
    out: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: str | None = None,
    allow_changed: str | list[str] | None = None,
) -> None:
    """Tune a model on instructions, conversations or texts: an adapter (LoRA), or all of its weights.

    The run's directory gets adapter/ (with --full or --merge model/), config.yaml, metrics.jsonl, split.json, samples.txt
    and loss.png; mygpt chat, generate and evaluate take it for a model.
    Example: mygpt finetune --model gpt2 --data alpaca.json --lora.r 8 --merge --out runs/tuned

    Args:
        model: a released model (gpt2), a run's directory, a model's, or a checkpoint file
        full: train all weights instead of an adapter; wants a lower learning rate, such as 2e-5
        merge: at the end add the adapter to the weights, which gives an ordinary model directory
        epochs: how often each example is seen
        frozen_dtype: bf16 halves the memory of the weights that LoRA leaves as they are
        out: the run's directory; default runs/ and the time
        device: auto, cpu, cuda or mps
        overwrite: replace the run that is in the directory
        resume: the directory of a run that goes on, with the options that it had; "auto" goes on with the run in --out if
            there is one, and else begins it
        allow_changed: options that may differ from those of the run that goes on
    """
    import torch

    from MyGPT.devices import pick_device
    from MyGPT.finetuning.examples import Examples
    from MyGPT.finetuning.lora import KeptAdapter, add_lora
    from MyGPT.model import GPTModel
    from MyGPT.opening import adapter_without_model, find_model_files
    from MyGPT.training.run import WholeModel
    from MyGPT.training.trainer import Trainer

    check_choices(full, merge, epochs, frozen_dtype)
    place = pick_device(device)
    run, how = choose_run(out, resume, overwrite)
    if adapter_without_model(model) is not None:
        raise ValueError(
            f"{model} holds an adapter only, and a model is needed: what finetune makes with --merge true is one"
        )
    files = find_model_files(model)
    torch.manual_seed(training.seed)
    gpt = GPTModel.from_pretrained(files.path, dtype=torch.bfloat16 if frozen_dtype == "bf16" else torch.float32)
    tokenizer = files.tokenizer(gpt.config.vocab_size)
    data = Examples(examples, tokenizer, gpt.config.context_length)
    print(data.describe())
    sampler = data.sampler(training.batch_size, training.seed)
    max_steps = max(1, round(epochs * sampler.batches_per_epoch))
    best_model: Any = WholeModel(gpt, tokenizer, data.template)
    if not full:
        base = str(Path(model).resolve()) if Path(model).exists() else model
        adapter = KeptAdapter(add_lora(gpt, **lora.for_peft()), base, data.template)
        best_model = adapter
    prompts = data.prompts(5, training.sample_tokens)
    if training.sample_every and not prompts:
        print(f"no live samples: no held-out prompt leaves room for sample_tokens={training.sample_tokens} after it")
    shown = {name: value for name, value in vars(training).items() if name not in HIDDEN}
    trainer = Trainer(
        gpt,
        dataclasses.replace(training, max_steps=max_steps),
        sampler,
        data.validation(data.val),
        tokenizer=tokenizer,
        prompts=prompts,
        best_model=best_model,
        run_dir=run,
        recipe={
            "model": model,
            **vars(examples),
            "lora": vars(lora),
            "full": full,
            "merge": merge,
            "epochs": epochs,
            "frozen_dtype": frozen_dtype,
            **shown,
            "device": device,
        },
        device=place,
        allow_changed=allow_changed or (),
        **how,
    )
    n_trained = gpt.num_parameters(only_trainable=True)
    print(
        f"{n_trained:,} of {gpt.num_parameters():,} parameters are trained; {max_steps} steps of {training.batch_size}"
    )
    run_and_report(trainer, data, run)
    if merge:
        WholeModel(adapter.merge(), tokenizer, data.template).save(run)
    print(f"the {'model' if full or merge else 'adapter'} is in {run}; try: mygpt chat --model {run}")


def check_choices(full: bool, merge: bool, epochs: float, frozen_dtype: str) -> None:
    """A ValueError for options that do not go together."""
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be a number above 0, got {epochs}")
    if full and merge:
        raise ValueError("with --full there is nothing to merge: the result is a whole model already")
    if full and frozen_dtype != "fp32":
        raise ValueError("frozen_dtype is for the weights that LoRA leaves as they are; with --full there are none")


def run_and_report(trainer: Any, data: Any, run: Path) -> None:
    """Trains; whatever ends it, the split and the losses are in the run's directory."""
    from MyGPT.commands.train import draw_losses

    try:
        loss = trainer.run()
    finally:
        if (run / "config.yaml").is_file():
            data.split.save(run / "split.json")
            draw_losses(run)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats a token (step {trainer.best_step})")
    if data.test is not None:
        trainer.validation = data.validation(data.test)
        print(
            f"test loss {trainer.evaluate(whole=True):.4f} nats a token, on {len(data.test):,} examples never looked at before"
        )
