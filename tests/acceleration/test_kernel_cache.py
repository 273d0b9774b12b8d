"""The compiled kernel's cache: what other users could have written, or is damaged, is never loaded."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import lively_model
from MyGPT.acceleration import compiler, kernel
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.kernel import Build
from MyGPT.acceleration.step import accelerate
from MyGPT.cli import main
from MyGPT.config import GPTConfig
from MyGPT.download import cache_directory
from MyGPT.generation import generate
from MyGPT.model import GPTModel
from MyGPT.tokenizers import CharTokenizer

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes of files")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the compiled kernel. Tests copy it."""
    place = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYGPT_CACHE", str(place))
        Build().wait()
    return place


@pytest.fixture
def cache(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(compiled, tmp_path / "cache")
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def umask_002() -> Iterator[None]:
    """The umask of systems whose users have groups of their own."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def library(cache: Path) -> Path:
    (path,) = (cache / "kernels").glob("*.so")
    return path


# What is in the cache


@needs_compiler
@posix
def test_the_kernel_is_stored_for_its_user_alone_with_its_length_and_hash(cache: Path) -> None:
    path = library(cache)
    assert stat.S_IMODE((cache / "kernels").stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert json.loads(path.with_suffix(".json").read_text()) == {"bytes": path.stat().st_size, "sha256": digest}
    assert Build().compiler is None


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_record(path: Path) -> None:
    path.with_suffix(".json").write_text('{"bytes": 1, "sha256": []}')


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: list[Any] = [
    replace_by_pipe, lambda path: replace_by_pipe(path.with_suffix(".json")),
    cut, flip, replace_record, Path.unlink, lambda path: os.truncate(path, 0), lambda path: path.write_bytes(b"x" * 99),
    lambda path: path.with_suffix(".json").unlink(), lambda path: cut(path.with_suffix(".json")),
    lambda path: path.chmod(0o666), lambda path: path.with_suffix(".json").chmod(0o620), lambda path: path.chmod(0o602),
]  # fmt: skip


@needs_compiler
@posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_shared_file_is_not_loaded_but_compiled_again(
    damage: Any, umask_002: None, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A truncated file ended every later `generate` with a bus error."""
    path, content = library(cache), library(cache).read_bytes()
    (tmp_path / "kernel").write_bytes(content)
    copying = script(tmp_path, 'for last; do :; done; cp "$PLACE/kernel" "$last"')
    damage(path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setattr(compiler, "find_compiler", lambda: str(copying))
    monkeypatch.setattr(compiler, "_cache_key", lambda source: path.stem.removeprefix("kernel-"))
    build = Build()
    assert build.compiler is not None
    assert build.wait().panel in kernel.PANELS
    assert path.read_bytes() == content
    assert Build().compiler is None
    assert len(list((cache / "kernels").iterdir())) == 2


def script(place: Path, text: str) -> Path:
    path = place / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_compiler
@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
def test_nothing_is_loaded_from_a_directory_in_which_others_write(
    mode: int, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "kernels").chmod(mode)
    model = tiny()
    fast = accelerate(model)
    error = capsys.readouterr().err
    assert f"no compiled code is loaded from {cache / 'kernels'}, because another user owns it or can write" in error
    assert "generating with torch's operators" in error and len(error.splitlines()) == 1
    ids = torch.tensor([[1, 2]])
    assert torch.equal(generate(fast, ids, 5), generate(model, ids, 5))


@needs_compiler
@posix
def test_a_directory_that_is_a_link_is_named_as_one(cache: Path) -> None:
    (cache / "kernels").rename(cache / "elsewhere")
    (cache / "kernels").symlink_to(cache / "elsewhere")
    with pytest.raises(OSError, match=r"no compiled code is loaded from .*, because it is a symbolic link: remove it"):
        Build()


@posix
def test_a_cache_that_cannot_be_created_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(compiler, "find_compiler", lambda: "c++")
    with pytest.raises(OSError, match=r"the cache for the compiled kernel cannot be created: .*file: (File|Not a)"):
        Build()


@needs_compiler
@posix
@pytest.mark.parametrize("what", ["directory", "file", "record"])
def test_files_of_another_user_are_not_loaded(what: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library(cache)
    foreign = {"directory": path.parent, "file": path, "record": path.with_suffix(".json")}[what]
    lstat = os.lstat

    def owned_by_another(name: Any, **options: Any) -> Any:
        found = lstat(name, **options)
        return os.stat_result((*found[:4], found.st_uid + (Path(name) == foreign), *found[5:]))

    monkeypatch.setattr(compiler.os, "lstat", owned_by_another)
    if what == "directory":
        with pytest.raises(OSError, match="another user owns it"):
            Build()
    else:
        assert Build().compiler is not None


@needs_compiler
@posix
def test_a_link_in_the_cache_is_not_followed(cache: Path, tmp_path: Path) -> None:
    path = library(cache)
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    assert Build().compiler is not None


@needs_compiler
@posix
def test_a_read_only_cache_with_a_kernel_is_used(cache: Path) -> None:
    (cache / "kernels").chmod(0o500)
    try:
        assert Build().wait().panel in kernel.PANELS
    finally:
        (cache / "kernels").chmod(0o700)


@pytest.mark.slow
@needs_compiler
def test_processes_that_compile_at_the_same_time_leave_one_kernel(tmp_path: Path) -> None:
    code = "from MyGPT.acceleration.kernel import Build; print(Build().wait().panel)"
    environment = {**os.environ, "MYGPT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    panels = {process.communicate(timeout=120)[0] for process in processes}
    assert len(panels) == 1 and int(panels.pop()) in kernel.PANELS
    assert sorted(path.suffix for path in (tmp_path / "kernels").iterdir()) == [".json", ".so"]


# Compilers that fail


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exit 0", "No such file"),
        ('for last; do :; done; echo no kernel > "$last"', "file too short|invalid ELF"),
        ('for last; do :; done; : > "$last"', "file too short"),
        ("exit 1", "could not compile the kernel: exit status 1"),
        ("kill -9 $$", "could not compile the kernel: exit status -9"),
        ("printf '\\377\\376 error: x' >&2; exit 1", "error: x"),
        ("sleep 60", "did not compile the kernel within 1 seconds"),
        ("sleep 60 & sleep 60", "did not compile the kernel within 1 seconds"),
    ],
)
def test_a_compiler_that_fails_hangs_or_writes_something_else_costs_speed_only(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script(tmp_path, text)))
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1 if "sleep" in text else 60)
    build, began = Build(), time.monotonic()
    for _ in range(2):  # the second call gives the same error
        with pytest.raises(OSError, match=words):
            build.wait()
    assert time.monotonic() - began < 30
    assert list((tmp_path / "cache/kernels").iterdir()) == []


