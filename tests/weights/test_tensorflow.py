"""TensorFlow checkpoints written by TensorFlow and by our own test writer, intact and damaged."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bundle_writer import (
    DTYPE_NUMBERS,
    Stored,
    block,
    entry,
    header,
    masked_crc,
    number,
    stored,
    stored_bfloat16,
    submessage,
    table,
    varint,
    write_bundle,
)
from MyGPT.config import GPTConfig
from MyGPT.model import GPTModel
from MyGPT.weights.formats.openai import load_gpt2_params_from_tf_ckpt, read_settings
from MyGPT.weights.tensorflow.bundle import BundleTensor, CheckpointError, latest_checkpoint, open_bundle
from places import FIXTURES

DATA = FIXTURES
OPENAI = DATA / "openai_gpt2_tf"
ODD = DATA / "tf_odd/odd.ckpt"
SHARD = ".data-00000-of-00001"

# The variables of OpenAI's graph for n_vocab 503, n_ctx 32, n_embd 24 and n_layer 2, written out by hand.
OPENAI_SHAPES = {
    "model/wte": (503, 24),
    "model/wpe": (32, 24),
    "model/ln_f/g": (24,),
    "model/ln_f/b": (24,),
} | {
    f"model/h{i}/{name}": shape
    for i in range(2)
    for name, shape in {
        "ln_1/g": (24,),
        "ln_1/b": (24,),
        "attn/c_attn/w": (1, 24, 72),
        "attn/c_attn/b": (72,),
        "attn/c_proj/w": (1, 24, 24),
        "attn/c_proj/b": (24,),
        "ln_2/g": (24,),
        "ln_2/b": (24,),
        "mlp/c_fc/w": (1, 24, 96),
        "mlp/c_fc/b": (96,),
        "mlp/c_proj/w": (1, 96, 24),
        "mlp/c_proj/b": (24,),
    }.items()
}


@pytest.fixture
def openai(tmp_path: Path) -> Path:
    """A copy of OpenAI's directory that a test may damage."""
    return Path(shutil.copytree(OPENAI, tmp_path / "gpt2"))


@pytest.fixture
def prefix(openai: Path) -> Path:
    return openai / "model.ckpt"


def read_all(bundle: dict[str, BundleTensor]) -> dict[str, tuple[Any, ...]]:
    """Return dtype, shape and contents of all readable tensors, for a comparison with ==."""
    return {name: fingerprint(tensor.read()) for name, tensor in bundle.items()}


