"""Files from the network: resumed where they broke off, checked, and under their final name only when whole.

While a file comes it is `NAME.part`, and `NAME.part.json` says whose bytes those are. `.downloads.json` remembers what
arrived, so that a whole file costs no network call. Only urllib speaks HTTP here, and obeys http_proxy and no_proxy.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import Any

from MyGPT.files import atomic_write, sha256_of
from MyGPT.http_headers import checksums, content_length, content_range, retry_after, validator

BLOCK_BYTES = 1 << 18
LONGEST_WAIT = 60.0
"""Seconds. A server that asks for more is left for the next one."""


class DownloadError(OSError):
    """No address gave the file; the message says what was tried, and what to copy where by hand."""


class _Refused(Exception):
    """This address does not have our file, however often it is asked."""


class _Failed(Exception):
    """This request went wrong, the next may not; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def download(
    urls: str | Sequence[str],
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 5,
    sleep: Callable[[float], object] = time.sleep,
) -> Path:
    """`path`, downloaded first from one of `urls` (mirrors, in order) unless it is there and whole.

    It must have `size` bytes and the hexadecimal `sha256`, where given, and the length and checksums that the server
    states. A file that contradicts nothing given or remembered is used as it is: it may have been copied by hand.
    A mirror is left once `attempts` requests in a row brought nothing new; `timeout` is in seconds without a byte. If none
    has the file: DownloadError. If it cannot be written: OSError. What came is kept, and the next call goes on from there.
    Of several threads or processes that want the same file one downloads it and the others wait.
    """
    from filelock import FileLock
    from tqdm import tqdm

    path = Path(path)
    urls = [urls] if isinstance(urls, str) else urls
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"an address begins with http:// or https://, got {url!r}")
    if _is_whole(path, sha256, size):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with (
        tqdm(desc=path.name, unit="B", unit_scale=True, disable=not progress) as bar,
        FileLock(path.parent / ".downloads.lock"),
    ):
        if _is_whole(path, sha256, size):  # whoever had the lock has downloaded it
            return path
        for url in urls:
            try:
                _Transfer(url, path, sha256, size, timeout, bar).run(attempts, sleep)
                return path
            except _Refused as refusal:
                failures.append(f"{url}: {refusal}")
    raise DownloadError(f"cannot download {path.name} ({'; '.join(failures)}); get it elsewhere and copy it to {path}")


