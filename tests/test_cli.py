"""The command line: what each command does, and one clear line for each error of a user."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from MyGPT import GPT2_CONFIGS, GPTModel, generate, load_tokenizer
from MyGPT.cli import COMMANDS, main

TINY = "--context_length 16 --emb_dim 16 --n_heads 2 --n_layers 1 --max_steps 4 --eval_every 2 --sample_every 2".split()
TINY += ["--sample_tokens", "5", "--log_every", "1", "--eval_windows", "4"]
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a trained run. Tests share the directory and must not write to it."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "book.txt").write_text(TEXT)
    assert main(["train", "--data", str(directory / "book.txt"), "--out", str(directory / "run"), *TINY]) == 0
    return directory / "run"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr of a command that must fail with status 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mygpt")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.slow
def test_training_leaves_a_run_that_generates(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "metrics.jsonl", "model", "checkpoints", "loss.png", "samples.txt"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        main(["generate", "--model", str(run), "--prompt", "It was", "--max_new_tokens", "20", "--temperature", "0"])
        == 0
    )
    printed = capsys.readouterr().out
    model, tokenizer = GPTModel.from_pretrained(run), load_tokenizer(run / "model")
    import torch

    expected = generate(model, torch.tensor([tokenizer.encode("It was")]), 20)
    assert printed == tokenizer.decode(expected[0].tolist()) + "\n"


@pytest.mark.slow
def test_config_yaml_is_all_that_is_needed_to_run_it_again(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(again)]) == 0
    assert (again / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert (again / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()

    def losses(directory: Path) -> list[float]:
        records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    assert losses(again) == losses(run)


def test_options_after_a_yaml_file_win_and_print_config_writes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("max_steps: 7\nlearning_rate: 1.0e-2\n")
    with pytest.raises(SystemExit) as done:
        main(["train", "--config", str(tmp_path / "mine.yaml"), "--max_steps", "9", "--print_config"])
    assert done.value.code == 0
    written = yaml.safe_load(capsys.readouterr().out)
    assert (written["max_steps"], written["learning_rate"], written["emb_dim"]) == (9, 0.01, 128)


def test_options_may_be_written_with_hyphens_and_flags_without_a_value(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["generate", "--model", str(run), "--prompt=It was", "--top_k=1"]
    assert main([*plain, "--max_new_tokens", "5", "--slide", "true"]) == 0
    first = capsys.readouterr().out
    assert main([*plain, "--max-new-tokens", "5", "--slide"]) == 0
    assert capsys.readouterr().out == first


def test_help_and_version_answer_without_importing_torch() -> None:
    code = (
        "import sys; from MyGPT.cli import main; main(['--help']); main(['--version']); "
        "heavy = {'torch', 'numpy', 'jsonargparse', 'tiktoken'} & set(sys.modules); assert not heavy, heavy"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(command in printed for command in COMMANDS)


def test_samples_are_repeatable_and_differ_from_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        main(["generate", "--model", str(run), "--n_samples", "2", "--seed", "7", "--max_new_tokens", "30"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    first, second = outputs[0].split("\n---\n")
    assert first != second


def test_a_prompt_from_standard_input_and_a_stop(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("April"))
    main(["generate", "--model", str(run), "--prompt", "-", "--seed", "1", "--max_new_tokens", "80", "--stop", '[" "]'])
    printed = capsys.readouterr().out
    assert printed.startswith("April")
    assert " " not in printed


@pytest.mark.slow
def test_prepared_data_train_like_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    files = [str(tmp_path / "*.gz"), str(tmp_path / "b.jsonl")]
    prepared = str(tmp_path / "tokens")
    options = ["--tokenizer", "bpe", "--tokenizer_size", "300"]
    assert main(["prepare", *files, "--out", prepared, "--workers", "1", *options]) == 0
    assert "2 documents" in capsys.readouterr().out
    assert main(["train", "--data", prepared, "--out", str(tmp_path / "one"), *TINY]) == 0
    both = json.dumps(files)
    assert main(["train", "--data", both, "--out", str(tmp_path / "two"), *options, *TINY]) == 0
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_plot_and_info(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), str(run), "--out", str(tmp_path / "both.svg")]) == 0
    assert "<svg" in (tmp_path / "both.svg").read_text()
    assert main(["info", "gpt2", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "124,439,808" in printed
    assert f"{GPTModel.from_pretrained(run).num_parameters():,}" in printed
    assert set(GPT2_CONFIGS) >= {"124M", "gpt2"}


@pytest.mark.slow
def test_ctrl_c_saves_the_model_and_says_where(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "MyGPT", "train", "--out", str(tmp_path / "run"), *TINY]
    command[command.index("--max_steps") + 1] = "100000"
    command[command.index("--eval_every") + 1] = "100000"
    command[command.index("--sample_every") + 1] = "0"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"is in {tmp_path / 'run' / 'model'}" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert GPTModel.from_pretrained(tmp_path / "run").num_parameters() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere.txt"], ["no text 'nowhere.txt'", "alice", "tinyshakespeare"]),
        (["--data", "{tmp}"], ["is a directory"]),
        (["--data", "{tmp}/*.nothing"], ["no file matches"]),
        (["--data", "{tmp}/empty.txt"], ["hold no text", "empty.txt"]),
        (["--data", "{tmp}/short.txt"], ["5 tokens", "16 tokens and its targets need 17"]),
        (["--data", "{tmp}/binary.bin"], ["binary.bin", "not UTF-8", "byte 0 is 0xff"]),
        (["--data", "{tmp}/nul.txt"], ["nul.txt", "binary file"]),
        (["--data", "{tmp}/bad.jsonl"], ["bad.jsonl, line 2", "'text'"]),
        (["--tokenizer", "klingon"], ["no tokenizer 'klingon'", "gpt2"]),
        (["--tokenizer", "bpe", "--tokenizer_size", "200"], ["vocab_size", "200", "257"]),
        (["--val_fraction", "1"], ["val_fraction", "1"]),
        (["--n_heads", "5"], ["emb_dim must be divisible by n_heads", "16 and 5"]),
        (["--emb_dim", "0"], ["emb_dim", "at least 1", "got 0"]),
        (["--emb_dim", "wide"], ["emb_dim must be a whole number, got 'wide'"]),
        (["--drop_rate", "1"], ["drop_rate", "1"]),
        (["--max_steps", "-3"], ["max_steps", "-3"]),
        (["--learning_rate", "nan"], ["learning_rate", "nan"]),
        (["--schedule", "sine"], ["schedule must be cosine, linear, constant or wsd, got 'sine'"]),
        (["--colour", "red"], ["unknown option --colour (see mygpt train --help)"]),
        (["--max-stepz", "3"], ["unknown option --max-stepz; did you mean --max_steps?"]),
        (["colour"], ["unexpected argument 'colour'"]),
        (["--max_steps"], ["--max_steps needs a value"]),
        (["--tie_weights", "maybe"], ["tie_weights must be true or false, got 'maybe'"]),
        (["--config", "{tmp}/wrong.yaml"], ["unknown option --max_stepz; did you mean --max_steps?", "wrong.yaml"]),
        (["--config", "{tmp}/list.yaml"], ["list.yaml is not a recipe: it has no keys"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--device", "cuda"], ["'cuda' is not available"]),
        (["--device", "toaster"], ["'toaster' is not available", "cpu"]),
        (["--sample_prompt", "\u2603"], ["'\u2603'", "not in the vocabulary"]),
        (["--out", "{tmp}/empty.txt/run"], ["empty.txt"]),
        (["--out", "{tmp}"], ["is not empty", "--overwrite"]),
    ],
)
def test_what_a_user_can_get_wrong_in_training_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("12345")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (tmp_path / "wrong.yaml").write_text("max_stepz: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    before = sorted(tmp_path.rglob("*"))
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    if options[0] == "--data" and "short" in options[1]:
        options += ["--val_fraction", "0"]
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    line = error_of(["train", *TINY, *options, *out], capsys)
    for word in words:
        assert word in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], ["temperature", "-1", "at least 0"]),
        (["--top_k", "0"], ["top_k", "0", "at least 1"]),
        (["--top_p", "0"], ["top_p", "0", "at most 1"]),
        (["--top_p", "1.5"], ["top_p", "1.5", "at most 1"]),
        (["--min_p", "2"], ["min_p", "2"]),
        (["--repetition_penalty", "0"], ["repetition_penalty", "0"]),
        (["--max_new_tokens", "-1"], ["max_new_tokens", "-1"]),
        (["--n_samples", "0"], ["n_samples", "0"]),
        (["--prompt", "It was a bright cold day"], ["24 tokens", "context is 16", "--slide"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "\u2603"], ["not in the vocabulary"]),
        (["--model", "nowhere"], ["no model at nowhere"]),
    ],
)
def test_what_a_user_can_get_wrong_in_generating_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    line = error_of(["generate", "--model", str(run), *options], capsys)
    for word in words:
        assert word in line


def test_a_long_prompt_can_be_allowed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "It was a bright cold day"
    arguments = ["generate", "--model", str(run), "--prompt", prompt, "--slide", "true", "--max_new_tokens", "3"]
    assert main(arguments) == 0
    assert len(capsys.readouterr().out) == len(prompt) + 3 + 1


def test_other_errors_are_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'fly'; the commands are train, finetune," in error_of(["fly"], capsys)
    assert "unknown command 'trian'; did you mean train?" in error_of(["trian"], capsys)
    assert "nowhere" in error_of(["plot", "nowhere"], capsys)
    assert "runs" in error_of(["plot"], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "llama" in error_of(["info", str(tmp_path)], capsys)
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    line = error_of(["prepare", str(tmp_path / "book.txt"), "--out", str(tmp_path / "full")], capsys)
    assert "not empty" in line
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_the_old_model(tmp_path: Path) -> None:
    """A limit on the size of files replaces the full disk: a write fails in the same way, in the middle of a file."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); from MyGPT.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "train", *TINY, "--emb_dim", "64", "--out", str(tmp_path / "run")]
    # Coverage would fail to write its own file under the limit.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mygpt train: cannot write") and "weights.safetensors" in last
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".process", "config.yaml", "checkpoints"}
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYGPT_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main(["fly"])
