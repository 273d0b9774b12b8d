"""The examples in docs/ run, and the pages build into a site without a warning."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import MyGPT
from MyGPT.cli import COMMANDS, main
from places import ROOT
from serve_process import ServeProcess

DOCS = ROOT / "docs"
# A block after an HTML comment that says so is not run.
FENCES = re.compile(r"(<!--[^\n]* not run [^\n]*-->\n)?^```([^\n`]*)\n(.*?)^```$", re.M | re.S)
# evaluation.md uses data sets that are not in this repository; design.md and the reference have no examples.
PAGES = sorted([*DOCS.glob("guide/*.md"), *DOCS.glob("coming_from_*.md"), DOCS / "index.md", DOCS / "learn.md"])
# Helpers that a user has no use for.
INTERNAL = {"MyGPT.cache.KVCache.check", "MyGPT.cache.KVCache.append"}


# PEFT uses a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, in_tmp_path: Path, alice: str) -> None:
    Path("book.txt").write_text(alice[:20_000], encoding="utf-8")
    spelled = list(dict.fromkeys(word for word in alice.split() if word.isalpha()))[:20]
    records = [{"instruction": f"Spell {word}.", "output": " ".join(word)} for word in spelled]
    Path("records.json").write_text(json.dumps(records))
    names: dict[str, object] = {"__name__": page.stem}
    servers: list[ServeProcess] = []
    with contextlib.ExitStack() as stack:
        for not_run, language, code in FENCES.findall(page.read_text(encoding="utf-8")):
            if not_run:
                continue
            if servers:
                code = code.replace("http://127.0.0.1:8000", servers[-1].url)
            assert language in ("python", "bash", "text"), f"{language or 'a block without a language'} is not run"
            if language == "python":
                exec(compile(code, page.name, "exec"), names)
            for line in code.replace("\\\n", " ").splitlines() if language == "bash" else []:
                words = shlex.split(line, comments=True)
                if not words:  # a comment
                    continue
                command, *arguments = words
                if command == "curl":
                    subprocess.run(["curl", "--fail", *arguments], check=True, timeout=60)
                elif arguments[:1] == ["serve"]:
                    servers.append(stack.enter_context(ServeProcess.of_command(arguments, Path("serve.log"))))
                # test_doctor.py tests mygpt doctor, which takes half a minute.
                elif command == "mygpt" and arguments != ["doctor"] and arguments != ["--help"]:
                    assert main(arguments) == 0, line
                else:
                    assert command in ("mygpt", "make"), f"not run: {line}"
        for server in servers:
            assert server.stop() in (0, 1)  # 1 on Windows, where processes end without a signal


def test_the_table_of_commands_is_complete() -> None:
    page = (DOCS / "guide/command_line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `mygpt (\w+)`", page, re.M)) == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs pip install 'mygpt[docs]'")
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anchors = {
        anchor
        for page in (tmp_path / "reference").glob("*.html")
        for anchor in re.findall(r'id="(MyGPT[\w.]*)"', page.read_text(encoding="utf-8"))
    }
    assert set(MyGPT.__all__) <= {anchor.rpartition(".")[2] for anchor in anchors}
    assert not [anchor for anchor in anchors if "._" in anchor or anchor in INTERNAL]


def test_pages_use_no_markup_that_a_code_host_shows_as_program_text() -> None:
    for page in PAGES:
        assert "```{" not in page.read_text(encoding="utf-8"), page
