"""`mygpt check`: a student's files in a process of their own, and a teacher's table."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from MyGPT.cli import main
from MyGPT.commands.check import copy_originals
from MyGPT.exercises import ORIGINALS, TASKS
from MyGPT.exercises.checking import Result, check_file
from MyGPT.exercises.submissions import as_text, find_file, find_students, write_marks
from places import ROOT

SOLUTIONS = ROOT / "exercises" / "solutions"
SOLVED = (SOLUTIONS / "attention.py").read_text(encoding="utf-8")


def test_the_files_in_the_repository_are_those_that_start_copies(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this fails after a change in src/MyGPT/exercises/tasks: delete the file in exercises/, and run mygpt check --start."""
    assert main(["check", "--start"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("and run: mygpt check bpe\n")
    copies = sorted(path.name for path in Path("exercises").iterdir())
    assert copies == sorted(["README.md", *(f"{task}.py" for task in TASKS)])
    for name in copies:
        assert (Path("exercises") / name).read_bytes() == (ORIGINALS / name).read_bytes()
        assert (ROOT / "exercises" / name).read_bytes() == (ORIGINALS / name).read_bytes(), name


def test_start_keeps_existing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bpe.py").write_text("mine")
    copy_originals(tmp_path)
    assert (tmp_path / "bpe.py").read_text() == "mine"
    printed = capsys.readouterr().out
    assert f"kept {tmp_path / 'bpe.py'}" in printed and f"wrote {tmp_path / 'lora.py'}" in printed


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="uses signals and a named pipe")
def test_code_that_ends_or_stops_its_process_fails_only_its_own_task(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("MyGPT.exercises.running.GRACE_SECONDS", 1.0)
    directory = Path("exercises")
    copy_originals(directory)
    capsys.readouterr()
    sources = {
        "windows": "import os\nif os.fork() == 0:\n    import time; time.sleep(600)\nos._exit(3)\n",
        "attention": SOLVED + "\nopen('notes.txt', 'w').write('x')\n",
        "loss": "def next_token_loss(logits, ids):\n    while True: pass\n",
        "sampling": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
        "kv_cache": "import ctypes\nctypes.string_at(0)\n",
    }
    for task, source in sources.items():
        (directory / f"{task}.py").write_text(source, encoding="utf-8")
    (directory / "lora.py").unlink()
    (directory / "block.py").unlink()
    os.mkfifo(directory / "block.py")
    names = sorted(path.name for path in directory.iterdir())
    assert main(["check", "--timeout", "4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert dict(line.split(maxsplit=1) for line in lines[:-1]) == {
        "bpe": "not started",
        "windows": "wrong: windows.py ended the process that checks it: it called os._exit, or compiled code did (exit status 3)",
        "attention": "done",
        "block": "wrong: block.py cannot be read: it is not an ordinary file",
        "loss": "wrong: next_token_loss had not ended after 4 s; likely cause: a loop without an end",
        "sampling": "wrong: sampling.py had not ended after 4 s, and did not react; likely cause: a loop without an end",
        "kv_cache": "wrong: kv_cache.py ended the process that checks it: a crash in compiled code (SIGSEGV)",
        "lora": "not started: there is no file lora.py",
        "induction_head": "not started",
    }
    assert lines[-1] == "1 of 9 tasks are done; next: mygpt check bpe"
    assert sorted(path.name for path in directory.iterdir()) == names  # the working directory was another one


@pytest.mark.slow
def test_one_task_is_tested_step_by_step(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path("exercises")
    directory.mkdir()
    (directory / "attention.py").write_text(SOLVED, encoding="utf-8")
    (directory / "windows.py").write_text(
        "print('\\x1b[2J' * 3)\nprint('x\\n' * 99)\ndef make_windows(ids, length, stride): ids[0] = 1\n"
    )
    (directory / "bpe.py").write_text((ORIGINALS / "bpe.py").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["check", "attention", str(directory / "windows.py"), "bpe"]) == 1
    printed = capsys.readouterr().out
    assert (
        "  ok    gives torch's gradients\nattention: solved\n  The library does the same in src/MyGPT/inside/tracing.py"
        in printed
    )
    assert "mygpt train --with exercises/attention.py\n  Next task: exercises/block.py\n" in printed
    assert "windows.py printed:\n  \\x1b[2J" in printed and printed.count("\n  x") == 19 and "\n  …\n" in printed
    assert "  wrong: make_windows(7 ids, length=3, stride=2): argument number 1 is changed in place" in printed
    assert printed.endswith("bpe: not started: replace `raise NotImplementedError` in exercises/bpe.py by your code\n")
    assert not list(directory.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("atention", "there is no task 'atention'; did you mean attention?"),
        ("nothing.py", "there is no task 'nothing'; the tasks are bpe, windows"),
        ("", "there is no directory 'exercises': mygpt check --start copies the exercise files"),
        ("bpe", "there is no file 'exercises/bpe.py': mygpt check --start"),
        ("--timeout 0", "timeout must be a number of seconds above 0, got 0.0"),
        ("--timeout nan", "timeout must be"),
        ("--csv x.csv", "--submissions and --csv belong together"),
        ("bpe --start", "--start copies the exercise files and tests nothing"),
        ("--submissions none --csv x.csv", "--submissions must be a directory with one subdirectory per student, got 'none'"),
        ("--submissions . --csv x.csv", "has no subdirectories: give each student a subdirectory"),
    ],
)  # fmt: skip
def test_wrong_use_gives_one_line(
    arguments: str, words: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments.split()]) == 2
    error = capsys.readouterr().err.replace("\\", "/")
    assert words in error and error.count("\n") == 1


@pytest.mark.slow
def test_an_exercise_file_checks_itself(tmp_path: Path) -> None:
    path = tmp_path / "windows.py"
    shutil.copy(ORIGINALS / "windows.py", path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("windows: not started") and not done.stderr


def hand_in(directory: Path, name: str, source: str, *, task: str = "attention") -> None:
    path = directory / name / f"{task}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def rows_of(table: Path) -> list[list[str]]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def check_here(files: dict[str, Path], seconds: float) -> Iterator[Result]:
    """Check files as check_files does, but in this process, which takes no time to start."""
    for task, path in files.items():
        yield check_file(path, task) if path.exists() else Result(task, "not started", f"there is no file {path.name}")


def test_a_table_of_a_class(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("MyGPT.exercises.submissions.check_files", check_here)
    class_ = Path("class")
    hand_in(class_, "ada", SOLVED)
    hand_in(class_, "=cmd|'calc'!A0", SOLVED.replace(" / math.sqrt(D)", ""))
    hand_in(class_, "grace/deep/exercises", "raise ValueError('=1+1, \"quoted\"\\nnext')\n")
    hand_in(class_, "zoe/a", SOLVED)
    hand_in(class_, "zoe/b", SOLVED)
    hand_in(class_, "late/solutions", SOLVED)
    hand_in(class_, "solutions", SOLVED)
    (class_ / ".git").mkdir()
    arguments = ["check", "attention", "--submissions", "class", "--csv", "marks.csv"]
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "marks.csv"
    data = Path("marks.csv").read_bytes()
    header, *rows = rows_of(Path("marks.csv"))
    assert header == ["student", "solved", "attention", "attention: reason"]
    table = {row[0]: row[1:] for row in rows}
    assert list(table) == ["'=cmd|'calc'!A0", "ada", "grace", "late", "zoe", "all students"]
    assert table["ada"] == ["1", "pass", ""]
    assert table["late"] == ["0", "not started", "there is no file attention.py"]
    assert table["zoe"] == [
        "0",
        "wrong",
        f"there are several files attention.py: {Path('a/attention.py')} and {Path('b/attention.py')}",
    ]
    assert table["'=cmd|'calc'!A0"][2].endswith("likely cause: the scores are not divided by √D")
    assert table["grace"][2] == 'opening attention.py: line 1 of attention.py raises ValueError: =1+1, "quoted" next'
    assert table["all students"] == ["1", "1", ""]
    assert main(arguments) == 1
    assert Path("marks.csv").read_bytes() == data


def test_cells_are_no_formulas() -> None:
    for text in ("=1", "+1", "-1", "@A1", "|x"):
        assert as_text(text) == f"'{text}"
    assert as_text("ada") == "ada" and as_text(-1) == -1
    assert as_text("a\udcff\n=1") == "a\\udcff\\n=1"  # the name of a directory that is not UTF-8


def test_an_interrupted_run_keeps_its_rows_and_other_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ada", "grace"):
        hand_in(tmp_path / "class", name, "")

    def check(files: dict[str, Path], seconds: float) -> list[Result]:
        return [Result(task, "solved") for task in files]

    monkeypatch.setattr("MyGPT.exercises.submissions.check_files", check)
    table = tmp_path / "marks.csv"
    marks = write_marks(tmp_path / "class", table, ["attention"], 1.0)
    next(marks)
    assert rows_of(table)[1] == ["ada", "1", "pass", ""]  # before the second student is checked
    marks.close()
    assert len(rows_of(table)) == 2
    assert len(list(write_marks(tmp_path / "class", table, ["attention"], 1.0))) == 2
    assert rows_of(table)[3] == ["all students", "2", "2", ""]
    table.write_text("my own notes")
    with pytest.raises(ValueError, match="is not a table of mygpt check"):
        next(write_marks(tmp_path / "class", table, ["attention"], 1.0))
    assert table.read_text() == "my own notes"
    with pytest.raises(IsADirectoryError, match=r"class is a directory: .* as in .*class/marks\.csv"):
        next(write_marks(tmp_path / "class", tmp_path / "class", ["attention"], 1.0))


def test_files_are_searched_in_the_directory_before_its_subdirectories(tmp_path: Path) -> None:
    hand_in(tmp_path, "ada/exercises", "")
    hand_in(tmp_path, "ada/__MACOSX", "")
    assert find_file(tmp_path / "ada", "attention") == tmp_path / "ada/exercises/attention.py"
    hand_in(tmp_path, "ada", "")
    assert find_file(tmp_path / "ada", "attention") == tmp_path / "ada/attention.py"
    assert find_file(tmp_path / "ada", "bpe") == tmp_path / "ada/bpe.py"
    (tmp_path / "_templates").mkdir()
    assert find_students(tmp_path) == [tmp_path / "ada"]


def test_a_directory_that_cannot_be_read_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ada", "grace"):
        (tmp_path / name).mkdir()
    listed = os.listdir

    def refuse(path: str | Path) -> list[str]:
        if Path(path).name == "ada":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    table = tmp_path / "marks.csv"
    assert len(list(write_marks(tmp_path, table, ["bpe"], 1.0))) == 2
    rows = rows_of(table)
    assert rows[1][:3] == ["ada", "0", "wrong"] and rows[1][3].endswith("ada: Permission denied")
    assert rows[2] == ["grace", "0", "not started", "there is no file bpe.py"]
