"""Misspelt options, wrong values and unusable paths: one plain sentence, before anything is read or opened."""

from __future__ import annotations

import functools
import importlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from MyGPT import CharTokenizer, GPTConfig, GPTModel
from MyGPT.cli import COMMANDS, main
from MyGPT.commands._options import CommandParser, join_repeated, make_parser, texts_first
from MyGPT.commands.plot import KINDS

NAMES = [*COMMANDS, *(f"plot {kind}" for kind in KINDS)]
PYTHON_WORDS = re.compile(r"NoneType|\bNone\b|<class|Union|literal|Errno|yaml\.|Parser key|Expected|Traceback")
CONTROL = "\x1b\x9b\u202e\r\x07"


@functools.cache
def parser_of(name: str) -> CommandParser:
    command, _, kind = name.partition(" ")
    module = importlib.import_module(f"MyGPT.commands.{command}")
    return make_parser(name, module.KINDS[kind] if kind else getattr(module, command))


def options_of(parser: CommandParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--") and not option.endswith("+")]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr of a command that must fail with status 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mygpt") and error.endswith("\n") and error.count("\n") == 1, error
    assert not PYTHON_WORDS.search(error), error
    return error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model whose vocabulary consists of letters and of control characters."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    config = GPTConfig(9, 16, 8, 2, 1, 0.0)
    GPTModel(config).save_pretrained(directory, CharTokenizer(sorted("abc " + CONTROL)))
    return str(directory)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("train --lr 3", "--learning_rate"),
        ("train --LR 3", "--learning_rate"),
        ("train --batch 3", "--batch_size"),
        ("train --bs=3", "--batch_size"),
        ("train --epochs 3", "--max_steps"),
        ("train --max-iters 3", "--max_steps"),
        ("train --n_embd 3", "--emb_dim"),
        ("train --num_layers 3", "--n_layers"),
        ("train --block_size 3", "--context_length"),
        ("train --out_dir x", "--out"),
        ("train --dropout 0", "--drop_rate"),
        ("train --eval_interval 3", "--eval_every"),
        ("train --vocab_size 3", "--tokenizer_size"),
        ("train --learning_rat 3", "--learning_rate"),
        ("train -lr 3", "--learning_rate"),
        ("finetune --num_train_epochs 3", "--epochs"),
        ("finetune --max_steps 3", "--epochs"),
        ("finetune --lora_r 3", "--lora.r"),
        ("finetune --rank 3", "--lora.r"),
        ("finetune --lora.alhpa 3", "--lora.alpha"),
        ("generate --max_tokens 3", "--max_new_tokens"),
        ("generate --max_token 3", "--max_new_tokens"),
        ("generate --temp 3", "--temperature"),
        ("generate --modle x", "--model"),
        ("generate --model_name x", "--model"),
        ("generate --num_return_sequences 2", "--n_samples"),
        ("generate --repetition-penalti 2", "--repetition_penalty"),
        ("chat --system_prompt x", "--system"),
        ("evaluate --dataset x", "--data"),
        ("prepare x --num_proc 2", "--workers"),
        ("plot attention --prompt x", "--text"),
        ("bench --model_size x", "--size"),
        ("info gpt2 --hlep", "--help"),
        ("train --tokenizer bep", "bpe"),
        ("train --data tinyshakespear", "tinyshakespeare"),
        ("train --data shakespeare", "tinyshakespeare"),
        ("train --precision int9", ""),
        ("generate --model x --precision int9", "int8"),
        ("train --schedule cosin", "cosine"),
        ("train --optimizer adam", "adamw"),
        ("generate --model gpt-2", "gpt2"),
        ("generate --model GPT2-medum", "gpt2-medium"),
        ("info gpt2-small", "gpt2"),
        ("download 117M", "gpt2"),
        ("bench --size 1.5B", "gpt2-xl"),
        ("evaluate --model gpt2 --data alice --protocol wikitext-2", "wikitext2"),
        ("plot neighbors", "mygpt plot neighbours"),
        ("plot attn --model x", "mygpt plot attention"),
        ("plot logit_lens", "mygpt plot lens"),
        ("trian", "train"),
        ("fine-tune", "finetune"),
        ("eval", "evaluate"),
        ("sample", "generate"),
    ],
)
def test_the_nearest_name_is_suggested(arguments: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (f"did you mean {meant}?" in error_of(arguments.split(), capsys)) == bool(meant)


def test_a_key_of_a_recipe_and_of_a_config_is_suggested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("n_embd: 8\n", encoding="utf-8-sig")
    error = error_of(["train", "--config", str(tmp_path / "recipe.yaml")], capsys)
    assert "unknown option --n_embd; did you mean --emb_dim?" in error and "recipe.yaml" in error
    with pytest.raises(ValueError, match=r"unknown key 'n_layer' .*; did you mean n_layers"):
        GPTModel({"vocab_size": 9, "n_layer": 2})


def test_a_misspelt_path_is_suggested(in_tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp_path / "runs" / "book").mkdir(parents=True)
    (in_tmp_path / "story.txt").write_text("a")
    assert "did you mean runs/book?" in error_of("generate --model runs/bok".split(), capsys)
    assert "did you mean story.txt?" in error_of("train --data stroy.txt".split(), capsys)
    assert "did you mean story.txt?" in error_of(f"finetune --model {model} --data stori.txt".split(), capsys)


def required_arguments(parser: CommandParser) -> list[str]:
    """Return a value for each argument and each option that a command needs."""
    values = {"--format": "gguf"}
    listed = ["x" for action in parser._actions if not action.option_strings]
    return listed + [
        f"{option}={values.get(option, 'x')}"
        for option in options_of(parser)
        if parser._option_string_actions[option].required
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_repeated_list_option_adds_to_its_list(name: str) -> None:
    """argparse would keep only the last value. Any other option keeps it, as in argparse and click."""
    parser = parser_of(name)
    required = required_arguments(parser)
    for option in options_of(parser):
        if "list[" not in str(getattr(parser._option_string_actions[option], "_typehint", "")):
            continue
        arguments = [*(one for one in required if not one.startswith(f"{option}=")), option, "a=1,2"]
        once = parser.parse_args(join_repeated(arguments, parser))
        assert once.get(option[2:]) == "a=1,2"
        again = join_repeated([*arguments, f"{option}=[b, c]", option, "{d: 1}"], parser)
        assert parser.parse_args(again).get(option[2:]) == ["a=1,2", "b", "c", "{d: 1}"]
    assert join_repeated(["--out", "a", "--out", "b"], parser) == ["--out", "a", "--out", "b"]


@pytest.mark.parametrize("texts", [["[", "]"], ["null", "# x"], ["12", "1e400"], ["true", "{}"], ["\n", "\t "], ["😀", "\x7f"],
                                   ["\\", "\"'"], ["- a", "b: c"], ["[1, 2]", "[a"], ["*a", "&b"]])  # fmt: skip
def test_any_text_can_be_repeated(texts: list[str]) -> None:
    arguments = ["--model", "x", *(f"--stop={text}" for text in texts)]
    assert parser_of("generate").parse_args(join_repeated(arguments, parser_of("generate"))).stop == texts


def test_texts_may_stand_between_options() -> None:
    """argparse would refuse the second text, and read the first one as the value of --live."""
    parser = parser_of("explain")
    for arguments, expected in [
        ("--live a --k 3 b", "a b --live=true --k 3"),
        ("a --live false -5 --k=3 - b", "a -5 - b --live=false --k=3"),
        ("--out live --live", "--out live --live=true"),
        ("a --live --k 3 -- --live b", "--live=true --k 3 -- a --live b"),
        ("a --k", "a --k"),
        ("-h a", "a -h"),
    ]:
        assert texts_first(arguments.split(), parser) == expected.split()
    without_texts = ["--overwrite", "maybe", "x"]
    assert texts_first(without_texts, parser_of("train")) == without_texts


def test_a_repeated_option_keeps_its_place() -> None:
    """It overrides the file of --config if one of the options follows --config. Texts after -- are not options."""
    parser = parser_of("explain")
    assert join_repeated(["--data", "a", "--config", "c", "--data=b", "--", "--data", "c", "--data", "d"], parser) == [
        "--config", "c", '--data=["a", "b"]', "--", "--data", "c", "--data", "d",
    ]  # fmt: skip
    assert join_repeated(["--data", "a", "--config", "c", "--data"], parser) == ["--data=a", "--config", "c", "--data"]


@pytest.mark.parametrize("name", NAMES)
def test_abbreviated_options_are_refused(name: str) -> None:
    """argparse once accepted every unambiguous beginning of an option, such as --temp."""
    parser = parser_of(name)
    options = options_of(parser)
    for option in options:
        short = option[:-1]
        if short in options or len(short) < 5 or short.endswith("."):
            continue
        with pytest.raises(ValueError, match=f"unknown option {short}; did you mean .*{option}"):
            parser.refuse_unknown([short, "1"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_value_of_every_option_gives_a_plain_sentence(name: str) -> None:
    parser = parser_of(name)
    required = required_arguments(parser)
    shared: Any = parser_of("train")._option_string_actions
    wrong = ["abc", "", "1e400", "{a: 1}", "☃\u202e", "*a"]
    n_refused = 0
    for option in options_of(parser):
        action: Any = parser._option_string_actions[option]
        if not hasattr(action, "_typehint"):
            continue
        if name != "train" and option in shared and shared[option]._typehint == action._typehint:
            continue  # tested with mygpt train
        for value in wrong:
            arguments = [*required, f"{option}={value}"]
            try:
                parser.refuse_unknown(arguments)
                parser.parse_args(arguments)
            except ValueError as error:
                message = str(error)
                n_refused += 1
                assert message.startswith(f"{option} must be "), message
                assert not PYTHON_WORDS.search(message), message
                assert f"got {value!r}" in message, message
    assert n_refused or name in (
        "info",
        "doctor",
        "download",
        "explain",
        "plot",
        "plot lens",
        "plot schedule",
        "plot tokens",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --model x --stop=", "a stop text must have at least one character, got ['']"),
        ("generate --model x --stop ['']", "a stop text must have at least one character, got ['']"),
        ("generate --model x --seed abc", "--seed must be a whole number, got 'abc'"),
        ("generate --model x --seed 1e30", "--seed must be a whole number, got '1e30'"),
        (f"generate --model x --seed {10**30}", "seed must be a whole number from -2**63 to 2**64 - 1"),
        ("generate --model x --top_k many", "--top_k must be a whole number or null, got 'many'"),
        ("generate --model x --prompt --x", "--prompt needs a value; if --x is this value, write --prompt=--x"),
        ("generate --model x --temperature -inf", "--temperature needs a value; if -inf is this value"),
        ("generate --model", "--model needs a value"),
        ("generate --model x --config nowhere.yaml", "--config nowhere.yaml: there is no such file"),
        ("finetune --model x --data x --lora 4", "--lora must be a YAML file of options, got '4'"),
        ("train --config", "--config needs a value"),
        ("train --config=", "--config '': there is no such file"),
        ("train --config .", "--config .: it is a directory"),
        ("train --out=", "--out is empty"),
        ("train --data=", "--data is empty"),
        ("generate --model=", "--model is empty"),
        ("info x --config=", "--config '': there is no such file"),
        (f"train --seed {10**30}", "seed must be a whole number from -2**63 to 2**64 - 1"),
        (f"dpo --model x --data x --seed {10**30}", "seed must be a whole number from -2**63 to 2**64 - 1"),
        (f"chat --model x --seed {10**30}", "seed must be a whole number from -2**63 to 2**64 - 1"),
        (f"train --batch_size {10**30}", "batch_size must be at most 1,000,000,000,000"),
        ("train --batch_size 1000000000", "there is not enough memory"),
        ("train --context_length 1000000000", "there is not enough memory"),
        (f"prepare alice --out x --workers {10**30}", "workers must be at most 1024"),
        ("bench --threads -1", "threads must be a whole number from 0 to 1024"),
        (f"bench --threads {10**7}", "threads must be a whole number from 0 to 1024"),
        (f"bench --n_tokens {10**7}", "must be below the model's context of 1024"),
        ("classify --model gpt2 --text x", "gpt2 is not a classifier"),
        ("classify --model nowhere --text x", "no model at nowhere"),
        ("classify --model x --text=", "the text is empty"),
        ("classify --model x --file .", "it is a directory"),
        ("train a b", "unexpected argument 'a'"),
    ],
)
def test_wrong_values_are_explained(
    arguments: str, message: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(arguments.split(), capsys)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("generate --model {model} --top_p 2", "top_p"),
        ("generate --model {model} --max_new_tokens -1", "max_new_tokens"),
        ("generate --model {model} --n_samples 0", "n_samples"),
        ("generate --model {model} --prompt=", "prompt is empty"),
        ("generate --model {model} --device toaster", "toaster"),
        ("evaluate --model {model} --data alice --stride 0", "stride"),
        ("evaluate --model {model} --data alice --batch_size 0", "batch_size"),
        ("evaluate --model {model} --data nowhere", "nowhere"),
        ("explain abc --model {model} --out a.png", ".html"),
        ("explain abc --model {model} --out no/a.html", "there is no directory no"),
        ("plot attention --model {model} --text abc --out a.gif", ".png"),
        ("plot lens --model {model} --text abc --out no/a.png", "there is no directory no"),
        ("plot neighbours --model {model} --text abc --k 0", "k must be"),
        ("plot sampling --model {model} --text=", "empty"),
        ("plot tokens --text a --tokenizer {model} --out no/a.html", "there is no directory no"),
        ("finetune --model {model} --data nowhere.json --out new", "nowhere.json"),
        ("finetune --model {model} --data file --template alpac --out new", "alpaca"),
        ("finetune --model {model} --data file --train_fraction 2 --out new", "train_fraction"),
        ("finetune --model {model} --data file --split_seed -1 --out new", "seed"),
        ("finetune --model {model} --data file --out file", "file is not a directory"),
        ("train --data file --out file/run", "file is not a directory"),
        ("train --data file --out full", "full is not empty"),
        ("train --data file --tokenizer bep --out new", "bpe"),
        ("train --data file --tokenizer bpe --tokenizer_size 3 --out new", "tokenizer_size"),
        ("prepare file --tokenizer bep --out new", "bpe"),
        ("prepare file --workers 0 --out new", "workers"),
        ("prepare file --out full", "full is not empty"),
        ("prepare file --out file/new", "file is not a directory"),
        ("download gpt2 gpt-3", "gpt-3"),
        ("download gpt2 --out file", "file is not a directory"),
    ],
)
def test_all_options_are_checked_before_data_are_read_or_a_model_is_opened(
    arguments: str,
    word: str,
    model: str,
    in_tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (in_tmp_path / "file").write_text("abc")
    (in_tmp_path / "full").mkdir()
    (in_tmp_path / "full" / "thesis.txt").write_text("years")
    before = sorted(in_tmp_path.rglob("*"))

    def too_early(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("data are read, or a model is opened, before all options are checked")

    for place in ("MyGPT.model.GPTModel.from_pretrained", "MyGPT.opening.open_model", "MyGPT.commands.plot.open_model",
                  "MyGPT.commands.generate.open_lazily", "MyGPT.commands.chat.open_lazily", "MyGPT.data.sources.read_pieces",
                  "MyGPT.weights.pretrained.download_gpt2", "MyGPT.finetuning.examples.read_records"):  # fmt: skip
        monkeypatch.setattr(place, too_early)
    assert word in error_of(arguments.format(model=model).split(), capsys)
    assert sorted(in_tmp_path.rglob("*")) == before


@pytest.mark.parametrize("argument", ["prepare {} --out x", "info {}", "plot {}", "download {}"])
def test_an_empty_name_in_a_list_is_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["" if word == "{}" else word for word in argument.split()]
    assert " is empty: give a value" in error_of(arguments, capsys)


@pytest.mark.parametrize(
    ("keys", "own"),
    [("data: x", "train"), ("lora: {}", "finetune"), ("lora: {}\nbeta: 1", "dpo"), ("train_only: head", "classify")],
)
@pytest.mark.parametrize("command", ["train", "finetune", "dpo", "classify"])
def test_a_run_of_another_command_is_not_resumed(
    command: str, keys: str, own: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp_path / "run").mkdir()
    (in_tmp_path / "run" / "config.yaml").write_text(keys)
    if command != own:
        error = error_of([command, "--resume", "run"], capsys)
        assert f"run is a run of mygpt {own}: resume it with mygpt {own} --resume run" in error


@pytest.mark.parametrize("command", ["info", "plot schedule"])
def test_a_misspelt_key_of_a_recipe_is_refused(
    command: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp_path / "recipe.yaml").write_text("max_stepz: 3\ndata: alice\n")
    assert "unknown option 'max_stepz'; did you mean max_steps?" in error_of([*command.split(), "recipe.yaml"], capsys)


def test_sample_to_end_without_an_end_token_is_reported(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp_path / "text.txt").write_text("abc " * 100)
    assert main(["train", "--data", "text.txt", "--out", "run", "--sample_to_end", *RUN]) == 0
    assert "sample_to_end has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "is_said"), [("", True), ("--tokenizer chars", False), ("--tokenizer bpe", False),
                                                  ("--config run/config.yaml", False)])  # fmt: skip
def test_a_missing_end_token_is_said_to_those_who_did_not_choose_it(
    options: str, is_said: bool, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe of the quick start names the tokenizer, and so does the recipe that a run stores."""
    (in_tmp_path / "text.txt").write_text("abc " * 100)
    if "config" in options:
        assert main(["train", "--data", "text.txt", "--out", "run", *RUN]) == 0
        capsys.readouterr()
    assert main(["train", *options.split(), "--data", "text.txt", "--out", "other", *RUN]) == 0
    assert ("which mygpt finetune and dpo need" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("name", list(COMMANDS))
def test_ctrl_c_prints_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("MyGPT.cli.run_command", interrupt)
    assert main([name]) == 130
    assert capsys.readouterr().err == f"mygpt {name}: interrupted\n"


class FakeTerminal(io.TextIOWrapper):
    """A stream with an encoding that claims to be a terminal, or not, and keeps what was written to it."""

    def __init__(self, encoding: str, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding, newline="\n")
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def text(self) -> str:
        self.flush()
        data: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return data.decode(self.encoding)


RUN = "--context_length 8 --emb_dim 8 --n_heads 2 --n_layers 1 --max_steps 2 --eval_every 1 --sample_every 1".split()
RUN += ["--sample_tokens", "20", "--eval_windows", "2", "--sample_temperature", "5"]


def commands_with_hostile_text(model: str, directory: Path) -> dict[str, list[str]]:
    from safetensors.torch import save_file

    weights = dict(GPTModel.from_pretrained(model).state_dict())
    save_file(
        {f"{name}{CONTROL}": tensor.contiguous().clone() for name, tensor in weights.items()},
        directory / "names.safetensors",
    )
    (directory / "text.txt").write_text(f"abc{CONTROL} " * 40, newline="")
    (directory / f"recipe{CONTROL}.yaml").write_text('"max_steps\\e[2J": 3\n')
    return {
        "generate": ["generate", "--model", model, "--max_new_tokens", "40", "--temperature", "9", "--seed", "1"],
        "train": ["train", "--data", str(directory / "text.txt"), "--out", str(directory / f"run{CONTROL}"), *RUN],
        "evaluate": ["evaluate", "--model", model, "--data", str(directory / "text.txt")],
        "info": ["info", str(directory / "names.safetensors")],
        "recipe": ["train", "--config", str(directory / f"recipe{CONTROL}.yaml")],
        "path": ["generate", "--model", f"no{CONTROL}where"],
        "value": ["generate", "--model", model, f"--top_k=a{CONTROL}"],
        "option": ["generate", "--model", model, f"--top{CONTROL}k"],
        "command": [f"tr{CONTROL}ain"],
        "tokenizer": ["prepare", "alice", "--tokenizer", f"bpe{CONTROL}", "--out", "x"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["generate", "train", "evaluate", "info", "recipe", "path", "value", "option", "command", "tokenizer"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_control_character_reaches_the_terminal_in_any_encoding(
    name: str, encoding: str, model: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = commands_with_hostile_text(model, in_tmp_path)[name]
    out, err = FakeTerminal(encoding, True), FakeTerminal(encoding, True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(arguments) in (0, 2)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out.text())
    assert not re.search("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", err.text().replace("\x1b[A", ""))
    assert "\\x1b" in out.text() + err.text() or name == "evaluate"


def test_a_pipe_keeps_the_bytes_of_the_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = FakeTerminal("utf-8", False)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "--model", model, "--max_new_tokens", "60", "--temperature", "9", "--seed", "1"]) == 0
    assert set(CONTROL) & set(out.text()) and "\\x" not in out.text()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_run_survives_an_encoding_without_the_replacement_character(
    encoding: str, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte-level sample contains U+FFFD, which once ended the run, and the resumed run too."""
    (in_tmp_path / "text.txt").write_text("é☃ü" * 200, encoding="utf-8")
    out = FakeTerminal(encoding, False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", FakeTerminal(encoding, False))
    bpe = ["--tokenizer", "bpe", "--tokenizer_size", "260", "--checkpoint_every", "1"]
    assert main(["train", "--data", "text.txt", "--out", "run", *bpe, *RUN]) == 0
    assert main(["train", "--resume", "run", "--max_steps", "3", "--allow_changed", "max_steps"]) == 0
    assert out.text().count("--- sample at step") == 3
    assert "\ufffd" in (in_tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    assert main(["generate", "--model", "run", "--max_new_tokens", "20", "--temperature", "5"]) == 0


def test_a_hint_can_be_copied(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    assert main(["train", "--data", "alice", "--out", "my run's", *RUN, "--val_fraction", "0.01"]) == 0
    hint = capsys.readouterr().out.splitlines()[-1].partition("try: ")[2]
    assert main([*shlex.split(hint)[1:], "--max_new_tokens", "1"]) == 0


def test_allow_changed_names_an_option(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp_path / "run").mkdir()
    (in_tmp_path / "run" / "config.yaml").write_text("max_steps: 2\nlearning_rate: 1.0\n")
    error = error_of("train --resume run --allow_changed lr".split(), capsys)
    assert "--allow_changed lr names no option of the run in run; did you mean learning_rate?" in error
    error = error_of("train --resume run --allow_changed lr --allow_changed max_steps".split(), capsys)
    assert "--allow_changed lr names no option of the run in run" in error
