"""The training loop behind `mygpt train` and `mygpt finetune`: schedules, accumulation, evaluation, live samples, a run on disk.

A run is one directory: `config.yaml` (all that is needed to run it again), `metrics.jsonl`, `model/` (the best model),
`loss.png`, `samples.txt`. Nothing that a run has saved is lost by an error, a NaN or Ctrl-C.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from MyGPT.acceleration.linear import fast_linear
from MyGPT.data.sampler import WindowSampler, WindowValidation
from MyGPT.data.templates import Template
from MyGPT.data.tokens import compact_ids
from MyGPT.files import atomic_write
from MyGPT.generation import evaluation_mode, generate
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.config import Precision, TrainConfig
from MyGPT.training.metrics import MetricsLog
from MyGPT.training.optim import make_optimizers, set_learning_rate
from MyGPT.weights.pretrained import read_weights

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "model",
    "adapter",
    "split.json",
    "loss.png",
    "samples.txt",
    "tensorboard",
)


class Keeper(Protocol):
    """What a run keeps of its best model, and where."""

    def place(self, run_dir: Path) -> Path:
        """The directory in the run's."""
        ...

    def save(self, run_dir: Path) -> Path:
        """Writes it there, whole or not at all."""
        ...

    def restore(self, run_dir: Path) -> None:
        """Puts what was written back into the model."""
        ...


