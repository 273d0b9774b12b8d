"""The training loop behind `mygpt train` and `mygpt finetune`: schedules, accumulation, evaluation, live samples, resuming.

What a step does depends on the weights, the optimizers, the generators and the number of the step, and on nothing else.
A checkpoint (checkpoint.py) holds these, so a run that was killed goes on as if it had not been. What lies in its
directory is in run_directory.py. Nothing that a run has saved is lost by an error, a NaN, a signal or a kill.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from MyGPT.acceleration.linear import fast_linear
from MyGPT.config import TrainingPrecision
from MyGPT.data.sampler import WindowSampler, WindowValidation
from MyGPT.data.tokens import compact_ids
from MyGPT.files import atomic_write
from MyGPT.generation import evaluation_mode, generate
from MyGPT.loss import IGNORED
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.checkpoint import (
    CHECKPOINTS,
    CheckpointWriter,
    Snapshot,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    read_newest,
    restore_random_states,
    seed_everything,
)
from MyGPT.training.config import TrainConfig
from MyGPT.training.metrics import MetricsLog, read_metrics
from MyGPT.training.optim import make_optimizers, set_learning_rate
from MyGPT.training.run_directory import (
    Keeper,
    WholeModel,
    check_run_directory,
    clear_run_directory,
    lock_run_directory,
    remove_unfinished,
)

_COUNTERS = (
    "tokens_seen",
    "best_loss",
    "best_step",
    "evaluated_step",
    "val_loss",
    "n_waited",
    "n_skipped",
    "usual_norm",
    "smoothed_loss",
)
_CONTEXT = ("lengths", "recipe", "data", "machine", "random")
_APPENDED = ("metrics.jsonl", "samples.txt")
_SPIKE = 5.0
"""A gradient so many times as long as is usual is told."""


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal, and all is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Batches(Protocol):
    """Where training batches come from: a function of the step. With `fingerprint()`, a resumed run notices other data."""

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

    With `resume` the run in run_dir goes on from its newest whole checkpoint: on the same machine, with as many threads and
    the same versions, bit for bit as if it had never been stopped. The recipe and the data must be those of the checkpoint,
    but for the keys in `allow_changed`; else a ValueError tells what differs.
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
        resume: bool = False,
        allow_changed: str | Sequence[str] = (),
        progress: bool = True,
    ) -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.keeper = WholeModel(model, tokenizer) if keeper is None else keeper
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.recipe = dict(recipe or vars(config))
        self.device = torch.device(device)
        self.overwrite = overwrite
        self.resume = resume
        self.allow_changed = (allow_changed,) if isinstance(allow_changed, str) else tuple(allow_changed)
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
        self.evaluated_step: int | None = None
        self.val_loss: float | None = None
        """The last evaluation's, of evaluated_step."""
        self.n_waited = 0
        """Evaluations since the last new best."""
        self.n_skipped = 0
        """Steps left out because they were not finite."""
        self.usual_norm: float | None = None
        """A running mean of the gradient's norm."""
        self.smoothed_loss: float | None = None
        self._fingerprints: dict[str, str] = {}
        self._metrics: MetricsLog | None = None
        self._lock: FileLock | None = None
        self._checkpoints: CheckpointWriter | None = None
        self._checkpoint_due = False
        self._began = self._checkpoint_time = time.monotonic()
        self._checkpoint_seconds = 0.0

    def setup(self) -> None:
        """Seeds all generators, moves the model, makes the optimizers, and takes the run's directory or goes on in it."""
        config = self.config
        if self.tokenizer is not None and config.sample_every and config.sample_prompt:
            # A prompt that cannot be encoded is an error now, not after hours.
            self.prompts = [self.tokenizer.encode(config.sample_prompt)]
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        seed_everything(config.seed)
        snapshot = self._take_run_directory(self.run_dir) if self.run_dir is not None else None
        self.model.to(self.device).train()
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, config)
        if snapshot is not None:
            self._restore(snapshot)
        self._began = self._checkpoint_time = time.monotonic()
        if config.compile:
            # Block by block: one compilation serves all of them, and names, generation and saving stay as they are.
            for block in self.model.transformer.h:
                block.compile()

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its loss, gradient norm and learning rate.

        A step whose loss or gradient is not finite leaves the weights as they were, and is counted in `n_skipped`; one more
        than max_skipped_steps is a FloatingPointError.
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
        values = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": learning_rate}
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.n_skipped += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.n_skipped > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"at step {self.step_number} the loss is {values['loss']} and the norm of its gradient "
                f"{values['grad_norm']}, not finite for the {_ordinal(self.n_skipped)} time: lower learning_rate (now "
                f"{learning_rate:.3g}) or raise warmup_steps"
            )
        self.tokens_seen += batch[0].numel()
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

    def snapshot(self) -> Snapshot:
        """All that the next step depends on, copied: what a checkpoint holds."""
        named = self._trained()
        weights = {name: _copy(parameter) for parameter, name in named.items()}
        optimizer = {name: _copy(tensor) for name, tensor in optimizer_tensors(self.optimizers, named).items()}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        counters["best_loss"] = None if math.isinf(self.best_loss) else self.best_loss  # JSON has no infinity
        if self.evaluated_step != self.step_number:
            counters["val_loss"] = None
        state = {
            **counters,
            "lengths": {name: _size(self.run_dir / name) for name in _APPENDED} if self.run_dir else {},
            "recipe": _plain(self.recipe),
            "data": self._data_fingerprints(),
            "machine": self._machine(),
            "random": random_states(),
        }
        return Snapshot(self.step_number, weights, optimizer, state)

    def run(self) -> float:
        """Trains to the end, to early_stop, or to a signal: SIGINT (Ctrl-C) and SIGTERM save a checkpoint and are `Stopped`.

        Returns the loss over the whole validation text (nan without one) of the best model, which `model/` and the
        trainer then hold; without a run_dir, of the last.
        """
        deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            self.setup()
            bar = tqdm(
                total=self.config.max_steps,
                initial=self.step_number,
                desc="training",
                unit="step",
                disable=not self.progress,
            )
            with bar:
                if self._checkpoints is not None and not self.resume:
                    self._checkpoint_now(self._checkpoints)  # so that it is known now whether one can be written
                with _stoppable() as signals:
                    self._train(bar, signals)
                    self._save_last_checkpoint(bar)
                    if signals:
                        raise Stopped(self._how_to_go_on(), signals[0])
                return self._finish(bar)
        finally:
            torch.use_deterministic_algorithms(deterministic)
            if self._metrics is not None:
                self._metrics.close()
            if self._lock is not None:
                self._lock.release()

    def _train(self, bar: tqdm[Any], signals: list[int]) -> None:
        config, since, tokens = self.config, time.perf_counter(), self.tokens_seen
        patience = math.inf if config.early_stop is None else config.early_stop
        while self.step_number < config.max_steps and not signals and self.n_waited < patience:
            try:
                values = self.step()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}{self._what_is_kept()}") from None
            done = self.step_number
            bar.update()
            self._watch(values, bar)
            if done % config.log_every == 0 or done == config.max_steps:
                now = time.perf_counter()
                speed, since, tokens = (self.tokens_seen - tokens) / (now - since), now, self.tokens_seen
                if math.isfinite(values["loss"]):
                    self._log(done, **values, tokens_per_second=speed)
                bar.set_postfix_str(f"loss {self.smoothed_loss or math.nan:.3f}, {speed:,.0f} tokens/s")
            pause = time.perf_counter()
            if done % config.eval_every == 0 and done < config.max_steps and self.validation is not None:
                self._evaluate_and_keep(bar)
            if config.sample_every and done % config.sample_every == 0 and self.tokenizer is not None and self.prompts:
                self._show_sample(bar)
            self._checkpoint_if_due(bar)
            since += time.perf_counter() - pause  # speed is the training's alone
        if self.n_waited >= patience:
            bar.write(f"step {self.step_number}: stopped early, {self.n_waited} evaluations without a new best")

    def _watch(self, values: Mapping[str, float], bar: tqdm[Any]) -> None:
        """Keeps the running means, and tells of steps that were left out and of gradients much longer than usual."""
        loss, norm = values["loss"], values["grad_norm"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._log(self.step_number, skipped_steps=self.n_skipped)
            bar.write(f"step {self.step_number}: left out, its loss is {loss} and the norm of its gradient {norm}")
            return
        self.smoothed_loss = loss if self.smoothed_loss is None else 0.9 * self.smoothed_loss + 0.1 * loss
        usual = norm if self.usual_norm is None else self.usual_norm
        if norm > _SPIKE * usual:
            self._log(self.step_number, grad_norm_spike=norm / usual)
            bar.write(
                f"step {self.step_number}: the gradient is {norm / usual:.1f} times as long as usual ({norm:.3g})"
            )
        self.usual_norm = 0.98 * usual + 0.02 * min(norm, _SPIKE * usual)

    def _finish(self, bar: tqdm[Any]) -> float:
        if self.validation is None:
            self.best_step = self.step_number
            self.save()
            return math.nan
        if self.evaluated_step != self.step_number:
            self._evaluate_and_keep(bar)
        if self.best_step != self.step_number and self.run_dir is not None:
            self.keeper.restore(self.run_dir)
        loss = self.evaluate(whole=True)
        self._log(self.best_step or 0, final_val_loss=loss)
        return loss

    def _evaluate_and_keep(self, bar: tqdm[Any]) -> None:
        """Evaluates, saves a new best, tells."""
        loss = self.evaluate()
        self.val_loss, self.evaluated_step = loss, self.step_number
        is_best = loss < self.best_loss
        bar.write(f"step {self.step_number}: validation loss {loss:.4f}{' (best)' if is_best else ''}")
        if is_best:
            self.save()  # before it is logged: the best loss in metrics.jsonl is never of a model that is not there
            self.best_loss, self.best_step = loss, self.step_number
        self.n_waited = 0 if is_best else self.n_waited + 1
        self._log(self.step_number, val_loss=loss)

    def _show_sample(self, bar: tqdm[Any]) -> None:
        text = self.sample()
        bar.write(f"--- sample at step {self.step_number} ---\n{text}\n---")
        if self.run_dir is not None:
            with open(self.run_dir / "samples.txt", "a", encoding="utf-8", newline="\n") as file:
                file.write(f"--- step {self.step_number} ---\n{text}\n\n")

    def _take_run_directory(self, run: Path) -> Snapshot | None:
        """Locks the directory and begins anew in it, or finds what it goes on from. Nothing is changed before all is known."""
        if not self.resume:
            check_run_directory(run, self.overwrite)
        self._lock = lock_run_directory(run)
        snapshot = None
        if self.resume:
            snapshot, problems = read_newest(run / CHECKPOINTS)
            for problem in problems:
                print(problem, file=sys.stderr)
            self._check_same(snapshot)
            remove_unfinished(run)
            if self.allow_changed:
                self._adopt_best(run, snapshot)
            for name, length in snapshot.state["lengths"].items():
                _cut(run / name, length)
        else:
            clear_run_directory(run)
        with atomic_write(run / "config.yaml") as file:
            yaml.safe_dump(_plain(self.recipe), file, sort_keys=False, allow_unicode=True)
        self._metrics = MetricsLog(run, self.config.tensorboard, snapshot.step if snapshot else None)
        if self.config.checkpoint_every or self.config.checkpoint_minutes:
            self._checkpoints = CheckpointWriter(run / CHECKPOINTS, self.config.keep_last, self.config.keep_best)
        return snapshot

    def _check_same(self, snapshot: Snapshot) -> None:
        """A ValueError if the recipe or the data are others than the checkpoint's; a word if the machine is another."""
        lacking = [name for name in (*_COUNTERS, *_CONTEXT) if name not in snapshot.state]
        if lacking:
            raise ValueError(
                f"the checkpoint of step {snapshot.step} in {self.run_dir} lacks {', '.join(lacking)}: "
                "another version of MyGPT wrote it"
            )
        saved, recipe, missing = snapshot.state["recipe"], _plain(self.recipe), "(absent)"
        differences = [
            f"{key} was {saved.get(key, missing)!r} and is {recipe.get(key, missing)!r}"
            for key in {**saved, **recipe}
            if saved.get(key, missing) != recipe.get(key, missing) and key not in self.allow_changed
        ]
        for key, value in self._data_fingerprints().items():
            source = "model" if key == "frozen_weights" else "data"
            if snapshot.state["data"].get(key) != value and source not in self.allow_changed:
                differences.append(f"{source}: the {key.replace('_', ' ')} are not those that the run began with")
        if differences:
            raise ValueError(
                f"the run in {self.run_dir} cannot go on: {'; '.join(differences)} "
                "(--allow-changed KEY goes on all the same, and is no longer the same run)"
            )
        for key, value in self._machine().items():
            before = snapshot.state["machine"].get(key)
            if before != value:
                print(f"{key} was {before} and is {value}: what follows may differ in the last digits", file=sys.stderr)

    def _adopt_best(self, run: Path, snapshot: Snapshot) -> None:
        """A changed run does not come by the same losses again: what is best on the disk stays so until it is beaten."""
        losses = {record["val_loss"]: record["step"] for record in read_metrics(run) if "val_loss" in record}
        if losses:
            snapshot.state["best_loss"] = min(losses)
            snapshot.state["best_step"] = losses[min(losses)]

    def _restore(self, snapshot: Snapshot) -> None:
        named = {name: parameter for parameter, name in self._trained().items()}
        if named.keys() != snapshot.weights.keys():
            raise ValueError(f"the checkpoint of step {snapshot.step} trains other parameters than this run does")
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                named[name].copy_(tensor)
        load_optimizer_tensors(self.optimizers, self._trained(), snapshot.optimizer)
        self.step_number = snapshot.step
        for name in _COUNTERS:
            setattr(self, name, snapshot.state[name])
        self.best_loss = math.inf if self.best_loss is None else self.best_loss
        restore_random_states(snapshot.state["random"])

    def _checkpoint_if_due(self, bar: tqdm[Any]) -> None:
        """Copies the state and has it written while training goes on; a writer that is still busy is not waited for."""
        if self._checkpoints is None:
            return
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        waited = time.monotonic() - self._checkpoint_time
        self._checkpoint_due |= (every > 0 and self.step_number % every == 0) or 0 < 60 * minutes <= waited
        self._tell_failed_checkpoint(bar)
        if self._checkpoint_due and not self._checkpoints.is_busy:
            self._begin_checkpoint(self._checkpoints)

    def _begin_checkpoint(self, writer: CheckpointWriter) -> None:
        began = time.monotonic()
        writer.start(self.snapshot())
        self._checkpoint_due, self._checkpoint_time = False, time.monotonic()
        self._checkpoint_seconds += self._checkpoint_time - began

    def _checkpoint_now(self, writer: CheckpointWriter) -> None:
        """Returns when the state is on the disk. One that cannot be written is an error."""
        self._begin_checkpoint(writer)
        writer.wait()
        failure = writer.take_failure()
        if failure is not None:
            raise failure

    def _save_last_checkpoint(self, bar: tqdm[Any]) -> None:
        """The state in which training ended or was stopped, on the disk before anything else happens."""
        writer = self._checkpoints
        if writer is None:
            return
        writer.wait()
        self._tell_failed_checkpoint(bar)
        if writer.written is None or writer.written.name != f"step-{self.step_number:06d}":
            self._checkpoint_now(writer)
        self._log(self.step_number, checkpoints=writer.n_written, checkpoint_seconds=self._checkpoint_seconds)
        share = self._checkpoint_seconds / (time.monotonic() - self._began)
        bar.write(
            f"{writer.n_written} checkpoints, for which training waited {self._checkpoint_seconds:.2f} s, {share:.1%} of its time"
        )

    def _tell_failed_checkpoint(self, bar: tqdm[Any]) -> None:
        failure = self._checkpoints.take_failure() if self._checkpoints is not None else None
        if failure is not None:
            bar.write(f"step {self.step_number}: a checkpoint could not be written: {failure}", file=sys.stderr)

    def _how_to_go_on(self) -> str:
        words = [f"stopped at step {self.step_number}"]
        if self._checkpoints is not None:
            words.append(f"--resume {self.run_dir} goes on from there")
        if self.best_step is None:
            self.save()  # something to look at, though nothing is known of it
        if self.run_dir is not None:
            which = "the model as it is" if self.best_step is None else f"the best model (step {self.best_step})"
            words.append(f"{which} is in {self.keeper.place(self.run_dir)}")
        return "; ".join(words)

    def _what_is_kept(self) -> str:
        """Where the last good state lies, for a run that fails."""
        if self.run_dir is None:
            return ""
        if self.best_step is None:
            self.save()
        kept = f"; the best model until then is in {self.keeper.place(self.run_dir)}"
        if self._checkpoints is not None:
            self._checkpoints.wait()
            if self._checkpoints.written is not None:
                kept += f", the last good checkpoint is {self._checkpoints.written}"
        return kept

    def _trained(self) -> dict[Tensor, str]:
        return {p: name for name, p in self.model.named_parameters() if p.requires_grad}

    def _data_fingerprints(self) -> dict[str, str]:
        """What the run depends on and does not change: its texts or examples, and weights that are not trained."""
        if not self._fingerprints:
            parts = {"training_data": self.sampler, "validation_data": self.validation}
            self._fingerprints = {
                name: part.fingerprint() for name, part in parts.items() if part and hasattr(part, "fingerprint")
            }
            frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
            if frozen:
                digest = hashlib.sha256()
                for name, parameter in sorted(frozen.items()):
                    digest.update(name.encode())
                    digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
                self._fingerprints["frozen_weights"] = digest.hexdigest()
        return self._fingerprints

    def _machine(self) -> dict[str, Any]:
        """What the last digits depend on."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"torch": str(torch.__version__), "device": name, "threads": torch.get_num_threads()}

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


def autocast_dtype(device: torch.device, precision: TrainingPrecision, emb_dim: int) -> torch.dtype | None:
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


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """A list that SIGINT (Ctrl-C) and SIGTERM fill, so that a step is never cut in two; a second Ctrl-C stops at once."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: Any) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, remember)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as YAML gives it back."""
    return yaml.safe_load(yaml.safe_dump(dict(recipe)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _cut(path: Path, length: int) -> None:
    """Takes back what was appended to a file after it had this length."""
    if _size(path) > length:
        os.truncate(path, length)


def _ordinal(n: int) -> str:
    return f"{n}{'st' if n == 1 else 'nd' if n == 2 else 'rd' if n == 3 else 'th'}"
