"""The examples in docs/ run, the pages build into a site without a warning, and what learn.md says about the code is true."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import MyGPT
from MyGPT.cli import COMMANDS, main
from MyGPT.exercises import TASKS
from places import ROOT
from serve_process import ServeProcess

DOCS = ROOT / "docs"
# A block after an HTML comment that says so is not run.
FENCES = re.compile(r"(<!--[^\n]* not run [^\n]*-->\n)?^```([^\n`]*)\n(.*?)^```$", re.M | re.S)
# evaluation.md uses data sets that are not in this repository; design.md and the reference have no examples.
PAGES = sorted([*DOCS.glob("guide/*.md"), *DOCS.glob("coming_from_*.md"), DOCS / "index.md", DOCS / "learn.md"])
LEARN = (DOCS / "learn.md").read_text(encoding="utf-8")
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


@pytest.fixture(scope="module")
def lessons() -> ModuleType:
    """The module that draws the pictures of learn.md."""
    spec = importlib.util.spec_from_file_location("lessons", DOCS / "pictures/lessons.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learn_shows_every_picture_that_is_drawn_and_no_other(lessons: ModuleType) -> None:
    shown = re.findall(r"!\[([^\]]+)\]\(pictures/learn/(\w+)\.svg\)", LEARN)
    names = [name for _, name in shown]
    assert sorted(names) == sorted([*lessons.LESSONS, *lessons.TRAINED_LESSONS])
    assert sorted(names) == sorted(path.stem for path in (DOCS / "pictures/learn").iterdir())
    for description, name in shown:
        assert len(description) > 60, f"{name}: the alternative text must say what the picture shows"


def test_pictures_of_learn_are_small_readable_and_safe() -> None:
    for path in (DOCS / "pictures/learn").iterdir():
        assert path.stat().st_size < 40_000, path
        root = ElementTree.parse(path).getroot()
        assert root.findtext("{http://www.w3.org/2000/svg}title"), path
        # A phone shows a picture of 480 pixels at about three quarters of its size.
        sizes = [float(element.get("font-size", 14)) for element in root.iter()]
        assert root.get("width") == "480" and min(sizes) >= 14, path
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        for element in root.iter("{http://www.w3.org/2000/svg}text"):
            assert 0 < float(element.get("x", 0)) < width and 0 < float(element.get("y", 0)) < height, path
        assert not re.search("<script|href=|url\\((?!#)|<image|foreignObject", path.read_text(encoding="utf-8")), path


def test_pictures_without_a_trained_model_are_up_to_date(lessons: ModuleType) -> None:
    for name, draw in lessons.LESSONS.items():
        stored = (DOCS / f"pictures/learn/{name}.svg").read_text(encoding="utf-8")
        assert draw().svg() == stored, f"{name}.svg is outdated: run python docs/pictures/draw.py --only learn"


def test_the_files_that_learn_names_have_that_length_and_those_functions() -> None:
    sections = re.findall(r"^## \d+\. `([\w/.]+)`\n\*About (\d+) lines\. Look first at ([^*]+)\*$", LEARN, re.M)
    assert len(sections) == len(re.findall(r"^## \d", LEARN, re.M)) >= 14
    for file, about, first in sections:
        source = (ROOT / "src/MyGPT" / file).read_text(encoding="utf-8")
        assert abs(len(source.splitlines()) / int(about) - 1) < 0.15, f"{file} has {len(source.splitlines())} lines"
        for name in re.findall(r"`([\w.]+)`", first):
            for part in name.split("."):
                assert re.search(rf"(?:def|class|function) {part}\b", source), f"{file} has no {part}"


def test_the_parts_of_the_notebook_that_learn_names_exist() -> None:
    cells = json.loads((ROOT / "MyGPT.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = re.findall(r"^## (\d+)\.", "\n".join("".join(cell["source"]) for cell in cells), re.M)
    named = re.findall(r"[Pp]art (\d+) of the notebook", LEARN)
    assert named and set(named) <= set(parts)


def test_learn_names_every_exercise() -> None:
    assert set(re.findall(r"`mygpt check (\w+)`", LEARN)) == set(TASKS)


def test_the_glossary_has_one_line_per_term_in_alphabetical_order() -> None:
    glossary = LEARN.partition("## Glossary\n")[2].partition("\n## ")[0]
    groups = re.split(r"^\*\*[^*]+\*\*$", glossary, flags=re.M)[1:]
    terms = []
    for group in groups:
        lines = group.strip().splitlines()
        found = [re.fullmatch(r"- \*\*([^*]+)\*\*: (.+\.)", line) for line in lines]
        assert all(found), [line for line, term in zip(lines, found, strict=True) if not term]
        names = [term[1].lower() for term in found if term]
        assert all(first < second for first, second in pairwise(names)), names
        terms += names
    assert len(terms) == len(set(terms)) > 100


def test_papers_are_named_with_author_title_and_year() -> None:
    papers = LEARN.partition("## Papers\n")[2].splitlines()
    links = []
    for line in papers:
        if line.startswith("-"):
            assert re.fullmatch(r"- [^:]+: .+, (\[[^\]]+\]\(https://[^)]+\)|\"[^\"]+\".*), (19|20)\d\d", line), line
            links += re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})\)", line)
    assert len(links) == len(set(links)) > 20
