"""Damaged and malicious files: every reader returns a usable result, or raises a ValueError or OSError that names the file.

No reader raises another exception, runs code, allocates the memory that a header asks for, or hangs. `make fuzz` tries more
examples and counts them (the environment variable MYGPT_FUZZ is a factor). Pickles and TensorFlow checkpoints have their own
tests (test_pretrained.py, test_tensorflow.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import load_file

from conftest import lively_model
from hostile import Kind, damaged
from MyGPT.book.classification import SpamDataset
from MyGPT.commands._options import call, make_parser
from MyGPT.commands.finetune import finetune
from MyGPT.commands.info import explain
from MyGPT.commands.train import train
from MyGPT.config import GPTConfig
from MyGPT.data.prepare import prepare
from MyGPT.data.records import Split, load_split, read_records
from MyGPT.data.sources import read_pieces
from MyGPT.data.templates import ALPACA, load_template
from MyGPT.data.tokens import open_tokens, sampled_sha256
from MyGPT.evaluation.protocols import read_texts
from MyGPT.finetuning.classification import GPTForClassification, read_labelled
from MyGPT.finetuning.foreign_adapters import base_of_adapter, open_adapter
from MyGPT.finetuning.lora import add_lora
from MyGPT.inside.plots import plot_losses
from MyGPT.messages import FileWarning
from MyGPT.model import GPTModel
from MyGPT.opening import open_model
from MyGPT.tokenizers import BPETokenizer, CharTokenizer, SimpleTokenizer, get_tokenizer, load_tokenizer
from MyGPT.training import checkpoint
from MyGPT.training.checkpoint import read_newest, write_snapshot
from MyGPT.training.metrics import read_metrics
from MyGPT.training.optim import make_optimizers
from MyGPT.training.snapshot import check_fit, restore_snapshot
from MyGPT.weights.formats.safetensors import write_safetensors
from tiny_runs import make_trainer

FACTOR = int(os.environ.get("MYGPT_FUZZ", "1"))
HANG_SECONDS = 15
"""An example that runs longer fails, because it probably hangs. Examples usually take less than a second."""

PHASES = (Phase.explicit, Phase.generate)
"""Without shrinking, which could repeat a slow example hundreds of times. One change to a small file is easy to read anyway."""

TINY = GPTConfig(vocab_size=300, context_length=8, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
RECORDS = [
    {"instruction": "Name it.", "input": "", "output": "It."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"text": "Once upon a time."},
]
RECIPE = {"data": "alice", "tokenizer": "bpe", "emb_dim": 8, "n_heads": 2, "drop_rate": 0.1, "learning_rate": 1e-3,
          "max_steps": 3, "early_stop": None, "optimizer": "muon", "compile": False, "out": "runs/x"}  # fmt: skip
TUNING = {"model": "gpt2", "data": "x.json", "lora": {"r": 4, "targets": ["c_attn"], "dora": False}, "epochs": 1.5,
          "rows": "packed", "full": False, "batch_size": 2}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A function of the library that reads files: how its files are made, which one is damaged, and how they are read."""

    make: Callable[[Path], object]
    file: str
    kind: Kind
    read: Callable[[Path], object]
    examples: int = 40


def lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def use(tokenizer: Any) -> None:
    """Check that an opened tokenizer works, at least on text that it can encode."""
    try:
        ids = tokenizer.encode("a b")
    except ValueError as error:
        assert "not in the vocabulary" in str(error) and not isinstance(tokenizer, BPETokenizer)
        return
    assert max(ids) < tokenizer.n_vocab
    tokenizer.decode(ids)
    tokenizer.to_json()


def make_openai_vocabulary(place: Path) -> None:
    described = BPE.to_json()
    (place / "encoder.json").write_text(json.dumps(described["model"]["vocab"] | {"<|endoftext|>": 270}), "utf-8")
    merges = [" ".join(merge) for merge in described["model"]["merges"]]
    (place / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def make_vocabulary(place: Path) -> None:
    """Write the files of transformers' tokenizer before it had tokenizer.json."""
    described = BPE.to_json()
    (place / "vocab.json").write_text(json.dumps(described["model"]["vocab"] | {"<|endoftext|>": 270}), "utf-8")
    merges = [" ".join(merge) for merge in described["model"]["merges"]]
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 8}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "additional_special_tokens": ["the"]}
    (place / "special_tokens_map.json").write_text(json.dumps(special))


