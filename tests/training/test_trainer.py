"""The Trainer computes what a plain loop computes, and keeps its results on the disk whatever happens."""

from __future__ import annotations

import errno
import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import tiny_runs
from MyGPT import GPTModel, TrainConfig, Trainer, train_model_simple
from MyGPT.data.sampler import WindowSampler, walk_windows
from MyGPT.training.arithmetic import autocast_dtype
from MyGPT.training.directory import check_run_directory
from tiny_runs import IDS, TOKENIZER, change, make_model

QUICK = tiny_runs.change(
    max_steps=6, batch_size=8, warmup_steps=2, eval_every=2, learning_rate=1e-2, checkpoint_every=250, keep_last=2
)


def fresh_model(drop_rate: float = 0.0) -> GPTModel:
    """Return the tiny model in float64."""
    return make_model(drop_rate).double()


def make_trainer(config: TrainConfig = QUICK, run_dir: Path | None = None, **options: Any) -> Trainer:
    """Return a Trainer of the tiny model in float64 without dropout."""
    options = {"model": fresh_model(), "tokenizer": TOKENIZER, **options}
    return tiny_runs.make_trainer(run_dir, config, **options)


def weights(model: GPTModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, tensor in one.items():
        assert (tensor - other[name].to(tensor.dtype)).abs().max() <= tolerance, name


def test_a_step_is_plain_adamw_on_the_mean_cross_entropy_with_clipping() -> None:
    config = change(QUICK, schedule="constant", warmup_steps=0, grad_clip=0.5, weight_decay=0.3)
    trainer = make_trainer(config)
    plain = fresh_model()
    decayed = [p for p in plain.parameters() if p.dim() == 2]
    others = [p for p in plain.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3
    )
    trainer.setup()
    for step in range(4):
        values = trainer.step()
        x, y = trainer.sampler.batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert values["loss"] == pytest.approx(loss.item(), abs=1e-6)  # The trainer sums losses in float32.
        assert values["grad_norm"] == pytest.approx(norm.item(), abs=1e-10)
    assert_same_weights(weights(trainer.model), weights(plain), 1e-10)


def test_both_training_loops_give_the_same_weights() -> None:
    trainer = make_trainer(change(QUICK, schedule="constant", warmup_steps=0, grad_clip=0.0, weight_decay=0.0))
    trainer.setup()
    batches = [trainer.sampler.batch(step) for step in range(5)]
    for _ in batches:
        trainer.step()
    simple = fresh_model()
    optimizer = torch.optim.AdamW(simple.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    train_model_simple(simple, batches, None, optimizer, "cpu", num_epochs=1)
    assert_same_weights(weights(trainer.model), weights(simple), 1e-10)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro_batch_size: int) -> None:
    whole, parts = make_trainer(), make_trainer(change(QUICK, micro_batch_size=micro_batch_size))
    for trainer in (whole, parts):
        trainer.setup()
        for _ in range(3):
            trainer.step()
    assert_same_weights(weights(whole.model), weights(parts.model), 1e-10)


def test_evaluation_and_samples_do_not_change_the_training() -> None:
    """With dropout, any additional draw from the global generator would change the weights."""
    busy = make_trainer(change(QUICK, eval_every=1, sample_every=1, sample_tokens=5), model=fresh_model(0.2))
    quiet = make_trainer(change(QUICK, eval_every=100), model=fresh_model(0.2), tokenizer=None)
    busy.run()
    quiet.run()
    assert_same_weights(weights(busy.model), weights(quiet.model))


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_trainer(run_dir=tmp_path / name, model=fresh_model(0.2)).run()

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    assert losses("a") == losses("b")
    assert len(losses("a")) == QUICK.max_steps


def test_evaluate_is_the_mean_over_every_validation_token() -> None:
    trainer = make_trainer()
    trainer.setup()
    model = trainer.model
    targets = logits = torch.empty(0)
    for x, y in walk_windows(trainer.validation.ids, 8, 7):  # type: ignore[arg-type]
        logits = torch.cat([logits, model.eval()(x).detach().flatten(0, 1)])
        targets = torch.cat([targets, y.flatten()])
    expected = F.cross_entropy(logits, targets.long(), ignore_index=-100).item()
    assert (targets != -100).sum() == 500 - 1
    assert trainer.evaluate(whole=True) == pytest.approx(expected, abs=1e-12)


def test_the_fixed_windows_are_the_same_every_time_and_spread_over_the_text() -> None:
    trainer = make_trainer(change(QUICK, eval_windows=7))
    first, second = (torch.cat([x for x, _ in trainer.validation.batches(whole=False)]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (7, 8)
    assert first[0].tolist() == IDS[1500:1508]
    assert first[-1].tolist() == IDS[1991:1999]


def test_a_run_leaves_all_its_files_and_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0])
    quick = change(QUICK, sample_every=3, sample_tokens=4)
    trainer = make_trainer(quick, tmp_path / "run", recipe={"data": "x.txt", **vars(quick)})
    saved = []
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: evaluate(True) if whole else next(losses))
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda: (saved.append(weights(trainer.model)), save())[1])
    final = trainer.run()

    assert trainer.best_step == 4
    best = GPTModel.from_pretrained(tmp_path / "run").state_dict()
    assert_same_weights(saved[-1], best)
    assert_same_weights(weights(trainer.model), saved[-1])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"] == "x.txt"
    assert TrainConfig(**{k: v for k, v in config.items() if k != "data"}) == trainer.config
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["val_loss"] for r in records if "val_loss" in r] == [3.0, 1.0, 2.0]
    assert records[-1] == {"step": 4, "final_val_loss": final}
    assert "--- step 3 ---" in (tmp_path / "run" / "samples.txt").read_text()


