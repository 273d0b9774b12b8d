"""Downloads from a local HTTP server that fails, request by request, in the ways that real servers fail."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from http_server import CERTIFICATE, CONTENT, OTHER, Server, chunked, file, serving, status, until_the_end
from MyGPT import GPT2_CONFIGS, BPETokenizer, GPTConfig, GPTModel
from MyGPT.data import sources
from MyGPT.data.templates import load_template
from MyGPT.download import DownloadError, address_of, checksums, content_range, download, retry_after, validator
from MyGPT.weights import released
from MyGPT.weights.hub import download_from_hub
from MyGPT.weights.released import download_gpt2, released_size
from texts import OPENAI_FILES

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def get(urls: str | list[str], path: Path, **options: Any) -> Path:
    """Call `download` without waiting times and progress bar."""
    return download(urls, path, **{"progress": False, "timeout": 5, "sleep": lambda seconds: None, **options})


def names(directory: Path) -> set[str]:
    """Return the file names in a directory without the lock and the list of downloads."""
    return {path.name for path in directory.iterdir()} - {".downloads.json", ".downloads.lock"}


# One file, one server


def test_a_file_arrives_in_a_new_directory_with_nothing_beside_it(server: Server, tmp_path: Path) -> None:
    path = get(server.will(file()), tmp_path / "a" / "b" / "file.bin")
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"file.bin"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_empty_file_is_a_file(server: Server, tmp_path: Path) -> None:
    assert get(server.will(file(b"")), tmp_path / "file.bin").read_bytes() == b""


def test_a_whole_file_costs_no_network_call(server: Server, tmp_path: Path) -> None:
    path = get(server.will(file()), tmp_path / "file.bin")
    for options in ({}, {"sha256": SHA256.upper()}, {"size": len(CONTENT)}):
        get(server.url, path, **options)
    os.utime(path, (1, 1))  # for example copied elsewhere and back: the content decides
    get(server.url, path)
    assert len(server.requests) == 1


def test_a_file_copied_by_hand_is_used_without_a_network_call_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    for options in ({}, {"sha256": SHA256}, {"size": len(CONTENT)}):
        assert get("http://127.0.0.1:1/file.bin", path, **options) == path
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options", [{"size": len(CONTENT)}, {"sha256": SHA256}])
def test_a_file_that_is_not_the_wanted_one_is_replaced(server: Server, tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT[:-1])
    assert get(server.will(file()), path, **options).read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [CONTENT[:1000], b"X" + CONTENT[1:], b""])
def test_a_file_that_was_damaged_since_is_downloaded_again(server: Server, tmp_path: Path, damage: bytes) -> None:
    path = get(server.will(file()), tmp_path / "file.bin")
    path.write_bytes(damage)
    os.utime(path, (1, 1))
    assert get(server.will(file()), path).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_what_is_there_stays_when_its_replacement_cannot_be_had(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(DownloadError):
        get(server.will(status(404)), path, sha256=SHA256)
    assert path.read_bytes() == b"old"


def test_the_list_of_downloads_may_be_lost_or_damaged(server: Server, tmp_path: Path) -> None:
    for text in ("", "[1]", "{", '{"url": 1}', "\0"):
        (tmp_path / ".downloads.json").write_text(text)
        (tmp_path / "file.bin.part").write_bytes(b"some")
        (tmp_path / "file.bin.part.json").write_text(text)
        assert get(server.will(file()), tmp_path / "file.bin").read_bytes() == CONTENT
        (tmp_path / "file.bin").unlink()
    assert server.ranges() == [None] * 5


def test_downloads_of_one_directory_are_listed_together(server: Server, tmp_path: Path) -> None:
    get(server.will(file(), file(OTHER)), tmp_path / "a")
    get(server.url, tmp_path / "b")
    memory = json.loads((tmp_path / ".downloads.json").read_text())
    assert memory["a"]["sha256"] == SHA256
    assert memory["b"] == {**memory["b"], "size": len(OTHER), "url": server.url}


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/a", ""])
def test_an_address_that_is_not_http_is_a_value_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        get(url, tmp_path / "file.bin")


def test_the_bar_goes_to_stderr_and_can_be_left_out(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    get(server.will(file(cut=1000), file()), tmp_path / "a", progress=True)
    shown = capfd.readouterr()
    assert shown.out == "" and "1.00k/300k" in shown.err
    assert shown.err.splitlines()[-1].startswith("a: 100%")
    get(server.will(file()), tmp_path / "b")
    assert capfd.readouterr() == ("", "")


# Resuming


def test_an_interrupted_file_is_resumed(server: Server, tmp_path: Path) -> None:
    path = get(server.will(file(cut=100_000), file(cut=50_000), file()), tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-", "bytes=150000-"]
    assert [headers["If-Range"] for _, headers in server.requests] == [None, '"v1"', '"v1"']
    assert names(tmp_path) == {"file.bin"}


def test_the_next_call_resumes_a_failed_download(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with pytest.raises(DownloadError, match="ended after 1,000 of 300,000 bytes"):
        get(server.will(file(cut=1000)), path, attempts=1)
    assert names(tmp_path) == {"file.bin.part", "file.bin.part.json"}
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:1000]
    assert get(server.will(file()), path).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000-"]


def test_a_killed_process_leaves_the_received_bytes(server: Server, tmp_path: Path) -> None:
    server.will(file(cut=200_000, stall=30))
    code = f"from MyGPT.download import download; download({server.url!r}, {str(tmp_path / 'file.bin')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / "file.bin.part", time.monotonic() + 20
    while not part.exists() or part.stat().st_size < 200_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "file.bin").exists()
    assert get(server.will(file()), tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=200000-"]


def test_a_kill_between_the_last_byte_and_the_renaming_costs_no_second_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_or_interrupt)
        get(server.will(file()), tmp_path / "file.bin")
    assert names(tmp_path) == {"file.bin.part", "file.bin.part.json"}
    assert get(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == 1


def replace_or_interrupt(old: Any, new: Any, rename: Callable[[Any, Any], None] = os.rename) -> None:
    if Path(new).name == "file.bin":
        raise KeyboardInterrupt
    rename(old, new)


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(server: Server, tmp_path: Path) -> None:
    path = get(server.will(file(cut=100_000), file(ranges=False)), tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-"]


@pytest.mark.parametrize("if_range", [True, False])
def test_a_changed_file_is_not_appended_to_an_old_part(server: Server, tmp_path: Path, if_range: bool) -> None:
    """A server that does not support If-Range needs one more request."""
    changed = file(OTHER, etag='"v2"', if_range=if_range)
    path = get(server.will(file(cut=100_000), changed, changed), tmp_path / "file.bin")
    assert path.read_bytes() == OTHER
    assert server.ranges() == [None, "bytes=100000-"] + [None] * (not if_range)


def test_a_file_that_became_shorter_than_our_part_is_begun_anew(server: Server, tmp_path: Path) -> None:
    short = file(OTHER[:1000], etag=None, if_range=False)  # answers 416
    path = get(server.will(file(cut=100_000), short, short), tmp_path / "file.bin")
    assert path.read_bytes() == OTHER[:1000]
    assert server.ranges() == [None, "bytes=100000-", None]


def test_416_means_complete_if_the_length_was_not_known(server: Server, tmp_path: Path) -> None:
    path = get(server.will(chunked(ends=False, ETag='"v1"'), file()), tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, f"bytes={len(CONTENT)}-"]


def test_a_rest_with_another_first_byte_is_not_appended(server: Server, tmp_path: Path) -> None:
    rest = {"Content-Range": f"bytes 500-{len(CONTENT) - 1}/{len(CONTENT)}", "ETag": '"v1"'}
    server.will(file(cut=1000), status(206, CONTENT[500:], **rest), file())
    assert get(server.url, tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000-", None]


def test_a_part_of_another_length_than_the_wanted_one_is_not_continued(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError):
        get(server.will(file(cut=1000)), tmp_path / "file.bin", attempts=1)
    path = get(server.will(file(OTHER)), tmp_path / "file.bin", size=len(OTHER))
    assert path.read_bytes() == OTHER
    assert server.ranges() == [None, None]


def test_a_part_of_an_unknown_version_is_not_continued(server: Server, tmp_path: Path) -> None:
    """The response has no date, and no ETag or a weak one, which does not guarantee equal bytes."""
    weak = file(cut=1000, etag='W/"v1"')
    path = get(server.will(file(cut=1000, etag=None), weak, file()), tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, None, None]


def test_a_date_serves_where_there_is_no_etag(server: Server, tmp_path: Path) -> None:
    dated = {"Last-Modified": "Tue, 05 Nov 2019 16:28:27 GMT"}
    path = get(
        server.will(file(cut=9, etag=None, headers=dated), file(if_range=False, etag=None, headers=dated)),
        tmp_path / "file.bin",
    )
    assert path.read_bytes() == CONTENT
    assert server.requests[1][1]["If-Range"] == dated["Last-Modified"]
    assert server.ranges() == [None, "bytes=9-"]


def test_the_part_of_one_mirror_is_not_continued_from_another(server: Server, tmp_path: Path) -> None:
    mirror = f"{server.address}/mirror"
    server.will(file(cut=1000), status(404), file(etag='"v1"'))
    assert get([server.url, mirror], tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000-", None]


def test_a_wrong_file_from_two_responses_is_downloaded_once_more_in_one_response(
    server: Server, tmp_path: Path
) -> None:
    """The server changes its file but not the ETag, so only the hash shows the change."""
    server.will(file(OTHER + CONTENT[len(OTHER) :], cut=1000), file(), file())
    path = get(server.url, tmp_path / "file.bin", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000-", None]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=2000), cuts=st.lists(st.integers(0, 700), max_size=6), ranges=st.booleans())
def test_wherever_the_connection_breaks_the_bytes_are_right(
    server: Server, content: bytes, cuts: list[int], ranges: bool
) -> None:
    server.requests.clear()
    server.answers = [file(content, cut=cut, ranges=ranges) for cut in cuts]
    server.default = file(content, ranges=ranges)
    with tempfile.TemporaryDirectory() as directory:
        assert get(server.url, Path(directory) / "file.bin", attempts=9).read_bytes() == content
    position, expected = 0, []
    for cut in [*cuts, len(content)]:
        expected.append(f"bytes={position}-" if position else None)
        position += cut
        if position >= len(content):
            break
    assert not ranges or server.ranges() == expected


VERSIONS = {"a": b"a" * 1000, "b": b"b" * 1000, "c": b"c" * 700}


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 900), st.booleans(), st.booleans()), max_size=5))
def test_versions_of_a_file_are_never_mixed(server: Server, answers: list[tuple[str, int, bool, bool]]) -> None:
    server.answers = [
        file(VERSIONS[version], cut=cut, etag=f'"{version}"', ranges=ranges, if_range=if_range)
        for version, cut, ranges, if_range in answers
    ]
    server.default = file(VERSIONS["a"], etag='"a"')
    with tempfile.TemporaryDirectory() as directory:
        assert get(server.url, Path(directory) / "file.bin", attempts=20).read_bytes() in VERSIONS.values()


# Bad responses


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(server: Server, tmp_path: Path, code: int) -> None:
    assert get(server.will(status(code), file()), tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("code", [204, 206, 304, 400, 401, 403, 404, 410, 416])
def test_a_server_that_does_not_have_it_is_not_asked_again_but_the_mirror_is(
    server: Server, tmp_path: Path, code: int
) -> None:
    mirror = f"{server.address}/mirror"
    path = get([server.will(status(code), file()), mirror], tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/file.bin", "/mirror"]


def test_waiting_times_double_and_vary_until_the_attempts_are_used_up(server: Server, tmp_path: Path) -> None:
    waits: list[float] = []
    server.default = status(500)
    with pytest.raises(DownloadError, match=r"500 Internal Server Error, attempt 5 of 5"):
        get(server.url, tmp_path / "file.bin", sleep=waits.append)
    assert len(server.requests) == 5
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits)) and len(waits) == 4
    assert len(set(waits)) == 4 and not any(
        wait.is_integer() for wait in waits
    )  # the waits are random; a false alarm has probability 2**-50
    assert names(tmp_path) == set()


def test_only_attempts_without_new_data_count(server: Server, tmp_path: Path) -> None:
    """A connection that breaks every 20,000 bytes still delivers the file, although only two attempts are allowed."""
    server.default = file(cut=20_000)
    assert get(server.url, tmp_path / "file.bin", attempts=2).read_bytes() == CONTENT
    assert len(server.requests) == 15


def test_a_server_that_ignores_ranges_and_breaks_off_is_given_up(server: Server, tmp_path: Path) -> None:
    server.default = file(cut=20_000, ranges=False)
    with pytest.raises(DownloadError, match="ended after 20,000 of 300,000 bytes"):
        get(server.url, tmp_path / "file.bin", attempts=3)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("value", "wait"), [("0", 0.0), ("7", 7.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("soon", None)]
)
def test_retry_after_is_obeyed(server: Server, tmp_path: Path, value: str, wait: float | None) -> None:
    waits: list[float] = []
    path = get(server.will(status(429, Retry_After=value), file()), tmp_path / "file.bin", sleep=waits.append)
    assert path.read_bytes() == CONTENT
    assert waits == [wait] if wait is not None else 0.5 <= waits[0] <= 1


def test_a_server_that_asks_for_an_hour_is_replaced_by_the_mirror(server: Server, tmp_path: Path) -> None:
    waits: list[float] = []
    server.will(status(503, Retry_After="3600"), file())
    get([server.url, f"{server.address}/mirror"], tmp_path / "file.bin", sleep=waits.append)
    assert waits == [] and server.requests[1][0] == "/mirror"


def test_a_stall_is_cut_short_and_the_file_goes_on(server: Server, tmp_path: Path) -> None:
    began = time.monotonic()
    path = get(server.will(file(cut=100_000, stall=3), file()), tmp_path / "file.bin", timeout=0.3)
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-"]
    assert time.monotonic() - began < 2.5


def test_a_server_that_never_answers_is_given_up(server: Server, tmp_path: Path) -> None:
    server.default = lambda handler: time.sleep(3)
    with pytest.raises(DownloadError, match=r"timed out, attempt 2 of 2"):
        get(server.url, tmp_path / "file.bin", timeout=0.2, attempts=2)
    assert len(server.requests) == 2


def test_a_reset_is_survived(server: Server, tmp_path: Path) -> None:
    path = get(server.will(file(cut=100_000, stall=0.05, reset=True), file()), tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert server.ranges() in (
        [None, "bytes=100000-"],
        [None, None],
    )  # a reset can arrive before data that was sent earlier


def test_a_connection_that_closes_without_a_word_is_tried_again(server: Server, tmp_path: Path) -> None:
    assert get(server.will(lambda handler: None, file()), tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_refused_connection_and_a_nonsense_answer_are_named(server: Server, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening
        urls = [f"http://127.0.0.1:{closed.getsockname()[1]}/a", server.url]
        server.default = lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n") and None
        with pytest.raises(DownloadError, match=r"/a: Connection refused.*file.bin: SSH-2.0"):
            get(urls, tmp_path / "file.bin", attempts=2)


@pytest.mark.parametrize("cut", [None, 1000])
def test_a_web_page_is_not_the_file(server: Server, tmp_path: Path, cut: int | None) -> None:
    """For example a hotel's login page. If it interrupts a download, the part is kept."""
    page = status(200, b"<html>Log in", Content_Type="text/html; charset=utf-8")
    server.will(*([] if cut is None else [file(cut=cut)]), page)
    with pytest.raises(DownloadError, match="the server sent a web page instead"):
        get(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == (set() if cut is None else {"file.bin.part", "file.bin.part.json"})
    if cut is not None:
        assert get(server.will(file()), tmp_path / "file.bin").read_bytes() == CONTENT
        assert server.ranges()[-1] == f"bytes={cut}-"


def test_a_compressed_response_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="compressed the file with gzip"):
        get(server.will(file(headers={"Content-Encoding": "gzip"})), tmp_path / "file.bin")
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("wrong", [299_999, 300_001, 5])
def test_another_length_than_the_known_one_is_refused_before_a_byte_is_kept(
    server: Server, tmp_path: Path, wrong: int
) -> None:
    with pytest.raises(DownloadError, match=f"the file there has {wrong:,} bytes, expected 300,000"):
        get(server.will(file(length=wrong)), tmp_path / "file.bin", size=300_000)
    assert names(tmp_path) == set()