def fingerprint(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.dtype.str, array.shape, array.tobytes()


# Written by TensorFlow


def test_tensors_of_openais_checkpoint_have_their_names_shapes_and_type() -> None:
    bundle = open_bundle(OPENAI / "model.ckpt")
    assert list(bundle) == sorted(OPENAI_SHAPES)
    for name, shape in OPENAI_SHAPES.items():
        array = bundle[name].read()
        assert bundle[name].shape == array.shape == shape
        assert bundle[name].dtype() == array.dtype == np.float32


def test_logits_of_openais_checkpoint_are_those_of_openais_graph() -> None:
    """The tolerance follows from rounding: OpenAI's graph computes in float32, and logits of size 3 are off by a few 1e-6.

    Our model adds its own rounding in float32, but not in float64. Measured in float64, mistakes change the logits much more: a
    transposed matrix by 2, a missing bias by 0.1, GELU without tanh by 7e-4.
    """
    reference = np.load(OPENAI / "reference.npz")
    expected = torch.from_numpy(reference["logits"])
    model = model_from(load_gpt2_params_from_tf_ckpt(OPENAI / "model.ckpt", read_settings(OPENAI)))
    ids = torch.from_numpy(reference["ids"]).long()
    with torch.no_grad():
        in_float32 = model(ids)
        in_float64 = model.double()(ids)
    assert (in_float32 - expected).abs().max() <= 1e-5
    assert (in_float64 - expected.double()).abs().max() <= 1e-5


def model_from(params: dict[str, Any]) -> GPTModel:
    config = GPTConfig(vocab_size=503, context_length=32, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0, qkv_bias=True)
    state = {
        "transformer.wte.weight": params["wte"],
        "transformer.wpe.weight": params["wpe"],
        "transformer.ln_f.weight": params["g"],
        "transformer.ln_f.bias": params["b"],
        "lm_head.weight": params["wte"],
    }
    for i, layer in enumerate(params["blocks"]):
        for norm in ("ln_1", "ln_2"):
            state[f"transformer.h.{i}.{norm}.weight"] = layer[norm]["g"]
            state[f"transformer.h.{i}.{norm}.bias"] = layer[norm]["b"]
        for part, linear in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            state[f"transformer.h.{i}.{part}.{linear}.weight"] = layer[part][linear]["w"].T
            state[f"transformer.h.{i}.{part}.{linear}.bias"] = layer[part][linear]["b"]
    model = GPTModel(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()


def test_odd_checkpoint_reads_as_tensorflow_reads_it() -> None:
    """The file has all number types, special bfloat16 values, a scalar, an empty tensor, unaligned data, slices and text."""
    bundle = open_bundle(ODD)
    expected = {name.replace("|", "/"): array for name, array in np.load(ODD.with_name("expected.npz")).items()}
    assert sorted(bundle) == sorted([*expected, "text"])
    for name in expected.keys() - {"part/w"}:
        array = bundle[name].read()
        assert fingerprint(array) == fingerprint(expected[name]), name
        assert array.flags.aligned and array.flags.writeable
    assert bundle["part/w"].shape == expected["part/w"].shape
    assert bundle["text"].shape == (2,)


def test_partitioned_variable_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"odd\.ckpt\.index: tensor 'part/w' is a partitioned variable"):
        open_bundle(ODD)["part/w"].read()


def test_type_that_numpy_does_not_have_is_refused_by_name() -> None:
    for look in (BundleTensor.read, BundleTensor.dtype):
        with pytest.raises(CheckpointError, match=r"odd\.ckpt\.index: tensor 'text' has TensorFlow's type number 7"):
            look(open_bundle(ODD)["text"])


# Memory mapping


def test_writing_to_an_array_leaves_the_file_alone(prefix: Path) -> None:
    before = Path(f"{prefix}{SHARD}").read_bytes()
    array = open_bundle(prefix)["model/wte"].read()
    array[:] = 0
    assert Path(f"{prefix}{SHARD}").read_bytes() == before
    assert np.any(open_bundle(prefix)["model/wte"].read())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_shard_is_mapped_once_and_only_while_an_array_lives(prefix: Path) -> None:
    """Hundreds of arrays may exist at once (macOS allows 256 open files), and arrays that are freed must not use memory."""

    def n_mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(prefix))

    bundle = open_bundle(prefix)
    arrays = [tensor.read() for tensor in bundle.values()]
    assert n_mappings() == 1
    del arrays
    assert n_mappings() == 0


# Written by bundle_writer

_part = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
_names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda name: name[0] != "\0"),
    st.lists(st.sampled_from(["model", "h0", "h1", "h10", "w"]), min_size=1, max_size=40).map("/".join),
    st.tuples(_part, st.integers(1, 120)).map(lambda pair: pair[0] * pair[1]),
)


