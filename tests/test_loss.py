"""The chunked loss, compared with the cross-entropy of all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from MyGPT import loss
from MyGPT.loss import linear_token_loss, token_loss

B, T, C, V = 3, 7, 6, 50
ROWS = 4  # 21 rows in chunks of 4: the last chunk has one
WIDTH = 64  # the memory of 50 outputs is rounded up to 64


@pytest.fixture(params=["whole", "chunks", "GPU chunks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with the chunked and with the plain loss, and check that the intended one was used.

    On a GPU, a chunk has all outputs, and the weight is padded.
    """
    name, calls = request.param, []
    take(name, monkeypatch, calls)
    yield name
    assert calls and set(calls) <= {name.removeprefix("GPU "), "whole"}


def take(name: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    def spied(way: str, function: Any) -> Any:
        return lambda *args, **options: (calls.append(way), function(*args, **options))[1]

    if name == "GPU chunks":
        monkeypatch.setattr(loss, "chunk_sizes", lambda device: (None, ROWS * WIDTH))
    if name != "whole":
        monkeypatch.setattr(loss, "MAX_LOGITS", ROWS * WIDTH)
        monkeypatch.setattr(loss, "VOCAB_CHUNK", 7)  # 50 outputs: the last product has one
    monkeypatch.setattr(loss, "token_loss", spied("whole", token_loss))
    monkeypatch.setattr(loss._ChunkedLinearLoss, "apply", spied("chunks", loss._ChunkedLinearLoss.apply))


def example(dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(B, T, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < ignored, -100)
    return hidden, weight, targets


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), targets.flatten(), reduction="sum")


def same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_value_count_and_gradients_are_those_of_cross_entropy(path: str, upstream: float, ignored: float) -> None:
    hidden, weight, targets = example(ignored=ignored)
    total, count = linear_token_loss(hidden, weight, targets)
    expected = cross_entropy(hidden, weight, targets)
    same(total, expected)
    assert count.item() == (targets != -100).sum().item()
    ours = torch.autograd.grad(upstream * total, (hidden, weight))
    theirs = torch.autograd.grad(upstream * expected, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)


@pytest.mark.parametrize("only", ["hidden", "weight"])
def test_a_gradient_is_asked_of_one_side_only(path: str, only: str) -> None:
    hidden, weight, targets = example()
    frozen, asked = (weight, hidden) if only == "hidden" else (hidden, weight)
    frozen.requires_grad_(False)
    linear_token_loss(hidden, weight, targets)[0].backward()
    (expected,) = torch.autograd.grad(cross_entropy(hidden, weight, targets), asked)
    assert asked.grad is not None and frozen.grad is None
    same(asked.grad, expected)


def test_without_gradients_the_value_is_the_same_and_none_is_kept(path: str) -> None:
    hidden, weight, targets = example()
    with torch.no_grad():
        total, _ = linear_token_loss(hidden, weight, targets)
        same(total, cross_entropy(hidden, weight, targets))
    assert not total.requires_grad


def test_gradients_of_several_losses_add_up(path: str) -> None:
    hidden, weight, targets = example()
    for row in range(B):
        linear_token_loss(hidden[row], weight, targets[row])[0].backward()
    expected = torch.autograd.grad(cross_entropy(hidden, weight, targets), (hidden, weight))
    assert hidden.grad is not None and weight.grad is not None
    same(hidden.grad, expected[0])
    same(weight.grad, expected[1])


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    take("chunks", monkeypatch, [])
    inputs = hidden, weight, _ = example()
    gradients = torch.autograd.grad(linear_token_loss(*inputs)[0], (hidden, weight))
    h = 1e-5  # errors: h² / 6 times the third derivative, and 1e-14 / h from rounding
    with torch.no_grad():
        for numbers, gradient in zip((hidden.view(-1), weight.view(-1)), gradients, strict=True):
            for i in range(0, len(numbers), 11):
                numbers[i] += h
                above = linear_token_loss(*inputs)[0]
                numbers[i] -= 2 * h
                below = linear_token_loss(*inputs)[0]
                numbers[i] += h
                assert ((above - below) / (2 * h)).item() == pytest.approx(gradient.view(-1)[i].item(), abs=1e-7)


