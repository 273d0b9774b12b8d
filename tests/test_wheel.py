"""The wheel holds everything that MyGPT needs outside this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from places import ROOT

PACKAGE = ROOT / "src" / "MyGPT"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the paths of this checkout and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build_wheel(directory: Path) -> Path:
    """Build the wheel from a copy, since setuptools writes into the source tree, and without the network."""
    source = directory / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", directory]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, source, cwd=directory)
    return next(directory.glob("*.whl"))


def make_environment(directory: Path, wheel: Path) -> Path:
    """Install the wheel alone in a fresh environment, which finds its dependencies among the packages of this one."""
    venv.create(directory, with_pip=False)
    scripts = directory / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / f"python{'.exe' if os.name == 'nt' else ''}"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=directory,
    )
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


@pytest.mark.slow
def test_the_installed_wheel_trains_and_generates_outside_the_checkout(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT / "src").as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert {name for name in sources if "__pycache__" not in name} | {"gpt_download3.py"} <= packed

    scripts = make_environment(tmp_path / "environment", wheel)
    where = run(scripts / "python", "-c", "import MyGPT, gpt_download3; print(MyGPT.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    sizes = "--context_length 16 --emb_dim 16 --n_heads 2 --n_layers 1 --batch_size 2 --eval_windows 4".split()
    run(scripts / "mygpt", "train", "--data", "alice", "--max_steps", "3", *sizes, "--out", "run", cwd=tmp_path)
    text = run(
        scripts / "mygpt", "generate", "--model", "run", "--prompt", "Alice", "--max_new_tokens", "5", cwd=tmp_path
    )
    assert text.startswith("Alice") and len(text.rstrip("\n")) >= 6