@st.composite
def _stored(draw: st.DrawFn) -> Stored:
    dtype = draw(st.sampled_from(sorted(DTYPE_NUMBERS)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    raw = np.random.default_rng(draw(st.integers(0, 99))).integers(
        0, 256, int(np.prod(shape)) * itemsize, dtype=np.uint8
    )
    return Stored(DTYPE_NUMBERS[dtype], shape, raw & 1 if dtype == "bool" else raw)


@pytest.mark.slow
@settings(deadline=None)
@given(
    tensors=st.dictionaries(_names, _stored(), max_size=60),
    n_shards=st.integers(1, 4),
    block_bytes=st.integers(1, 4096),
    restart_interval=st.integers(1, 20),
)
@example(tensors={}, n_shards=1, block_bytes=1, restart_interval=1)
def test_bundles_of_the_test_writer_are_read_back(
    tensors: dict[str, Stored], n_shards: int, block_bytes: int, restart_interval: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "any name.ckpt"
        write_bundle(prefix, tensors, n_shards=n_shards, block_bytes=block_bytes, restart_interval=restart_interval)
        bundle = open_bundle(prefix)
        assert list(bundle) == sorted(tensors, key=str.encode)
        for name, tensor in tensors.items():
            array = bundle[name].read()
            assert bundle[name].shape == array.shape == tensor.shape
            assert bundle[name].dtype() == array.dtype
            if tensor.dtype == DTYPE_NUMBERS["bfloat16"]:
                array = stored_bfloat16(array).raw
            else:
                assert DTYPE_NUMBERS[array.dtype.name] == tensor.dtype
            assert array.tobytes() == tensor.raw.tobytes()
            del array  # Windows cannot delete a mapped file


@pytest.mark.slow
def test_many_tensors_in_many_blocks_are_read_back(tmp_path: Path) -> None:
    tensors = {f"layer_{i % 97}/{'long_' * (i % 30)}{i}": np.full(i % 5, i, np.float32) for i in range(5000)}
    write_bundle(
        tmp_path / "many", {name: stored(array) for name, array in tensors.items()}, n_shards=3, block_bytes=1000
    )
    assert read_all(open_bundle(tmp_path / "many")) == {name: fingerprint(array) for name, array in tensors.items()}


def test_unknown_fields_of_all_kinds_are_skipped(tmp_path: Path) -> None:
    later = number(90, 5) + varint(91 << 3 | 1) + b"8 bytes." + submessage(92, b"any") + varint(93 << 3 | 5) + b"four"
    write_files(tmp_path, {b"": header(1) + later, b"t": entry(4, (3,), 0, 1, 3, masked_crc(b"bcd"), later)})
    assert open_bundle(tmp_path / "x.ckpt")["t"].read().tobytes() == b"bcd"


# Damage


def outcome(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or None if it raises CheckpointError. Any other exception fails the test."""
    try:
        return read()
    except CheckpointError as error:
        assert "model.ckpt" in str(error)
        return None


def flips(path: Path) -> Iterator[tuple[int, int]]:
    """Change each byte of the file in turn, in one bit and in all bits, and yield position and change while it is changed."""
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:  # changing bytes in place is much faster than rewriting the file
        for at, byte in enumerate(whole):
            for pattern in (*(1 << bit for bit in range(8)), 0xFF):
                file.seek(at)
                file.write(bytes([byte ^ pattern]))
                yield at, pattern
            file.seek(at)
            file.write(bytes([byte]))


@pytest.mark.slow
def test_every_changed_byte_of_the_index_is_detected(prefix: Path) -> None:
    """All changes but one are refused. That one turns a length in the footer, 15, into a longer varint for the same 15."""
    index = Path(f"{prefix}.index")
    expected = read_all(open_bundle(prefix))
    length_of_index_block = index.read_bytes().rindex(b"\x0f\0\0")
    harmless = []
    for flip in flips(index):
        found = outcome(lambda: read_all(open_bundle(prefix)))
        assert found is None or found == expected
        if found:
            harmless.append(flip)
    assert harmless == [(length_of_index_block, 0x80)]


def test_index_cut_off_anywhere_is_refused(prefix: Path) -> None:
    index = Path(f"{prefix}.index")
    length = index.stat().st_size
    for shorter in reversed(range(length)):
        os.truncate(index, shorter)
        assert outcome(lambda: open_bundle(prefix)) is None
        os.truncate(index, length)  # a file system that loses a block fills it with zeros
        assert outcome(lambda: open_bundle(prefix)) is None


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_behind_a_right_checksum_is_refused_or_harmless(data: st.DataObject) -> None:
    """An attacker also computes the checksum, so a block is changed and its checksum is updated."""
    whole = (OPENAI / "model.ckpt.index").read_bytes()
    size = first_block_size(whole)
    content = bytearray(whole[:size])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    signed = bytes(content) + b"\0"
    forged = signed + masked_crc(signed).to_bytes(4, "little") + whole[size + 5 :]
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "model.ckpt"
        shutil.copy(OPENAI / f"model.ckpt{SHARD}", directory)
        Path(f"{prefix}.index").write_bytes(forged)
        tracemalloc.start()
        try:
            outcome(lambda: read_all(open_bundle(prefix)))
            assert tracemalloc.get_traced_memory()[1] < 4_000_000  # 36 times the data; read_all makes two copies
        finally:
            tracemalloc.stop()


def first_block_size(index: bytes) -> int:
    """Return the size of the only data block. It ends at the metaindex block, whose offset is the footer's first varint."""
    low, high = index[-48:-46]
    return (low & 127 | high << 7) - 5


@pytest.mark.parametrize("at", ["first", "last"])
def test_flip_at_either_end_of_a_tensor_is_found_in_that_tensor_alone(prefix: Path, at: str) -> None:
    shard = Path(f"{prefix}{SHARD}")
    whole = shard.read_bytes()
    names = sorted(OPENAI_SHAPES)  # TensorFlow's Saver wrote them in this order
    begin = 0
    for name in names:
        end = begin + 4 * int(np.prod(OPENAI_SHAPES[name]))
        position = begin if at == "first" else end - 1
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        bundle = open_bundle(prefix)
        with pytest.raises(CheckpointError, match=rf"model\.ckpt{SHARD}: tensor '{name}' is damaged"):
            bundle[name].read()
        for other in names:
            if other != name:
                bundle[other].read()
        begin = end
    assert begin == len(whole)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(changes=st.dictionaries(st.integers(0, 109343), st.integers(1, 255), min_size=1, max_size=5))
def test_flipped_bytes_of_the_data_are_found(changes: dict[int, int]) -> None:
    whole = bytearray((OPENAI / f"model.ckpt{SHARD}").read_bytes())
    for position, pattern in changes.items():
        whole[position] ^= pattern
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "model.ckpt"
        shutil.copy(OPENAI / "model.ckpt.index", directory)
        Path(f"{prefix}{SHARD}").write_bytes(whole)
        assert outcome(lambda: load_gpt2_params_from_tf_ckpt(prefix, read_settings(OPENAI))) is None


def test_data_cut_off_anywhere_is_refused_at_once(prefix: Path) -> None:
    shard = Path(f"{prefix}{SHARD}")
    length = shard.stat().st_size
    for shorter in [*range(length - 1, 0, -997), 1, 0]:
        os.truncate(shard, shorter)
        with pytest.raises(
            CheckpointError, match=rf"model\.ckpt{SHARD} has {shorter} bytes, too few for tensor 'model/"
        ):
            open_bundle(prefix)


def test_shard_that_is_cut_off_after_opening_is_refused(prefix: Path) -> None:
    bundle = open_bundle(prefix)
    for length in (1000, 0):
        os.truncate(f"{prefix}{SHARD}", length)
        with pytest.raises(CheckpointError, match=rf"model\.ckpt{SHARD}: tensor 'model/wte' cannot be read"):
            bundle["model/wte"].read()


def test_missing_shard_is_named(prefix: Path) -> None:
    os.remove(f"{prefix}{SHARD}")
    with pytest.raises(
        CheckpointError, match=rf"model\.ckpt{SHARD} is missing, but it contains tensor 'model/h0/attn/c_attn/b'"
    ):
        open_bundle(prefix)


def test_missing_index_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt\.index"):
        open_bundle(tmp_path / "model.ckpt")


# Invalid contents with valid checksums


def write_files(directory: Path, records: dict[bytes, bytes], **options: int) -> None:
    """Write a checkpoint x.ckpt with these records and four bytes of data."""
    (directory / "x.ckpt.index").write_bytes(table(records, **options))
    (directory / f"x.ckpt{SHARD}").write_bytes(b"abcd")


def uint8_entry(shape: Iterable[int], *, shard: int = 0, offset: int = 0, size: int = 0) -> bytes:
    return entry(DTYPE_NUMBERS["uint8"], shape, shard, offset, size, 0)


SIZE = 1 << 60


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (uint8_entry([1 << 40], size=1 << 40), rf"{SHARD} has 4 bytes, too few for tensor 't': {1 << 40} at offset 0"),
        (uint8_entry([4], size=SIZE), rf"{SHARD} has 4 bytes, too few for tensor 't': {SIZE} at offset 0"),
        (uint8_entry([SIZE], size=SIZE), "tensor 't': the shape .* is too large for a tensor"),
        (uint8_entry([4], offset=SIZE, size=4), rf"too few for tensor 't': 4 at offset {SIZE}"),
        (uint8_entry([4], offset=1, size=4), "too few for tensor 't': 4 at offset 1"),
        (uint8_entry([4], offset=-1, size=4), "too few for tensor 't'"),
        (uint8_entry([-4], size=-4), "too few for tensor 't'|too large for a tensor"),
        (uint8_entry([SIZE], size=4), "tensor 't': the shape .* is too large for a tensor"),
        (uint8_entry([0, SIZE]), "tensor 't': the shape .* is too large for a tensor"),
        (uint8_entry([0, -1]), "tensor 't': the shape .* is too large for a tensor"),
        (uint8_entry([1] * 33, size=1), "tensor 't': 33 dimensions, but at most 32"),
        (uint8_entry([5], size=4), r"tensor 't' of shape \(5,\) cannot be 4 bytes long"),
        (uint8_entry([], size=4), r"tensor 't' of shape \(\) cannot be 4 bytes long"),
        (uint8_entry([4], shard=1, size=4), "tensor 't': it is in shard 1 of 1"),
        (uint8_entry([4], shard=-1, size=4), "tensor 't': it is in shard .* of 1"),
        (submessage(1, b"float"), "tensor 't': field 1 of a protocol buffer has the wrong type"),
        (number(2, 5), "tensor 't': field 2 of a protocol buffer has the wrong type"),
        (submessage(2, number(2, 5)), "tensor 't': field 2 of a protocol buffer has the wrong type"),
        (submessage(2, b"")[:-1] + b"\5", "tensor 't': a protocol buffer is truncated"),
        (varint(6 << 3 | 5) + b"abc", "tensor 't': a protocol buffer is truncated"),
        (varint(6 << 3 | 3), "tensor 't': a protocol buffer has a field of the unknown wire type 3"),
        (b"\x08" + b"\xff" * 11, "tensor 't': a varint is damaged"),
        (b"\x08", "tensor 't': a varint is damaged"),
    ],
)
def test_false_claim_about_a_tensor_is_refused_before_anything_is_allocated(
    tmp_path: Path, value: bytes, message: str
) -> None:
    write_files(tmp_path, {b"": header(1), b"t": value})
    open_bundle(ODD)  # so that one-time imports do not count
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_bundle(tmp_path / "x.ckpt")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert "x.ckpt" in str(caught.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({}, "without a checkpoint's header"),
        ({b"t": uint8_entry([])}, "without a checkpoint's header"),
        ({b"": header(1, endianness=1)}, "big-endian"),
        ({b"": header(1, min_consumer=2)}, "version is 2, but versions after 1 are not supported"),
        ({b"": number(3, 1)}, "field 3 of a protocol buffer has the wrong type"),
        ({b"": header(1), b"t\xff": uint8_entry([])}, "not UTF-8"),
    ],
)
def test_checkpoint_of_another_kind_is_refused(tmp_path: Path, records: dict[bytes, bytes], message: str) -> None:
    write_files(tmp_path, records)
    with pytest.raises(CheckpointError, match=rf"x\.ckpt\.index: .*{message}"):
        open_bundle(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("compression", "message"),
    [(1, "compressed with Snappy, but only"), (2, "compressed with the unknown method 2, but only")],
)
def test_compressed_index_is_refused(tmp_path: Path, compression: int, message: str) -> None:
    write_files(tmp_path, {b"": header(1)}, compression=compression)
    with pytest.raises(CheckpointError, match=message):
        open_bundle(tmp_path / "x.ckpt")


def test_shard_of_many_that_no_tensor_is_in_may_be_missing(tmp_path: Path) -> None:
    write_files(tmp_path, {b"": header(1 << 40)})
    assert open_bundle(tmp_path / "x.ckpt") == {}


def signed(content: bytes) -> bytes:
    """Return a block with its trailer."""
    return content + b"\0" + masked_crc(content + b"\0").to_bytes(4, "little")


def table_of(data: bytes, index: bytes) -> bytes:
    """Return a table with this data block and this index block."""
    blocks = [signed(data), signed(block({}, 1)), signed(index)]
    handles = [varint(len(b"".join(blocks[:i]))) + varint(len(blocks[i]) - 5) for i in (1, 2)]
    return b"".join(blocks) + b"".join(handles).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def handle(offset: int, size: int) -> bytes:
    return varint(offset) + varint(size)


NO_RESTARTS = bytes(4)
ONE = block({b"": header(1), b"t": uint8_entry([4], size=4)}, 16)


@pytest.mark.parametrize(
    ("index_bytes", "message"),
    [
        (table_of(ONE, block({b"a": handle(0, len(ONE)), b"b": handle(0, len(ONE))}, 1)), "blocks overlap"),
        (table_of(ONE, block({b"a": handle(1 << 60, 9)}, 1)), "does not fit in a table"),
        (table_of(ONE, block({b"a": handle(0, 1 << 60)}, 1)), "does not fit in a table"),
        (table_of(ONE, block({b"a": b"\x80"}, 1)), "a varint is damaged"),
        (table_of(block({b"b": b"", b"a": b""}, 1), block({b"a": handle(0, 20)}, 1)), "checksum|keys are not in order"),
        (
            table_of(varint(1) + varint(0) * 2 + NO_RESTARTS, block({b"a": handle(0, 7)}, 1)),
            "an entry of a block is damaged",
        ),
        (
            table_of(varint(0) + varint(9) * 2 + NO_RESTARTS, block({b"a": handle(0, 7)}, 1)),
            "an entry of a block is damaged",
        ),
        (table_of(b"\xff" * 4, block({b"a": handle(0, 4)}, 1)), "restart points"),
        (table_of(b"", block({b"a": handle(0, 0)}, 1)), "restart points"),
        (bytes(40) + bytes.fromhex("57fb808b247547db"), "does not fit in a table"),
        (b"\xff" * 40 + bytes.fromhex("57fb808b247547db"), "a varint is damaged"),
        (bytes(39) + b"\1" + bytes.fromhex("57fb808b247547db"), "the footer is damaged"),
        (b"\x80" * 39 + bytes.fromhex("57fb808b247547db"), "magic"),
        (b"", "magic"),
    ],
)
def test_table_that_contradicts_itself_is_refused(tmp_path: Path, index_bytes: bytes, message: str) -> None:
    (tmp_path / "x.ckpt.index").write_bytes(index_bytes)
    with pytest.raises(CheckpointError, match=rf"x\.ckpt\.index: .*({message})"):
        open_bundle(tmp_path / "x.ckpt")


def test_keys_that_share_without_end_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    """A key of 100,000 bytes and 50,000 keys that each extend it by a byte would need 6 GB, from a file of 350 kB."""
    long = varint(0) + varint(100_000) + varint(0) + b"k" * 100_000
    more = b"".join(varint(100_000 + i) + varint(1) + varint(0) + b"k" for i in range(50_000))
    data = long + more + NO_RESTARTS
    (tmp_path / "x.ckpt.index").write_bytes(table_of(data, block({b"z": handle(0, len(data))}, 1)))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="an entry of a block is damaged"):
            open_bundle(tmp_path / "x.ckpt")
        assert tracemalloc.get_traced_memory()[1] < 64 * len(data) + 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="makes a file with a hole")