def test_a_second_backward_is_an_error_and_no_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    take("chunks", monkeypatch, [])
    hidden, weight, targets = example()
    total, _ = linear_token_loss(hidden, weight, targets)
    total.backward(retain_graph=True)
    kept = weight.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    same(weight.grad, kept)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunk_gives_the_whole(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    n, max_logits = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20 * WIDTH))
    n_words, is_on_gpu = data.draw(st.integers(1, V + 1)), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    hidden = torch.randn(n, C, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, C, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(data.draw(st.lists(st.integers(-1, V - 1), min_size=n, max_size=n)))
    targets[targets == -1] = -100
    expected = cross_entropy(hidden, weight, targets)
    with monkeypatch.context() as patch:
        patch.setattr(loss, "MAX_LOGITS", max_logits)
        patch.setattr(loss, "VOCAB_CHUNK", n_words)
        if is_on_gpu:
            patch.setattr(loss, "chunk_sizes", lambda device: (None, max_logits))
        total, _ = linear_token_loss(hidden, weight, targets)
        gradients = torch.autograd.grad(total, (hidden, weight))
    same(total, expected)
    for mine, other in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        same(mine, other)


class LargestTensor(TorchDispatchMode):
    """A mode that records the size of the largest tensor that an operation creates. Views do not count."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_there_are_never_more_logits_than_a_chunk_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    take("chunks", monkeypatch, [])
    monkeypatch.setattr(loss, "MAX_LOGITS", 10 * WIDTH)
    hidden, weight, targets = example()
    with LargestTensor() as largest:
        linear_token_loss(hidden, weight, targets)[0].backward()
    assert largest.numel == max(10 * WIDTH, V * C, B * T * C)


def test_under_bf16_autocast_chunks_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has 8 bits, so a sum of 1,500 in bf16 would be wrong by up to 4. Both losses round the logits to bf16, a few of them
    differently, because chunks add in another order. That changes the loss by 0.01 %; the test allows 0.1 %."""
    take("chunks", monkeypatch, calls := [])
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(300, C), torch.randn(V, C), torch.randint(V, (300,))
    logits = F.linear(hidden.bfloat16(), weight.bfloat16()).double()
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_token_loss(hidden, weight, targets)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected, rel=1e-3)
    assert set(calls) == {"chunks"}


@pytest.mark.parametrize("way", ["whole", "chunks", "GPU chunks"])
def test_under_bf16_autocast_gradients_have_the_right_size(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding changes each number by up to 0.4 % in a random direction. Averaged over 300 rows, at most 0.1 % remains along
    the true gradient. The factor 1/3 rounded to bf16 would change all numbers by 0.2 % in the same direction."""
    take(way, monkeypatch, [])
    torch.manual_seed(0)
    hidden = torch.randn(300, C).bfloat16().float().requires_grad_()
    weight = (0.1 * torch.randn(V, C)).bfloat16().float().requires_grad_()
    targets = torch.randint(V, (300,))
    upstream = 1 / 3
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_token_loss(hidden, weight, targets)
    ours = torch.autograd.grad(upstream * total, (hidden, weight))
    theirs = torch.autograd.grad(upstream * cross_entropy(hidden.double(), weight.double(), targets), (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert (mine * other).sum() / (other * other).sum() == pytest.approx(1, abs=1e-3)
        assert (mine - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_of_any_precision_are_summed_in_float32_at_least(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(2, 5, V).to(dtype), torch.randint(V, (2, 5))
    targets[0, :2] = -100
    total, count = token_loss(logits, targets)
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count.item() == 8


# Dynamo itself causes this warning for every autograd function.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_step_gives_the_same_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    take("chunks", monkeypatch, [])
    hidden, weight, targets = example()
    compiled = torch.compile(linear_token_loss, backend="eager")
    total, _ = compiled(hidden, weight, targets)
    expected = cross_entropy(hidden, weight, targets)
    same(total, expected)
    for mine, other in zip(*(torch.autograd.grad(sum_, (hidden, weight)) for sum_ in (total, expected)), strict=True):
        same(mine, other)


def test_evaluation_computes_no_gradients_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights require gradients in evaluation too; computing these gradients once made evaluation three times slower."""
    take("chunks", monkeypatch, [])
    monkeypatch.setattr(loss, "MAX_LOGITS", 2 * WIDTH)
    inputs = example()
    with torch.no_grad(), LargestTensor() as largest:
        linear_token_loss(*inputs)
    assert largest.numel == 2 * WIDTH


def test_rows_without_a_target_get_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most positions are ignored when a model is trained on answers only."""
    hidden, weight, targets = example(ignored=0.0)
    targets[:, 2:] = -100
    rows = []
    monkeypatch.setattr(
        loss, "token_loss", lambda logits, kept: (rows.append(len(logits)), token_loss(logits, kept))[1]
    )
    total, count = linear_token_loss(hidden, weight, targets)
    same(total, cross_entropy(hidden, weight, targets))
    assert rows == [2 * B] and count.item() == 2 * B
