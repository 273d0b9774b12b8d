"""`mygpt dpo`: train a LoRA adapter on pairs of a preferred and a rejected answer."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

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
from MyGPT.config import require_positive
from MyGPT.data.instructions import encode_prompt
from MyGPT.data.templates import Template, load_template
from MyGPT.finetuning.lora import KeptAdapter, LoraOptions, add_lora
from MyGPT.finetuning.preference import (
    PLAIN,
    PreferenceLoss,
    PreferencePairs,
    check_beta,
    read_preferences,
    with_answers,
)
from MyGPT.finetuning.splits import ExampleBatches, ExampleSampler, Part, Parts, SplitOptions, read_parts
from MyGPT.messages import quote
from MyGPT.sampling import require_finite
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.config import TrainConfig
from MyGPT.training.run import WholeModel
from MyGPT.training.trainer import Trainer
from MyGPT.weights.pretrained import stored_name

DEFAULTS = {**_tuning.DEFAULTS, **_tuning.SAMPLE_DEFAULTS, "learning_rate": 5e-5}
HIDDEN = (*_tuning.HIDDEN, "sample_prompt")
NESTED = ("lora",)
COMMON = (
    "model data template out resume epochs batch_size learning_rate beta merge lora.r lora.alpha eval_every device"
).split()
EXPAND = with_options_of_run


@dataclass(frozen=True)
class PreferenceOptions(SplitOptions):
    """The options of `mygpt dpo` for the data. Raises ValueError for a value out of range."""

    data: str
    """File of pairs, or data set saved by datasets, with the keys prompt, chosen and rejected: texts or lists of messages.
    The keys instruction and input can replace prompt. OpenAI's keys are read too."""
    template: str | None = None
    """Prompt template: alpaca, book or a JSON file. Default: the model's own template, or prompts without added text."""
    max_length: int | None = None
    """Maximum number of tokens of a prompt with its answer; longer pairs are left out. Default: the context length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None:
            require_positive(max_length=self.max_length)


@dataclass(frozen=True)
class DpoOptions:
    """Options that say how long to train and how far. Raises ValueError for a value out of range."""

    beta: float = 0.1
    """Strength of the tie to the model before training: with a higher beta, the answers change less."""
    label_smoothing: float = 0.0
    """Expected fraction of pairs in which chosen and rejected are swapped by mistake."""
    merge: bool = False
    """Merge the adapter into the weights at the end, and write a complete model directory."""
    epochs: float = 1.0
    """Number of passes over the training pairs."""
    frozen_dtype: FrozenDtype = "fp32"
    """Data type of the weights that LoRA does not train; bf16 takes half their memory, and int8 a quarter."""

    def __post_init__(self) -> None:
        require_epochs(self.epochs)
        check_beta(self.beta, self.label_smoothing)


def dpo(
    model: str, pairs: PreferenceOptions, training: TrainConfig, lora: LoraOptions, tuning: DpoOptions, run: RunOptions
) -> None:
    """Train a model with direct preference optimization (DPO), so that it prefers chosen answers to rejected ones.

    A LoRA adapter is trained. The model without the adapter is the reference with which DPO compares it. The run directory
    receives adapter/ (and model/ with --merge), config.yaml, metrics.jsonl, split.json, samples.txt and loss.png. mygpt chat,
    generate and evaluate open the run directory as a model.

    Examples:
        mygpt dpo --model runs/tuned --data pairs.jsonl --out runs/dpo
        mygpt dpo --resume runs/dpo
    """
    run_options = run.for_trainer(training)
    directory = run_options["run_dir"]
    pairs.check_files()
    chosen_template = None if pairs.template is None else load_template(pairs.template)
    refuse_rounded_dora(lora, tuning.frozen_dtype)
    gpt, tokenizer, files = open_frozen_base(model, training, "dpo", tuning.frozen_dtype, run_options["device"])
    context = gpt.config.context_length
    max_length = min(pairs.max_length or context, context)
    parts = read_parts(pairs, read_preferences)
    template = template_for(parts.train.records[0], chosen_template or files.template())
    train, val, test = (
        encode_pairs(part, tokenizer, max_length, template) for part in (parts.train, parts.val, parts.test)
    )
    assert train is not None  # `read_parts` raises an error if no record is left for training
    for name, part in (("training", train), ("validation", val), ("test", test)):
        if part is not None:
            print(f"{name}: {part.describe()}")
    sampler = ExampleSampler(train, training.batch_size, training.seed)
    max_steps = count_steps(tuning.epochs, sampler)
    adapter = KeptAdapter(add_lora(gpt, **lora.for_peft()), stored_name(model), template)
    prompts = sample_prompts(parts, tokenizer, template, max_length - training.sample_tokens)
    report_samples(prompts, training)
    shown = {name: value for name, value in vars(training).items() if name not in HIDDEN}
    trainer = Trainer(
        gpt,
        dataclasses.replace(training, max_steps=max_steps),
        sampler,
        None if val is None else ExampleBatches(val),
        tokenizer=tokenizer,
        prompts=prompts,
        best_model=adapter,
        recipe={"model": model, **vars(pairs), "lora": vars(lora), **vars(tuning), **shown, "device": run.device},
        objective=PreferenceLoss(adapter.peft_model, tuning.beta, tuning.label_smoothing),
        **run_options,
    )
    report_training(gpt, max_steps, training.batch_size, "pairs")
    loss = run_and_draw(trainer, parts.split, directory)
    if not math.isnan(loss):
        print(f"validation: {describe(loss, trainer)} (step {trainer.best_step})")
    if test is not None:
        trainer.validation = ExampleBatches(test)
        loss = trainer.evaluate(whole=True)
        require_finite("the test loss", loss)
        print(f"test: {describe(loss, trainer)} on {len(test):,} pairs kept for this test")
    if tuning.merge:
        WholeModel(merged_model(gpt, adapter, files, directory), tokenizer, template).save(directory)
    saved = "model" if tuning.merge else "adapter"
    print(f"{saved} saved in {directory}; try: mygpt chat --model {quote(directory)}")


def template_for(record: dict[str, object], template: Template | None) -> Template:
    """Return the template for pairs like `record`: `template`, or if it is None, one that adds no text to a plain prompt.

    The field `asks` is set to the form of the record, so that `mygpt chat` asks questions as in training. A prompt that is a
    text has no form of its own, so `asks` stays as it is in the template.
    """
    template = PLAIN if template is None else template
    question, _ = with_answers(record, "record 1", template.asks)
    for form in ("instruction", "messages"):
        if form in question:
            return dataclasses.replace(template, asks=form)
    return template


def encode_pairs(
    part: Part | None, tokenizer: Tokenizer, max_length: int, template: Template
) -> PreferencePairs | None:
    """Return the pairs of a set as token ids, or None if there is no such set."""
    return None if part is None else PreferencePairs(part.records, tokenizer, max_length, template, part.names)


def sample_prompts(parts: Parts, tokenizer: Tokenizer, template: Template, room: int) -> list[list[int]]:
    """Return the token ids of the first five held-out prompts, or training prompts if there are none.

    Prompts of more than `room` tokens are left out.
    """
    records = [record for part in (parts.val, parts.test) if part for record in part.records] or parts.train.records
    questions = (with_answers(record, "the record", template.asks)[0] for record in records[:5])
    prompts = [encode_prompt(question, tokenizer, template) for question in questions]
    return [ids for ids in prompts if 0 < len(ids) <= room]


def describe(loss: float, trainer: Trainer) -> str:
    """Return the loss and the scores of the last evaluation as a text."""
    right, margin = trainer.scores["reward_accuracy"], trainer.scores["reward_margin"]
    return f"loss {loss:.4f}, the chosen answer has the higher reward in {right:.1%} of the pairs, mean margin {margin:.4f}"