def test_index_of_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "x.ckpt.index", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"longer than .* bytes, which is too long for an index"):
        open_bundle(tmp_path / "x.ckpt")


# The file `checkpoint`


def test_latest_checkpoint_is_the_prefix_in_the_directory(openai: Path) -> None:
    assert latest_checkpoint(openai) == openai / "model.ckpt"
    assert latest_checkpoint(str(openai)) == openai / "model.ckpt"
    (openai / "checkpoint").write_bytes(
        b'model_checkpoint_path: "model.ckpt"\r\nall_model_checkpoint_paths: "/elsewhere/a"\r\n'
    )
    assert latest_checkpoint(openai) == openai / "model.ckpt"


def test_latest_checkpoint_may_be_an_absolute_path_into_the_directory(openai: Path) -> None:
    """TensorFlow writes an absolute path if it was given one."""
    name_checkpoint(openai, (openai / "model.ckpt").as_posix())
    assert latest_checkpoint(openai) == openai / "model.ckpt"


def name_checkpoint(directory: Path, name: str) -> None:
    (directory / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n', encoding="utf-8")


@pytest.mark.parametrize("name", ["../model.ckpt", "/model.ckpt", "sub/../../model.ckpt", "link/model.ckpt", ".."])
def test_path_out_of_the_directory_is_refused(openai: Path, name: str) -> None:
    for suffix in (".index", SHARD):
        shutil.copy(openai / f"model.ckpt{suffix}", openai.parent)
    try:
        (openai / "link").symlink_to(openai.parent, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    name_checkpoint(openai, name)
    with pytest.raises(CheckpointError, match=r"checkpoint names .* which is outside its directory"):
        latest_checkpoint(openai)


@pytest.mark.parametrize("name", ["gone.ckpt", "a" * 5000, "sub/model.ckpt", "model.ckpt.index"])
def test_path_to_nothing_is_refused(openai: Path, name: str) -> None:
    name_checkpoint(openai, name)
    with pytest.raises(CheckpointError, match=r"checkpoint names .* but .*\.index is missing"):
        latest_checkpoint(openai)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"model_checkpoint_path: model.ckpt",
        b'model_checkpoint_path: "model.ckpt',
        b'model_checkpoint_path: ""',
        b'model_checkpoint_path: "model.ckpt"\nmodel_checkpoint_path: "model.ckpt"',
        b'model_checkpoint_path: "model\\056ckpt"',
        b"\xff\xfe",
        b"\0",
    ],
)
def test_file_that_names_no_checkpoint_is_refused(openai: Path, content: bytes) -> None:
    (openai / "checkpoint").write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint"):
        latest_checkpoint(openai)


