"""Tests of token ids in several files, against the same ids in one numpy array."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from MyGPT import CharTokenizer, GPTConfig, GPTDataset, GPTModel, create_dataloader
from MyGPT.data import shards
from MyGPT.data.sampler import WindowSampler, WindowValidation, walk_windows
from MyGPT.data.shards import ShardedTokens
from MyGPT.data.tokens import compact_ids, describe_shard, fingerprint, open_tokens
from MyGPT.evaluation.perplexity import strided_loss

IDS = np.random.default_rng(1).integers(0, 50, 100).astype("<u2")
LETTERS = CharTokenizer(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def write_shards(directory: Path, ids: np.ndarray[Any, Any], cuts: Sequence[int]) -> ShardedTokens:
    directory.mkdir(exist_ok=True)
    for number, part in enumerate(np.split(ids, cuts)):
        part.tofile(directory / f"tokens-{number:05}.bin")
    return ShardedTokens(sorted(directory.glob("*.bin")), ids.dtype)


def write_data_set(directory: Path, ids: np.ndarray[Any, Any], cuts: Sequence[int]) -> dict[str, Any]:
    """Write the directory that `mygpt prepare` writes, with hashes from hashlib."""
    write_shards(directory, ids, cuts)
    paths = sorted(directory.glob("*.bin"))
    sizes = [path.stat().st_size // ids.dtype.itemsize for path in paths]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    described = [describe_shard(*values) for values in zip(paths, sizes, hashes, strict=True)]
    content = {"n_tokens": len(ids), "dtype": ids.dtype.name, "shards": described}
    (directory / "tokens.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def sharded(tmp_path: Path) -> ShardedTokens:
    return write_shards(tmp_path / "ids", IDS, [1, 30, 33, 80])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bounds=st.lists(st.integers(-110, 110) | st.none(), min_size=4, max_size=4), index=st.integers(-110, 110))
def test_slices_and_elements_are_those_of_the_array(
    sharded: ShardedTokens, bounds: list[int | None], index: int
) -> None:
    part, expected = sharded[bounds[0] : bounds[1]], IDS[bounds[0] : bounds[1]]
    for ids, array in ((part, expected), (part[bounds[2] : bounds[3]], expected[bounds[2] : bounds[3]])):
        assert len(ids) == len(array) and ids.shape == array.shape and ids.dtype == array.dtype
        assert np.array_equal(ids, array) and ids.tolist() == list(ids) == array.tolist()
        assert ids.astype(np.int64).dtype == np.int64
        if -len(array) <= index < len(array):
            assert ids[index] == array[index]
        else:
            with pytest.raises(IndexError, match=f"there is no token {index} among {len(array)} tokens"):
                ids[index]


def test_a_slice_reads_nothing_and_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 3)
    whole = shards._Files._open
    monkeypatch.setattr(shards._Files, "_open", lambda self, number: opened.append(number) or whole(self, number))
    ids = write_shards(tmp_path / "ids", IDS, range(10, 100, 10))
    part = ids[15:95][5:]
    assert not opened and len(part) == 75
    assert np.array_equal(part, IDS[20:95]) and opened == [*range(2, 10)]
    assert part[-1] == IDS[94] and part[-20] == IDS[75] and len(opened) == 8  # both still open
    assert ids[0] == IDS[0] and opened[-1] == 0
    assert ids._files._map.cache_info().currsize == 3


def test_everything_that_takes_ids_gives_the_same_result(sharded: ShardedTokens) -> None:
    assert compact_ids(sharded) is sharded
    assert fingerprint(sharded) == fingerprint(IDS) and fingerprint(sharded[1:7]) == fingerprint(IDS[1:7])
    for order in ("random", "shuffled", "sequential"):
        of_array, of_shards = (WindowSampler(ids, 7, 5, order, seed=3) for ids in (IDS, sharded))  # type: ignore[arg-type]
        assert all(map(torch.equal, of_array.batch(9), of_shards.batch(9)))
        assert of_array.fingerprint() == of_shards.fingerprint()
    for whole in (True, False):
        pairs = zip(*(WindowValidation(ids, 7, 3).batches(whole) for ids in (IDS, sharded)), strict=True)
        assert all(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))
    for a, b in zip(walk_windows(IDS[:50], 6, 4), walk_windows(sharded[:50], 6, 4), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    datasets = [GPTDataset(ids, LETTERS, 7, 3, pad_last=True) for ids in (IDS, sharded)]
    assert all(torch.equal(datasets[0][i][1], datasets[1][i][1]) for i in range(len(datasets[0])))
    loaders = [create_dataloader(ids, 4, 7, tokenizer=LETTERS, seed=1) for ids in (IDS, sharded)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*loaders, strict=True))
    model = GPTModel(GPTConfig(50, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    for bos_id in (None, 3):
        assert strided_loss(model, sharded, 5, bos_id=bos_id) == strided_loss(model, IDS, 5, bos_id=bos_id)


def test_a_pickle_has_the_paths_and_not_the_ids(tmp_path: Path) -> None:
    """A worker process of a DataLoader receives its data set as a pickle. A pickled memmap contains all ids."""
    ids = write_shards(tmp_path / "ids", np.arange(50_000, dtype="<u2"), [20_000])[5:]
    assert ids[0] == 5
    data = pickle.dumps(ids)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data), np.arange(5, 50_000))


def test_a_shard_that_is_replaced_while_it_is_in_use_is_noticed(sharded: ShardedTokens) -> None:
    assert sharded[0] == IDS[0]
    path = sharded._files.files[2].path
    os.rename(path, path.with_suffix(".old"))
    with pytest.raises(FileNotFoundError, match=r"tokens-00002\.bin"):
        sharded[31]
    path.write_bytes(bytes(6))
    with pytest.raises(OSError, match=r"tokens-00002\.bin was replaced or changed while it was in use"):
        sharded[31]


def test_impossible_files_and_slices_are_refused(tmp_path: Path, sharded: ShardedTokens) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"odd\.bin has 3 bytes, which is not a positive number of ids of type uint16"):
        ShardedTokens([tmp_path / "odd.bin"], "<u2")
    with pytest.raises(ValueError, match="at least one file"):
        ShardedTokens([], "<u2")
    with pytest.raises(ValueError, match="must have the step 1, got 2"):
        sharded[::2]


# --- prepared directories --------------------------------------------------------------------------------------------


def test_a_directory_with_shards_opens_as_their_concatenation(tmp_path: Path) -> None:
    content = write_data_set(tmp_path, IDS, [40, 41])
    ids, description = open_tokens(tmp_path)
    assert isinstance(ids, ShardedTokens) and ids.tolist() == IDS.tolist() and description == content
    write_data_set(tmp_path / "one", IDS, [])
    ids, _ = open_tokens(tmp_path / "one")
    assert isinstance(ids, np.ndarray) and ids.tolist() == IDS.tolist()


def test_a_directory_of_an_early_version_opens(tmp_path: Path) -> None:
    IDS.tofile(tmp_path / "tokens.bin")
    known = hashlib.sha256(IDS.tobytes()).hexdigest()
    (tmp_path / "tokens.json").write_text(json.dumps({"n_tokens": 100, "dtype": "uint16", "sha256": known}))
    ids, _ = open_tokens(tmp_path)
    assert isinstance(ids, np.ndarray) and ids.tolist() == IDS.tolist()


@pytest.mark.parametrize("is_large", [False, True])
def test_a_missing_cut_or_exchanged_shard_is_named(
    tmp_path: Path, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:  # so that only blocks are hashed
        monkeypatch.setattr("MyGPT.data.tokens._WHOLE_BYTES", 10)
    write_data_set(tmp_path, IDS, [40, 70])
    _, second, last = sorted(tmp_path.glob("*.bin"))
    content = second.read_bytes()
    second.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"tokens-00001\.bin has 58 bytes, tokens\.json requires 60"):
        open_tokens(tmp_path)
    second.write_bytes(last.read_bytes())  # The second and third shard have equal sizes.
    with pytest.raises(ValueError, match=r"tokens-00001\.bin is not the file that tokens\.json describes"):
        open_tokens(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00001\.bin is missing, tokens\.json requires it: run mygpt"):
        open_tokens(tmp_path)
    second.write_bytes(content)
    assert len(open_tokens(tmp_path)[0]) == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shards": []}, "its shards have 0 tokens together, not 100"),
        ({"shards": None}, "is damaged: TypeError"),
        ({"shards": "ab"}, "is damaged: TypeError"),
        ({"shards": [{"file": "tokens-00000.bin"}]}, "is damaged: KeyError: 'n_tokens'"),
        ({"n_tokens": 99}, "its shards have 100 tokens together, not 99"),
        ({"file": "../tokens-00001.bin"}, "60 tokens in the file '../tokens-00001.bin', which is not valid"),
        ({"file": ["a"]}, "which is not valid"),
        ({"file": "tokens-00000.bin"}, "its shards have 100 tokens together"),
        ({"file": "tokens.json"}, r"has \d+ bytes, tokens\.json requires 120"),
    ],
)
def test_an_invalid_list_of_shards_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = write_data_set(tmp_path, IDS, [40])
    if "file" in change:
        content["shards"][1] |= change
    else:
        content |= change
    (tmp_path / "tokens.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        open_tokens(tmp_path)


@pytest.mark.slow
def test_a_thousand_large_shards_are_checked_quickly(tmp_path: Path) -> None:
    """1,000 shards of 200 MB: hashing 64 MiB of each, as for a single file, would read 64 GB."""
    size = 100_000_000
    for number in range(1000):
        with open(tmp_path / f"tokens-{number:05}.bin", "wb") as file:
            file.truncate(2 * size)
    sampled = hashlib.sha256(bytes(16 << 14)).hexdigest()
    described = [
        {"file": path.name, "n_tokens": size, "sha256": "", "sampled_sha256": sampled}
        for path in sorted(tmp_path.iterdir())
    ]
    content = {"n_tokens": 1000 * size, "dtype": "uint16", "shards": described}
    (tmp_path / "tokens.json").write_text(json.dumps(content))
    ids, _ = open_tokens(tmp_path)
    sampler = WindowSampler(ids, 1024, 100, "random")
    assert int(sampler.batch(1)[0].max()) == 0 and len(ids) == 10**11
    with open(tmp_path / "tokens-00700.bin", "r+b") as file:
        file.seek(2 * size - 1)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"tokens-00700\.bin is not the file"):
        open_tokens(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_on_20_gigabytes_needs_little_more_memory_than_on_a_short_text(tmp_path: Path) -> None:
    """A table of the windows alone would have 10 GB. Pages of the files count, although the system can drop them: 64 MB
    that are hashed, and one or two pages of 4 kB for each window."""
    n_shards, size = 10, 10**9
    large = tmp_path / "large"
    large.mkdir()
    sampled = hashlib.sha256(bytes(16 << 14)).hexdigest()
    for number in range(n_shards):
        with open(large / f"tokens-{number:05}.bin", "wb") as file:
            file.truncate(2 * size)
    described = [
        {"file": path.name, "n_tokens": size, "sha256": "", "sampled_sha256": sampled} for path in large.iterdir()
    ]
    (large / "tokens.json").write_text(
        json.dumps({"n_tokens": n_shards * size, "dtype": "uint16", "shards": described})
    )
    write_data_set(tmp_path / "small", IDS, [40])
    peaks = {}
    for name, val_fraction in (("small", 0.2), ("large", 1e-6)):
        LETTERS.save(tmp_path / name)
        options = f"--data {name} --val_fraction {val_fraction} --order shuffled --max_steps 20 --batch_size 64 --out {name}-run"
        options += " --context_length 8 --emb_dim 8 --n_heads 2 --n_layers 1 --sample_every 0 --device cpu"
        code = f"from MyGPT.cli import main; assert main('train {options}'.split()) == 0; print(open('/proc/self/status').read())"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        found = re.search(r"VmHWM:\s*(\d+) kB", done.stdout)
        assert found is not None
        peaks[name] = int(found[1]) / 1000
    assert peaks["large"] < peaks["small"] + 120, peaks
