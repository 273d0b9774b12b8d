"""`mygpt pack`, and the commands that use the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import lively_model
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.kernel import Build
from MyGPT.cli import main
from MyGPT.config import GPTConfig
from MyGPT.tokenizers import CharTokenizer

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
TEXT = "the cat sat by the fire and thought about it"


@pytest.fixture
def directory(tmp_path: Path, capsys: Any) -> Path:
    if find_compiler() is not None:
        Build().wait()
        capsys.readouterr()  # the first test compiles the kernel, which prints a line
    tokenizer = CharTokenizer.from_text(TEXT)
    config = GPTConfig(tokenizer.n_vocab, 32, 24, 3, 2, 0.0)
    lively_model(config).save_pretrained(tmp_path / "model", tokenizer)
    return tmp_path / "model"


def generated(directory: Path, capsys: Any, *more: str) -> tuple[str, str]:
    options = ["--prompt", "the cat", "--max_new_tokens", "12", "--seed", "3", "--device", "cpu", *more]
    assert main(["generate", "--model", str(directory), *options]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


@needs_compiler
@pytest.mark.parametrize(("options", "precision"), [([], "fp32"), (["--precision", "int8"], "int8")])
def test_generation_uses_the_file_and_gives_the_same_text(
    options: list[str], precision: str, directory: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generated(directory, capsys, *options)
    assert main(["pack", "--model", str(directory), *options]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == directory
    assert path.name.startswith(f"model.safetensors.{precision}-")
    from MyGPT.acceleration import packed

    # Nothing is packed again.
    monkeypatch.setattr(packed.PanelLinear, "_pack", lambda *_: pytest.fail("the weights are packed again"))
    assert generated(directory, capsys, *options) == expected


@needs_compiler
def test_a_damaged_file_is_named_in_one_line(directory: Path, capsys: Any) -> None:
    expected, _ = generated(directory, capsys)
    main(["pack", "--model", str(directory)])
    path = Path(capsys.readouterr().out.strip())
    path.write_bytes(path.read_bytes()[:-4])
    text, error = generated(directory, capsys)
    assert text == expected
    reason = "it is damaged: its header does not describe its content"
    assert error == f"{path} is not used: {reason}; mygpt pack writes a new one\n"


def test_without_a_compiler_nothing_is_packed(
    directory: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    before = sorted(directory.iterdir())
    assert main(["pack", "--model", str(directory)]) == 2
    assert capsys.readouterr().err == "mygpt pack: there is no C++ compiler (no-such-compiler)\n"
    assert sorted(directory.iterdir()) == before


@needs_compiler
def test_a_missing_model_is_named(capsys: Any, tmp_path: Path) -> None:
    assert main(["pack", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"mygpt pack: no model at {tmp_path / 'none'}")


@needs_compiler
def test_an_adapter_is_refused(directory: Path, capsys: Any) -> None:
    adapter = directory.parent / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(directory), "peft_type": "LORA", "r": 4, "target_modules": ["c_attn"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert main(["pack", "--model", str(adapter)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"mygpt pack: {adapter} is a LoRA adapter, and mygpt pack needs a complete model: "
        "train it with --merge to get a complete model\n"
    )


@needs_compiler
def test_int4_weights_are_calibrated_with_a_text(directory: Path, capsys: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 9)
    written = []
    for options in ([], ["--calibrate", str(text)]):
        assert main(["pack", "--model", str(directory), "--precision", "int4", *options]) == 0
        written.append(Path(capsys.readouterr().out.strip()).read_bytes())
    assert written[0] != written[1] and len(written[0]) == len(written[1])
    out, err = generated(directory, capsys, "--precision", "int4")
    assert out and not err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "int8", "--calibrate", "alice"], "--calibrate is for --precision int4, got int8: leave out"),
        (["--precision", "int4", "--calibrate", "empty.txt"], "empty.txt contains no tokens: give a text"),
        (["--precision", "int4", "--calibrate", "none.txt"], "none.txt"),
    ],
)
def test_a_calibration_that_is_impossible_is_one_line(
    options: list[str], words: str, directory: Path, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    assert main(["pack", "--model", str(directory), *options]) == 2
    assert words in capsys.readouterr().err