@posix
def test_another_library_is_not_taken_for_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that lacks the kernel's functions ended in an AttributeError."""
    import _ctypes

    other = getattr(_ctypes, "__file__", None)
    if other is None:
        pytest.skip("no other library is at hand")
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script(tmp_path, f'for last; do :; done; cp "{other}" "$last"')))
    with pytest.raises(OSError, match="is not the compiled kernel: it lacks gpt2_panel"):
        Build().wait()


@posix
def test_a_full_disk_costs_speed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import errno

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(Build, "_open", lambda build, path: "a kernel")
    monkeypatch.setenv("CXX", str(script(tmp_path, 'for last; do :; done; echo x > "$last"')))
    monkeypatch.setattr(compiler.os, "fsync", full)
    accelerate(tiny())
    assert "No space left on device; generating with torch's operators" in capsys.readouterr().err
    assert list((tmp_path / "kernels").iterdir()) == []


@posix
def test_the_next_compilation_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    (tmp_path / "kernels").mkdir(mode=0o700)
    for name, age in (("kernel-0.so.1", 10**6), ("kernel-0.so.2", 0)):
        (tmp_path / "kernels" / name).write_text("half")
        os.utime(tmp_path / "kernels" / name, (time.time() - age,) * 2)
    Build()
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["kernel-0.so.2"]


# Where the cache is


@pytest.mark.parametrize("value", ["", "relative/cache", ".", None])
def test_an_empty_or_relative_xdg_cache_home_is_ignored(
    value: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The XDG Base Directory Specification: "All paths must be absolute", and an empty variable is not set."""
    monkeypatch.delenv("MYGPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_directory() == tmp_path / ".cache/mygpt"


def test_the_variables_of_the_cache_are_used_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.setenv("MYGPT_CACHE", "")
    assert cache_directory() == tmp_path / "mygpt"
    monkeypatch.setenv("MYGPT_CACHE", "models")
    with pytest.raises(ValueError, match="MYGPT_CACHE must be an absolute path, got 'models': write /"):
        cache_directory()


# Every precision of an opened model


def tiny(**changes: Any) -> GPTModel:
    sizes = {"vocab_size": 27, "context_length": 32, "emb_dim": 64, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
    return lively_model(GPTConfig(**{**sizes, **changes}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of three models: one in float32, the same in bf16, and one with a width that int8 kernels lack."""
    place = tmp_path_factory.mktemp("models")
    coder = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz ")
    tiny().save_pretrained(place / "directory", coder)
    tiny(emb_dim=40, tie_weights=False).save_pretrained(place / "odd", coder)
    GPTModel.from_pretrained(place / "directory").bfloat16().save_pretrained(place / "bf16", coder)
    return {name: place / name for name in ("directory", "odd", "bf16")}


def without_compiler(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    if how == "PATH":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", how)


@pytest.mark.parametrize("how", ["/bin/false", "PATH"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["directory", "odd", "bf16"])
def test_without_a_compiler_an_opened_model_generates_in_every_precision(
    name: str, precision: Any, how: str, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of an opened model are transposed views of its file, which torch's int8 operator refuses."""
    without_compiler(how, tmp_path, monkeypatch)
    model = GPTModel.from_pretrained(saved[name])
    in_memory = GPTModel(model.config)
    in_memory.load_state_dict(model.state_dict())
    ids = torch.randint(0, 27, (2, 6))
    found = generate(accelerate(model, precision), ids, 20)
    assert torch.equal(
        found, generate(accelerate(in_memory.to(model.transformer.wte.weight.dtype), precision), ids, 20)
    )


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["directory", "odd", "bf16"])
def test_ids_without_a_compiler_are_the_kernels(name: str, precision: Any, saved: dict[str, Path], cache: Path) -> None:
    """torch rounds activations to bf16, so the ids agree as far as two different roundings can: in these texts fully.

    With int4, the kernel rounds activations to 8 bits; test_int4.py compares its products with those of float64.
    """
    model = GPTModel.from_pretrained(saved[name])
    ids = torch.arange(8)[:, None] + torch.arange(5)
    plain, fast = (generate(accelerate(model, precision, compiled=it), ids, 3) for it in (False, True))
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int8", "int4"])
def test_commands_work_in_every_precision_without_a_compiler(
    command: str, precision: str, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import io

    without_compiler("/bin/false", tmp_path, monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    arguments = [command, "--model", str(saved["directory"]), "--precision", precision, "--max_new_tokens", "4"]
    arguments += ["--device", "cpu", *(["--prompt", "abc"] if command == "generate" else [])]
    status = main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "contiguous" not in captured.err
    if command == "generate":
        assert status == 0 and captured.out.startswith("abc")
