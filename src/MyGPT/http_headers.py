"""Parsers for the HTTP response headers that describe a file: its version, byte range, length and checksums."""

from __future__ import annotations

import base64
import email.utils
import re
import time
from email.message import Message


def validator(headers: Message) -> str | None:
    """Return the value for If-Range (RFC 9110, 13.1.5): a strong ETag, else the date of the last change, else None."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def content_range(headers: Message) -> tuple[int | None, int | None]:
    """Return the position of the first byte and the total length of the file; each is None if it is not given."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    first, total = (None if number is None else int(number) for number in match.groups())
    return first, total


def content_length(headers: Message) -> int | None:
    """Return the number of bytes of the body, or None if it is sent in chunks or ends with the connection."""
    length = headers.get("Content-Length", "").strip()
    return int(length) if length.isdecimal() and "Transfer-Encoding" not in headers else None


def checksums(headers: Message) -> dict[str, str]:
    """Return the hexadecimal digests of the whole file, by algorithm. The response must contain the whole file.

    Reads the headers of Azure, Google and Backblaze, and the Content-MD5 of RFC 1864.
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
    """Return the seconds to wait before the next request, from a number or a date; None if neither is given."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