def test_a_length_that_the_server_does_not_keep_gives_no_file(server: Server, tmp_path: Path) -> None:
    server.default = file(length=300_100)
    with pytest.raises(DownloadError):
        get(server.url, tmp_path / "file.bin", attempts=4)
    assert not (tmp_path / "file.bin").exists()


def test_a_file_sent_in_chunks_arrives_and_a_broken_one_does_not(server: Server, tmp_path: Path) -> None:
    assert get(server.will(chunked()), tmp_path / "a").read_bytes() == CONTENT
    with pytest.raises(DownloadError):
        get(server.will(chunked(ends=False)), tmp_path / "b", attempts=1)
    assert not (tmp_path / "b").exists()


def test_a_file_of_unknown_length_needs_a_hash_or_a_size(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="does not send the length"):
        get(server.will(until_the_end), tmp_path / "file.bin")
    for options in ({"sha256": SHA256}, {"size": len(CONTENT)}):
        assert get(server.will(until_the_end), tmp_path / "file.bin", **options).read_bytes() == CONTENT
        (tmp_path / "file.bin").unlink()
    with pytest.raises(DownloadError, match="ended after 300,000 of 300,001"):
        get(server.will(until_the_end), tmp_path / "file.bin", size=300_001, attempts=1)
    with pytest.raises(DownloadError, match="more than the expected 299,999 bytes"):
        get(server.will(until_the_end), tmp_path / "file.bin", size=299_999, attempts=1)
    assert names(tmp_path) == set()


