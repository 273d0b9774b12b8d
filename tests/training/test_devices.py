"""Devices that lack what a CPU has: Apple's GPUs have no float64, and other devices no fused optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from MyGPT import (
    GPTModel,
    TrainConfig,
    calc_loss_loader,
    create_dataloader,
    generate,
)
from MyGPT.costs import median_seconds
from MyGPT.evaluation.perplexity import strided_loss
from MyGPT.training.optim import make_optimizers
from MyGPT.training.texts import to_device
from tiny_runs import CONFIG, IDS, TEXT, TOKENIZER, make_model, make_trainer


class WithoutFloat64(TorchDispatchMode):
    """A guard under which the CPU refuses float64 tensors with the error of an Apple GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(
                f"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it: {func}"
            )
        return result


def test_the_guard_notices_float64() -> None:
    with WithoutFloat64(), pytest.raises(TypeError, match="float64"):
        torch.zeros((), dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"precision": "bf16", "gradient_checkpointing": True}])
def test_a_run_needs_no_float64(options: dict[str, Any]) -> None:
    config = TrainConfig(
        max_steps=4, batch_size=4, micro_batch_size=2, eval_every=2, sample_every=2, sample_tokens=3, **options
    )
    with WithoutFloat64():
        loss = make_trainer(config=config, tokenizer=TOKENIZER).run()
    assert 0 < loss < 10


def sample(model: GPTModel) -> None:
    generate(model, torch.tensor([IDS[:4], IDS[4:8]]), 12, temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, seed=1)
    generate(model, torch.tensor([IDS[:4]]), 4, repetition_penalty=1.3, stop="x", tokenizer=TOKENIZER)


def measure(model: GPTModel) -> None:
    strided_loss(model, IDS[:100], stride=3)
    calc_loss_loader(create_dataloader(TEXT[:200], 2, 8, tokenizer=TOKENIZER), model, "cpu")
    model(torch.tensor([IDS[:8]]), labels=torch.tensor([IDS[:8]])).loss.backward()


@pytest.mark.parametrize("work", [sample, measure])
def test_the_library_needs_no_float64(work: Callable[[GPTModel], None]) -> None:
    model = make_model()
    with WithoutFloat64():
        work(model)


def test_only_cuda_gets_batches_by_non_blocking_copies_from_pinned_memory() -> None:
    class Recorder:
        device, is_pinned = torch.device("cpu"), False

        def pin_memory(self) -> Recorder:
            self.is_pinned = True
            return self

        def to(self, device: torch.device, non_blocking: bool) -> tuple[str, bool, bool]:
            return device.type, self.is_pinned, non_blocking

    for name in ("cpu", "cuda", "mps"):
        batch: Any = (Recorder(), Recorder())
        assert to_device(batch, torch.device(name)) == ((name, name == "cuda", name == "cuda"),) * 2


def test_a_device_without_a_fused_adamw_gets_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device is one. A step of its optimizer has to work."""
    with torch.device("meta"):
        model = make_model()
    (optimizer,) = make_optimizers(model, TrainConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not optimizer.defaults["fused"]
    assert make_optimizers(make_model(), TrainConfig())[0].defaults["fused"]


def test_evaluation_needs_no_compiler_unless_the_run_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "set_stance", lambda *_: pytest.fail("the compiler was asked"))
    config = TrainConfig(max_steps=1, batch_size=2, sample_every=1, sample_tokens=2)
    make_trainer(config=config, tokenizer=TOKENIZER).run()


def test_a_device_without_autocast_has_a_loss() -> None:
    """The meta device is one: it has shapes and no numbers. The vocabulary is too large for one chunk."""
    with torch.device("meta"):
        model = GPTModel({**vars(CONFIG), "vocab_size": 3000})
        ids = torch.zeros(2, 8, dtype=torch.int64)
        total, count = model.token_loss(ids, ids)
    assert total.shape == count.shape == ()


def test_times_include_the_work_that_a_gpu_does_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device.type))
    for name in ("cpu", "mps", "cuda"):
        median_seconds(lambda: None, torch.device(name), 1)
    assert waited == ["mps", "mps", "cuda", "cuda"]
