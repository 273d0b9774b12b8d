"""Tests of compressed files (.zst) and Parquet files, written by zstandard, pyarrow and pandas."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from MyGPT.data import formats, sources
from MyGPT.data.formats import open_data, read_data, read_parquet
from MyGPT.data.records import read_records
from MyGPT.data.sources import read_documents, read_pieces
from MyGPT.evaluation.protocols import read_texts
from places import ALICE

TEXTS = ["one", "", "zwei\né", ALICE[:5000]]


def zst(content: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


@pytest.mark.parametrize("name", ["a.txt.zst", "a.TXT.ZST"])
def test_texts_may_consist_of_several_frames(tmp_path: Path, name: str) -> None:
    middle = len(ALICE) // 2
    parts = [zst(ALICE[:middle].encode()), zst(b""), zst(ALICE[middle:].encode(), level=19)]
    skippable = (
        b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    )  # zstd's format allows frames with other data
    (tmp_path / name).write_bytes(skippable.join(parts))
    assert "".join(read_documents([tmp_path / name])) == ALICE
    assert read_data(tmp_path / name) == ALICE
    pieces = list(read_pieces(tmp_path / name))
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_streams_with_a_long_window_are_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(buffer, closefd=False) as writer:
        writer.write(ALICE.encode())
    assert zstandard.get_frame_parameters(buffer.getvalue()).window_size == 1 << 31
    (tmp_path / "a.txt.zst").write_bytes(buffer.getvalue())
    assert read_data(tmp_path / "a.txt.zst") == ALICE


def test_records_are_read_from_pandas_files(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": [text or " " for text in TEXTS], "number": range(len(TEXTS))})
    frame.to_json(tmp_path / "a.jsonl.zst", orient="records", lines=True)
    frame.to_csv(tmp_path / "a.csv.zst", index=False)
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl.zst", "a.csv.zst", "a.parquet"):
        assert list(read_documents([tmp_path / name])) == [text or " " for text in TEXTS], name
        assert list(read_texts([tmp_path / name], by_line="csv" not in name)) == [text or " " for text in TEXTS], name
        assert [record["text"] for record in read_records(tmp_path / name)] == [text or " " for text in TEXTS], name


def test_conversations_are_read_from_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    pq.write_table(pa.table({"messages": [messages], "source": ["web"]}), tmp_path / "a.PARQUET")
    assert read_records(tmp_path / "a.PARQUET") == [{"messages": messages, "source": "web"}]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet_types_and_compressions(tmp_path: Path, type_: pa.DataType, compression: str) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"body": pa.array(TEXTS * 30, type_), "other": [b"x" * 100] * 120})
    pq.write_table(table, path, compression=compression, row_group_size=50)
    read: list[int] = []
    assert [piece.text for piece in read_pieces(path, "body", read.append)] == [text for text in TEXTS * 30 if text]
    assert len(read) == 4 and sum(read) == path.stat().st_size
    assert [where for where, _ in read_parquet(path, "body")][-1] == f"{path}, row 120"


def test_only_some_rows_are_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i:04} " * 400 for i in range(10_000)]}), path, compression="zstd")
    before = pa.total_allocated_bytes()
    peak = 0
    for _ in read_pieces(path):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 10_000_000  # The texts have 20 MB, and are one row group.


def test_a_text_column_that_is_missing_or_has_other_values_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", None], "number": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: no text in the column 'text'"):
        list(read_pieces(path))
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: no text in the column 'body'"):
        list(read_pieces(path, "body"))
    with pytest.raises(ValueError, match=r"row 1: no text in the column 'number'"):
        list(read_pieces(path, "number"))
    (tmp_path / "a.parquet.zst").write_bytes(zst(path.read_bytes()))
    for read in (read_pieces, read_records):
        with pytest.raises(ValueError, match="is a compressed Parquet file: unpack it"):
            list(read(tmp_path / "a.parquet.zst"))  # type: ignore[operator]


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole, path = zst(ALICE[:3000].encode(), write_checksum=True), tmp_path / "a.txt.zst"
    assert zstandard.get_frame_parameters(whole).has_checksum
    for content in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:3],
        whole + b"more",
        b"no archive",
        whole[:40] + b"xx" + whole[42:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.txt\.zst is a damaged archive: "):
            list(read_pieces(path))
    path.write_bytes(b"")
    assert list(read_pieces(path)) == []


@pytest.mark.parametrize("name", ["a.txt.zst", "a.parquet"])
def test_a_file_that_unpacks_to_terabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(formats, "FREE_BYTES", 1 << 20)
    path = tmp_path / name
    if name == "a.parquet":  # The text is stored once, in a dictionary.
        pq.write_table(pa.table({"text": ["a" * 10_000] * 1000}), path)
    else:
        path.write_bytes(zst(b"a" * (1 << 25), level=19))
    n_characters = 0
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        for piece in read_pieces(path):
            n_characters += len(piece.text)
    assert n_characters < 3 << 20


def test_a_burst_of_zst_is_bounded(tmp_path: Path) -> None:
    """A block of a .zst file is unpacked at a time, and four bytes give at most 128 KiB."""
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zst(bytes(1 << 27)))
    with open_data(path) as (file, _):
        archive = file.raw._unpacked  # type: ignore[attr-defined]
        file.read(1)
        assert len(archive._unpacked) <= formats._ZSTD_BLOCK // 4 * (1 << 17)


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"to read .*{name}, install {package}, for example with pip install {package}$"
    ):
        list(read_pieces(tmp_path / name))


def test_archives_and_parquet_are_not_cut_into_parts(tmp_path: Path) -> None:
    for name in ("a.txt.zst", "a.jsonl.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"a b " * 100)
        assert sources.cut_near(tmp_path / name, 10) is None