def test_directory_without_checkpoint_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.slow
def test_no_flipped_byte_of_the_small_files_gives_other_weights(openai: Path) -> None:
    """Exceptions are harmless: white space, and the number of heads, which does not occur in the weights."""
    expected = fingerprints(load(openai))
    for name in ("checkpoint", "hparams.json"):
        for _ in flips(openai / name):
            try:
                assert fingerprints(load(openai)) == expected
            except CheckpointError as error:
                assert name in str(error) or "model.ckpt" in str(error)


# OpenAI's parameters


def load(directory: Path) -> dict[str, Any]:
    return load_gpt2_params_from_tf_ckpt(latest_checkpoint(directory), read_settings(directory))


def fingerprints(params: Any) -> Any:
    if isinstance(params, dict):
        return {key: fingerprints(value) for key, value in params.items()}
    if isinstance(params, list):
        return [fingerprints(value) for value in params]
    return fingerprint(params)


def test_parameters_are_nested_as_in_the_book() -> None:
    """The book's gpt_download.py gives the same: no prefix "model/", blocks in a list, and no axes of length 1."""
    bundle = open_bundle(OPENAI / "model.ckpt")

    def squeezed(name: str) -> tuple[Any, ...]:
        return fingerprint(np.squeeze(bundle[f"model/{name}"].read()))

    def pair(name: str, *keys: str) -> dict[str, Any]:
        return {key: squeezed(f"{name}/{key}") for key in keys}

    assert fingerprints(load(OPENAI)) == {
        "wte": squeezed("wte"),
        "wpe": squeezed("wpe"),
        "g": squeezed("ln_f/g"),
        "b": squeezed("ln_f/b"),
        "blocks": [
            {
                "attn": {name: pair(f"h{i}/attn/{name}", "w", "b") for name in ("c_attn", "c_proj")},
                "mlp": {name: pair(f"h{i}/mlp/{name}", "w", "b") for name in ("c_fc", "c_proj")},
                "ln_1": pair(f"h{i}/ln_1", "g", "b"),
                "ln_2": pair(f"h{i}/ln_2", "g", "b"),
            }
            for i in range(2)
        ],
    }
    assert load(OPENAI)["blocks"][1]["mlp"]["c_proj"]["w"].shape == (96, 24)


