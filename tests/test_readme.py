"""Every code block of the README runs, in order, in one directory, as a reader would run them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from MyGPT.cli import main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
# Training commands are cut to a few steps; everything else runs as it stands.
SHORT = "--max_steps 3 --warmup_steps 1 --eval_every 2 --eval_windows 4 --sample_every 2 --sample_tokens 5".split()


@pytest.mark.slow
def test_every_block_runs(in_tmp_path: Path, alice: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "configs", "configs")
    Path("book.txt").write_text(alice, encoding="utf-8")
    names: dict[str, object] = {"__name__": "readme"}
    languages = set()
    for language, code in BLOCKS:
        languages.add(language)
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "mygpt":
                    short = SHORT if words[1] == "train" else []
                    assert main([*words[1:], *short]) == 0, (line, capsys.readouterr().err)
                else:
                    assert not words or words[0] in ("make", "git", "cd", "pip", "python"), f"not run: {line}"
    assert languages <= {"python", "bash", "text"}
    assert "python" in languages and "bash" in languages