def base64_md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


@pytest.mark.parametrize(
    "stated",
    [
        lambda content: {"Content-MD5": base64_md5(content)},
        lambda content: {"x-ms-blob-content-md5": base64_md5(content)},
        lambda content: {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64_md5(content)}"},
        lambda content: {"x-bz-content-sha1": hashlib.sha1(content).hexdigest()},
    ],
)
def test_what_contradicts_the_servers_checksum_is_not_kept(
    server: Server, tmp_path: Path, stated: Callable[[bytes], dict[str, str]]
) -> None:
    right, wrong = file(headers=stated(CONTENT)), file(headers=stated(OTHER))
    with pytest.raises(DownloadError, match=r"the downloaded file has the (md5|sha1) \w+, expected \w+"):
        get(server.will(wrong), tmp_path / "file.bin")
    assert names(tmp_path) == set()
    urls = [server.will(wrong, file(cut=1000, headers=stated(CONTENT)), right), f"{server.address}/mirror"]
    assert get(urls, tmp_path / "file.bin").read_bytes() == CONTENT
    # Only the first response contains the whole file. The Content-MD5 of the second is that of the rest.
    path = get(server.will(file(cut=1000, headers=stated(CONTENT)), file(headers=stated(OTHER))), tmp_path / "b")
    assert path.read_bytes() == CONTENT


