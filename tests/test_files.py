"""What stands under its final name is whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from MyGPT import files
from MyGPT.files import atomic_directory, atomic_write, read_text, restore_directory, sha256_of


class Failure(Exception):
    pass


def test_a_written_file_has_its_content_and_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "text") as file:
        file.write("é\n")
    with atomic_write(tmp_path / "bytes", "wb") as file:
        file.write(b"\xff")
    assert (tmp_path / "text").read_bytes() == "é\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\xff"
    assert (tmp_path / "text").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, old: str | None) -> None:
    if old is not None:
        (tmp_path / "text").write_text(old)
    with pytest.raises(Failure), atomic_write(tmp_path / "text") as file:
        file.write("half")
        raise Failure
    assert [path.read_text() for path in tmp_path.iterdir()] == ([old] if old else [])


def test_a_directory_is_replaced_as_a_whole_and_foreign_files_stay(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "mine.txt").write_text("mine")
    (target / "mine.txt").write_text("mine too")
    (target / "weights").write_text("old")
    with atomic_directory(target) as new:
        assert not list(new.iterdir())
        (new / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"
    assert (target / "weights").read_text() == "new"
    assert (target / "mine.txt").read_text() == "mine too"
    assert (target / "notes" / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", ["in the block", "rename aside", "rename into place"])
def test_a_failed_replacement_leaves_the_old_directory_and_nothing_else(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    rename, calls = os.rename, []

    def failing(source: object, destination: object) -> None:
        calls.append(source)
        if len(calls) == {"rename aside": 1, "rename into place": 2}.get(fails):
            raise Failure
        rename(source, destination)  # type: ignore[arg-type]

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(Failure), atomic_directory(target) as new:
        (new / "weights").write_text("new")
        if fails == "in the block":
            raise Failure
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kill_between_the_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    aside = tmp_path / ".model.previous"
    aside.mkdir()
    (aside / "weights").write_text("old")
    restore_directory(target)
    assert (target / "weights").read_text() == "old"
    aside.mkdir()  # as after a kill just behind the second rename
    restore_directory(target)
    assert (target / "weights").read_text() == "old"
    assert not aside.exists()


def test_a_hash_is_that_of_hashlib(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_text_is_read_with_plain_line_ends_and_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "x") == "one\ntwo\nthree\n"
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 2 is 0xff"):
        read_text(tmp_path / "x")
