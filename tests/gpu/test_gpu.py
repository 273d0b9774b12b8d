"""The model, generation and training on a GPU, compared with transformers, with torch, and with float64 on the CPU.

Every test also runs on the CPU, where it proves at least that the test itself works. The model is small, but its heads have
the width of GPT-2's, so that a GPU uses the same attention kernels, and its vocabulary is not a multiple of 8, as GPT-2's.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conftest import lively_model, same_weights
from MyGPT import GPTConfig, GPTModel, PromptLookup, TrainConfig, Trainer, generate
from MyGPT.acceleration.captured import CapturedModel
from MyGPT.cache import Piece
from MyGPT.generation import generate_stream
from MyGPT.loss import compiled_loss, head_loss, linear_token_loss
from MyGPT.training.optim import make_optimizers

CONFIG = GPTConfig(vocab_size=515, context_length=160, emb_dim=128, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
GPU_ONLY = [
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
    )
]


def new_model(**changes: Any) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel(dataclasses.replace(CONFIG, **changes))


def random_ids(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def relative_error(result: Tensor, expected: Tensor) -> float:
    difference = result.detach().cpu().double() - expected.detach().cpu().double()
    return float(difference.norm() / expected.detach().cpu().double().norm())


# The model

PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "largest"), PRECISIONS)
def test_logits_are_as_exact_as_those_of_transformers(
    device: torch.device, dtype: torch.dtype, largest: float, tmp_path: Path
) -> None:
    """Both are compared with the float64 model. They round in different orders, so their errors differ a little."""
    transformers = pytest.importorskip("transformers")
    lively_model(CONFIG).save_pretrained(tmp_path)
    ids = random_ids(3, 160)
    ours = GPTModel.from_pretrained(tmp_path).to(device, dtype)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype).eval().to(device)
    with torch.no_grad():
        exact = GPTModel.from_pretrained(tmp_path).double()(ids)
        our_error = relative_error(ours(ids.to(device)), exact)
        their_error = relative_error(theirs(ids.to(device)).logits, exact)
    assert their_error < largest
    assert our_error < 2 * their_error


def test_packed_and_padded_texts_have_the_logits_of_the_cpu(device: torch.device) -> None:
    """Masks use other attention kernels. Logits of padding mean nothing and are left out."""
    model, ids, mask = lively_model(CONFIG), random_ids(2, 64), torch.ones(2, 64, dtype=torch.int64)
    mask[0, 20:], mask[1, :9] = 2, 0
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask)
        logits = model.to(device)(ids.to(device), attention_mask=mask.to(device))
    assert relative_error(logits.cpu()[mask > 0], exact[mask > 0]) < 1e-5


def gradients(model: GPTModel, ids: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss and the gradients, with matrix products under autocast to `dtype`."""
    model.zero_grad()
    with torch.autocast(ids.device.type, dtype, enabled=dtype is not None):
        total, count = model.token_loss(ids[:, :-1], ids[:, 1:])
    loss = total / count
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_a_bf16_step_has_nearly_the_loss_and_the_gradient_of_float64(device: torch.device) -> None:
    """A bfloat16 number has 8 bits, so every product is rounded by up to 0.4%; most of these errors cancel each other."""
    model, ids = new_model(), random_ids(4, 129)
    exact_loss, exact = gradients(copy.deepcopy(model).double(), ids)
    loss, rounded = gradients(model.to(device), ids.to(device), torch.bfloat16)
    assert abs(float(loss) / float(exact_loss) - 1) < 1e-3
    one, other = (torch.cat([g[name].cpu().double().flatten() for name in exact]) for g in (exact, rounded))
    assert float(F.cosine_similarity(one, other, dim=0)) > 0.9995
    assert abs(float(one.norm() / other.norm()) - 1) < 0.01


def test_gradient_checkpointing_gives_the_same_gradients(device: torch.device) -> None:
    model, ids = new_model().to(device), random_ids(2, 65).to(device)
    _, expected = gradients(model, ids)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.gradient_checkpointing = True
    _, found = gradients(model, ids)
    assert all(relative_error(found[name], expected[name]) < 1e-5 for name in expected)


