"""The option keep_every: a run keeps its models in history/, also if it is killed, resumed, extended or out of disk space."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import GPT2LMHeadModel

from killing import Kill, differences, leftovers, remains, run, run_with_kills
from MyGPT import GPTModel, TrainConfig, Trainer, open_model
from MyGPT.cli import main
from MyGPT.commands.runs import find_runs, summarize
from MyGPT.finetuning.classification import GPTForClassification
from MyGPT.generation import evaluation_mode
from MyGPT.training.checkpoint import CheckpointWriter, read_snapshot
from MyGPT.training.snapshot import check_unchanged
from ranks import run_on_ranks
from tiny_parallel import CONFIG, IDS
from tiny_runs import (
    RECIPES,
    TEXT,
    TOKENIZER,
    change,
    classify_command,
    finetune_command,
    make_model,
    make_trainer,
    train_command,
)

KEEPING = change(keep_every=3)  # of 8 steps, with a checkpoint after every second one


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training wait for each checkpoint, so that no checkpoint is postponed while a slow disk writes another."""
    monkeypatch.setattr(CheckpointWriter, "is_busy", property(lambda writer: bool(writer.wait())))


def names(run_dir: Path) -> list[str]:
    """Return the sorted names of all entries in the history of a run, also of unfinished ones."""
    history = run_dir / "history"
    return sorted(path.name for path in history.iterdir()) if history.exists() else []


def kept(run_dir: Path) -> dict[str, bytes]:
    """Return the content of each file in the history of a run, by its path in the run."""
    files = sorted((run_dir / "history").rglob("*"))
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files if file.is_file()}


def test_the_history_holds_the_models_of_its_steps_which_transformers_opens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", KEEPING, tokenizer=TOKENIZER)
    trainer.run()
    assert names(tmp_path / "run") == ["step-000000", "step-000003", "step-000006", "step-000008"]
    steps = make_trainer(None, KEEPING)  # the same steps, without files
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with steps:
        for step in range(9):
            if (place := tmp_path / f"run/history/step-{step:06d}").exists():
                with torch.no_grad(), evaluation_mode(steps.model):
                    expected = steps.model(ids)
                    theirs = GPT2LMHeadModel.from_pretrained(place)(ids).logits
                    assert (theirs - expected).abs().max() < 1e-5
                    opened, tokenizer = open_model(place)
                    assert torch.equal(opened(ids), expected)
                assert tokenizer.encode("the fox") == TOKENIZER.encode("the fox")
            if step < 8:
                steps.step()


def test_the_default_keeps_nothing_and_keeping_changes_no_result(tmp_path: Path) -> None:
    make_trainer(tmp_path / "off").run()
    make_trainer(tmp_path / "on", KEEPING).run()
    assert not (tmp_path / "off/history").exists()
    found, expected = remains(tmp_path / "on"), remains(tmp_path / "off")
    assert differences(found, expected) == []


def test_an_early_stop_keeps_the_last_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", change(keep_every=3, eval_every=2, early_stop=1))
    losses = iter([3.0, 4.0])
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: evaluate(True) if whole else next(losses))
    trainer.run()
    assert names(tmp_path / "run") == ["step-000000", "step-000003", "step-000004"]


def test_a_run_resumed_before_its_newest_kept_model_loses_and_doubles_none(tmp_path: Path) -> None:
    """The newest checkpoints are damaged, so the run returns to step 4, before the kept models of steps 6 and 8."""
    make_trainer(tmp_path / "run", KEEPING).run()
    untouched = kept(tmp_path / "run")
    for step in (6, 8):
        (tmp_path / f"run/checkpoints/step-00000{step}/weights.safetensors").write_bytes(b"")
    resumed = make_trainer(tmp_path / "run", KEEPING, resume=True)
    with resumed:
        assert resumed.step_number == 4
        assert names(tmp_path / "run") == ["step-000000", "step-000003"]  # the others will be written again
    make_trainer(tmp_path / "run", KEEPING, resume=True).run()
    assert kept(tmp_path / "run") == untouched