def test_settings_are_hparams_json() -> None:
    assert read_settings(OPENAI) == {"n_vocab": 503, "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[1, 2]", "not a JSON object"),
        ("{}", "n_vocab is missing; n_ctx is missing; n_embd is missing; n_head is missing; n_layer is missing"),
        (
            json.dumps({"n_vocab": 0, "n_ctx": 1.5, "n_embd": "24", "n_head": True, "n_layer": None}),
            "got 0; .* got None",
        ),
        (
            json.dumps({"n_vocab": 9, "n_ctx": 9, "n_embd": 9, "n_head": 2, "n_layer": 9}),
            "divisible by n_head, got 9 and 2",
        ),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "hparams.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"hparams\.json.* {message}"):
        read_settings(tmp_path)


def test_missing_settings_are_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"hparams\.json"):
        read_settings(tmp_path)


def test_settings_that_lack_sizes_are_refused_by_the_loader_too() -> None:
    with pytest.raises(CheckpointError, match="n_layer is missing"):
        load_gpt2_params_from_tf_ckpt(OPENAI / "model.ckpt", {"n_vocab": 503, "n_ctx": 32, "n_embd": 24, "n_head": 3})


@pytest.mark.parametrize("n_layer", [1, 3, 10**12])
def test_wrong_number_of_layers_is_one_line(n_layer: int) -> None:
    with pytest.raises(CheckpointError, match=rf"in 1 points: n_layer is {n_layer}, the checkpoint has 2 blocks"):
        load_gpt2_params_from_tf_ckpt(OPENAI / "model.ckpt", read_settings(OPENAI) | {"n_layer": n_layer})


