"""Downloads that resume after an interruption, and get their final name only when they are complete and verified.

An unfinished download is stored as `NAME.part`; `NAME.part.json` stores its address and the version of the file.
Finished downloads are listed in `.downloads.json`, so a complete file needs no network. Requests use urllib and obey
http_proxy and no_proxy.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.message import Message
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import Any

from MyGPT.files import atomic_write, sha256_of

BLOCK_BYTES = 1 << 18
LONGEST_WAIT = 60.0
"""The longest wait before a retry, in seconds. If a server asks for more, the next mirror is tried instead."""
_FINISHED = ".downloads.json"


class DownloadError(OSError):
    """Error raised when no mirror provided the file. Its message gives the reason for each mirror, and advice."""


class _PermanentError(Exception):
    """An error for which a retry at the same address is useless, such as HTTP status 404."""


class _TemporaryError(Exception):
    """An error after which a retry may succeed. `wait` is how many seconds the server asked to wait, or None."""

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
    """Download a file to `path`, unless it is already complete, and return `path`.

    A download must have the given `sha256` and `size`, and the length and the checksums that the server sends. A
    file that exists already is kept if it agrees with `sha256`, `size` and `.downloads.json` (the list of finished
    downloads), as far as they are given. After an error the received bytes are kept, and the next call resumes after
    them. If several threads or processes need the same file, one of them downloads it and the others wait.

    Args:
        urls: one address, or mirrors that are tried in this order.
        path: the file to write. Missing directories are created.
        sha256, size: the expected hash in hexadecimal and the expected number of bytes.
        progress: show a progress bar.
        timeout: seconds without data after which a request fails.
        attempts: after this many consecutive requests without new data, the next mirror is tried.
        sleep: the function that waits between two requests. Tests replace it.

    Raises:
        DownloadError: no mirror provided the file.
        OSError: the file cannot be written.
        ValueError: an address does not begin with http:// or https://.
    """
    from filelock import FileLock

    from MyGPT.progress import progress_bar

    path = Path(path)
    urls = [urls] if isinstance(urls, str) else urls
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"an address must begin with http:// or https://, got {url!r}")
    if _is_complete(path, sha256, size):
        with contextlib.suppress(OSError):  # A cache that cannot be written is used as it is.
            _info_path(path).unlink(missing_ok=True)  # left by a process that was killed when the file was complete
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    bar = progress_bar(progress, desc=path.name, unit="B", unit_scale=True)
    with bar, FileLock(path.parent / ".downloads.lock"):
        if _is_complete(path, sha256, size):  # another process had the lock and downloaded it
            return path
        for url in urls:
            try:
                _Transfer(url, path, sha256, size, timeout, bar).run(attempts, sleep)
                return path
            except _PermanentError as refusal:
                failures.append(f"{url}: {refusal}")
    tried = "; ".join(failures)
    raise DownloadError(f"cannot download {path.name} ({tried}): download it elsewhere and copy it to {path}")


def cache_directory() -> Path:
    """Return the directory for downloads: $MYGPT_CACHE if set, else $XDG_CACHE_HOME/mygpt, else ~/.cache/mygpt.

    An empty variable counts as not set. A relative path in XDG_CACHE_HOME is ignored, as the XDG Base Directory
    Specification demands. A relative path in MYGPT_CACHE raises ValueError: each directory would have its own cache.
    """
    own, common = os.environ.get("MYGPT_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    if own and not Path(own).is_absolute():
        raise ValueError(f"MYGPT_CACHE must be an absolute path, got {own!r}: write {os.path.abspath(own)}")
    if own:
        return Path(own)
    return (common if common.is_absolute() else Path.home() / ".cache") / "mygpt"


def address_of(path: str | os.PathLike[str]) -> str | None:
    """Return the URL from which `download` got the file at `path`, or None if `download` did not write this file."""
    address: str | None = _read_json(Path(path).with_name(_FINISHED)).get(Path(path).name, {}).get("url")
    return address


def _is_complete(path: Path, sha256: str | None, size: int | None) -> bool:
    """Return whether `path` is a file with this hash and size.

    If `sha256` or `size` is None, the value recorded for the file in `.downloads.json` is used, if there is one.
    """
    if not path.is_file():
        return False
    found, recorded = path.stat(), _read_json(path.with_name(_FINISHED)).get(path.name, {})
    expected = sha256.lower() if sha256 else recorded.get("sha256")
    if found.st_size != (recorded.get("size", found.st_size) if size is None else size):
        return False
    if expected == recorded.get("sha256") and found.st_mtime_ns == recorded.get("mtime_ns", found.st_mtime_ns):
        return True  # not modified since it was verified, or nothing is known about it
    return sha256_of(path) == expected


def _info_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.json")


@dataclass
class _PartInfo:
    """The URL and version of the file whose first bytes are in a `.part` file. It is stored as `.part.json`."""

    url: str = ""
    total: int | None = None
    etag: str | None = None
    modified: str | None = None
    validator: str | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    resumed: bool = False

    def contradicts(self, headers: Message, total: int | None) -> bool:
        """Return whether response headers or the file length `total` show that the file has changed on the server."""
        stated = ((self.etag, headers["ETag"]), (self.modified, headers["Last-Modified"]), (self.total, total))
        return any(None not in pair and pair[0] != pair[1] for pair in stated)


class _Transfer:
    """The download of one file from one URL. The received bytes are stored in a `.part` file until all have arrived."""

    def __init__(self, url: str, path: Path, sha256: str | None, size: int | None, timeout: float, bar: Any) -> None:
        self.url, self.path, self.sha256, self.size, self.timeout, self.bar = url, path, sha256, size, timeout, bar
        self.part = path.with_name(f"{path.name}.part")
        self.info_path = _info_path(path)
        # Not urlopen, which would keep the proxies of its first call.
        self.opener = urllib.request.build_opener(_SafeRedirects())
        try:
            self.info = _PartInfo(**_read_json(self.info_path))
        except TypeError:
            self.info = _PartInfo()

    def run(self, attempts: int, sleep: Callable[[float], object]) -> None:
        """Download the file to `self.path`. `sleep` is called to wait between two requests.

        Raises _PermanentError if the address cannot provide the file, or after `attempts` consecutive requests without
        new data. Raises OSError if the file cannot be written.
        """
        failures, furthest = 0, self._position()
        while True:
            try:
                self._request()
                return self._finish()
            except OSError as error:  # from the disk; network errors are raised as _TemporaryError
                kept = f"{self._position():,} bytes are kept in {self.part.name}, where the next call resumes"
                raise OSError(error.errno, f"cannot write {self.path}: {_reason(error)}; {kept}") from error
            except _TemporaryError as failure:
                position = self._position()
                failures = 1 if position > furthest else failures + 1
                furthest = max(furthest, position)
                if failures >= attempts:
                    raise _PermanentError(f"{failure}, attempt {failures} of {attempts}") from None
                backoff = min(LONGEST_WAIT, 2.0 ** (failures - 1)) * random.SystemRandom().uniform(0.5, 1)
                wait = backoff if failure.wait is None else failure.wait
                self.bar.set_postfix_str(f"{failure}, retrying in {wait:.0f} s")
                sleep(wait)
                self.bar.set_postfix_str("")

    def _position(self) -> int:
        """Return how many bytes of the `.part` file can be kept: all of them, or 0 if the download must start again.

        It must start again if the bytes are from another URL, if the version of the file is unknown, or if the file
        does not have the expected size.
        """
        info = self.info
        if info.url != self.url or not info.validator or self.size not in (None, info.total):
            return 0
        return self.part.stat().st_size if self.part.is_file() else 0

    def _request(self) -> None:
        """Send one HTTP request and store the response's body in the `.part` file.

        If some bytes of the file are on disk already, only the missing bytes are requested, otherwise the whole file.
        """
        start, info = self._position(), self.info
        headers = {"User-Agent": "MyGPT", "Accept-Encoding": "identity"}
        if start and start == info.total:
            return  # the process was killed between the last byte and the verification
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": str(info.validator)}
        with self._open(headers) as response:
            if not start or response.status not in (206, 416):
                _check_response(response)
                self._receive(response, self._begin(response))
                return
            first, total = content_range(response.headers)
            fits = first == start if response.status == 206 else total == start  # 416: no bytes follow ours
            if not fits or info.contradicts(response.headers, total):
                self._drop()
                raise _TemporaryError("the file on the server has changed")
            if response.status == 206:
                info.resumed = True
                self._write_info(info)
                self._receive(response, info.total or total)

    def _open(self, headers: Mapping[str, str]) -> Any:
        """Send a GET request with these headers and return the response, also if its status is an error such as 404."""
        try:
            return self.opener.open(urllib.request.Request(self.url, headers=dict(headers)), timeout=self.timeout)
        except urllib.error.HTTPError as answer:
            return answer
        except (OSError, HTTPException) as error:
            raise _TemporaryError(_reason(getattr(error, "reason", error))) from None

    def _begin(self, response: Any) -> int | None:
        """Create an empty `.part` file, and store the file's version from the response's headers in `.part.json`.

        Return the length that the whole file will have, or None if it is unknown.
        """
        headers, total = response.headers, content_length(response.headers)
        if None not in (total, self.size) and total != self.size:
            raise _PermanentError(f"the file there has {total:,} bytes, expected {self.size:,}")
        if total is None and self.size is None and self.sha256 is None and not response.chunked:
            raise _PermanentError("the server does not send the length of the file")
        total = self.size if total is None else total
        self.part.write_bytes(b"")
        tag, date = headers["ETag"], headers["Last-Modified"]
        self._write_info(_PartInfo(self.url, total, tag, date, validator(headers), checksums(headers)))
        return total

    def _write_info(self, info: _PartInfo) -> None:
        self.info = info
        with atomic_write(self.info_path) as file:
            json.dump(asdict(info), file)

    def _receive(self, response: Any, total: int | None) -> None:
        """Append the body of the response to the `.part` file.

        `total` is the length that the complete file must have, or None if it is unknown.
        """
        position = self.part.stat().st_size
        self.bar.total, self.bar.initial, self.bar.n = total, position, position
        # Unbuffered, so that received bytes survive if the process is killed.
        with open(self.part, "ab", buffering=0) as file:
            while (total is None or position <= total) and (block := _read(response)):
                position += len(block)
                self.bar.update(len(block))
                while block:
                    block = block[file.write(block) :]
            os.fsync(file.fileno())
        if total is not None and position > total:
            self._drop()
            raise _PermanentError(f"the server sent more than the expected {total:,} bytes")
        if total is not None and position < total:
            raise _TemporaryError(f"the connection ended after {position:,} of {total:,} bytes")

    def _finish(self) -> None:
        """Verify the checksums of the `.part` file, rename it to `self.path`, and record it in `.downloads.json`."""
        found = sha256_of(self.part)
        checks = [("sha256", self.sha256.lower(), found)] if self.sha256 else []
        checks += [(kind, value, _digest(self.part, kind)) for kind, value in self.info.checksums.items()]
        for kind, expected, value in checks:
            if value != expected:
                # A part from several responses may mix two versions, so try again. A single response would only repeat.
                failure = _TemporaryError if self.info.resumed else _PermanentError
                self._drop()
                raise failure(f"the downloaded file has the {kind} {value}, expected {expected}")
        os.replace(self.part, self.path)
        self.info_path.unlink()
        stat, finished = self.path.stat(), self.path.with_name(_FINISHED)
        entry = {"url": self.url, "size": stat.st_size, "sha256": found, "mtime_ns": stat.st_mtime_ns}
        entries = _read_json(finished) | {self.path.name: entry}
        with atomic_write(finished) as file:
            json.dump(entries, file, indent=2)

    def _drop(self) -> None:
        """Delete the `.part` file and its description in `.part.json`."""
        self.part.unlink(missing_ok=True)
        self.info_path.unlink(missing_ok=True)
        self.info = _PartInfo()


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https addresses, and to http addresses only from a server that is itself reached over http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Any:
        """Return the request for a redirect to `newurl`. Raises _PermanentError if this address is not allowed."""
        problem = redirect_problem(req.full_url, newurl)
        if problem is not None:
            raise _PermanentError(problem)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def redirect_problem(source: str, target: str) -> str | None:
    """Return why a redirect from the URL `source` to `target` must not be followed, or None if it may be.

    A redirect may not leave https, because everyone on the way could then change the file, and may lead only to a web server.
    """
    schemes = ("https",) if urllib.parse.urlsplit(source).scheme == "https" else ("http", "https")
    if urllib.parse.urlsplit(target).scheme in schemes:
        return None
    return f"the server redirects to {target:.200}, but only {' and '.join(schemes)} addresses are followed from here"


def _check_response(response: Any) -> None:
    """Raise an error unless an HTTP response is the whole file: status 200, not compressed and not a web page."""
    status, headers = response.status, response.headers
    reason, wait = f"{status} {response.reason}", retry_after(response.headers)
    if status in (408, 425, 429) or status >= 500:
        if wait is not None and wait > LONGEST_WAIT:
            raise _PermanentError(f"{reason}, and the server asks to wait {wait:.0f} s")
        raise _TemporaryError(reason, wait)
    if status != 200:
        raise _PermanentError(reason)
    if headers.get_content_type() == "text/html":
        raise _PermanentError("the server sent a web page instead")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _PermanentError(f"the server compressed the file with {headers['Content-Encoding']} without being asked")


def _read(response: Any) -> bytes:
    """Wait until some bytes of the response's body have arrived, and return them; return b"" at the end of the body."""
    try:
        return response.read1(BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise _TemporaryError(_reason(error)) from None


def _reason(error: object) -> str:
    """Return an error's message with the error number and file name left out, or its class name if the message is empty."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _digest(path: Path, algorithm: str) -> str:
    """Return the hexadecimal checksum of a file. `algorithm` is the name of a hash function, such as "md5"."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def validator(headers: Message) -> str | None:
    """Return the ETag of a file if it is a strong one, else its Last-Modified, else None.

    With this value in the header If-Range (RFC 9110, 13.1.5), a download is resumed only if the file has not changed.
    """
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def content_range(headers: Message) -> tuple[int | None, int | None]:
    """Return the position of the first byte sent and the length of the whole file, from the header Content-Range.

    A value that the header does not give is None.
    """
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    first, total = (None if number is None else int(number) for number in match.groups())
    return first, total


def content_length(headers: Message) -> int | None:
    """Return the number of bytes in the response's body, or None if the headers do not say it (chunked encoding)."""
    length = headers.get("Content-Length", "").strip()
    return int(length) if length.isdecimal() and "Transfer-Encoding" not in headers else None


def checksums(headers: Message) -> dict[str, str]:
    """Return the file's checksums in hexadecimal: a dict with the keys "md5" and "sha1", if the headers contain them.

    Reads the headers that Azure, Google and Backblaze send, and Content-MD5 (RFC 1864). The headers must belong to a
    response with the whole file, because Content-MD5 describes only the bytes sent.
    """
    digests = {}
    google = re.findall(r"\bmd5=([^\s,]+)", ",".join(headers.get_all("x-goog-hash", [])))
    for md5 in [*google, headers.get("x-ms-blob-content-md5", ""), headers.get("Content-MD5", "")]:
        if re.fullmatch(r"[A-Za-z0-9+/]{22}==", md5):  # 16 bytes in base64
            digests["md5"] = base64.b64decode(md5).hex()
    sha1 = headers.get("x-bz-content-sha1", "").lower()  # "none" if the file was uploaded in pieces
    if re.fullmatch(r"[0-9a-f]{40}", sha1):
        digests["sha1"] = sha1
    return digests


def retry_after(headers: Message) -> float | None:
    """Return how many seconds to wait, from the header Retry-After (seconds or a date).

    Return None if the header is missing or invalid.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