def test_early_stop_counts_evaluations_without_a_new_best(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(change(QUICK, max_steps=50, eval_every=1, early_stop=2), tokenizer=None)
    losses = iter([2.0, 1.0, 1.5, 1.0, *[0.0] * 50])
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: next(losses))
    trainer.run()
    assert trainer.step_number == 4


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_loss_that_is_nan_stops_the_run_names_the_step_and_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    trainer = make_trainer(change(QUICK, eval_every=100, max_skipped_steps=0), tmp_path / "run")
    compute, last_good = trainer._token_loss, []

    def poisoned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total, count = compute(x, y)
        if trainer.step_number == steps_before:
            last_good.append(weights(trainer.model))
            total = total * math.nan
        return total, count

    monkeypatch.setattr(trainer, "_token_loss", poisoned)
    with pytest.raises(FloatingPointError, match=f"at step {steps_before} the loss is nan") as caught:
        trainer.run()
    assert str(tmp_path / "run" / "model") in str(caught.value)
    assert_same_weights(last_good[0], GPTModel.from_pretrained(tmp_path / "run").state_dict())


def test_a_full_disk_leaves_the_last_best_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.setup()
    trainer.save()
    before = weights(GPTModel.from_pretrained(tmp_path / "run"))
    trainer.step()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert_same_weights(before, GPTModel.from_pretrained(tmp_path / "run").state_dict())
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", ".process", "config.yaml", "model"]


def test_without_a_validation_text_the_last_model_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer(run_dir=tmp_path / "run", val=None)
    assert math.isnan(trainer.run())
    assert_same_weights(weights(trainer.model), GPTModel.from_pretrained(tmp_path / "run").state_dict())


def test_a_directory_that_is_not_empty_is_refused_and_only_a_run_can_be_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    check_run_directory(run, overwrite=False)
    (run / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="run"):
            check_run_directory(run, overwrite)
    (run / "config.yaml").write_text("data: x\n")
    make_trainer(run_dir=run, overwrite=True).run()
    assert (run / "thesis.txt").read_text() == "years of work"
    assert "max_steps: 6" in (run / "config.yaml").read_text()


def test_a_text_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"8 tokens.*window of 8 tokens and its targets need 9"):
        Trainer(fresh_model(), QUICK, IDS[:8])


def test_float32_and_bfloat16_train_alike() -> None:
    """bfloat16 has a mantissa of 8 bits, so losses of about 3 nats agree to about 3 * 2**-8."""
    losses = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(3)
        trainer = make_trainer(change(QUICK, precision=precision), model=make_model(0.0))
        trainer.setup()
        losses[precision] = [trainer.step()["loss"] for _ in range(5)]
        assert next(trainer.model.parameters()).dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.03)
    assert losses["bf16"] != losses["fp32"]


def test_automatic_precision_is_float32_for_narrow_models_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype(cpu, "auto", 128) is None
    assert autocast_dtype(cpu, "fp32", 768) is None
    assert autocast_dtype(cpu, "bf16", 128) is torch.bfloat16


def test_compile_is_ignored_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    plain, compiled = make_trainer(), make_trainer(change(QUICK, compile=True))
    plain.run()
    assert "compile" not in capsys.readouterr().err
    compiled.run()
    assert "compile: true is ignored on a CPU, where compiled blocks are slower" in capsys.readouterr().err
    assert_same_weights(weights(plain.model), weights(compiled.model), 0)


NEW_PAGES = """
import resource
import torch
from MyGPT.training.arithmetic import reused_memory

def pages_of_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        kept = [torch.ones(12 << 20) for _ in range(2)]  # 48 MB each
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])

pages_of_steps()
usual, resident = pages_of_steps(), resident_pages()
with reused_memory(torch.device("cpu")):
    pages_of_steps()
    reused = pages_of_steps()
print(usual, reused, resident_pages() - resident)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_memory_is_reused_inside_a_run_and_returned_after_it() -> None:
    """Every step needed new pages for all its large tensors, which took a tenth of the time."""
    out = subprocess.run([sys.executable, "-c", NEW_PAGES], capture_output=True, text=True, check=True).stdout
    usual, reused, growth = map(int, out.split())
    assert usual > 10_000 and reused < 100
    assert growth < 2_000  # 8 MB of the 96 MB of a step


def test_the_sampler_is_what_the_trainer_sees() -> None:
    trainer = make_trainer(change(QUICK, order="shuffled", seed=5))
    x, y = trainer.sampler.batch(3)
    x2, y2 = WindowSampler(np.array(IDS[:1500], np.uint16), 8, 8, "shuffled", seed=5).batch(3)
    assert torch.equal(x, x2) and torch.equal(y, y2)