def test_another_content_than_the_known_one_is_not_kept(server: Server, tmp_path: Path) -> None:
    damaged = file(CONTENT[:-1] + b"X")
    with pytest.raises(DownloadError, match="the downloaded file has the sha256"):
        get(server.will(damaged), tmp_path / "file.bin", sha256=SHA256)
    assert names(tmp_path) == set() and len(server.requests) == 1
    urls = [server.will(damaged, file()), f"{server.address}/mirror"]
    assert get(urls, tmp_path / "file.bin", sha256=SHA256).read_bytes() == CONTENT


@pytest.fixture
def secure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with an https address that this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with serving(tls=True) as server:
        yield server


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("hops", [1, 2])
def test_a_redirect_does_not_leave_https(code: int, hops: int, secure: Server, server: Server, tmp_path: Path) -> None:
    server.default = file()
    secure.will(*[status(code, Location=secure.url)] * (hops - 1), status(code, Location=server.url))
    with pytest.raises(DownloadError, match=f"redirects to {server.url}, but only https addresses are followed"):
        get(secure.url, tmp_path / "file.bin")
    assert server.requests == [] and names(tmp_path) == set()
    assert get(
        [secure.will(status(code, Location=server.url)), server.url], tmp_path / "file.bin"
    ).is_file()  # a mirror


