"""Fixtures for all tests: no network, a clean environment, and small models whose predictions vary."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from MyGPT.config import GPTConfig
from MyGPT.model import GPTModel
from places import ALICE

# transformers, an oracle, would otherwise look for updates and models on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tensors of a few hundred numbers gain nothing from a second thread. On a busy machine, waiting for the second thread
# takes ten times as long as the computation.
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to another machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("MYGPT_DEBUG", "MYGPT_GPT2_URL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> GPTConfig:
    return GPTConfig(
        vocab_size=67,
        context_length=16,
        emb_dim=24,
        n_heads=3,
        n_layers=3,
        drop_rate=0.0,
        qkv_bias=True,
        tie_weights=False,
    )


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPTModel:
    """A small float32 model in evaluation mode whose greedy continuations vary from token to token."""
    return lively_model(tiny_config)


@pytest.fixture
def tiny_model64(tiny_config: GPTConfig) -> GPTModel:
    """The model of `tiny_model` in float64, where rounding errors of 1e-15 cannot decide an argmax."""
    return lively_model(tiny_config).double()


def same_weights(one: GPTModel, other: GPTModel) -> bool:
    """Return whether two models have bit-identical weights.

    Their logits may still differ in the last bits, because the kernels of an opened model are transposed in memory.
    """
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lively_model(config: GPTConfig) -> GPTModel:
    """Return a model with large random weights and biases.

    Freshly initialised weights give nearly equal logits, which would hide many mistakes.
    """
    torch.manual_seed(1)
    model = GPTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.35) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def alice() -> str:
    return ALICE


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run the test in its own empty directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