def test_an_extended_run_keeps_the_model_of_its_earlier_end(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", KEEPING).run()
    before = kept(tmp_path / "run")
    longer = change(KEEPING, max_steps=10)
    make_trainer(tmp_path / "run", longer, resume=True, allow_changed="max_steps").run()
    assert names(tmp_path / "run")[3:] == ["step-000008", "step-000009", "step-000010"]
    after = kept(tmp_path / "run")
    assert before == {name: after[name] for name in before}


def test_a_run_from_before_the_option_resumes_and_can_begin_to_keep_models(tmp_path: Path) -> None:
    with make_trainer(tmp_path / "run", recipe={"text": "a"}) as trainer:
        context, snapshot = trainer.files.context(), trainer.snapshot()
    assert check_unchanged(snapshot, {**context, "recipe": {"text": "a", "keep_every": 0}}, ()) == []
    make_trainer(tmp_path / "run", overwrite=True).run()
    with pytest.raises(ValueError, match=r"keep_every was 0 and is 3 .*--allow_changed"):
        make_trainer(tmp_path / "run", KEEPING, resume=True).run()
    longer = change(KEEPING, max_steps=10)
    make_trainer(tmp_path / "run", longer, resume=True, allow_changed=["keep_every", "max_steps"]).run()
    assert names(tmp_path / "run") == ["step-000009", "step-000010"]


def test_overwriting_a_run_removes_its_history_and_mygpt_runs_ignores_it(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", KEEPING).run()
    assert list(find_runs(tmp_path)) == [tmp_path / "run"]
    assert summarize(tmp_path / "run").state == "finished"
    with pytest.raises(FileExistsError, match="is not empty"):
        make_trainer(tmp_path / "run").run()
    make_trainer(tmp_path / "run", overwrite=True).run()
    assert names(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["history", "history/step-000003"])
def test_the_history_is_never_written_through_a_link(name: str, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", KEEPING).run()
    (tmp_path / "run" / name).rename(tmp_path / "outside")
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.rglob("*"))
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=rf"{name} is a symbolic link to .*outside"):
            make_trainer(tmp_path / "run", KEEPING, **how).run()
    assert sorted(tmp_path.rglob("*")) == before


def fill_disk(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make writing the kept model of each of these steps fail after half of its file."""
    save = safetensors.torch.save_file

    def full(tensors: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        save(tensors, path, *arguments, **keywords)
        if any(f"history/.step-{step:06d}." in Path(path).as_posix() for step in steps):
            os.truncate(path, os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)


def test_a_full_disk_costs_only_the_models_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_trainer(tmp_path / "untouched", KEEPING).run()
    capsys.readouterr()
    fill_disk(monkeypatch, 0, 3)
    make_trainer(tmp_path / "run", KEEPING).run()
    assert names(tmp_path / "run") == ["step-000006", "step-000008"]
    errors = capsys.readouterr().err
    for step in (0, 3):
        assert f"the model of step {step} could not be kept: " in errors
    assert differences(remains(tmp_path / "run"), remains(tmp_path / "untouched")) == []


def test_a_last_model_that_cannot_be_kept_fails_the_run_and_is_kept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(tmp_path / "untouched", KEEPING).run()
    with monkeypatch.context() as patch:
        fill_disk(patch, 8)
        with pytest.raises(OSError, match=rf"No space left.*--resume {tmp_path / 'run'} completes the run"):
            make_trainer(tmp_path / "run", KEEPING).run()
    assert names(tmp_path / "run") == ["step-000000", "step-000003", "step-000006"]
    make_trainer(tmp_path / "run", KEEPING, resume=True).run()
    assert kept(tmp_path / "run") == kept(tmp_path / "untouched")


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_keeps_a_model_ends_like_an_untouched_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = [*RECIPES["adamw"].split(), "--keep_every", "5"]
    assert run(train_command(tmp_path / "text.txt", tmp_path / "untouched", *options)) == 0
    kills = [Kill("half_file", 3), Kill("rename", 1), Kill("step", 7)]  # the first two while step 0 is kept
    command = train_command(tmp_path / "text.txt", tmp_path / "killed", *options, "--resume", "auto")
    assert run_with_kills(command, kills) == 3
    assert names(tmp_path / "killed") == [f"step-{step:06d}" for step in (0, 5, 10, 15, 20, 24)]
    assert kept(tmp_path / "killed") == kept(tmp_path / "untouched")
    assert leftovers(tmp_path / "killed") == []
    assert differences(remains(tmp_path / "untouched"), remains(tmp_path / "killed")) == []


@pytest.mark.slow
def test_a_fine_tuning_keeps_adapters_and_a_classifier_keeps_classifiers(tmp_path: Path) -> None:
    options = ["--keep_every", "10", "--epochs", "1.5"]
    assert main([*finetune_command(tmp_path, tmp_path / "tuned", "--sample_every", "0"), *options]) == 0
    assert names(tmp_path / "tuned")[0] == "step-000000" and len(names(tmp_path / "tuned")) >= 2
    last = tmp_path / "tuned/history" / names(tmp_path / "tuned")[-1]
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(open_model(last)[0](ids), open_model(tmp_path / "base", adapter=last)[0](ids))
    assert not torch.equal(open_model(last)[0](ids), open_model(tmp_path / "base")[0](ids))
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    assert main([*classify_command(tmp_path, tmp_path / "classifier"), *options]) == 0
    last = tmp_path / "classifier/history" / names(tmp_path / "classifier")[-1]
    assert sorted(GPTForClassification.from_pretrained(last).labels) == ["a", "b", "c", "d"]


def run_of_ranks(directory: str) -> None:
    """Train with the weights divided among the ranks, and with a copy of the weights on each rank."""
    for parallel in ("fsdp", "ddp"):
        torch.manual_seed(1)
        config = TrainConfig(
            max_steps=4, batch_size=4, warmup_steps=1, checkpoint_every=2, keep_last=9, keep_every=2, parallel=parallel
        )
        model, run_dir = GPTModel(CONFIG), f"{directory}/{parallel}"
        Trainer(model, config, IDS[:2000], IDS[2000:2300], run_dir=run_dir, progress=False).run()


@pytest.mark.torchrun
@pytest.mark.slow
def test_two_ranks_keep_whole_models_with_the_weights_of_their_checkpoints(tmp_path: Path) -> None:
    run_on_ranks(2, run_of_ranks, str(tmp_path))
    for run_dir in (tmp_path / "fsdp", tmp_path / "ddp"):
        assert names(run_dir) == ["step-000000", "step-000002", "step-000004"]
        for name in names(run_dir):
            model = GPTModel.from_pretrained(run_dir / "history" / name)
            expected = read_snapshot(run_dir / "checkpoints" / name).weights
            assert all(torch.equal(tensor, expected[key]) for key, tensor in model.named_parameters())
            assert len(expected) == len(list(model.named_parameters()))


def test_a_trainer_without_a_directory_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(None, KEEPING, model=make_model()).run()
    assert list(tmp_path.iterdir()) == []
