"""`mygpt finetune`: train a LoRA adapter, or all weights of a model, on instructions."""

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
COMMON = (
    *("model", "data", "template", "out", "resume", "epochs", "batch_size", "learning_rate"),
    *("full", "merge", "lora.r", "lora.alpha", "eval_every", "device"),
)
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
    """Fine-tune a model on instructions, conversations or texts, with LoRA or on all weights.

    The run directory receives adapter/ (or model/ with --full or --merge), config.yaml, metrics.jsonl, split.json,
    samples.txt and loss.png. mygpt chat, generate and evaluate open the run directory as a model.

    Examples:
        mygpt finetune --model gpt2 --data alpaca.json --merge --out runs/tuned
        mygpt finetune --model gpt2 --data alpaca.json --full --learning_rate 2e-5 --out runs/tuned
        mygpt finetune --resume runs/tuned

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.
        full: Train all weights instead of an adapter; use a lower learning rate, such as 2e-5.
        merge: Merge the adapter into the weights at the end, and write a complete model directory.
        epochs: Number of passes over the training examples.
        frozen_dtype: Type of the weights that LoRA does not train; bf16 halves their memory.
        out: Directory of the run; without it, runs/ and the current time.
        device: Where to compute: auto, cpu, cuda or mps.
        overwrite: Replace a run that is already in the directory.
        resume: Directory of a run to resume with its own options; auto resumes the run in --out, or starts it if it has no
            checkpoint.
        allow_changed: Options that may differ from those of the resumed run.
    """
    import torch

    from MyGPT.devices import pick_device
    from MyGPT.finetuning.examples import Examples
    from MyGPT.finetuning.lora import KeptAdapter, add_lora
    from MyGPT.finetuning.lora import merge as merge_adapter
    from MyGPT.model import GPTModel
    from MyGPT.opening import adapter_without_model, find_model_files
    from MyGPT.training.run import WholeModel
    from MyGPT.training.trainer import Trainer

    check_choices(full, merge, epochs, frozen_dtype)
    place = pick_device(device)
    run, how = choose_run(out, resume, overwrite)
    if adapter_without_model(model) is not None:
        raise ValueError(
            f"{model} holds only an adapter, but finetune needs a complete model, such as a run made with --merge"
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
        print(f"sample texts are off: every held-out prompt is too long to add sample_tokens={training.sample_tokens}")
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
        f"training {n_trained:,} of {gpt.num_parameters():,} parameters: {max_steps} steps of {training.batch_size} sequences"
    )
    run_and_report(trainer, data, run)
    if merge:
        WholeModel(merge_adapter(adapter.peft_model), tokenizer, data.template).save(run)
    print(f"{'model' if full or merge else 'adapter'} saved in {run}; try: mygpt chat --model {run}")


def check_choices(full: bool, merge: bool, epochs: float, frozen_dtype: str) -> None:
    """Raise ValueError for options that exclude each other."""
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be a number above 0, got {epochs}")
    if full and merge:
        raise ValueError("--merge cannot be used with --full, which has no adapter to merge: leave out --merge")
    if full and frozen_dtype != "fp32":
        raise ValueError(
            "--frozen_dtype bf16 cannot be used with --full, which trains all weights: leave out --frozen_dtype"
        )


def run_and_report(trainer: Any, data: Any, run: Path) -> None:
    """Train, then print the losses. The run directory receives split.json and loss.png even after an error."""
    from MyGPT.commands.train import draw_losses

    try:
        loss = trainer.run()
    finally:
        if (run / "config.yaml").is_file():
            data.split.save(run / "split.json")
            draw_losses(run)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats per token (step {trainer.best_step})")
    if data.test is not None:
        trainer.validation = data.validation(data.test)
        print(
            f"test loss {trainer.evaluate(whole=True):.4f} nats per token on {len(data.test):,} examples kept for this test"
        )