def make_tuned(place: Path) -> None:
    """Write a model whose turns end with another token than its documents."""
    MODEL.save_pretrained(place, BPE)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [270, 7], "pad_token_id": 7}))


def make_meta(place: Path) -> None:
    characters = " ab"
    content = {"vocab_size": 3, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (place / "meta.pkl").write_bytes(pickle.dumps(content))


def make_checkpoint(place: Path) -> None:
    with make_trainer() as trainer:
        trainer.step()
        write_snapshot(place, trainer.snapshot())


def make_sharded_checkpoint(place: Path) -> None:
    """Write a checkpoint as two ranks write it: each holds half of the rows of all tensors."""
    make_checkpoint(place)
    path = place / "step-000001"
    files = [path / "weights.safetensors", path / "optimizer.safetensors"]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for rank in range(2):
        halves, positions = {}, {}
        for name, tensor in tensors.items():
            if tensor.ndim > 0:
                halves[name] = tensor.chunk(2)[rank]
                positions[name] = [rank * len(tensor.chunk(2)[0]), *[0] * (tensor.ndim - 1)]
            elif rank == 0:
                halves[name], positions[name] = tensor, []
        write_safetensors(path / f"shard-0000{rank + 1}-of-00002.safetensors", halves, positions=positions)
    for file in files:
        file.unlink()


def read_checkpoint(place: Path, signs: bool = False) -> None:
    """Read the only checkpoint as a resumed run does. `signs` writes a manifest that fits, as an attacker would."""
    path = place / "step-000001"
    if signs:
        names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
        (path / "manifest.json").write_text(json.dumps(checkpoint._make_manifest(path, names)))
    trainer = make_trainer()
    snapshot, _ = read_newest(place, functools.partial(check_fit, trainer.model, trainer.config))
    restore_snapshot(snapshot, trainer.model, make_optimizers(trainer.model, trainer.config))


def make_shards(place: Path) -> None:
    from MyGPT.weights.formats import huggingface

    whole, huggingface.MAX_SHARD_BYTES = huggingface.MAX_SHARD_BYTES, 8000
    try:
        MODEL.save_pretrained(place)
    finally:
        huggingface.MAX_SHARD_BYTES = whole


def make_adapter(place: Path) -> None:
    adapted = add_lora(copy.deepcopy(MODEL), r=2)
    adapted.peft_config["default"].base_model_name_or_path = "gpt2"
    adapted.save_pretrained(str(place), save_embedding_layers=False)


def read_adapter(place: Path) -> None:
    base_of_adapter(place)
    open_adapter(copy.deepcopy(MODEL), place)(torch.tensor([[1, 2]]))


def make_tokens(place: Path) -> None:
    (place.parent / "text.txt").write_text("a b " * 50)
    prepare([place.parent / "text.txt"], place, BPE, progress=False, overwrite=True)


def read_tokens(place: Path) -> None:
    ids, _ = open_tokens(place)
    assert int(ids[-1]) + len(ids) > 0


@functools.cache
def parser_of(command: Any) -> Any:
    return make_parser(command.__name__, command)


def read_recipe(command: Any, place: Path) -> None:
    """Read the options as `mygpt train --config FILE` does, without training."""

    @functools.wraps(command)
    def nothing(*arguments: Any, **options: Any) -> None:
        pass

    options = parser_of(command).parse_args(["--config", str(place / "config.yaml")])
    with contextlib.suppress(
        ValueError
    ):  # a value out of range: the error cannot know whether it came from the file or the command line
        call(nothing, options)


BPE = BPETokenizer.train("the cat sat on the mat, the cat ate the rat " * 3, 270, progress=False)
MODEL = lively_model(TINY)
LABELLED = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
TALKS = [
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Rhyme."},
    {"conversations": [{"from": "system", "value": "Sing."}, {"from": "gpt", "value": "La"}], "system": None},
]
METRICS = [{"step": 1, "loss": 2.5, "lr": 1e-3}, {"step": 2, "loss": 2.25}, {"step": 2, "val_loss": 2.0}]

READERS = {
    "config.json": Reader(MODEL.save_pretrained, "config.json", "json", GPTModel.from_pretrained, 60),
    "config.json, by PEFT": Reader(MODEL.save_pretrained, "config.json", "json", GPTConfig.from_pretrained),
    "config.json of a classifier": Reader(
        GPTForClassification(MODEL, ["a", "b"]).save_pretrained, "config.json", "json", GPTForClassification.from_pretrained
    ),
    "model.safetensors": Reader(MODEL.save_pretrained, "model.safetensors", "safetensors", GPTModel.from_pretrained, 80),
    "model.safetensors of a classifier": Reader(
        GPTForClassification(MODEL, ["a", "b"]).save_pretrained, "model.safetensors", "safetensors",
        GPTForClassification.from_pretrained,
    ),
    "model.safetensors.index.json": Reader(
        make_shards, "model.safetensors.index.json", "json", GPTModel.from_pretrained
    ),
    "tokenizer.json, BPE": Reader(BPE.save, "tokenizer.json", "json", lambda d: use(load_tokenizer(d)), 80),
    "tokenizer.json, words": Reader(
        SimpleTokenizer.from_text("a b, c").save, "tokenizer.json", "json", lambda d: use(load_tokenizer(d))
    ),
    "tokenizer.json, characters": Reader(
        CharTokenizer.from_text("a bc").save, "tokenizer.json", "json", lambda d: use(load_tokenizer(d))
    ),
    "encoder.json": Reader(make_openai_vocabulary, "encoder.json", "json", lambda d: use(get_tokenizer(d))),
    "vocab.bpe": Reader(make_openai_vocabulary, "vocab.bpe", "text", lambda d: use(get_tokenizer(d))),
    "vocab.json": Reader(make_vocabulary, "vocab.json", "json", lambda d: use(get_tokenizer(d))),
    "merges.txt": Reader(make_vocabulary, "merges.txt", "text", lambda d: use(get_tokenizer(d))),
    "tokenizer_config.json": Reader(
        make_vocabulary, "tokenizer_config.json", "json", lambda d: use(get_tokenizer(d))
    ),
    "special_tokens_map.json": Reader(
        make_vocabulary, "special_tokens_map.json", "json", lambda d: use(get_tokenizer(d))
    ),
    "generation_config.json": Reader(
        make_tuned, "generation_config.json", "json", lambda d: open_model(d, device="cpu")[0].config
    ),
    "meta.pkl": Reader(make_meta, "meta.pkl", "bytes", lambda d: use(get_tokenizer(d))),
    "adapter_config.json": Reader(make_adapter, "adapter_config.json", "json", read_adapter, 60),
    "adapter_model.safetensors": Reader(make_adapter, "adapter_model.safetensors", "safetensors", read_adapter),
    "config.yaml, train": Reader(
        lambda d: (d / "config.yaml").write_text(json.dumps(RECIPE)), "config.yaml", "yaml",
        functools.partial(read_recipe, train), 60,
    ),
    "config.yaml, finetune": Reader(
        lambda d: (d / "config.yaml").write_text(json.dumps(TUNING)), "config.yaml", "yaml",
        functools.partial(read_recipe, finetune),
    ),
    "config.yaml, info": Reader(
        lambda d: (d / "config.yaml").write_text(json.dumps(RECIPE | {"context_length": 8, "n_layers": 1})),
        "config.yaml", "yaml", lambda d: explain(str(d / "config.yaml")),
    ),
    "tokens.json": Reader(make_tokens, "tokens.json", "json", read_tokens),
    "tokens-00000.bin": Reader(make_tokens, "tokens-00000.bin", "bytes", read_tokens),
    "records, lines": Reader(
        lambda d: lines(d / "records.jsonl", RECORDS), "records.jsonl", "jsonl",
        lambda d: [ALPACA.parts(record) for record in read_records(d / "records.jsonl")],
    ),
    "records, array": Reader(
        lambda d: (d / "records.json").write_text(json.dumps(RECORDS)), "records.json", "json",
        lambda d: [ALPACA.parts(record) for record in read_records(d / "records.json")],
    ),
    "records, CSV": Reader(
        lambda d: (d / "records.csv").write_text('instruction;input;output\nSay;"it; or\nnot";yes\nSay;;no\n'), "records.csv",
        "text", lambda d: [ALPACA.parts(record) for record in read_records(d / "records.csv")],
    ),
    "records, ShareGPT": Reader(
        lambda d: lines(d / "talks.jsonl", TALKS), "talks.jsonl", "jsonl",
        lambda d: [ALPACA.parts(record) for record in read_records(d / "talks.jsonl")],
    ),
    "records, gzip": Reader(
        lambda d: (d / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS[0]).encode() + b"\n")), "a.jsonl.gz",
        "bytes", lambda d: read_records(d / "a.jsonl.gz"),
    ),
    "state.json of a checkpoint": Reader(
        make_checkpoint, "step-000001/state.json", "json", functools.partial(read_checkpoint, signs=True), 60
    ),
    "manifest.json of a checkpoint": Reader(make_checkpoint, "step-000001/manifest.json", "json", read_checkpoint),
    "optimizer.safetensors of a checkpoint": Reader(
        make_checkpoint, "step-000001/optimizer.safetensors", "safetensors", functools.partial(read_checkpoint, signs=True)
    ),
    "shard of a checkpoint": Reader(
        make_sharded_checkpoint, "step-000001/shard-00002-of-00002.safetensors", "safetensors",
        functools.partial(read_checkpoint, signs=True)
    ),
    "text": Reader(
        lambda d: (d / "a.txt").write_text("Once\nupon a time.\n"), "a.txt", "text",
        lambda d: BPE.encode("".join(piece.text for piece in read_pieces(d / "a.txt"))),
    ),
    "text, lines of JSON": Reader(
        lambda d: lines(d / "a.jsonl", [{"text": "Once"}, {"text": "upon", "id": 3}]), "a.jsonl", "jsonl",
        lambda d: BPE.encode("".join(read_texts([d / "a.jsonl"]))),
    ),
    "text, array": Reader(
        lambda d: (d / "a.json").write_text(json.dumps([{"text": "Once"}, {"text": "upon", "id": 3}])), "a.json", "json",
        lambda d: BPE.encode("".join(read_texts([d / "a.json"]))),
    ),
    "text, zst": Reader(
        lambda d: (d / "a.txt.zst").write_bytes(zstandard.compress(b"Once upon a time. " * 9)), "a.txt.zst", "bytes",
        lambda d: list(read_pieces(d / "a.txt.zst")),
    ),
    "text, parquet": Reader(
        lambda d: pq.write_table(pa.table({"text": ["Once upon a time.", "é"] * 4}), d / "a.parquet", compression="zstd"),
        "a.parquet", "bytes", lambda d: list(read_pieces(d / "a.parquet")),
    ),
    "records, parquet": Reader(
        lambda d: pq.write_table(pa.Table.from_pylist(RECORDS[1:2]), d / "a.parquet"), "a.parquet", "bytes",
        lambda d: read_records(d / "a.parquet"),
    ),
    "text, gzip": Reader(
        lambda d: (d / "a.txt.gz").write_bytes(gzip.compress(b"Once upon a time. " * 9)), "a.txt.gz", "bytes",
        lambda d: list(read_pieces(d / "a.txt.gz")),
    ),
    "template.json": Reader(ALPACA.save, "template.json", "json", load_template),
    "split.json": Reader(
        lambda d: Split((0, 2), (1,), (3,)).save(d / "split.json"), "split.json", "json",
        lambda d: load_split(d / "split.json"),
    ),
    "metrics.jsonl": Reader(
        lambda d: lines(d / "metrics.jsonl", METRICS), "metrics.jsonl", "jsonl",
        lambda d: (read_metrics(d), plot_losses([d])),
    ),
    "labelled texts, lines": Reader(
        lambda d: lines(d / "spam.jsonl", LABELLED), "spam.jsonl", "jsonl", lambda d: read_labelled(d / "spam.jsonl")
    ),
    "labelled texts, CSV": Reader(
        lambda d: (d / "spam.csv").write_text("text,label\ngood,yes\n\"b,\nad\",no\n"), "spam.csv", "text",
        lambda d: read_labelled(d / "spam.csv"),
    ),
    "the book's CSV": Reader(
        lambda d: (d / "spam.csv").write_text("Label,Text\n0,good\n1,\"b,\nad\"\n"), "spam.csv", "text",
        lambda d: SpamDataset(d / "spam.csv", BPE)[0],
    ),
}  # fmt: skip

