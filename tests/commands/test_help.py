"""--help and --help-all of every command, and the errors for missing options."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from MyGPT import GPTConfig, SamplingConfig, TrainConfig
from MyGPT.cli import COMMANDS, main
from MyGPT.commands._help import GROUPS
from MyGPT.commands.plot import KINDS
from MyGPT.commands.train import HIDDEN
from MyGPT.finetuning.examples import ExampleOptions
from MyGPT.finetuning.lora import LoraOptions

MAX_LINES = 45
"""The lines of a large terminal. A page of --help may fill the terminal once."""
NAMES = [*COMMANDS, *(f"plot {kind}" for kind in KINDS)]
OPTION = re.compile(r"^  (?:-h, )?(--[\w.-]+)", re.M)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def page(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        main([*name.split(), option])
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_a_screen_and_mentions_the_options_that_it_hides(name: str, capsys: Any) -> None:
    short, full = page(name, "--help", capsys), page(name, "--help-all", capsys)
    assert short.startswith(f"usage: mygpt {name} ")
    assert len(short.splitlines()) <= MAX_LINES
    assert set(OPTION.findall(short)) <= set(OPTION.findall(full))
    hides = set(OPTION.findall(short)) < set(OPTION.findall(full))
    assert (f"mygpt {name} --help-all shows all" in short) == hides


@pytest.mark.parametrize("name", NAMES)
def test_help_reads_alike_in_every_command(name: str, capsys: Any) -> None:
    text = page(name, "--help-all", capsys)
    options = OPTION.findall(text)
    assert len(options) == len(set(options))
    for noise in ("Union", "subtypes", "type:", "null)", "Optional[", "ValueError"):
        assert noise not in text
    descriptions = [" ".join(part.split()) for part in re.split(r"^  \S.*?(?:  +|\n +)(?=\S)", text, flags=re.M)[1:]]
    assert len(descriptions) >= len(options)
    for description in descriptions:
        assert re.match(r"[A-Z]|gpt2, ", description), description
    assert re.search(rf"^Examples?:\n    mygpt {name} ", text, re.M)


@pytest.mark.parametrize("kind", [GPTConfig, TrainConfig])
def test_help_all_of_train_lists_every_field(kind: Any, capsys: Any) -> None:
    options = OPTION.findall(page("train", "--help-all", capsys))
    fields = [field.name for field in dataclasses.fields(kind) if field.name not in HIDDEN]
    assert set(options) >= {f"--{name}" for name in fields}
    assert "--vocab_size" not in options  # the tokenizer gives it


def test_every_option_of_the_long_pages_has_a_heading(capsys: Any) -> None:
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert len(grouped) == len(set(grouped))
    for kind in (GPTConfig, TrainConfig, SamplingConfig, ExampleOptions, LoraOptions):
        prefix = "lora." if kind is LoraOptions else ""
        assert {prefix + field.name for field in dataclasses.fields(kind)} - {*HIDDEN} <= set(grouped)
    for name in ("train", "finetune", "dpo", "classify", "generate", "chat"):
        text = page(name, "--help-all", capsys)
        assert "\nModel:\n" in text and "\nOther:\n" not in text


def test_choices_are_listed_once(capsys: Any) -> None:
    text = " ".join(page("train", "--help-all", capsys).split())
    assert text.count("{cosine,linear,constant,wsd}") == 1
    assert "'cosine'" not in text and "cosine, linear" not in text


def test_a_default_is_that_of_the_command(capsys: Any) -> None:
    """The defaults of `finetune` differ from those of TrainConfig, and a default of 0 is shown."""
    text = page("finetune", "--help-all", capsys)
    for option, default in {"batch_size": "8", "warmup_steps": "20", "weight_decay": "0.0", "keep_best": "0"}.items():
        assert re.search(rf"--{option} [A-Z]+\s[^-]*\(default: {re.escape(default)}\)", text), option
    assert "(default: [c_attn, c_proj, c_fc])" in text


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("finetune", "--model and --data"),
        ("dpo", "--model and --data"),
        ("classify", "--model"),
        ("generate", "--model"),
        ("chat", "--model"),
        ("evaluate", "--model and --data"),
        ("download", "MODELS"),
        ("prepare", "FILES and --out"),
        ("sweep", "RECIPE and --out"),
        ("info", "MODELS"),
        ("plot", "RUNS"),
        ("plot attention", "--model and --text"),
        ("explain", "TEXT and --model"),
    ],
)
def test_a_command_without_its_options_names_them_and_gives_an_example(name: str, missing: str, capsys: Any) -> None:
    """`mygpt train` and `mygpt finetune` without any argument once failed with a message about zip()."""
    assert main(name.split()) == 2
    error = capsys.readouterr().err
    assert f": missing {missing}; for example: mygpt {name} " in error
    assert error.endswith(f" (see mygpt {name} --help)\n") and error.count("\n") == 1


def test_train_needs_no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mygpt train` alone trains on the built-in text; the parser once failed before the command was called."""
    from MyGPT.commands import train

    called = []
    monkeypatch.setattr("MyGPT.commands._options.call", lambda command, options: called.append((command, options.data)))
    assert main(["train"]) == 0
    assert called == [(train.train, "alice")]
