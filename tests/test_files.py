"""Tests of atomic writes and of safe reading."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from MyGPT import files
from MyGPT.files import atomic_directory, atomic_write, read_text, remove_leftovers, restore_directory, sha256_of


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
    aside.mkdir()  # This is the state after a kill directly after the second rename.
    restore_directory(target)
    assert (target / "weights").read_text() == "old"
    assert not aside.exists()


def test_a_hash_equals_that_of_hashlib(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_line_ends_of_a_text_are_normalised_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "x") == "one\ntwo\nthree\n"
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 2 is 0xff"):
        read_text(tmp_path / "x")


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o600)
    (tmp_path / "d").mkdir(mode=0o700)
    with atomic_write(tmp_path / "x") as file:
        file.write("new")
    with atomic_directory(tmp_path / "d"):
        pass
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700


def test_a_new_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_umask_of_the_process_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The umask was once set to 0 for an instant, also in a background thread: two threads could leave it at 0."""
    monkeypatch.setattr(files.os, "umask", lambda mask: pytest.fail("os.umask was called"))
    with atomic_write(tmp_path / "new.txt") as file:
        file.write("new")
    with atomic_directory(tmp_path / "new") as new:
        (new / "weights").write_text("new")


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_new_files_respect_the_users_umask(tmp_path: Path, umask: int) -> None:
    """The test runs in a new process, because the umask belongs to the whole process."""
    program = f"""
import os, pathlib, stat
os.umask({umask})
os.chdir({str(tmp_path)!r})
from MyGPT.files import atomic_directory, atomic_write
with atomic_write("new.txt") as file:
    file.write("new")
with atomic_directory("new") as new:
    (new / "weights").touch(0o600)
pathlib.Path("old").mkdir(0o700)
with atomic_directory("old") as new:
    (new / "weights").touch(0o600)
modes = [oct(stat.S_IMODE(os.stat(name).st_mode)) for name in ("new.txt", "new", "new/weights", "old", "old/weights")]
print(*modes)
"""
    modes = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    file, directory = oct(0o666 & ~umask), oct(0o777 & ~umask)
    assert modes == [file, directory, file, "0o700", file]


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "x").touch(0o600)
    (tmp_path / "d").mkdir(0o700)
    with atomic_write(tmp_path / "x") as file:
        assert os.stat(file.fileno()).st_mode & 0o777 == 0o600
    with atomic_directory(tmp_path / "d") as new:
        assert new.stat().st_mode & 0o777 == 0o700


def test_a_write_through_a_symbolic_link_changes_its_target(tmp_path: Path) -> None:
    """A link, for example to a directory on a larger disk, was once replaced by a real directory."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "mine").write_text("mine")
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_directory(tmp_path / "link") as new:
        (new / "weights").write_text("new")
    with atomic_write(tmp_path / "link.txt") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link.txt").is_symlink()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["mine", "weights"]
    assert (tmp_path / "real.txt").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 4


def test_links_in_a_replaced_directory_stay_links(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "data").symlink_to("/nowhere")
    with atomic_directory(tmp_path / "model"):
        pass
    assert os.readlink(tmp_path / "model" / "data") == "/nowhere"


@pytest.mark.parametrize("target", [".", "..", "../inside"])
def test_the_current_directory_cannot_be_replaced(
    in_tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp_path / "inside").mkdir()
    (in_tmp_path / "inside" / "mine").write_text("mine")
    monkeypatch.chdir(in_tmp_path / "inside")
    with (
        pytest.raises(ValueError, match="cannot be replaced while it contains the current directory"),
        atomic_directory(target),
    ):
        raise Failure
    assert [path.name for path in in_tmp_path.rglob("*")] == ["inside", "mine"]


@pytest.mark.parametrize("kill", ["in the block", "before the renames", "between the renames", "after the renames"])
def test_a_process_killed_at_any_moment_leaves_one_whole_directory(tmp_path: Path, kill: str) -> None:
    """A real process ends itself without any cleaning up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    program = f"""
import os
from MyGPT import files
kill, renames = {kill!r}, 0
rename = os.rename
def killing(source, target):
    global renames
    renames += 1
    if kill == "before the renames" or (kill == "between the renames" and renames == 2):
        os._exit(9)
    rename(source, target)
    if kill == "after the renames" and renames == 2:
        os._exit(9)
files.os.rename = killing
with files.atomic_directory({str(tmp_path / "model")!r}) as new:
    (new / "weights").write_text("new")
    if kill == "in the block":
        os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    restore_directory(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == ("new" if kill == "after the renames" else "old")
    with atomic_directory(tmp_path / "model") as new:
        (new / "weights").write_text("newer")
    assert (tmp_path / "model" / "weights").read_text() == "newer"
    assert not (tmp_path / ".model.previous").exists()


@pytest.mark.parametrize("content", [b"a\0b", "é\0".encode()])
def test_a_nul_is_named_with_its_position(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x looks like a binary file: it has a NUL character at position 1"):
        read_text(tmp_path / "x")


# What killed processes leave

SLOW_WRITER = """
import os, sys, time
from pathlib import Path
from MyGPT.files import atomic_directory, atomic_write
with (atomic_directory if sys.argv[2] == "directory" else atomic_write)(sys.argv[1]) as new:
    (new / "weights").write_text("half") if sys.argv[2] == "directory" else new.write("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def write(path: Path, kind: str) -> None:
    if kind == "directory":
        with atomic_directory(path) as new:
            (new / "weights").write_text("new")
    else:
        with atomic_write(path) as file:
            file.write("new")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of open directories")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_next_writer_removes_what_a_killed_one_left_but_not_what_a_living_one_writes(
    kind: str, tmp_path: Path
) -> None:
    """A killed `prepare` left gigabytes for ever."""
    command = [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "d"), kind]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert len(list(tmp_path.iterdir())) == 2
    processes[0].kill()
    processes[0].wait()
    (tmp_path / ".d.notes").write_text("mine")
    (tmp_path / ".other.0123abcd").write_text("mine")
    write(tmp_path / "d", kind)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 4 and {"d", ".d.notes", ".other.0123abcd"} < set(left)  # and that of the living process
    processes[1].kill()
    processes[1].wait()
    write(tmp_path / "d", kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.notes", ".other.0123abcd", "d"]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of open directories")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_writer_whose_temporary_file_is_removed_before_it_is_locked_makes_another(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes it for abandoned in the instant between its creation and its lock."""
    flock, seen = files.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not seen:
            seen.extend(tmp_path.iterdir())
            for path in seen:
                path.rmdir() if path.is_dir() else path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write(tmp_path / "d", kind)
    assert len(seen) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_file_system_without_locks_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse locks. Nothing can be taken for abandoned there."""
    if files.fcntl is None:
        pytest.skip("no locks of this kind")

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".d.0123abcd").mkdir()
    write(tmp_path / "d", "directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.0123abcd", "d"]


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".d.0123abcd").symlink_to(tmp_path / "mine")
    write(tmp_path / "d", "directory")
    remove_leftovers(tmp_path, ["d"])
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    assert not (tmp_path / ".d.0123abcd").is_symlink()