@pytest.mark.parametrize("device_name", GPU_ONLY)  # tests/training/test_trainer.py does this on the CPU
@pytest.mark.filterwarnings("ignore")  # The compiler warns about torch's own code.
def test_compiled_blocks_give_the_gradients_of_eager_ones(device_name: str) -> None:
    """In float32, with sums in another order: 1e-6 per sum, and a few dozen sums follow each other."""
    model, ids = new_model().to(device_name), random_ids(2, 65).to(device_name)
    loss, expected = gradients(copy.deepcopy(model), ids)
    for block in model.transformer.h:
        block.compile()
    compiled_loss, found = gradients(model, ids)
    assert abs(float(compiled_loss) / float(loss) - 1) < 1e-6
    assert all(relative_error(found[name], expected[name]) < 1e-4 for name in expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # The compiler warns about torch's own code.
def test_the_compiled_loss_is_torchs_cross_entropy(device: torch.device) -> None:
    """In float32, a sum of 515 numbers has a relative error of at most about 1e-6."""
    x = torch.randn(70, 64, device=device, requires_grad=True)
    weight = torch.randn(515, 64, device=device, requires_grad=True)
    targets = torch.randint(515, (70,), device=device).where(torch.rand(70, device=device) < 0.8, -100)
    with compiled_loss():
        total, count = linear_token_loss(x, weight, targets)
    logits = x.double() @ weight.double().T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert int(count) == int((targets != -100).sum())
    assert abs(float(total) / float(expected) - 1) < 1e-6
    for found, exact in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (total, expected)), strict=True):
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_loss_is_torchs_cross_entropy(
    device: torch.device, dtype: torch.dtype, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 positions at a time, of which some have no target. The reference is computed in float64 from the same numbers."""
    monkeypatch.setattr("MyGPT.loss.MAX_LOGITS", 50 * 3072)
    monkeypatch.setattr("MyGPT.loss.MAX_GPU_LOGITS", 50 * 3072)
    monkeypatch.setattr("MyGPT.loss.VOCAB_CHUNK", 700)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (3 * 77, 3001))
    targets = torch.randint(0, 3001, (3, 77), generator=generator)
    targets[0, :30] = -100
    h = hidden.view(3, 77, 64).to(device).detach().requires_grad_()
    head = torch.nn.Linear(64, 3001, bias=False, device="meta")
    head.weight = torch.nn.Parameter(weight.to(device))
    total, count = head_loss(head, h, targets.to(device))
    (total * 0.3).backward()
    exact_h, exact_w = (x.to(torch.float64, copy=True).requires_grad_() for x in (hidden, weight))
    exact = F.cross_entropy(exact_h @ exact_w.T, targets.flatten(), reduction="sum")
    (exact * 0.3).backward()
    assert int(count) == int((targets != -100).sum())
    assert total.item() == pytest.approx(exact.item(), rel=largest)
    assert head.weight.grad is not None and h.grad is not None and exact_h.grad is not None and exact_w.grad is not None
    assert relative_error(h.grad.flatten(0, 1), exact_h.grad) < largest
    assert relative_error(head.weight.grad, exact_w.grad) < largest


@pytest.mark.parametrize("device_name", GPU_ONLY)
def test_neither_the_forward_nor_the_backward_pass_waits_for_the_gpu(device_name: str) -> None:
    """A wait leaves the GPU without work until the CPU has started the next kernels."""
    model, ids = new_model().to(device_name), random_ids(2, 65).to(device_name)
    gradients(model, ids, torch.bfloat16)  # libraries initialise themselves
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradients(model, ids, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Generation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cache_has_the_dtype_and_the_device_of_the_weights(device: torch.device, dtype: torch.dtype) -> None:
    model = lively_model(CONFIG).to(device, dtype)
    for cache in (model.new_cache(2, 9), CapturedModel(model).new_cache(2, 9)):
        assert (cache.storage.dtype, cache.storage.device.type, cache.capacity) == (dtype, device.type, 9)


@pytest.fixture(params=[{}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def sampling(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def prompts(device: torch.device) -> dict[str, Tensor]:
    """Return three prompts of unequal length, padded on the left."""
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :13], mask[1, :1] = 0, 0
    return {"idx": random_ids(3, 20).to(device), "attention_mask": mask.to(device)}


@pytest.mark.slow
def test_captured_generation_gives_the_ids_of_eager_generation(
    device: torch.device, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where rounding errors of 1e-15 cannot decide a token. The texts need several graphs of each batch size.

    The third generation uses the graphs of the second one with weights that were changed in place.
    """
    monkeypatch.setattr("MyGPT.acceleration.captured.LENGTH_STEP", 16)
    model = lively_model(CONFIG).to(device, torch.float64)
    captured = CapturedModel(model)
    for options in (prompts(device), {"idx": random_ids(1, 5).to(device)}, {"idx": random_ids(1, 9, 1).to(device)}):
        expected = generate(model, max_new_tokens=40, **options, **sampling)
        assert torch.equal(generate(captured, max_new_tokens=40, **options, **sampling), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_captured_logits_are_as_exact_as_eager_ones(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where attention rounds differently with and without a mask."""
    monkeypatch.setattr("MyGPT.acceleration.captured.LENGTH_STEP", 16)
    model, ids = lively_model(CONFIG), random_ids(2, 60)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids)[:, 9:]
        model.to(device, torch.bfloat16)
        errors = []
        for variant in (model, CapturedModel(model)):
            cache = variant.new_cache(2)
            logits = [variant(piece, cache=cache)[:, -1:] for piece in ids.to(device).split([10] + 50 * [1], dim=1)]
            errors.append(relative_error(torch.cat(logits, dim=1), exact))
    assert errors[0] < 5e-2
    assert errors[1] < 1.5 * errors[0]


def test_captured_generations_that_take_turns_do_not_disturb_each_other(device: torch.device) -> None:
    model = lively_model(CONFIG).to(device, torch.float64)
    captured, pair = CapturedModel(model), [random_ids(1, 7, seed).to(device) for seed in (1, 2)]
    steps = zip(*(generate_stream(captured, ids, 30) for ids in pair), strict=True)
    found = torch.stack([torch.cat(new) for new in steps], dim=1)
    expected = torch.cat([generate(model, ids, 30)[:, 7:] for ids in pair])
    assert torch.equal(found, expected)


def test_prompt_lookup_over_a_captured_model_gives_the_models_ids(device: torch.device) -> None:
    """A vocabulary of 4 tokens repeats itself, so that guesses are often accepted and often dropped."""
    model = lively_model(dataclasses.replace(CONFIG, vocab_size=4)).to(device, torch.float64)
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    found = generate(PromptLookup(CapturedModel(model), n_match=2), ids, 60)
    assert torch.equal(found, generate(model, ids, 60))


def test_slots_of_different_lengths_have_the_logits_of_each_sequence_alone(device: torch.device) -> None:
    """In float64, sums in another order differ by 1e-15 each."""
    model, ids = lively_model(CONFIG).to(device, torch.float64), random_ids(3, 40).tolist()
    cache = model.new_slot_cache(4)
    model.forward_slots([Piece(2, ids[0][:20], 0), Piece(0, ids[1][:1], 0), Piece(3, ids[2][:3], 0)], cache)
    cache.copy_prefix(2, 1, 7)
    pieces = [Piece(slot, row[n : n + 1], 1) for slot, n, row in ((2, 20, ids[0]), (0, 1, ids[1]), (3, 3, ids[2]))]
    logits = model.forward_slots([*pieces, Piece(1, ids[0][7:12], 5)], cache)
    with torch.no_grad():
        alone = model(torch.tensor(ids, device=device))
    expected = torch.cat([alone[0, 20:21], alone[1, 1:2], alone[2, 3:4], alone[0, 7:12]])
    assert (logits - expected).abs().max() < 1e-12
    assert cache.lengths == [2, 12, 21, 4] and cache.storage.device == logits.device


def test_greedy_ids_are_those_of_the_cpu(device: torch.device) -> None:
    model, options = lively_model(CONFIG).double(), {"max_new_tokens": 30, "repetition_penalty": 1.2}
    expected = generate(model, **prompts(torch.device("cpu")), **options)
    assert torch.equal(generate(model.to(device), **prompts(device), **options).cpu(), expected)


def test_a_seed_gives_each_row_its_own_numbers(device: torch.device) -> None:
    """Row r of a batch has the ids that its prompt alone has with seed + r, whatever torch's global seed is."""
    model, ids = lively_model(CONFIG).to(device, torch.float64), random_ids(3, 6).to(device)
    batch = generate(model, ids, 20, temperature=1.0, top_k=40, seed=5)
    torch.manual_seed(99)
    for row in range(3):
        alone = generate(model, ids[row : row + 1], 20, temperature=1.0, top_k=40, seed=5 + row)
        assert torch.equal(batch[row : row + 1], alone)


# Training

STEPS = TrainConfig(
    max_steps=6, batch_size=4, micro_batch_size=2, learning_rate=1e-3, warmup_steps=2, eval_every=3, eval_windows=4,
    sample_every=0, log_every=1, checkpoint_every=2, precision="fp32",
)  # fmt: skip


def make_trainer(device: torch.device, run_dir: Path | None = None, **changes: Any) -> Trainer:
    """Return a Trainer on 2,000 ids, in sequences as long as the model's context of 64; `changes` are options."""
    drop_rate, resume = changes.pop("drop_rate", 0.0), changes.pop("resume", False)
    ids, config = random_ids(1, 2000)[0].numpy(), dataclasses.replace(STEPS, **changes)
    model = new_model(context_length=64, drop_rate=drop_rate)
    return Trainer(model, config, ids, ids[:500], run_dir=run_dir, device=device, progress=False, resume=resume)


def losses(trainer: Trainer) -> list[float]:
    with trainer:
        return [trainer.step()["loss"] for _ in range(trainer.config.max_steps)]


def test_training_gives_the_losses_of_the_cpu(device: torch.device) -> None:
    """In float32. The first losses differ by rounding (1e-7), which AdamW's first steps, ± the learning rate, increase."""
    found, expected = losses(make_trainer(device)), losses(make_trainer(torch.device("cpu")))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    device: torch.device, precision: str, tmp_path: Path
) -> None:
    """Bit for bit, with dropout, whose random numbers come from the device's own generator."""
    options: dict[str, Any] = {"deterministic": True, "precision": precision, "drop_rate": 0.2}
    whole = make_trainer(device, tmp_path / "whole", **options)
    whole.run()
    broken = make_trainer(device, tmp_path / "broken", **options)
    batch, broken.sampler.batch = broken.sampler.batch, lambda step: batch(step) if step < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.run()
    resumed = make_trainer(device, tmp_path / "broken", resume=True, **options)
    resumed.run()
    assert resumed.state == whole.state
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(("optimizer", "largest"), [("adamw", 1e-5), ("muon", 0.04)])
def test_an_optimizer_makes_the_updates_of_float64(device: torch.device, optimizer: Any, largest: float) -> None:
    """A GPU computes Muon's directions in bfloat16, which changes them by 2%."""
    config = dataclasses.replace(STEPS, optimizer=optimizer)
    moves = []
    for where, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        model = new_model().to(where, dtype)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizers, generator = make_optimizers(model, config), torch.Generator().manual_seed(4)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(where, dtype)
            for one in optimizers:
                one.step()
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    assert relative_error(moves[1], moves[0]) < largest


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_on_one_rank_has_the_losses_of_a_run_without_ranks(
    device: torch.device, parallel: str, precision: str
) -> None:
    """On a GPU, FSDP2 also rounds LayerNorm's weights, which are near 1, to bfloat16, by up to 2^-9 each."""
    expected = losses(make_trainer(device, precision=precision))
    try:
        found = losses(make_trainer(device, precision=precision, parallel=parallel))
    finally:
        dist.destroy_process_group()
    is_rounded = device.type == "cuda" and precision == "bf16"
    assert found == pytest.approx(expected, rel=2e-3 if is_rounded else 1e-6)
