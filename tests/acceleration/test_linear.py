"""Matrix products through oneDNN, compared with float64, and the rule that chooses the library."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT import GPTModel
from MyGPT.acceleration import linear
from MyGPT.acceleration.linear import OneDNNLinear, fast_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 1)


def went_through_onednn(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_LinearBackward"


@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 37, 48), (130, 48)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradients_are_those_of_float64(shape: tuple[int, ...], has_bias: bool) -> None:
    """Sums of up to 130 products of standard normal numbers have errors of 5e-7 in float32; in bf16 they would be 1e-1."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(80, 48), *([torch.randn(80)] if has_bias else [])]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with OneDNNLinear():
        y = F.linear(*inputs)
    assert went_through_onednn(y)
    expected = F.linear(*exact)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    ours = torch.autograd.grad(y, inputs, upstream)
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-4)


def test_only_float32_matrices_outside_autocast_are_taken() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)
    with OneDNNLinear():
        assert went_through_onednn(F.linear(x, weight))
        assert not went_through_onednn(F.linear(x.double(), weight.double()))
        assert not went_through_onednn(F.linear(x[0], weight))
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, weight)
        assert y.dtype == torch.bfloat16
    assert not went_through_onednn(F.linear(x, weight))


def test_small_products_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 4 * 8 * 8)
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)
    with OneDNNLinear():
        assert went_through_onednn(F.linear(x, weight))
        assert not went_through_onednn(F.linear(x[:3], weight))


def tiny() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(
        {"vocab_size": 3000, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0}
    )


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, count = model.token_loss(ids[:, :-1], ids[:, 1:])
    (total / count).backward()
    return [parameter.grad for parameter in parameters]


def test_a_model_has_the_gradients_of_float64() -> None:
    """Gradients are below 1 and have seven digits in float32, so errors of 2e-6 are a few roundings."""
    model = tiny().train()
    ids = torch.randint(0, 3000, (3, 17))
    expected = gradients(copy.deepcopy(model).double(), ids)
    with OneDNNLinear():
        ours = gradients(model, ids)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=2e-6)


def test_a_model_in_pefts_wrapper_goes_the_same_way() -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0)
    model = get_peft_model(tiny(), lora).train()
    seen: list[bool] = []
    base = model.base_model.model.transformer.h[0].mlp.c_fc.base_layer
    base.register_forward_hook(lambda module, args, y: seen.append(went_through_onednn(y)))
    ids = torch.randint(0, 3000, (3, 17))
    expected = gradients(copy.deepcopy(model).double(), ids)
    with OneDNNLinear():
        ours = gradients(model, ids)
    assert seen == [False, True]  # the copy in float64 has the hook too
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("capability", "processor", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_onednn_is_taken_on_amds_processors_with_avx512(
    capability: str, processor: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear, "_cpu_description", lambda: f"vendor_id : {processor}")
    linear.onednn_is_faster.cache_clear()
    try:
        assert isinstance(fast_linear(), OneDNNLinear) is expected
    finally:
        linear.onednn_is_faster.cache_clear()