def test_wrong_width_lists_every_tensor_with_its_shape() -> None:
    with pytest.raises(CheckpointError, match="does not match the settings in 28 points") as caught:
        load_gpt2_params_from_tf_ckpt(OPENAI / "model.ckpt", read_settings(OPENAI) | {"n_embd": 48})
    assert "model/h1/mlp/c_fc/w is (1, 24, 96), expected (1, 48, 192)" in str(caught.value)


def test_missing_unknown_and_wrong_tensors_are_listed_together(tmp_path: Path) -> None:
    tensors = {name: stored(np.zeros(shape, np.float32)) for name, shape in OPENAI_SHAPES.items()}
    del tensors["model/ln_f/b"], tensors["model/h1/ln_2/g"]
    tensors["model/h0/attn/bias"] = stored(np.zeros((1, 1), np.float32))
    tensors["wte"] = stored(np.zeros(3, np.float32))
    tensors["model/wpe"] = stored(np.zeros((32, 24), np.int32))
    tensors["model/wte"] = stored(np.zeros((24, 503), np.float32))
    write_bundle(tmp_path / "model.ckpt", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_gpt2_params_from_tf_ckpt(tmp_path / "model.ckpt", read_settings(OPENAI))
    assert str(caught.value) == (
        f"{tmp_path / 'model.ckpt'} does not match the settings in 6 points: "
        "model/h1/ln_2/g is missing; model/ln_f/b is missing; model/h0/attn/bias (1, 1) is unknown; "
        "model/wpe holds int32, but weights must be floating-point numbers; model/wte is (24, 503), expected (503, 24); "
        "wte (3,) is unknown"
    )


@pytest.mark.parametrize(
    "convert", [lambda a: stored(a.astype(np.float16)), stored_bfloat16, lambda a: stored(a.astype(float))]
)
def test_weights_may_be_of_any_floating_point_type(tmp_path: Path, convert: Callable[[Any], Stored]) -> None:
    original = open_bundle(OPENAI / "model.ckpt")
    write_bundle(tmp_path / "model.ckpt", {name: convert(original[name].read()) for name in original}, n_shards=2)
    params = load_gpt2_params_from_tf_ckpt(tmp_path / "model.ckpt", read_settings(OPENAI))
    np.testing.assert_allclose(
        params["wte"], original["model/wte"].read(), rtol=2**-7
    )  # bfloat16 has 7 bits after the leading one
