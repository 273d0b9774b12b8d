"""Every reader of files from outside gives a result that can be used, or a ValueError or OSError that names the file.

Never another exception, code that runs, memory that a header asks for, or a reader that does not come back. `make fuzz`
tries more examples and counts them (MYGPT_FUZZ, a factor). Pickles and TensorFlow's checkpoints have tests of their own
(test_pretrained.py, test_tf_checkpoint.py).
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import functools
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from conftest import lively_model
from hostile import Kind, damaged
from MyGPT.book.classification import SpamDataset
from MyGPT.cli import call, make_parser
from MyGPT.commands.finetune import finetune
from MyGPT.commands.info import explain
from MyGPT.commands.train import train
from MyGPT.config import GPTConfig
from MyGPT.data.prepare import prepare
from MyGPT.data.records import Split, load_split, read_records
from MyGPT.data.sources import read_pieces
from MyGPT.data.templates import ALPACA, load_template
from MyGPT.data.tokens import open_tokens
from MyGPT.evaluation.protocols import read_texts
from MyGPT.finetuning.classification import GPTForClassification, read_labelled
from MyGPT.finetuning.lora import add_lora, base_of_adapter, open_adapter
from MyGPT.model import GPTModel
from MyGPT.plots import plot_losses
from MyGPT.tokenizers import BPETokenizer, CharTokenizer, SimpleTokenizer, get_tokenizer, load_tokenizer
from MyGPT.training.metrics import read_metrics

FACTOR = int(os.environ.get("MYGPT_FUZZ", "1"))
HANG_SECONDS = 120
"""No example takes a second. One that never ends would hold up everything: it ends the run, with a traceback."""

PHASES = (Phase.explicit, Phase.generate)
"""No shrinking, which may try a slow example hundreds of times: one change to a small file is short enough to read."""

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
    """A way into the library: how its files are made in a directory, which of them is damaged, and how they are read."""

    make: Callable[[Path], object]
    file: str
    kind: Kind
    read: Callable[[Path], object]
    examples: int = 40


def lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def use(tokenizer: Any) -> None:
    """What opens must also work: at least on what it can encode."""
    ids = tokenizer.encode("a b")
    assert max(ids) < tokenizer.n_vocab
    tokenizer.decode(ids)
    tokenizer.to_json()


def make_openai_vocabulary(place: Path) -> None:
    described = BPE.to_json()
    (place / "encoder.json").write_text(json.dumps(described["model"]["vocab"] | {"<|endoftext|>": 270}), "utf-8")
    merges = [" ".join(merge) for merge in described["model"]["merges"]]
    (place / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def make_shards(place: Path) -> None:
    from MyGPT.weights import directory

    whole, directory.MAX_SHARD_BYTES = directory.MAX_SHARD_BYTES, 8000
    try:
        MODEL.save_pretrained(place)
    finally:
        directory.MAX_SHARD_BYTES = whole


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
    """As `mygpt train --config FILE` up to where the command's own work begins."""

    @functools.wraps(command)
    def nothing(*arguments: Any, **options: Any) -> None:
        pass

    options = parser_of(command).parse_args(["--config", str(place / "config.yaml")])
    with contextlib.suppress(
        ValueError
    ):  # of a value out of range: where it came from, file or command line, is not known
        call(nothing, options)


BPE = BPETokenizer.train("the cat sat on the mat, the cat ate the rat " * 3, 270, progress=False)
MODEL = lively_model(TINY)
LABELLED = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
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
    "tokens.bin": Reader(make_tokens, "tokens.bin", "bytes", read_tokens),
    "records, lines": Reader(
        lambda d: lines(d / "records.jsonl", RECORDS), "records.jsonl", "jsonl",
        lambda d: [ALPACA.parts(record) for record in read_records(d / "records.jsonl")],
    ),
    "records, array": Reader(
        lambda d: (d / "records.json").write_text(json.dumps(RECORDS)), "records.json", "json",
        lambda d: [ALPACA.parts(record) for record in read_records(d / "records.json")],
    ),
    "text": Reader(
        lambda d: (d / "a.txt").write_text("Once\nupon a time.\n"), "a.txt", "text",
        lambda d: BPE.encode("".join(piece.text for piece in read_pieces(d / "a.txt"))),
    ),
    "text, lines of JSON": Reader(
        lambda d: lines(d / "a.jsonl", [{"text": "Once"}, {"text": "upon", "id": 3}]), "a.jsonl", "jsonl",
        lambda d: BPE.encode("".join(read_texts([d / "a.jsonl"]))),
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
def _counts() -> Iterator[None]:
    yield
    if FACTOR > 1:
        for name in READERS:
            found = {what: n for (reader, what), n in COUNTS.items() if reader == name}
            print(f"\n{name:<36} {sum(found.values()):>8,}  {found}", end="", file=sys.__stderr__)


@functools.cache
def original(name: str) -> Path:
    """A directory with the reader's files as they should be, which the reader takes."""
    place = Path(tempfile.mkdtemp(prefix="hostile-")) / "files"
    place.mkdir()
    READERS[name].make(place)
    READERS[name].read(place)
    return place


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_its_name_or_read(name: str, in_tmp_path: Path) -> None:
    reader, place = READERS[name], in_tmp_path / "files"
    shutil.copytree(original(name), place)
    content = (place / reader.file).read_bytes()

    @settings(
        max_examples=reader.examples * FACTOR, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damage=damaged(content, reader.kind))
    def check(damage: bytes) -> None:
        (place / reader.file).write_bytes(damage)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            reader.read(place)
        except (ValueError, OSError) as error:
            assert str(place) in str(error), f"a {type(error).__name__} that does not name the file: {error}"
            COUNTS[name, type(error).__name__] += 1
        else:
            COUNTS[name, "read"] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert not (in_tmp_path / "ran").exists()

    check()
