"""`mygpt finetune`: train a LoRA adapter, or all weights of a model, on instructions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MyGPT.acceleration.frozen import FrozenDtype
from MyGPT.commands import _tuning
from MyGPT.commands._run import RunOptions, with_options_of_run
from MyGPT.commands._tuning import (
    count_steps,
    merged_model,
    open_frozen_base,
    refuse_rounded_dora,
    report_samples,
    report_training,
    require_epochs,
    run_and_draw,
)
from MyGPT.finetuning.examples import ExampleOptions, Examples
from MyGPT.finetuning.lora import KeptAdapter, LoraOptions, add_lora
from MyGPT.messages import quote
from MyGPT.sampling import require_finite
from MyGPT.training.config import TrainConfig
from MyGPT.training.run import WholeModel
from MyGPT.training.trainer import Trainer
from MyGPT.weights.pretrained import stored_name

DEFAULTS = {**_tuning.DEFAULTS, **_tuning.SAMPLE_DEFAULTS, "learning_rate": 2e-4}
HIDDEN = (*_tuning.HIDDEN, "sample_prompt")
NESTED = ("lora",)
COMMON = (
    "model data template out resume epochs batch_size learning_rate full merge lora.r lora.alpha eval_every device"
).split()
EXPAND = with_options_of_run


@dataclass(frozen=True)
class TuneOptions:
    """Options that say which weights are trained and for how long. Raises ValueError for options that exclude each other."""

    full: bool = False
    """Train all weights instead of an adapter; use a lower learning rate, such as 2e-5."""
    merge: bool = False
    """Merge the adapter into the weights at the end, and write a complete model directory."""
    epochs: float = 2.0
    """Number of passes over the training examples."""
    frozen_dtype: FrozenDtype = "fp32"
    """Data type of the weights that LoRA does not train; bf16 takes half their memory, and int8 a quarter."""

    def __post_init__(self) -> None:
        require_epochs(self.epochs)
        if self.full and self.merge:
            raise ValueError("--merge cannot be used with --full, which has no adapter to merge: leave out --merge")
        if self.full and self.frozen_dtype != "fp32":
            reason = "which trains all weights: leave out --frozen_dtype"
            raise ValueError(f"--frozen_dtype {self.frozen_dtype} cannot be used with --full, {reason}")


def finetune(
    model: str, examples: ExampleOptions, training: TrainConfig, lora: LoraOptions, tuning: TuneOptions, run: RunOptions
) -> None:
    """Fine-tune a model on instructions, conversations or texts, with LoRA or on all weights.

    The run directory receives adapter/ (or model/ with --full or --merge), config.yaml, metrics.jsonl, split.json,
    samples.txt and loss.png. mygpt chat, generate and evaluate open the run directory as a model.

    Examples:
        mygpt finetune --model gpt2 --data alpaca.json --merge --out runs/tuned
        mygpt finetune --model gpt2 --data alpaca.json --full --learning_rate 2e-5 --out runs/tuned
        mygpt finetune --resume runs/tuned
        mygpt finetune --resume runs/tuned --epochs 4 --allow_changed epochs
    """
    run_options = run.for_trainer(training)
    directory = run_options["run_dir"]
    examples.check_files()
    refuse_rounded_dora(lora, tuning.frozen_dtype)
    gpt, tokenizer, files = open_frozen_base(model, training, "finetune", tuning.frozen_dtype, run_options["device"])
    data = Examples(examples, tokenizer, gpt.config.context_length)
    print(data.describe())
    sampler = data.sampler(training.batch_size, training.seed)
    max_steps = count_steps(tuning.epochs, sampler)
    best_model: Any = WholeModel(gpt, tokenizer, data.template)
    if not tuning.full:
        best_model = KeptAdapter(add_lora(gpt, **lora.for_peft()), stored_name(model), data.template)
    prompts = data.prompts(5, training.sample_tokens)
    report_samples(prompts, training)
    shown = {name: value for name, value in vars(training).items() if name not in HIDDEN}
    recipe = {"model": model, **vars(examples), "lora": vars(lora), **vars(tuning), **shown, "device": run.device}
    trainer = Trainer(
        gpt,
        dataclasses.replace(training, max_steps=max_steps),
        sampler,
        data.validation(data.val),
        tokenizer=tokenizer,
        prompts=prompts,
        best_model=best_model,
        recipe=recipe,
        **run_options,
    )
    report_training(gpt, max_steps, training.batch_size, "sequences")
    run_and_report(trainer, data, directory)
    if tuning.merge:
        WholeModel(merged_model(gpt, best_model, files, directory), tokenizer, data.template).save(directory)
    saved = "model" if tuning.full or tuning.merge else "adapter"
    print(f"{saved} saved in {directory}; try: mygpt chat --model {quote(directory)}")


def run_and_report(trainer: Trainer, data: Examples, run: Path) -> None:
    """Train the model, then print the validation loss and, if there is test data, the test loss."""
    loss = run_and_draw(trainer, data.split, run)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats per token (step {trainer.best_step})")
    if data.test is not None:
        trainer.validation = data.validation(data.test)
        loss, n = trainer.evaluate(whole=True), len(data.test)
        require_finite("the test loss", loss)
        print(f"test loss {loss:.4f} nats per token on {n:,} examples kept for this test")