def test_redirects_within_https_and_from_http_to_either_are_followed(
    secure: Server, server: Server, tmp_path: Path
) -> None:
    secure.default = server.default = file()
    assert get(secure.will(status(302, Location="/other.bin")), tmp_path / "a").read_bytes() == CONTENT
    assert get(server.will(status(302, Location=secure.url)), tmp_path / "b").read_bytes() == CONTENT
    assert get(server.will(status(302, Location=server.url)), tmp_path / "c").read_bytes() == CONTENT


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "gopher://127.0.0.1/"])
def test_a_redirect_to_another_scheme_is_refused(target: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=re.escape(target)):
        get(server.will(status(302, Location=target)), tmp_path / "file.bin")
    assert names(tmp_path) == set() and len(server.requests) == 1


def test_redirects_are_followed_with_the_range(server: Server, tmp_path: Path) -> None:
    moved = status(302, Location=f"{server.address}/elsewhere")
    path = get(server.will(moved, file(cut=1000), moved, file()), tmp_path / "file.bin")
    assert path.read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/file.bin", "/elsewhere"] * 2
    assert server.ranges() == [None, None, "bytes=1000-", "bytes=1000-"]


def test_a_redirect_in_a_circle_or_to_a_local_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.default = status(302, Location=server.url)
    with pytest.raises(DownloadError, match="302"):
        get(server.url, tmp_path / "file.bin")
    with pytest.raises(DownloadError, match="302"):
        get(server.will(status(302, Location="file:///etc/passwd")), tmp_path / "file.bin")
    assert names(tmp_path) == set()


def test_the_final_error_lists_what_was_tried_and_where_the_file_belongs(server: Server, tmp_path: Path) -> None:
    path, mirror = tmp_path / "file.bin", f"{server.address}/mirror"
    with pytest.raises(DownloadError) as error:
        get([server.will(status(404), status(503)), mirror], path, attempts=1)
    assert str(error.value) == (
        f"cannot download file.bin ({server.url}: 404 Not Found; {mirror}: 503 Service Unavailable, attempt 1 of 1): "
        f"download it elsewhere and copy it to {path}"
    )
    assert isinstance(error.value, OSError)


def test_the_proxy_of_the_environment_is_used_unless_the_host_is_excepted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    server.default = file()
    get("http://gpt2.invalid/models/file.bin", tmp_path / "a")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    get(server.url, tmp_path / "b")
    assert [path for path, _ in server.requests] == ["http://gpt2.invalid/models/file.bin", "/file.bin"]


# Full disks and concurrent downloads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a POSIX limit stands in for the full disk")
def test_on_a_full_disk_the_part_is_kept_and_resumed_later(server: Server, tmp_path: Path) -> None:
    import resource

    content = random.Random(2).randbytes(1_000_001)  # the last write is shortened, not refused
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write .*file\.bin: .* 1,000,000 bytes are kept in file.bin.part"
        ) as error:
            get(server.will(file(content)), tmp_path / "file.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and not isinstance(error.value, DownloadError)
    assert names(tmp_path) == {"file.bin.part", "file.bin.part.json"}
    assert get(server.will(file(content)), tmp_path / "file.bin").read_bytes() == content
    assert server.ranges() == [None, "bytes=1000000-"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"file\.bin: No space left on device") as error:
        get(server.will(file()), tmp_path / "file.bin")
    assert error.value.errno == errno.ENOSPC
    assert len(server.requests) == 1  # no retry, no mirror


def test_threads_that_want_the_same_file_download_it_once(server: Server, tmp_path: Path) -> None:
    server.will(file(cut=1000, stall=0.2), file())
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(server.url, tmp_path / "file.bin"), range(4)))
    assert [path.read_bytes() for path in paths] == [CONTENT] * 4
    assert server.ranges() == [None, "bytes=1000-"]


@pytest.mark.slow
def test_processes_that_want_the_same_file_download_it_once(server: Server, tmp_path: Path) -> None:
    server.will(file(cut=100_000, stall=0.5), file())
    path = tmp_path / "file.bin"
    code = f"from MyGPT.download import download; download({server.url!r}, {str(path)!r}, sleep=id, progress=False)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said.decode()
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-"]


# Response headers


def message(**headers: str) -> Message:
    made = Message()
    for name, value in headers.items():
        made[name.replace("_", "-")] = value
    return made


