"""The training loops and `generate` of other libraries on our model, against transformers' GPT-2 with the same weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from conftest import lively_model, same_weights
from MyGPT import GPTConfig, GPTModel, as_transformers
from MyGPT.tokenizers import BPETokenizer
from oracles_model import transformers_twin

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries about their own dependencies

V = 67
ROWS = [{"input_ids": torch.arange(n).mul(n + 3).remainder(V - 1).tolist()} for n in (9, 5, 12, 7, 10, 3, 8, 11)]
IDS = torch.arange(27).view(3, 9) * 11 % V


def small_model(**changes: Any) -> GPTModel:
    sizes: dict[str, Any] = {"vocab_size": V, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    return lively_model(GPTConfig(**{**sizes, "drop_rate": 0.0, "qkv_bias": True, **changes}))


def pair(**changes: Any) -> tuple[Any, Any]:
    """Return the adapter, and transformers' GPT-2 with the same weights."""
    model = small_model(**changes)
    return as_transformers(model), transformers_twin(model, "sdpa")


class Losses(TrainerCallback):
    """The losses in the log, which the Trainer rounds only when it prints them."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.evaluation: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.train += [logs["loss"]] if "loss" in logs else []
        self.evaluation += [logs["eval_loss"]] if "eval_loss" in logs else []


class PadTokenizer:
    """The part of a tokenizer that the collator uses: rows are padded with id 66."""

    pad_token_id, padding_side = V - 1, "right"
    pad_token = "pad"

    def save_pretrained(self, directory: str) -> None:
        """Write nothing: the test needs no tokenizer in the checkpoint."""

    def pad(self, rows: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        gaps = [longest - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor([row["input_ids"] + [V - 1] * gap for row, gap in zip(rows, gaps, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
        }


def trainer(model: Any, directory: Path, **options: Any) -> tuple[Trainer, Losses]:
    """Return a Trainer of a few steps with padded batches, and the losses that it will log."""
    losses = Losses()
    defaults: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "seed": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(directory), **{**defaults, **options})
    collator = DataCollatorForLanguageModeling(PadTokenizer(), mlm=False)  # type: ignore[arg-type]
    made = Trainer(
        model, arguments, data_collator=collator, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[losses]
    )
    return made, losses


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"eval_strategy": "steps", "eval_steps": 2}),
        pytest.param(
            {"tie_weights": False, "qkv_bias": False}, {"label_smoothing_factor": 0.1}, marks=pytest.mark.slow
        ),
        pytest.param({}, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"emb_dim": 4, "n_heads": 1}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_trainer_takes_the_steps_of_transformers(
    changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """The logged losses, with accumulation over padded batches. bfloat16 has a relative rounding error of 2^-8."""
    found = []
    for model in pair(**changes):
        made, losses = trainer(model, tmp_path, **options)
        made.train()
        found.append((losses.train, losses.evaluation))
    if changes.get("qkv_bias") is False:  # transformers' GPT-2 has these biases, and trains them from the first step on
        found = [(train[:1], evaluation) for train, evaluation in found]
    ours, theirs = found
    tolerance = 2e-2 if options.get("bf16") else 1e-5
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1] == pytest.approx(theirs[1], rel=tolerance)
    assert len(ours[1]) == 2 * ("eval_steps" in options)


def test_gradient_checkpointing_of_transformers_recomputes_our_blocks() -> None:
    model = small_model()
    adapted = as_transformers(model).train()
    calls: list[int] = []
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    adapted(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.gradient_checkpointing
    adapted(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2 + 4
    adapted.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"tie_weights": False}, marks=pytest.mark.slow),
        pytest.param({"emb_dim": 8, "n_heads": 1, "vocab_size": 68}, marks=pytest.mark.slow),
    ],
)
def test_trainer_resumes_and_opens_what_it_saved(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The losses after a resume equal those of an uninterrupted run, and both libraries open the checkpoint."""
    saving = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4,
        "load_best_model_at_end": True, "learning_rate": 3e-2,
    }  # fmt: skip
    made, whole = trainer(as_transformers(small_model(**changes)), tmp_path, **saving)
    made.train()
    best = Path(str(made.state.best_model_checkpoint))
    assert best.name in ("checkpoint-2", "checkpoint-4")
    kept = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}  # type: ignore[union-attr]
    for name, tensor in GPTModel.from_pretrained(best).state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    checkpoint = tmp_path / "checkpoint-2"
    other = as_transformers(small_model(**changes))
    with torch.no_grad():
        other.transformer.wpe.weight.zero_()
    resumed, rest = trainer(other, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert rest.train == whole.train[2:]
    assert "missing" not in caplog.text.lower()

    ours = GPTModel.from_pretrained(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = IDS % V
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def greedy(model: Any, **options: Any) -> Tensor:
    fixed = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
    tokens: Tensor = model.generate(IDS, **{**fixed, **options})
    return tokens


PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": PADDED},
        {"attention_mask": PADDED, "use_cache": False},
        {"attention_mask": PADDED, "cache_implementation": "static"},
        {"cache_implementation": "static"},
        {"num_beams": 3, "attention_mask": PADDED},
        {"do_sample": True, "top_k": 5, "temperature": 1.3},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_generate_gives_the_tokens_of_transformers(options: dict[str, Any]) -> None:
    found = []
    for model in pair():
        torch.manual_seed(7)
        found.append(greedy(model, **options))
    ours, theirs = found
    assert ours.shape == (3, 19) and torch.equal(ours, theirs)


@pytest.mark.slow
def test_assisted_generation_gives_the_tokens_of_the_model_alone() -> None:
    adapted, twin = pair()
    assistant = as_transformers(small_model(n_layers=1))
    ids, options = IDS[:1], {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = adapted.generate(ids, **options)
    assert torch.equal(adapted.generate(ids, assistant_model=assistant, **options), alone)
    assert torch.equal(twin.generate(ids, **options), alone)


def test_a_cache_continues_as_for_transformers() -> None:
    found = []
    for model in pair():
        with torch.no_grad():
            first = model(IDS[:, :4], use_cache=True)
            found.append(model(IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_positions_that_contradict_the_mask_are_refused() -> None:
    adapted = as_transformers(small_model())
    with pytest.raises(ValueError, match="position_ids must count the tokens of attention_mask"):
        adapted(IDS, attention_mask=torch.ones_like(IDS), position_ids=torch.arange(9)[None] + 1)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=name):
            adapted(IDS, **{name: True})


def test_positions_alone_separate_packed_texts() -> None:
    """The logits of two texts in one row, whose positions begin again at 0, equal those of the texts alone."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for model in pair():
        packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
        alone = [model(part).logits for part in (IDS[:1, :4], IDS[:1, 4:])]
        torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_a_pipeline_continues_a_text(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train("the cat sat on the mat. the rat sat on the cat. " * 4, 270, progress=False)
    model = small_model(vocab_size=tokenizer.n_vocab)
    model.save_pretrained(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False}
    found = [
        pipeline("text-generation", model=each, tokenizer=theirs)("the cat", **options)[0]["generated_text"]
        for each in (as_transformers(model), AutoModelForCausalLM.from_pretrained(tmp_path))
    ]
    assert found[0] == found[1] and found[0].startswith("the cat")


def plain_steps(model: Any, batches: list[Tensor]) -> list[float]:
    """Return the losses of plain SGD steps without any trainer."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for ids in batches:
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


BATCHES = [IDS, IDS.flip(1), IDS.roll(1, 0), IDS.roll(1, 1)]


def test_accelerate_trains_and_saves_a_model_itself(tmp_path: Path) -> None:
    """Each step accumulates two halves of a batch, which have equally many tokens."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    batches = [torch.cat((ids, ids.flip(0)[:1])) for ids in BATCHES]
    expected = plain_steps(transformers_twin(small_model(), "sdpa"), batches)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader([row for ids in batches for row in ids], batch_size=2)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(ids, labels=ids)["loss"]
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    means = [(one + two) / 2 for one, two in zip(losses[::2], losses[1::2], strict=True)]
    assert means == pytest.approx(expected, rel=1e-5)

    accelerator.save_state(str(tmp_path / "state"))
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unwrapped = accelerator.unwrap_model(model)
    idiom: dict[str, Any] = {"save_function": accelerator.save, "state_dict": accelerator.get_state_dict(model)}
    unwrapped.save_pretrained(tmp_path / "other", is_main_process=False, **idiom)
    assert not (tmp_path / "other").exists()
    unwrapped.save_pretrained(tmp_path / "saved", is_main_process=accelerator.is_main_process, **idiom)
    assert same_weights(GPTModel.from_pretrained(tmp_path / "saved"), unwrapped)
    accelerator.save_model(model, str(tmp_path / "weights"))
    (tmp_path / "weights/config.json").write_text(json.dumps(unwrapped.config.to_dict()))
    assert same_weights(GPTModel.from_pretrained(tmp_path / "weights/model.safetensors"), unwrapped)

    with torch.no_grad():
        for parameter in unwrapped.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert unwrapped.lm_head.weight is unwrapped.transformer.wte.weight


class Module(lightning.LightningModule):
    """A LightningModule around a model, as its documentation writes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, ids: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_lightning_trains_checkpoints_and_resumes(tmp_path: Path) -> None:
    def fit(model: GPTModel, n_epochs: int, checkpoint: Path | None = None) -> Module:
        module = Module(model)
        loops = lightning.Trainer(
            max_epochs=n_epochs, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        loader = DataLoader(list(IDS), batch_size=3)  # type: ignore[arg-type]
        loops.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        loops.save_checkpoint(tmp_path / f"{n_epochs}.ckpt")
        return module

    expected = plain_steps(transformers_twin(small_model(), "sdpa"), [IDS] * 4)
    first = fit(small_model(), 2)
    resumed = fit(small_model(init_std=0.01), 4, tmp_path / "2.ckpt")
    assert first.losses + resumed.losses == pytest.approx(expected, rel=1e-5)
    opened = torch.load(tmp_path / "4.ckpt", weights_only=False)["state_dict"]
    assert all(name.startswith("model.") for name in opened)
    (tmp_path / "config.json").write_text(json.dumps(small_model().config.to_dict()))
    assert same_weights(GPTModel.from_pretrained(tmp_path / "4.ckpt"), resumed.model)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained_tokenizer() -> BPETokenizer:
    return BPETokenizer.train("the cat sat on the mat. the rat sat on the cat. " * 4, 270, progress=False)


QUESTIONS = ["the cat", "the rat sat", "on the mat", "the", "sat on", "cat"]
ANSWERS = [" sat on the mat.", " on the cat", ". the rat", " cat sat on the mat. the", " the rat", " on the mat"]
WORSE = [" the", ". . .", " cat cat on", " t", " mat", " sat sat sat"]


def sft_rows(tokenizer: BPETokenizer) -> list[dict[str, list[int]]]:
    """Return the ids of the texts, and which of them belong to the answers."""
    rows = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        asked, said = tokenizer.encode(question), tokenizer.encode(answer)
        rows.append({"input_ids": asked + said, "completion_mask": [0] * len(asked) + [1] * len(said)})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize(
    "options",
    [
        {"completion_only_loss": True},
        {"completion_only_loss": False, "gradient_checkpointing": True},
        {"padding_free": True, "completion_only_loss": True, "max_length": None},
        {"packing": True, "max_length": 24},
    ],
    ids=lambda options: ", ".join(options),
)
def test_sft_of_trl_takes_the_steps_of_transformers(
    options: dict[str, Any], with_lora: bool, trained_tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    found = sft_losses(datasets, trl, options, with_lora, trained_tokenizer, tmp_path)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0]
    if "padding_free" in options:  # the texts of one row must not see each other
        padded = sft_losses(datasets, trl, {"completion_only_loss": True}, with_lora, trained_tokenizer, tmp_path)
        assert found[0] == pytest.approx(padded[0], rel=1e-5)


def sft_losses(
    datasets: Any, trl: Any, options: dict[str, Any], with_lora: bool, tokenizer: BPETokenizer, directory: Path
) -> list[list[float]]:
    """Return the losses of our model and of transformers' GPT-2 in SFTTrainer."""
    model = small_model(vocab_size=tokenizer.n_vocab)
    model.save_pretrained(directory, tokenizer)
    found = []
    for each in (as_transformers(copy.deepcopy(model)), transformers_twin(model, "sdpa")):
        losses = Losses()
        trl.SFTTrainer(
            each,
            trl.SFTConfig(**{**trl_options(directory), "max_length": 32, "gradient_checkpointing": False, **options}),
            train_dataset=datasets.Dataset.from_list(sft_rows(tokenizer)),
            processing_class=AutoTokenizer.from_pretrained(directory),
            peft_config=lora() if with_lora else None,
            callbacks=[losses],
        ).train()
        found.append(losses.train)
    return found


def trl_options(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "run"), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no", "seed": 1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "bf16": False,
    }  # fmt: skip


def lora() -> Any:
    """Return the options of LoRA. The trainer's seed gives both models the same initial matrices."""
    return LoraConfig(r=2, target_modules=["c_attn", "mlp.c_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a copy", "the directory", "LoRA"])
def test_dpo_of_trl_takes_the_steps_of_transformers(how: str, trained_tokenizer: BPETokenizer, tmp_path: Path) -> None:
    """The reference model is a copy, or opened from the model's directory, or the model without its adapter."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model = small_model(vocab_size=trained_tokenizer.n_vocab)
    model.save_pretrained(tmp_path, trained_tokenizer)
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in zip(QUESTIONS, ANSWERS, WORSE, strict=True)
    ]
    found = []
    for is_ours in (True, False):
        ours = GPTModel.from_pretrained(tmp_path)
        policy = as_transformers(ours) if is_ours else AutoModelForCausalLM.from_pretrained(tmp_path)
        losses = Losses()
        trl.DPOTrainer(
            policy,
            ref_model=copy.deepcopy(policy) if how == "a copy" else None,
            args=trl.DPOConfig(**{**trl_options(tmp_path), "gradient_checkpointing": False}),
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(tmp_path),
            peft_config=lora() if how == "LoRA" else None,
            callbacks=[losses],
        ).train()
        found.append(losses.train)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] == pytest.approx(math.log(2), rel=1e-4) and found[0][-1] < found[0][0]