def cache_directory() -> Path:
    """Where downloads are kept: $MYGPT_CACHE, or mygpt in the user's cache directory."""
    if "MYGPT_CACHE" in os.environ:
        return Path(os.environ["MYGPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mygpt"


def address_of(path: str | os.PathLike[str]) -> str | None:
    """Where `download` found a file; None if it did not bring it."""
    address: str | None = _read_json(_manifest(Path(path))).get(Path(path).name, {}).get("url")
    return address


def _is_whole(path: Path, sha256: str | None, size: int | None) -> bool:
    if not path.is_file():
        return False
    found, remembered = path.stat(), _read_json(_manifest(path)).get(path.name, {})
    expected = sha256.lower() if sha256 else remembered.get("sha256")
    if found.st_size != (remembered.get("size", found.st_size) if size is None else size):
        return False
    if expected == remembered.get("sha256") and found.st_mtime_ns == remembered.get("mtime_ns", found.st_mtime_ns):
        return True  # untouched since it was checked, or nothing is known of it
    return sha256_of(path) == expected


@dataclass
class _About:
    """Whose bytes the part holds."""

    url: str
    total: int | None
    etag: str | None
    modified: str | None
    validator: str | None
    checksums: dict[str, str]
    resumed: bool = False

    def contradicts(self, headers: Message, total: int | None) -> bool:
        """Whether an answer is about another version of the file; not every server heeds If-Range."""
        stated = ((self.etag, headers["ETag"]), (self.modified, headers["Last-Modified"]), (self.total, total))
        return any(None not in pair and pair[0] != pair[1] for pair in stated)


class _Transfer:
    """One file from one address."""

    def __init__(self, url: str, path: Path, sha256: str | None, size: int | None, timeout: float, bar: Any) -> None:
        self.url, self.path, self.sha256, self.size, self.timeout, self.bar = url, path, sha256, size, timeout, bar
        self.part = path.with_name(f"{path.name}.part")
        self.about_path = path.with_name(f"{path.name}.part.json")
        self.opener = urllib.request.build_opener()  # urlopen would stay with the proxies of its first call
        try:
            self.about: _About | None = _About(**_read_json(self.about_path))
        except TypeError:
            self.about = None

    def run(self, attempts: int, sleep: Callable[[float], object]) -> None:
        """Brings the file to its place, or raises _Refused with the reason."""
        failures, furthest = 0, self._position()
        while True:
            try:
                self._request()
                return self._finish()
            except OSError as error:  # of the disk: the network's are _Failed
                kept = f"{self._position():,} bytes in {self.part.name} are kept for the next call to go on from"
                raise OSError(error.errno, f"cannot write {self.path}: {_words(error)}; {kept}") from error
            except _Failed as failure:
                position = self._position()
                failures = 1 if position > furthest else failures + 1
                furthest = max(furthest, position)
                if failures >= attempts:
                    raise _Refused(f"{failure}, attempt {failures} of {attempts}") from None
                backoff = min(LONGEST_WAIT, 2.0 ** (failures - 1)) * random.SystemRandom().uniform(0.5, 1)
                wait = backoff if failure.wait is None else failure.wait
                self.bar.set_postfix_str(f"{failure}, again in {wait:.0f} s")
                sleep(wait)
                self.bar.set_postfix_str("")

    def _position(self) -> int:
        """How many bytes there are to go on from: none if they are of another address or cannot be told from a newer file's."""
        about = self.about
        if about is None or about.url != self.url or not about.validator or self.size not in (None, about.total):
            return 0
        return self.part.stat().st_size if self.part.is_file() else 0

    def _request(self) -> None:
        """Brings the part to its end by one request."""
        start, about = self._position(), self.about
        headers = {"User-Agent": "MyGPT", "Accept-Encoding": "identity"}
        if about is not None and start:
            if start == about.total:
                return  # a kill came between the last byte and the check
            headers |= {"Range": f"bytes={start}-", "If-Range": str(about.validator)}
        with self._open(headers) as response:
            if about is None or not start or response.status not in (206, 416):
                _check_answer(response)
                self._receive(response, self._begin(response))
                return
            first, total = content_range(response.headers)
            fits = first == start if response.status == 206 else total == start  # 416: there is nothing after our bytes
            if not fits or about.contradicts(response.headers, total):
                self._drop()
                raise _Failed("the file on the server is not the one that was begun")
            if response.status == 206:
                about.resumed = True
                self._write_about(about)
                self._receive(response, about.total or total)

    def _open(self, headers: Mapping[str, str]) -> Any:
        try:
            return self.opener.open(urllib.request.Request(self.url, headers=dict(headers)), timeout=self.timeout)
        except urllib.error.HTTPError as answer:
            return answer
        except (OSError, HTTPException) as error:
            raise _Failed(_words(getattr(error, "reason", error))) from None

    def _begin(self, response: Any) -> int | None:
        """An empty part for the whole file, which the server is about to send; its length."""
        headers, total = response.headers, content_length(response.headers)
        if None not in (total, self.size) and total != self.size:
            raise _Refused(f"it has {total:,} bytes there, expected {self.size:,}")
        if total is None and self.size is None and self.sha256 is None and not response.chunked:
            raise _Refused("the server does not say how long it is")
        total = self.size if total is None else total
        self.part.write_bytes(b"")
        tag, date = headers["ETag"], headers["Last-Modified"]
        self._write_about(_About(self.url, total, tag, date, validator(headers), checksums(headers)))
        return total

    def _write_about(self, about: _About) -> None:
        self.about = about
        with atomic_write(self.about_path) as file:
            json.dump(asdict(about), file)

    def _receive(self, response: Any, total: int | None) -> None:
        position = self.part.stat().st_size
        self.bar.total, self.bar.initial, self.bar.n = total, position, position
        with open(self.part, "ab", buffering=0) as file:  # unbuffered: what came outlives our being killed
            while (total is None or position <= total) and (block := _read(response)):
                position += len(block)
                self.bar.update(len(block))
                while block:
                    block = block[file.write(block) :]
            os.fsync(file.fileno())
        if total is not None and position > total:
            self._drop()
            raise _Refused(f"more than the expected {total:,} bytes came")
        if total is not None and position < total:
            raise _Failed(f"the connection ended after {position:,} of {total:,} bytes")

    def _finish(self) -> None:
        """Checks the part, gives it its name and remembers it."""
        assert self.about is not None
        found = sha256_of(self.part)
        checks = [("sha256", self.sha256.lower(), found)] if self.sha256 else []
        checks += [(kind, value, _digest(self.part, kind)) for kind, value in self.about.checksums.items()]
        for kind, expected, value in checks:
            if value != expected:
                # What was glued together from several answers may be wrong where they meet; one answer would come again.
                failure = _Failed if self.about.resumed else _Refused
                self._drop()
                raise failure(f"what came has the {kind} {value}, expected {expected}")
        os.replace(self.part, self.path)
        self.about_path.unlink()
        stat, manifest = self.path.stat(), _read_json(_manifest(self.path))
        entry = {"url": self.url, "size": stat.st_size, "sha256": found, "mtime_ns": stat.st_mtime_ns}
        with atomic_write(_manifest(self.path)) as file:
            json.dump({**manifest, self.path.name: entry}, file, indent=2)

    def _drop(self) -> None:
        self.part.unlink(missing_ok=True)
        self.about_path.unlink(missing_ok=True)
        self.about = None


def _check_answer(response: Any) -> None:
    """Raises unless the whole file is about to come."""
    status, headers = response.status, response.headers
    reason, wait = f"{status} {response.reason}", retry_after(response.headers)
    if status in (408, 425, 429) or status >= 500:
        if wait is not None and wait > LONGEST_WAIT:
            raise _Refused(f"{reason}, to be asked again in {wait:.0f} s")
        raise _Failed(reason, wait)
    if status != 200:
        raise _Refused(reason)
    if headers.get_content_type() == "text/html":
        raise _Refused("a web page came instead")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _Refused(f"it came packed as {headers['Content-Encoding']}, which was not asked for")


def _read(response: Any) -> bytes:
    """The next bytes as soon as there are some; none at the end."""
    try:
        return response.read1(BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise _Failed(_words(error)) from None


def _words(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _manifest(path: Path) -> Path:
    return path.parent / ".downloads.json"


def _read_json(path: Path) -> dict[str, Any]:
    """What we once wrote there; nothing if it is missing or damaged, which costs a download at most."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
