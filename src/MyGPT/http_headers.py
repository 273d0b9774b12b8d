"""What the headers of an HTTP answer say about a file: which version, which part of it, which checksums."""

from __future__ import annotations

import base64
import binascii
import email.utils
import re
import time
from email.message import Message


def validator(headers: Message) -> str | None:
    """What If-Range takes, RFC 9110 13.1.5: a strong ETag, else the date of the last change; None if there is neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def content_range(headers: Message) -> tuple[int | None, int | None]:
    """First byte and total length of the file, each None where it is not stated."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    first, total = match.groups()
    return None if first is None else int(first), None if total is None else int(total)


def content_length(headers: Message) -> int | None:
    """Bytes of the body; None if it is sent in chunks or until the connection ends."""
    length = headers.get("Content-Length", "").strip()
    return int(length) if length.isdecimal() and "Transfer-Encoding" not in headers else None


def checksums(headers: Message) -> dict[str, str]:
    """Algorithm to hexadecimal digest of the whole file, in an answer that brings the whole: what Azure, Google and
    Backblaze state, and the Content-MD5 of RFC 1864."""
    stated = {}
    google = (item.strip() for header in headers.get_all("x-goog-hash", []) for item in header.split(","))
    md5s = [item.removeprefix("md5=") for item in google if item.startswith("md5=")]
    for md5 in [*md5s, headers.get("x-ms-blob-content-md5", ""), headers.get("Content-MD5", "")]:
        digest = _from_base64(md5)
        if len(digest) == 16:
            stated["md5"] = digest.hex()
    sha1 = headers.get("x-bz-content-sha1", "").lower()  # "none" if the file was uploaded in pieces
    if re.fullmatch(r"[0-9a-f]{40}", sha1):
        stated["sha1"] = sha1
    return stated


def retry_after(headers: Message) -> float | None:
    """Seconds to wait before the next request; the header has them, or a date."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _from_base64(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return b""
