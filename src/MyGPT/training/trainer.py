"""The training loop behind `mygpt train`, `finetune`, `dpo` and `classify`: the step, the loop, and the evaluation.

A step depends only on the weights, the optimizers, the random states and the step number. A checkpoint stores them, so
a resumed run gives bit-identical results. state.py holds the counters, run.py writes files, console.py prints.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT import ranks
from MyGPT.acceleration.training import Buffers, fused_blocks
from MyGPT.generation import evaluation_mode
from MyGPT.notebooks import html_table
from MyGPT.parts import check_parts
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.arithmetic import autocast_dtype, deterministic_algorithms, forward_pass, reused_memory, uncompiled
from MyGPT.training.config import TrainConfig
from MyGPT.training.console import Console, SilentConsole
from MyGPT.training.interrupts import SIGPIPE, Stopped, delayed_signals
from MyGPT.training.objective import NextToken, Objective
from MyGPT.training.optim import make_optimizers, set_learning_rate
from MyGPT.training.parallel import (
    distribute,
    gather_weights,
    micro_batches,
    reduce_gradients,
    seed_step,
)
from MyGPT.training.run import BestModelStore, GatheredModel, Run, WholeModel
from MyGPT.training.snapshot import (
    Snapshot,
    check_fit,
    identify,
    restore_snapshot,
    seed_everything,
    take_snapshot,
)
from MyGPT.training.state import RunState
from MyGPT.training.texts import LiveSamples, make_batches, to_device


class Trainer:
    """Trains a model. `run` does everything; use `setup`, `step`, `evaluate`, `save` and `close` for your own loop.

    `with Trainer(...) as trainer:` calls `setup` and `close`. A resumed run gives the same results as an uninterrupted
    run, bit for bit on the same machine with the same versions and number of threads.

    Under torchrun, all ranks make the same Trainer and call the same methods. Each takes its rows of every batch, and
    only rank 0 prints and writes logs.

    Args:
        model: the GPTModel to train, or a GPTForClassification.
        config: the options of the training run.
        train: token ids, or an object whose method `batch(step)` returns inputs and targets, each (batch, time) int64,
            and optionally an attention mask (batch, time). If it has `fingerprint()`, resuming checks the data. If it
            has `metrics(step)`, the values of the result are recorded beside the training loss.
        val: token ids, or an object whose method `batches(whole)` yields such batches: all of them if `whole` is True,
            otherwise the same few every time. None trains without evaluation. If it has `parts`, a dict of such
            objects, and `shares`, a dict of numbers, the loss is the sum of share * loss over these parts.
        tokenizer: decodes sample texts and is saved with the model.
        prompts: token ids that sample texts continue, unless config.sample_prompt is set. Default: the first validation
            tokens.
        best_model: saves the best model of the run. Default: an object that saves it in the directory `model/`.
        run_dir: the directory for the files of the run. None writes no files.
        recipe: the content of config.yaml, such as the options of a command. Default: the options in `config`.
        objective: the loss to minimize, with the form of its batches. Default: the loss of the next token.
        device: the device on which the model is trained.
        overwrite: replace an earlier run in run_dir.
        resume: continue the run in run_dir. The recipe and the data must be unchanged.
        allow_changed: recipe keys that may differ on resuming, in a list or with commas; "data_content" and "model_content"
            allow other data and other frozen weights.
        console: prints all messages. Default: `Console(progress)`, with a progress bar if `progress` is True.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        train: Any,
        val: Any = None,
        *,
        tokenizer: Tokenizer | None = None,
        prompts: Sequence[list[int]] = (),
        best_model: BestModelStore | None = None,
        run_dir: str | Path | None = None,
        recipe: Mapping[str, Any] | None = None,
        objective: Objective | None = None,
        device: torch.device | str = "cpu",
        overwrite: bool = False,
        resume: bool = False,
        allow_changed: str | Sequence[str] = (),
        progress: bool = True,
        console: Console | None = None,
    ) -> None:
        ranks.join(config.timeout_minutes, even_alone=config.parallel in ("ddp", "fsdp"))
        self.model, self.config, self.device = model, config, torch.device(device)
        self.objective: Objective = NextToken(model) if objective is None else objective
        self.state = RunState()
        self.scores: dict[str, float] = {}
        """The values that the last call of `evaluate` measured beside the loss, by name; empty for the default objective."""
        self.sampler, self.validation, start = make_batches(train, val, model.config.context_length, config)
        self.samples = LiveSamples(model, tokenizer, prompts if len(prompts) > 0 else start, config)
        self.autocast_dtype = autocast_dtype(self.device, config.precision, model.config.emb_dim)
        console = Console(progress) if console is None else console
        allowed = [allow_changed] if isinstance(allow_changed, str) else allow_changed
        self.console = console if ranks.rank() == 0 else SilentConsole()
        self.files = Run(
            None if run_dir is None else Path(run_dir),
            config,
            dict(vars(config) if recipe is None else recipe),
            GatheredModel(WholeModel(model, tokenizer) if best_model is None else best_model, self._gather),
            self.console,
            cache(partial(identify, model, self.sampler, self.validation, self.device)),
            partial(check_fit, model, config),
            overwrite=overwrite,
            resume=resume,
            allow_changed=[name.strip() for names in allowed for name in names.split(",")],
            parts=getattr(model, "parts", None),
        )
        self._contexts, self._is_ready = ExitStack(), False
        self._buffers = Buffers()
        self._whole: tuple[Any, Objective] | None = None
        self._sample_errors: set[type[Exception]] = set()

    def _repr_html_(self) -> str:
        of = f"{self.state.step:,} of {self.config.max_steps:,}"
        return html_table("Trainer", {**self.state.summary(), "steps": of, "run_dir": self.files.directory})

    step_number = property(attrgetter("state.step"), doc="The number of steps so far.")
    tokens_seen = property(attrgetter("state.tokens_seen"), doc="The number of input tokens so far.")
    best_loss = property(attrgetter("state.best_loss"), doc="The lowest validation loss; infinity before the first.")
    best_step = property(attrgetter("state.best_step"), doc="The step of best_loss; None before the first.")

    def setup(self) -> None:
        """Seed the random generators, lock run_dir, move the model to the device, and make the optimizers.

        A resumed run also loads its newest checkpoint. A second call does nothing. An error closes the trainer.
        """
        if self._is_ready:
            return
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self._contexts.enter_context(deterministic_algorithms(self.config.deterministic))
            self._contexts.enter_context(reused_memory(self.device))
            seed_everything(self.config.seed)
            snapshot = self._contexts.enter_context(self.files)
            self.config = self.files.config  # its warmup may have been shortened
            if self.config.compile and self.device.type == "cpu":
                self.console.warn("compile: true is ignored on a CPU, where compiled blocks are slower")
                self.config = dataclasses.replace(self.config, compile=False)
            if (shard_size := self.config.shard_size_on(ranks.world_size())) is not None:
                # The model itself stays whole, for everything that happens to it between and after the steps.
                self._whole = self.model, self.objective
                self.model, self.objective = copy.deepcopy(self._whole)
            self.model.to(self.device).train()
            if self.files.parts is not None:
                check_parts(self.model)
            self.model.gradient_checkpointing = self.config.gradient_checkpointing
            if shard_size is not None:
                distribute(self.model, shard_size, self.config, self.device, self.autocast_dtype)
            self.samples.model = self.model
            self.optimizers = make_optimizers(self.model, self.config)
            if snapshot is not None:
                self.state = restore_snapshot(snapshot, self.model, self.optimizers, self.files.group)
            for block in self.model.transformer.h if self.config.compile else ():
                block.compile()  # One compilation serves all blocks; names, generation and saving stay as they are.
            on_error.pop_all()
        self._is_ready = True

    def close(self) -> None:
        """Wait for the checkpoint writer, unlock run_dir and restore torch's deterministic mode.

        Later calls do nothing. `evaluate` and `save` still work on a closed trainer.
        """
        self._is_ready = False
        with self._contexts, closing(self.console):
            self.files.close()

    def __enter__(self) -> Trainer:
        self.setup()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._gather(and_end=True)
        self.files.has_failed = kind is not None
        self.close()

    def step(self) -> dict[str, float]:
        """Take one optimizer step and return {"loss": ..., "grad_norm": ..., "learning_rate": ...} and the scores.

        A step whose loss or gradient is not finite does not change the weights. FloatingPointError is raised after
        more than config.max_skipped_steps such steps.
        """
        if not self._is_ready:
            raise RuntimeError("the trainer is not set up: call setup(), or use `with Trainer(...) as trainer:`")
        config, state = self.config, self.state
        learning_rate = set_learning_rate(self.optimizers, config, state.step)
        batch = self.sampler.batch(state.step)
        count = self.objective.count(*batch)  # of the rows of all ranks
        means = torch.zeros(1 + len(self.objective.scores), device=self.device)  # the loss first
        seed_step(config.seed, state.step)
        parts = micro_batches(batch, config.micro_batch_size)
        for i, (micro_batch, is_counted) in enumerate(parts, start=1):
            reduce_gradients(self.model, is_last=i == len(parts))
            share = (self._token_loss(*to_device(micro_batch, self.device))[0] / count).flatten()
            share = share if is_counted else share * 0
            share[0].backward()
            means += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        loss, *scores = ranks.sum_over_ranks(means).tolist()
        values = {"loss": loss, "grad_norm": ranks.whole(norm).item(), "learning_rate": learning_rate}
        is_finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        for optimizer in self.optimizers:
            if is_finite:
                optimizer.step()
            optimizer.zero_grad()
        state.n_skipped += not is_finite
        self.files.check_divergence(state, **values)
        values |= dict(zip(self.objective.scores, scores, strict=True))
        state.tokens_seen += batch[0].numel()
        state.step += 1
        return values

    def evaluate(self, whole: bool = False) -> float:
        """Return the mean validation loss, on all data or on a fixed small part; NaN without data.

        The loss of the next token is in nats per token. `scores` receives the other measured values, such as the loss of
        each source of a mixture.
        """
        if (parts := getattr(self.validation, "parts", None)) is None:
            loss, *scores = self._mean_losses(self.validation, whole)
            self.scores = dict(zip(self.objective.scores, scores, strict=True))
            return loss
        losses = {name: self._mean_losses(part, whole)[0] for name, part in parts.items()}
        self.scores = {f"loss/{name}": loss for name, loss in losses.items()}
        return sum(float(self.validation.shares[name]) * loss for name, loss in losses.items())

    def _mean_losses(self, validation: Any, whole: bool) -> list[float]:
        """Return the mean loss and scores of the objective on validation batches; NaN without batches."""
        # The sums, the loss first, then the number of terms. Python adds in float64, which not every device has.
        totals = [0.0] * (2 + len(self.objective.scores))
        with evaluation_mode(self.model), torch.no_grad(), uncompiled(self.config):
            for batch in () if validation is None else validation.batches(whole):
                for rows, is_counted in micro_batches(batch, None):
                    sums, n_terms = self._token_loss(*to_device(rows, self.device))
                    if is_counted:
                        values = [*sums.flatten().tolist(), int(n_terms)]
                        totals = [total + value for total, value in zip(totals, values, strict=True)]
        *parts, count = ranks.sum_numbers(totals)
        return [part / count if count else math.nan for part in parts]

    def save(self) -> Path | None:
        """Save the current model as the run's best model and return its directory, or None if run_dir is None."""
        return self.files.save_model()

    def snapshot(self) -> Snapshot:
        """Return a copy of everything on which the next step depends. A checkpoint stores such a copy."""
        return take_snapshot(self.model, self.optimizers, self.state, self.files.context())

    def run(self) -> float:
        """Train until the last step or an early stop, close the trainer, and return the best model's validation loss.

        The loss is measured on all validation data. It is NaN if there is none. Afterwards `trainer.model` and
        run_dir hold the best model. Without run_dir, the last model is kept and evaluated instead.

        Raises:
            Stopped: SIGINT (Ctrl-C), SIGTERM or SIGHUP arrived, or the program that reads the console's output has
                ended, which counts as SIGPIPE. A checkpoint was saved before.
            FloatingPointError: too many losses or gradients, or all validation losses, were not finite.
            OSError: the first checkpoint, or at the end the last checkpoint or the model, could not be written.
        """
        with ranks.naming_missing_ranks(), self:
            self.console.start(self.state.step, self.config.max_steps)
            self.files.write_first_checkpoint(self.snapshot)
            with delayed_signals() as signals:
                stop = self._train(signals)
                self.files.write_last_checkpoint(self.state.step, self.snapshot)
                if stop is not None:
                    message = self.files.stop_message(self.state)
                    self.files.raise_failed_writes()
                    raise Stopped(message, stop)
            loss = self._finish()
            self.files.raise_failed_writes()
            return loss

    def _train(self, signals: list[int]) -> int | None:
        """Take steps until the last step, an early stop, or a signal. Return the number of the signal, if any."""
        config, state = self.config, self.state
        seconds, tokens = 0.0, state.tokens_seen
        first_step = state.step
        while True:
            stop = signals[0] if signals else SIGPIPE if self.console.reader_has_ended else 0
            # A signal may arrive at one rank only, and the clocks and disks of the ranks differ.
            stop, is_late, is_busy = ranks.max_over_ranks(
                stop, self.files.is_checkpoint_late, self.files.is_writer_busy
            )
            self.files.keep_model_if_due(state)  # before the checkpoint, so that a resumed run lacks no kept model
            if state.step > first_step:
                self.files.checkpoint_if_due(state.step, self.snapshot, bool(is_late), bool(is_busy))
            if stop:
                return stop
            if state.step >= config.max_steps or state.has_lost_patience(config.early_stop):
                return None
            began = time.perf_counter()
            values = self.step()
            self.files.record_step(state, values["loss"], values["grad_norm"])
            seconds += time.perf_counter() - began  # without evaluations, samples and checkpoints
            if state.step % config.log_every == 0 or state.step == config.max_steps:
                values |= self.sampler.metrics(state.step) if hasattr(self.sampler, "metrics") else {}
                self.files.record_speed(state, values, (state.tokens_seen - tokens) / seconds)
                seconds, tokens = 0.0, state.tokens_seen
            if state.step % config.eval_every == 0 and state.step < config.max_steps and self.validation is not None:
                self._evaluate_and_save_best()
            self._show_sample()

    def _evaluate_and_save_best(self) -> None:
        loss = self.evaluate()
        # The model is saved before its loss is recorded: metrics.jsonl never names a best model that was not saved.
        is_saved = not loss < self.best_loss or self.files.try_to_save(self.save)
        self.files.record_evaluation(self.state, loss, is_saved, self.scores)

    def _show_sample(self) -> None:
        """Print and store a sample text if one is due. A failure is reported once per type of error, and ends nothing."""
        step = self.state.step
        try:
            text = self.samples.text(step)
        # A model that diverges, a tokenizer that cannot decode a token, too little memory: no error is worth the run.
        except Exception as error:
            if type(error) not in self._sample_errors:
                self._sample_errors.add(type(error))
                reason = " ".join(str(error).split()) or type(error).__name__
                self.console.warn(f"step {step}: no sample text, because generating it failed: {reason}")
            return
        if text is not None:
            self.files.record_sample(step, text)

    def _finish(self) -> float:
        """Evaluate the last model, restore the best one, and return its loss on all validation data."""
        if self.validation is None:
            self.state.best_step = self.state.step
            self.files.try_to_save(self.save)
            return math.nan
        if self.state.evaluated_step != self.state.step:
            self._evaluate_and_save_best()
        self._gather(and_end=True)
        self.files.restore_best_model(self.state)
        loss = self.evaluate(whole=True)
        scores = {f"final_val_{name}": value for name, value in self.scores.items()}
        self.files.log(self.state.best_step or 0, final_val_loss=loss, **scores)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of the best model on all validation data is {loss}: check these data")
        return loss

    def _gather(self, and_end: bool = False) -> None:
        """Copy the trained weights into the model that the trainer was given, if a distributed copy of it is trained.

        With and_end=True, the trainer continues with this model, and the distributed copy is not used again.
        """
        if self._whole is None:
            return
        gather_weights(self.model, self._whole[0])
        if and_end:
            self.model, self.objective = self._whole
            self.model.to(self.device)
            self.samples.model, self._whole = self.model, None

    def _token_loss(self, *batch: Tensor) -> tuple[Tensor, Tensor | int]:
        is_recomputed = self.config.gradient_checkpointing  # outside of the context of fused_blocks
        blocks = nullcontext() if is_recomputed else fused_blocks(self.model, self._buffers)
        with forward_pass(self.config, self.device, self.autocast_dtype), blocks:
            return self.objective(*batch)