def test_headers_are_read_as_the_standards_write_them() -> None:
    assert validator(message(ETag='"x"', Last_Modified="d")) == '"x"'
    assert validator(message(ETag='W/"x"', Last_Modified="d")) == "d"
    assert validator(message(ETag='W/"x"')) is None
    assert content_range(message(Content_Range="bytes 10-19/20")) == (10, 20)
    assert content_range(message(Content_Range="bytes 0-19/*")) == (0, None)
    assert content_range(message(Content_Range="bytes */20")) == (None, 20)
    for nonsense in ("", "bytes", "items 0-1/2", "bytes -5/20", "bytes 0-1/2/3"):
        assert content_range(message(Content_Range=nonsense)) == (None, None)
    assert 8 < (retry_after(message(Retry_After=formatdate(time.time() + 10, usegmt=True))) or 0) <= 10
    assert checksums(message(Content_MD5="???", x_bz_content_sha1="none", x_goog_hash="crc32c=AAAAAA==")) == {}


# Named downloads


def test_a_named_text_is_downloaded_once_and_verified(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setitem(sources.DOWNLOADS, "tinyshakespeare", sources.Download(server.url, SHA256))
    server.will(file(), file())
    for _ in range(2):
        assert sources.find_files("tinyshakespeare") == [tmp_path / "tinyshakespeare.txt"]
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == CONTENT
    (tmp_path / "tinyshakespeare.txt").write_text("not Shakespeare")
    sources.find_files("tinyshakespeare")
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_the_error_for_a_named_text_says_where_to_copy_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setitem(sources.DOWNLOADS, "tinyshakespeare", sources.Download(server.will(status(404)), SHA256))
    with pytest.raises(OSError, match=r"copy it to .*tinyshakespeare\.txt"):
        sources.find_files("tinyshakespeare")


@pytest.fixture
def openai(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with a released model whose data file has 1,000 bytes; the vocabulary is the real one."""
    contents = {name: name.encode() for name in released.FILES}
    contents |= {name: (OPENAI_FILES / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    contents["model.ckpt.data-00000-of-00001"] = CONTENT[:1000]
    monkeypatch.setitem(released.DATA_BYTES, "355M", 1000)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        directory, _, name = handler.path.rpartition("/")
        (file(contents[name]) if directory == "/models/355M" and name in contents else status(404))(handler)

    server.default = answer
    return server


def test_gpt2_comes_from_the_given_server_and_only_once(openai: Server, tmp_path: Path) -> None:
    directory = download_gpt2("gpt2-medium", tmp_path, f"{openai.address}/models/", progress=False)
    assert directory == tmp_path / "355M"
    assert names(directory) == set(released.FILES)
    assert (directory / "checkpoint").read_text() == "checkpoint"
    assert (directory / "model.ckpt.data-00000-of-00001").read_bytes() == CONTENT[:1000]
    assert {path for path, _ in openai.requests} == {f"/models/355M/{name}" for name in released.FILES}
    openai.requests.clear()
    assert download_gpt2("355M", tmp_path, "http://127.0.0.1:1", progress=False) == directory
    assert openai.requests == []


def test_gpt2s_server_can_come_from_the_environment(
    openai: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYGPT_GPT2_URL", f"{openai.address}/models")
    assert names(download_gpt2("355M", tmp_path, progress=False)) == set(released.FILES)


def test_a_failed_gpt2_download_lists_the_missing_files(openai: Server, tmp_path: Path) -> None:
    openai.will(file(b"checkpoint"), status(404))
    with pytest.raises(DownloadError) as error:
        download_gpt2("355M", tmp_path, f"{openai.address}/models", progress=False)
    said = str(error.value)
    assert f"{openai.address}/models/355M/hparams.json: 404 Not Found" in said
    assert f"{tmp_path / '355M'} still lacks hparams.json, encoder.json, vocab.bpe, model.ckpt.index" in said
    assert "MYGPT_GPT2_URL" in said


def test_a_vocabulary_that_is_not_openais_is_refused(openai: Server, tmp_path: Path) -> None:
    openai.will(file(b"checkpoint"), file(b"hparams"), file(b"{}"))
    with pytest.raises(DownloadError, match=r"encoder\.json.*sha256"):
        download_gpt2("355M", tmp_path, f"{openai.address}/models", progress=False)
    assert names(tmp_path / "355M") == {"checkpoint", "hparams.json"}


def test_the_public_servers_are_asked_in_turn(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "SERVERS", (f"{server.address}/one", f"{server.address}/two"))
    server.default = status(404)
    with pytest.raises(DownloadError):
        download_gpt2("124M", tmp_path, progress=False)
    assert [path for path, _ in server.requests] == ["/one/124M/checkpoint", "/two/124M/checkpoint"]


def test_the_server_that_had_one_file_is_asked_first_for_the_next(
    openai: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a firewall in front of the first server would cost its timeout for each of the six files."""
    monkeypatch.setattr(released, "SERVERS", (f"{openai.address}/one", f"{openai.address}/models"))
    download_gpt2("355M", tmp_path, progress=False)
    assert [path.split("/")[1] for path, _ in openai.requests] == ["one", *["models"] * 6]


def test_released_sizes_have_exactly_two_names() -> None:
    assert [released_size(name) for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")] == [*released.DATA_BYTES]
    assert released_size("1558M") == "1558M"
    with pytest.raises(ValueError, match="no GPT-2 of the size '117M'; the sizes are 124M, gpt2, 355M, gpt2-medium"):
        released_size("117M")


@pytest.mark.slow
def test_the_data_file_has_four_bytes_per_parameter() -> None:
    import torch

    for size, n_bytes in released.DATA_BYTES.items():
        with torch.device("meta"):
            assert n_bytes == 4 * GPTModel(GPT2_CONFIGS[size]).num_parameters()


# The Hugging Face hub


def test_without_its_library_the_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'mygpt\[hub\]', or copy the repository's files to "):
        download_from_hub("openai-community/gpt2", tmp_path)


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path: Path) -> None:
    """The tests' environment has HF_HUB_OFFLINE=1."""
    with pytest.raises(OSError, match=r"cannot download openai-community/gpt2 .*copy the repository's files to"):
        download_from_hub("openai-community/gpt2", tmp_path)


COMMIT = "0" * 40


def hub_repository(files: dict[str, bytes]) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return the answers of a hub that has one repository with these files."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        sizes = {name: {"size": len(content), "oid": sha1(content)} for name, content in files.items()}
        listing: Any = [{"type": "file", "path": name, **about} for name, about in sizes.items()]
        if not path.startswith(f"/api/models/user/model/tree/{COMMIT}"):
            listing = {"id": "user/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if path.startswith("/api/"):
            return status(200, json.dumps(listing).encode(), Content_Type="application/json")(handler)
        name = path.removeprefix(f"/user/model/resolve/{COMMIT}/").removeprefix("/user/model/resolve/main/")
        if name not in files:
            return status(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)(handler)
        content = files[name]
        body = b"" if handler.command == "HEAD" else content
        headers = {"X-Repo-Commit": COMMIT}
        return file(body, etag=f'"{sha1(content)}"', length=len(content), headers=headers)(handler)

    return answer


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The server, used as the hub by this process."""
    return use_as_hub(server, monkeypatch, tmp_path)


def use_as_hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """Let huggingface_hub use the server, although it reads its environment only when it is imported."""
    from huggingface_hub import constants

    for name, value in (("ENDPOINT", server.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return server


@pytest.mark.parametrize("moved", ["/api/", "/resolve/"])
def test_the_hub_may_not_redirect_to_an_unencrypted_address(
    moved: str, secure: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of huggingface_hub, which other code shares, follows such redirects again afterwards."""
    from huggingface_hub import utils

    use_as_hub(secure, monkeypatch, tmp_path)
    repository = hub_repository({"config.json": b"{}", "model.safetensors": b"weights"})
    server.default = repository

    def answer(handler: BaseHTTPRequestHandler) -> None:
        about = {"X_Repo_Commit": COMMIT, "ETag": '"1"', "X_Linked_Size": "7"}
        leaves = moved in handler.path and "config.json" not in handler.path
        (status(307, Location=server.address + handler.path, **about) if leaves else repository)(handler)

    secure.default = answer
    utils.close_session()  # the next session reads SSL_CERT_FILE
    try:
        with pytest.raises(OSError, match=f"redirects to {server.address}/.* only https addresses"):
            download_from_hub("user/model", tmp_path / "gpt2")
        assert server.requests == []
        hooks = utils.get_session().event_hooks["request"]
        assert utils.get_session().get(f"{secure.address}/api/models/user/model").status_code == 200 and len(hooks) == 1
    finally:
        utils.close_session()


def test_the_hubs_token_is_not_sent_to_another_server(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    repository = hub_repository(files)
    with serving() as other:
        other.default = repository
        elsewhere = f"http://localhost:{other.http.server_port}"

        def answer(handler: BaseHTTPRequestHandler) -> None:
            content, name = b"weights", handler.path.rpartition("/")[2]
            moved = {"Location": elsewhere + handler.path, "X_Repo_Commit": COMMIT, "ETag": sha1(content)}
            leaves = name == "model.safetensors"
            (status(302, **moved, X_Linked_Size="7") if leaves else repository)(handler)

        hub.default = answer
        download_from_hub("user/model", tmp_path / "gpt2")
        assert {headers["Authorization"] for _, headers in hub.requests} == {"Bearer hf_secret"}
        assert other.requests and all(headers["Authorization"] is None for _, headers in other.requests)


CONTENT_OF: dict[str, bytes] = {
    name: name.encode() for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md", "a/b.json")
}


@pytest.mark.parametrize(
    ("weights", "ignored"),
    [
        (["model.safetensors"], ["pytorch_model.bin", "model.safetensors.index.json", "rust_model.ot"]),
        (["pytorch_model.bin"], ["tf_model.h5"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], []),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], ["flax_model.msgpack"]),
    ],
)
def test_a_repository_is_downloaded_once_with_its_shards_and_template(
    weights: list[str], ignored: list[str], hub: Server, tmp_path: Path
) -> None:
    """The repository has no vocab.json. The second call needs no network."""
    index = json.dumps({"weight_map": {name: name for name in weights if "-of-" in name}}).encode()
    files = {**CONTENT_OF, "template.json": b"{}"}
    files |= {name: index if name.endswith(".index.json") else name.encode() for name in [*weights, *ignored]}
    hub.default = hub_repository(files)
    directory = download_from_hub("user/model", tmp_path / "gpt2")
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    expected = ["config.json", "generation_config.json", "tokenizer.json", "template.json", *weights]
    assert found == {name: files[name] for name in expected}
    n_requests = len(hub.requests)
    assert download_from_hub("user/model", tmp_path / "gpt2") == directory
    assert len(hub.requests) == n_requests


@pytest.mark.parametrize("completed", ["by the next call", "by hand"])
def test_an_interrupted_download_is_not_taken_for_a_complete_one(
    completed: str, hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config and the weights arrive, but the template does not."""
    files = {**CONTENT_OF, "model.safetensors": b"weights", "template.json": b"{}"}
    complete, broken = hub_repository(files), status(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
    hub.default = lambda handler: (broken if handler.path.endswith("template.json") else complete)(handler)
    directory = tmp_path / "gpt2"
    for is_offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
        with pytest.raises(OSError, match="cannot download user/model"):
            download_from_hub("user/model", directory)
        for name in files.keys() - {"template.json", "a/b.json"}:  # they arrive in any order
            (directory / name).write_bytes(files[name])
    if completed == "by hand":  # still offline
        (directory / "template.json").write_bytes(b"{}")
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub.default = complete
    assert download_from_hub("user/model", directory) == directory
    assert (directory / "template.json").read_bytes() == b"{}"


def test_a_copy_made_by_hand_needs_neither_network_nor_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert download_from_hub("user/model", tmp_path) == tmp_path


def test_a_repository_without_a_model_is_refused(hub: Server, tmp_path: Path) -> None:
    hub.default = hub_repository({"config.json": b"{}", "README.md": b""})
    with pytest.raises(OSError, match=r"\(it does not contain config.json and model.safetensors or pytorch_model.bin"):
        download_from_hub("user/model", tmp_path / "gpt2")


@pytest.mark.slow
def test_a_tuned_model_on_the_hub_is_opened_with_its_tokenizer_and_template(server: Server, tmp_path: Path) -> None:
    """A process opens the model by the name of its repository, in which are all files that `save_pretrained` writes."""
    import torch

    tokenizer = BPETokenizer.train("the cat sat by the fire " * 5, 280, progress=False)
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(vocab_size=280, context_length=16, emb_dim=24, n_heads=3, n_layers=2)).eval()
    model.save_pretrained(tmp_path / "saved", tokenizer)
    load_template("book").save(tmp_path / "saved")
    server.default = hub_repository({path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    code = """
import torch
from MyGPT import open_model
from MyGPT.data.templates import load_template
from MyGPT.opening import find_model_files
model, tokenizer = open_model("hf://user/model", "cpu")
assert find_model_files("hf://user/model").template() == load_template("book")
print(tokenizer.encode("the cat"), model(torch.tensor([[1, 2, 3]])).sum().item())
"""
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]])).sum().item()
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "MYGPT_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids, said = done.stdout.rsplit(maxsplit=1)
    assert ids == str(tokenizer.encode("the cat")) and float(said) == pytest.approx(expected, abs=1e-4)


# Files beside a download that are damaged, or come from somebody else


@pytest.mark.parametrize(
    "values",
    [
        [], {"url": 5}, {"total": "x"}, {"etag": []}, {"validator": {}}, {"checksums": []}, {"checksums": {"rot13": "x"}},
        {"checksums": {"md5": 5}}, {"modified": 1.5}, {"extra": 1},
    ],
)  # fmt: skip
def test_a_description_of_a_part_with_wrong_values_starts_the_download_again(
    values: Any, server: Server, tmp_path: Path
) -> None:
    url = server.will(file(cut=100_000), file(), file())
    with pytest.raises(DownloadError):
        download(url, tmp_path / "a", progress=False, attempts=1)
    info = tmp_path / "a.part.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), **values} if isinstance(values, dict) else values))
    download(url, tmp_path / "a", progress=False, attempts=2, sleep=lambda seconds: None)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("entry", [5, [], {"url": 5, "size": "x"}, {"sha256": []}])
def test_a_list_of_downloads_with_wrong_values_is_ignored(entry: Any, server: Server, tmp_path: Path) -> None:
    download(server.will(file(), file()), tmp_path / "a", progress=False)
    (tmp_path / ".downloads.json").write_text(json.dumps({"a": entry}))
    address_of(tmp_path / "a")
    download(server.url, tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_part_that_is_a_link_is_not_written_through(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.part").symlink_to(tmp_path / "mine")
    download(server.will(file()), tmp_path / "a", progress=False)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a").read_bytes() == CONTENT and not (tmp_path / "a").is_symlink()


def test_a_description_left_by_a_kill_after_the_last_rename_is_removed(server: Server, tmp_path: Path) -> None:
    download(server.will(file()), tmp_path / "a", progress=False)
    (tmp_path / "a.part.json").write_text("{}")
    download(server.url, tmp_path / "a", progress=False)
    assert names(tmp_path) == {"a"}
