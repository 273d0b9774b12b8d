"""Readers beside a writer that replaces a directory: they change nothing, and they never see half of an exchange."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import same_weights
from MyGPT import CharTokenizer, GPTConfig, GPTModel, open_model
from MyGPT.commands.info import explain
from MyGPT.data.prepare import prepare
from MyGPT.data.tokens import is_prepared, open_tokens
from MyGPT.files import atomic_directory, present_directory, reading
from MyGPT.finetuning.classification import GPTForClassification
from MyGPT.training.directory import is_empty_run

SIZES = {"context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
TOKENIZERS = [CharTokenizer(list("abc")), CharTokenizer(list("abcdefg"))]
"""The models of the two tokenizers have different shapes, so files of both together cannot be opened."""


def save_model(directory: Path, i: int) -> None:
    tokenizer = TOKENIZERS[i % 2]
    GPTModel(GPTConfig(tokenizer.n_vocab, **SIZES)).save_pretrained(directory, tokenizer)


def save_classifier(directory: Path, i: int) -> None:
    labels = ["x", "y"] if i % 2 else ["x", "y", "z"]
    GPTForClassification(GPTModel(GPTConfig(5 + i % 2, **SIZES)), labels).save_pretrained(directory)


def save_tokens(directory: Path, i: int) -> None:
    text = directory.parent / f"{i % 2}.txt"
    text.write_text("abc" * (2 + i % 2))
    prepare([text], directory, TOKENIZERS[i % 2], overwrite=True, progress=False)


def read_model(directory: Path) -> None:
    model, tokenizer = open_model(directory.parent)
    assert tokenizer.n_vocab == model.config.vocab_size


READERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], Any]]] = {
    "open_model": (save_model, read_model),
    "info": (save_model, lambda directory: explain(str(directory.parent))),
    "from_pretrained": (save_model, GPTModel.from_pretrained),
    "a classifier": (save_classifier, GPTForClassification.from_pretrained),
    "open_tokens": (save_tokens, open_tokens),
}


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("n_exchanges", [6, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", READERS)
def test_a_reader_beside_a_writer_opens_a_whole_directory(kind: str, n_exchanges: int, tmp_path: Path) -> None:
    save, read = READERS[kind]
    directory, errors = tmp_path / "model", list[BaseException]()
    save(directory, 0)
    done = threading.Event()

    def write() -> None:
        try:
            for i in range(1, n_exchanges):
                save(directory, i)
        except BaseException as error:
            errors.append(error)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    n_read = 0
    while not done.is_set():
        read(directory)
        n_read += 1
    writer.join()
    assert errors == [] and n_read > 0
    assert not any(name.startswith(".") for name in files_in(tmp_path))


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_opens_the_old_directory_of_a_killed_writer_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    save, read = READERS[kind]
    save(tmp_path / "model", 0)
    os.rename(tmp_path / "model", tmp_path / ".model.previous")
    before = files_in(tmp_path)
    tmp_path.chmod(0o555)
    try:
        read(tmp_path / "model")
    finally:
        tmp_path.chmod(0o755)
    assert files_in(tmp_path) == before
    save(tmp_path / "model", 1)  # the next writer cleans up
    read(tmp_path / "model")
    assert not (tmp_path / ".model.previous").exists()


def test_looking_for_a_run_or_a_data_set_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert is_empty_run(tmp_path)
    save_model(tmp_path / "model", 0)
    os.rename(tmp_path / "model", tmp_path / ".model.previous")
    before = files_in(tmp_path)
    assert not is_empty_run(tmp_path) and not is_prepared(tmp_path / "model")
    assert present_directory(tmp_path / "model") == tmp_path / ".model.previous"
    assert files_in(tmp_path) == before


def test_a_writer_waits_for_a_reader_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", 0)
    with reading(tmp_path):
        writer = threading.Thread(target=save_model, args=(tmp_path / "model", 1))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        assert GPTModel.from_pretrained(tmp_path).config.vocab_size == TOKENIZERS[0].n_vocab
    writer.join()
    assert GPTModel.from_pretrained(tmp_path).config.vocab_size == TOKENIZERS[1].n_vocab
    monkeypatch.setattr("MyGPT.files._MAX_WAIT_FOR_READERS", 0.05)
    with reading(tmp_path):
        save_model(tmp_path / "model", 0)
    assert GPTModel.from_pretrained(tmp_path).config.vocab_size == TOKENIZERS[0].n_vocab


def test_a_model_that_is_open_survives_its_replacement(tmp_path: Path) -> None:
    save_model(tmp_path / "model", 0)
    model, other = GPTModel.from_pretrained(tmp_path), GPTModel.from_pretrained(tmp_path)
    with atomic_directory(tmp_path / "model", replaces=("*",)) as new:
        (new / "other").write_text("")
    assert same_weights(model, other)
