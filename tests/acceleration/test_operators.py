"""Private torch operators: the public way gives the same result, and a missing or changed operator is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import lively_model
from MyGPT import GPTConfig, accelerate, generate
from MyGPT.acceleration import operators
from MyGPT.acceleration.linear import fast_linear, onednn_is_faster

PROBES = (operators.has_onednn_linear, operators.has_int8_linear, onednn_is_faster)


@pytest.fixture(autouse=True)
def _fresh_probes() -> Iterator[None]:
    for probe in PROBES:
        probe.cache_clear()
    yield
    for probe in PROBES:
        probe.cache_clear()


def changed_signature(x: Tensor) -> Tensor:
    return x


def wrong_result(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return F.linear(x.float(), weight.float()) + 1


def broken(*_: Any) -> Tensor:
    raise RuntimeError("not implemented for this CPU")


OPERATORS: dict[str, dict[str, Any]] = {
    "missing": {},
    "other arguments": {"_linear_pointwise": changed_signature, "_weight_int8pack_mm": changed_signature},
    "wrong": {"_linear_pointwise": wrong_result, "_weight_int8pack_mm": wrong_result},
    "broken": {"_linear_pointwise": broken, "_weight_int8pack_mm": broken},
}


@pytest.fixture(params=OPERATORS)
def other_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose private operators are missing, changed, wrong or broken."""
    namespace = SimpleNamespace(**OPERATORS[request.param])
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=namespace, aten=namespace))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_todays_operators_pass_the_probes() -> None:
    assert operators.has_onednn_linear()
    assert operators.has_int8_linear()


@pytest.mark.usefixtures("other_torch")
def test_a_missing_or_changed_operator_is_noticed() -> None:
    assert not operators.has_onednn_linear()
    assert not operators.has_int8_linear()


@pytest.mark.usefixtures("other_torch")
def test_products_without_private_operators_are_those_of_float64() -> None:
    """Sums of 64 products of size 1 in float32: 1e-5 is about twenty roundings. int8 numbers times 64 values are larger."""
    x, weight, bias = torch.randn(3, 64), torch.randn(5, 64), torch.randn(5)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (operators.onednn_linear(x, weight, bias) - exact).abs().max() < 1e-5
    narrow = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
    exact = F.linear(x.double(), narrow.double())
    assert (operators.int8_linear(x, narrow) - exact).abs().max() < 1e-3


@pytest.mark.usefixtures("other_torch")
def test_training_without_the_private_operator_uses_torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("MyGPT.acceleration.linear._cpu_description", lambda: "AuthenticAMD")
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)
    with fast_linear():
        assert torch.equal(F.linear(x, weight), x @ weight.T)


@pytest.mark.usefixtures("other_torch")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_an_accelerated_model_works_without_private_operators(precision: Any) -> None:
    sizes = {"vocab_size": 67, "context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
    model = lively_model(GPTConfig(**sizes))  # type: ignore[arg-type]
    ids = torch.randint(0, 67, (2, 5))
    fast = accelerate(model, precision, compiled=False)
    assert generate(fast, ids, 8).shape == (2, 13)
    # Rounded weights move logits of size 10 by a few tenths; another order of summing moves them by 1e-5.
    with torch.no_grad():
        error = (fast(ids) - model(ids)).abs().max()
    assert error < (1e-4 if precision == "fp32" else 2.0)