class WholeModel:
    """Keeps the model's directory, `model/`."""

    def __init__(self, model: GPTModel, tokenizer: Tokenizer | None, template: Template | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template

    def place(self, run_dir: Path) -> Path:
        return run_dir / "model"

    def save(self, run_dir: Path) -> Path:
        self.model.save_pretrained(self.place(run_dir), self.tokenizer)
        if self.template is not None:
            self.template.save(self.place(run_dir))
        return self.place(run_dir)

    def restore(self, run_dir: Path) -> None:
        self.model.load_state_dict(read_weights(self.place(run_dir))[1])


class Batches(Protocol):
    """Where training batches come from: a function of the step."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Inputs and targets (B, T) int64, and if it is needed an attention mask."""
        ...


class Validation(Protocol):
    """What a model is evaluated on."""

    def batches(self, whole: bool) -> Iterator[tuple[Tensor, ...]]:
        """Batches as in training: the same few every time, or all."""
        ...


class Trainer:
    """Trains a model on token ids, or on batches of any kind.

    `run` does it all; `setup`, `step`, `evaluate`, `save` are its parts, for loops of one's own. Without `run_dir`
    nothing is written. `recipe` is what config.yaml says, by default the TrainConfig. Live samples continue the
    `prompts` in turn; without any, sample_prompt, or the beginning of the validation text. What is kept of the best model is
    its directory, `model/`, unless `keeper` says otherwise.
    """

    def __init__(
        self,
        model: GPTModel,
        config: TrainConfig,
        train: Any,
        val: Any = None,
        *,
        tokenizer: Tokenizer | None = None,
        prompts: Sequence[list[int]] = (),
        keeper: Keeper | None = None,
        run_dir: str | Path | None = None,
        recipe: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.keeper = WholeModel(model, tokenizer) if keeper is None else keeper
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.recipe = dict(recipe or {})
        self.device = torch.device(device)
        self.overwrite = overwrite
        self.progress = progress
        context = model.config.context_length
        self.sampler: Batches
        self.validation: Validation | None = None
        text: Any = []
        if hasattr(train, "batch"):
            self.sampler = train
        else:
            text = compact_ids(train)
            self.sampler = WindowSampler(text, context, config.batch_size, config.order, config.seed)
        if hasattr(val, "batches"):
            self.validation = val
        elif val is not None and len(val) >= 2:
            text = compact_ids(val)
            self.validation = WindowValidation(text, context, config.eval_windows)
        self.prompts = list(prompts)
        if not self.prompts and not config.sample_prompt and len(text):
            self.prompts = [[int(id_) for id_ in text[:8]]]
        self.autocast_dtype = autocast_dtype(self.device, config.precision, model.config.emb_dim)
        self.step_number = 0
        self.tokens_seen = 0
        self.best_loss = math.inf
        self.best_step: int | None = None
        self._evaluated_step: int | None = None
        self._metrics: MetricsLog | None = None

    def setup(self) -> None:
        """Seeds torch, moves the model, makes the optimizers, and claims the run's directory."""
        if self.tokenizer is not None and self.config.sample_every and self.config.sample_prompt:
            # A prompt that cannot be encoded is an error now, not after hours.
            self.prompts = [self.tokenizer.encode(self.config.sample_prompt)]
        if self.run_dir is not None:
            claim_run_directory(self.run_dir, self.overwrite)
            with atomic_write(self.run_dir / "config.yaml") as file:
                yaml.safe_dump(self.recipe or vars(self.config), file, sort_keys=False, allow_unicode=True)
            self._metrics = MetricsLog(self.run_dir, self.config.tensorboard)
        torch.manual_seed(self.config.seed)
        self.model.to(self.device).train()
        self.model.gradient_checkpointing = self.config.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, self.config)
        if self.config.compile:
            # Block by block: one compilation serves all of them, and names, generation and saving stay as they are.
            for block in self.model.transformer.h:
                block.compile()

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its loss, gradient norm and learning rate.

        A loss or gradient that is not finite is a FloatingPointError, and the weights stay as they were.
        """
        learning_rate = set_learning_rate(self.optimizers, self.config, self.step_number)
        loss = torch.zeros((), device=self.device)
        batch = self._to_device(self.sampler.batch(self.step_number))
        count = (batch[1] != IGNORED).sum()
        micro = self.config.micro_batch_size or len(batch[0])
        for part_of_batch in zip(*(tensor.split(micro) for tensor in batch), strict=True):
            part = self._token_loss(*part_of_batch)[0] / count
            part.backward()
            loss += part.detach()
        clip = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.tokens_seen += batch[0].numel()
        values = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": learning_rate}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise FloatingPointError(
                f"at step {self.step_number} the loss is {values['loss']} and the norm of its gradient "
                f"{values['grad_norm']}: lower learning_rate (now {learning_rate:.3g}) or raise warmup_steps"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        return values

    def evaluate(self, whole: bool = False) -> float:
        """Validation loss in nats a token, over the fixed batches or all that there is; nan without any."""
        if self.validation is None:
            return math.nan
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with evaluation_mode(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in self.validation.batches(whole):
                batch_total, batch_count = self._token_loss(*self._to_device(batch))
                total, count = total + batch_total, count + int(batch_count)
        return total.item() / count

    def sample(self) -> str:
        """A continuation of the prompt whose turn it is, the same at the same weights and step."""
        if self.tokenizer is None:
            raise ValueError("a sample needs the tokenizer")
        turn = self.step_number // max(1, self.config.sample_every)
        prompt = torch.tensor([self.prompts[turn % len(self.prompts)]], device=self.device)
        with torch.compiler.set_stance("force_eager"):
            ids = generate(
                self.model,
                prompt,
                self.config.sample_tokens,
                temperature=self.config.sample_temperature,
                top_k=200,
                seed=self.config.seed,
                eos_id=self.tokenizer.eot_token if self.config.sample_to_end else None,
            )
        return self.tokenizer.decode(ids[0].tolist())

    def save(self) -> Path | None:
        """Writes the model as it is to the run's directory, whole or not at all."""
        return None if self.run_dir is None else self.keeper.save(self.run_dir)

    def run(self) -> float:
        """Trains to the end, to early_stop, or to Ctrl-C (then KeyboardInterrupt, the model saved).

        Returns the loss over the whole validation text (nan without one) of the best model, which `model/` and the
        trainer then hold; without a run_dir, of the last.
        """
        self.setup()
        bar = tqdm(total=self.config.max_steps, desc="training", unit="step", disable=not self.progress)
        try:
            with bar, _interruptible() as interrupted:
                self._train(bar, interrupted)
                return self._finish(bar, bool(interrupted))
        finally:
            if self._metrics is not None:
                self._metrics.close()

    def _train(self, bar: tqdm[Any], interrupted: list[int]) -> None:
        config, since, tokens = self.config, time.perf_counter(), self.tokens_seen
        smoothed, waited = math.nan, 0
        while self.step_number < config.max_steps and not interrupted:
            try:
                values = self.step()
            except FloatingPointError as error:
                if self.best_step is None:
                    self.best_step = self.step_number
                    self.save()
                kept = f"; the best model until then is in {self.keeper.place(self.run_dir)}" if self.run_dir else ""
                raise FloatingPointError(f"{error}{kept}") from None
            done = self.step_number
            smoothed = values["loss"] if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * values["loss"]
            bar.update()
            if done % config.log_every == 0 or done == config.max_steps:
                now = time.perf_counter()
                speed, since, tokens = (self.tokens_seen - tokens) / (now - since), now, self.tokens_seen
                self._log(done, **values, tokens_per_second=speed)
                bar.set_postfix_str(f"loss {smoothed:.3f}, {speed:,.0f} tokens/s")
            pause = time.perf_counter()
            if done % config.eval_every == 0 and done < config.max_steps and self.validation is not None:
                waited = 0 if self._evaluate_and_keep(bar) else waited + 1
            if config.sample_every and done % config.sample_every == 0 and self.tokenizer is not None and self.prompts:
                self._show_sample(bar)
            since += time.perf_counter() - pause  # speed is the training's alone
            if config.early_stop is not None and waited >= config.early_stop:
                bar.write(f"step {done}: stopped early, {waited} evaluations without a new best")
                return

    def _finish(self, bar: tqdm[Any], interrupted: bool) -> float:
        if self.validation is None:
            self.best_step = self.step_number
            self.save()
            loss = math.nan
        else:
            if self._evaluated_step != self.step_number:
                self._evaluate_and_keep(bar)
            if self.best_step != self.step_number and self.run_dir is not None:
                self.keeper.restore(self.run_dir)
            loss = math.nan if interrupted else self.evaluate(whole=True)
        if interrupted:
            kept = self.keeper.place(self.run_dir) if self.run_dir else None
            where = f"; the best model (step {self.best_step}) is in {kept}" if kept else ""
            raise KeyboardInterrupt(f"stopped at step {self.step_number}{where}")
        if self.validation is not None:
            self._log(self.best_step or 0, final_val_loss=loss)
        return loss

    def _evaluate_and_keep(self, bar: tqdm[Any]) -> bool:
        """Evaluates, saves a new best, tells; whether it was a new best."""
        loss, self._evaluated_step = self.evaluate(), self.step_number
        self._log(self.step_number, val_loss=loss)
        is_best = loss < self.best_loss
        bar.write(f"step {self.step_number}: validation loss {loss:.4f}{' (best)' if is_best else ''}")
        if is_best:
            self.save()
            self.best_loss, self.best_step = loss, self.step_number
        return is_best

    def _show_sample(self, bar: tqdm[Any]) -> None:
        text = self.sample()
        bar.write(f"--- sample at step {self.step_number} ---\n{text}\n---")
        if self.run_dir is not None:
            with open(self.run_dir / "samples.txt", "a", encoding="utf-8", newline="\n") as file:
                file.write(f"--- step {self.step_number} ---\n{text}\n\n")

    def _log(self, step: int, **values: float) -> None:
        if self._metrics is not None:
            self._metrics.write(step, **values)

    def _token_loss(self, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Neither compiled code nor checkpointing's second pass would go the way that fast_linear goes.
        plain = self.config.compile or self.config.gradient_checkpointing
        with (
            nullcontext() if plain else fast_linear(),
            torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None),
        ):
            return self.model.token_loss(inputs, targets, mask)

    def _to_device(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)


def autocast_dtype(device: torch.device, precision: Precision, emb_dim: int) -> torch.dtype | None:
    """bfloat16 where it was asked for or, with "auto", where the machine gains from it; None for float32.

    A processor gains with AVX-512 BF16 or AMX, and only when the matrices are large enough to pay for the conversions.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu" and emb_dim >= 256:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else None
    return None


def check_run_directory(run: Path, overwrite: bool) -> None:
    """A FileExistsError if the directory is not empty, unless it holds a run and that may be overwritten."""
    if not run.exists() or not any(run.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{run} is not empty: choose another --out, or give --overwrite true")
    if not (run / "config.yaml").is_file():
        raise FileExistsError(f"{run} holds something else than a run: choose another --out")


def claim_run_directory(run: Path, overwrite: bool) -> None:
    """Makes the run's directory; the files of a run that may be overwritten are removed from it."""
    check_run_directory(run, overwrite)
    run.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink(missing_ok=True)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that Ctrl-C makes true, so that a step is never cut in two; a second Ctrl-C stops at once."""
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    default = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: Any) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, default)

    signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, default)