COUNTS: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _counts(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if FACTOR > 1:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            for name in dict.fromkeys(reader for reader, _ in COUNTS):
                found = {what: n for (reader, what), n in COUNTS.items() if reader == name}
                print(f"\n{name:<36} {sum(found.values()):>8,}  {found}", end="")


@contextlib.contextmanager
def ended(seconds: int) -> Iterator[None]:
    """Raise AssertionError in the block if it runs longer than `seconds`, on systems with alarm signals."""

    def fail(*_: object) -> None:
        raise AssertionError(f"a reader did not come back within {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def original(name: str) -> Path:
    """Make a directory with undamaged files, and check that the reader accepts them."""
    place = Path(tempfile.mkdtemp(prefix="hostile-")) / "files"
    place.mkdir()
    READERS[name].make(place)
    READERS[name].read(place)
    return place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_with_its_name(name: str, in_tmp_path: Path) -> None:
    reader, place = READERS[name], in_tmp_path / "files"
    shutil.copytree(original(name), place)
    content = (place / reader.file).read_bytes()

    @settings(
        max_examples=reader.examples * FACTOR,
        deadline=None,
        database=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(damage=damaged(content, reader.kind))
    def check(damage: bytes) -> None:
        (place / reader.file).write_bytes(damage)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", FileWarning)  # all other warnings are errors
            try:
                with ended(HANG_SECONDS):
                    reader.read(place)
            except (ValueError, OSError) as error:
                assert str(place) in str(error), f"a {type(error).__name__} that does not name the file: {error}"
                COUNTS[name, type(error).__name__] += 1
            else:
                COUNTS[name, "read with a note" if notes else "read"] += 1
        assert all(str(place) in str(note.message) for note in notes)
        assert not (in_tmp_path / "ran").exists()

    check()


# Files that demand terabytes or endless work, or lead to other files


def in_four_gigabytes(code: str, *arguments: object) -> str:
    """Run code in a new process with at most 4 GB of memory, and return its output. A crash or a hang fails the test."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
    command = [sys.executable, "-c", limit + textwrap.dedent(code), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_files_that_demand_terabytes_are_refused_within_a_few_gigabytes(tmp_path: Path) -> None:
    """A header of 2 TB, 10**9 layers, tokens of 4 EB, sparse files of a terabyte, and three archives of gigabytes."""
    MODEL.save_pretrained(tmp_path / "header")
    weights = tmp_path / "header" / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2 << 40) + weights.read_bytes()[8:])
    for name, sizes in (("layers", {"n_layer": 10**9}), ("width", {"n_embd": 2**30}), ("words", {"vocab_size": 2**30})):
        MODEL.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | sizes))
    make_tokens(tmp_path / "tokens")
    description = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(description | {"n_tokens": 2**61}))
    for name in ("a.json", "a.yaml", "tokenizer.json", "a.jsonl"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)
    for name, block in (
        ("a.txt.gz", b"a" * (1 << 20)),
        ("b.txt.gz", b"a b " * (1 << 18)),
        ("c.jsonl.gz", b"[" * (1 << 20)),
    ):
        (tmp_path / name).write_bytes(gzip.compress(block) * 400)  # concatenated gzip archives are a valid archive
    code = """
    from pathlib import Path
    import sys
    from MyGPT import GPTModel
    from MyGPT.commands._recipe import read_recipe
    from MyGPT.data.records import read_records
    from MyGPT.data.sources import read_pieces
    from MyGPT.data.tokens import open_tokens, sampled_sha256
    from MyGPT.tokenizers import load_tokenizer
    place = Path(sys.argv[1])
    def pieces(path):
        return sum(len(piece.text) for piece in read_pieces(path))
    for read, name in (
        (GPTModel.from_pretrained, "header"), (GPTModel.from_pretrained, "layers"), (GPTModel.from_pretrained, "width"),
        (GPTModel.from_pretrained, "words"), (open_tokens, "tokens"), (read_records, "a.json"), (read_recipe, "a.yaml"),
        (load_tokenizer, "."), (pieces, "a.jsonl"), (pieces, "a.txt.gz"), (pieces, "b.txt.gz"), (pieces, "c.jsonl.gz"),
    ):
        try:
            print("read", name, read(place / name))
        except (ValueError, OSError) as error:
            print("refused", str(error)[:200])
    """
    printed = in_four_gigabytes(code, tmp_path).splitlines()
    assert len(printed) == 12
    assert all(line.startswith("refused") and str(tmp_path) in line for line in printed), "\n".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize("deep", ['{"a":' * 100_000, "[" * 100_000, "- " * 100_000], ids=["objects", "lists", "blocks"])
def test_a_deep_recipe_does_not_crash_the_interpreter(tmp_path: Path, deep: str) -> None:
    """jsonargparse uses libyaml where it is installed, and libyaml crashed with a segmentation fault."""
    (tmp_path / "run.yaml").write_text(deep)
    with pytest.raises(ValueError, match=r"run\.yaml .*nested more than 20 levels deep"):
        parser_of(train).parse_args(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match=r"run\.yaml .*nested more than 20 levels deep"):
        explain(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    "key", ["epochs", "train_fraction", "full", "rows", "learning_rate", "batch_size", "lora.dropout"]
)
def test_a_recipe_with_null_for_a_number_is_refused(key: str, tmp_path: Path) -> None:
    """jsonargparse accepts null for every option. `0 < None` ended in a traceback."""
    recipe = copy.deepcopy(TUNING)
    outer, _, inner = key.partition(".")
    if inner:
        recipe[outer][inner] = None
    else:
        recipe[outer] = None
    (tmp_path / "config.yaml").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=rf"--{key} must be .*, got null|{key} must be .*, got None"):
        call(finetune, parser_of(finetune).parse_args(["--config", str(tmp_path / "config.yaml")]))


def test_a_recipe_with_a_tokenizer_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(RECIPE | {"tokenizer": "2026-13-45"}))
    with pytest.raises(ValueError, match=r"config\.yaml: .*2026-13-45"):
        explain(str(tmp_path / "config.yaml"))


def test_a_recipe_of_aliases_is_refused_before_it_is_unfolded(tmp_path: Path) -> None:
    """Nine lines expand to a billion words, which the error message would have contained."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "run.yaml").write_text("\n".join([*lines, "emb_dim: *a8", ""]))
    with pytest.raises(ValueError, match=r"run\.yaml .*alias \*a0"):
        parser_of(train).parse_args(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match=r"run\.yaml .*alias \*a0"):
        explain(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "the option megatron_config is not supported"),
        ({"layer_replication": [[0, 10**9]]}, "the option layer_replication is not supported"),
        (
            {"monteclora_config": {"L": {}}},
            "the option monteclora_config is not supported",
        ),  # PEFT recurses without end
        ({"r": 10**9}, "but the model needs (1000000000, 8)"),
        ({"rank_pattern": {"c_attn": 10**9}}, "but the model needs (1000000000, 8)"),
        ({"target_modules": "(.*)*(.*)*x"}, "could run forever"),
        ({"target_modules": "(.|.)" * 30}, "could run forever"),
        ({"alpha_pattern": {"(a|.)+(b|.)+(c|.)+x": 1}}, "could run forever"),
        ({"exclude_modules": ".*.*.*.*.*.*.*.*x"}, "could run forever"),
        ({"init_lora_weights": "pissa_niter_999999999"}, "pissa or pissa_niter_16, got 'pissa_niter_999999999'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0, got nan"),
    ],
)
def test_an_adapter_that_would_run_code_fill_memory_or_never_end_is_refused(
    in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    make_adapter(in_tmp_path)
    (in_tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.syspath_prepend(in_tmp_path)
    config = json.loads((in_tmp_path / "adapter_config.json").read_text())
    (in_tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=re.escape(words)):
        open_adapter(copy.deepcopy(MODEL), in_tmp_path)
    assert not (in_tmp_path / "ran").exists()


@pytest.mark.parametrize("target", [r".*\.c_(attn|proj)", r"transformer\.h\.\d+\.attn\.c_attn", "all-linear"])
def test_a_regular_expression_of_the_usual_kind_is_still_a_target(tmp_path: Path, target: str) -> None:
    adapted = add_lora(copy.deepcopy(MODEL), r=2, target_modules=target)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    open_adapter(copy.deepcopy(MODEL), tmp_path)


@pytest.mark.slow
def test_a_token_of_many_bytes_is_checked_quickly(tmp_path: Path) -> None:
    """Each merge doubles the token. A check that tries every pair again would take hours for a file of a megabyte."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"a" * 2**i for i in range(1, 16)]
    merges = [(b"a" * 2**i, b"a" * 2**i) for i in range(15)]
    BPETokenizer({token: id_ for id_, token in enumerate(tokens)}, merges, {}).save(tmp_path)
    assert load_tokenizer(tmp_path).encode("a" * 2**15) == [270]


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokenizer.json"])
def test_files_of_another_data_set_are_noticed_though_their_length_is_the_same(tmp_path: Path, name: str) -> None:
    make_tokens(tmp_path / "tokens")
    path = tmp_path / "tokens" / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b") if name == "tokenizer.json" else content[::-1])
    with pytest.raises(ValueError, match=rf"{name} is not .*SHA-256 differs: run mygpt prepare again"):
        open_tokens(tmp_path / "tokens")


@pytest.mark.slow
def test_samples_of_a_long_token_file_are_compared(tmp_path: Path) -> None:
    """Only samples are compared, so the cost is constant. A swapped file is detected, one changed byte may not be."""
    n_bytes = 256 << 20
    with open(tmp_path / "tokens.bin", "wb") as file:
        file.truncate(n_bytes)
    known = sampled_sha256(tmp_path / "tokens.bin")
    assert known == hashlib.sha256(bytes(64 << 20)).hexdigest()
    for place, is_seen in (
        (0, True),
        (n_bytes - 1, True),
        (n_bytes // 2, False),
        (1 << 21, False),
        (n_bytes // 63 * 7, True),
    ):
        with open(tmp_path / "tokens.bin", "r+b") as file:
            file.seek(place)
            file.write(b"\x01")
            file.flush()
            assert (sampled_sha256(tmp_path / "tokens.bin") != known) == is_seen, place
            file.seek(place)
            file.write(b"\0")


def test_a_data_set_prepared_before_there_were_samples_opens(tmp_path: Path) -> None:
    make_tokens(tmp_path / "tokens")
    path = tmp_path / "tokens" / "tokens.json"
    description = json.loads(path.read_text())
    (shard,) = description["shards"]
    (tmp_path / "tokens" / shard["file"]).rename(tmp_path / "tokens" / "tokens.bin")
    old = {key: description[key] for key in ("n_tokens", "dtype", "n_vocab")} | {"sha256": shard["sha256"]}
    path.write_text(json.dumps(old))
    assert len(open_tokens(tmp_path / "tokens")[0]) == description["n_tokens"]


def test_a_pipe_in_a_model_directory_does_not_hang(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a pipe"):
        load_tokenizer(tmp_path)
