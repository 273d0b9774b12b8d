"""A GPTModel inside torch's wrappers for several processes computes the losses and gradients of one process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from MyGPT import GPTConfig, GPTModel, accelerate, generate, load_weights_into_gpt
from MyGPT.data.templates import ALPACA
from MyGPT.finetuning.lora import KeptAdapter, add_lora
from MyGPT.weights.formats import huggingface
from ranks import run_on_ranks

CONFIG = GPTConfig(vocab_size=71, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True)
TOLERANCE = 1e-6
"""Largest difference of losses and gradients, which are around 1: float32 rounding of sums in another order is 1e-7."""


def batch() -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (4, 16) each. The rows, and the halves of the batch, have different numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(71, (4, 17), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    for row, n_ignored in enumerate((0, 3, 8, 13)):
        targets[row, :n_ignored] = -100
    return inputs, targets


def mine(tensor: Tensor) -> Tensor:
    """Return this rank's rows."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole gradients of trained parameters. DistributedDataParallel's prefix is removed from their names."""
    trained = {name.removeprefix("module."): it for name, it in model.named_parameters() if it.requires_grad}
    return {name: whole(parameter.grad) for name, parameter in trained.items()}


def sum_over_ranks(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


# What a training loop can call: each returns the loss of the whole batch's rows that it gets, summed, and their number.
def by_targets(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return model(inputs, targets=targets)[0]


def by_token_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return model.token_loss(inputs, targets)[0]


def by_row_losses(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return model.row_losses(inputs, targets).sum()


def by_labels(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    labels = torch.cat([torch.full_like(targets[:, :1], -100), targets[:, :-1]], dim=1)
    return model(inputs, labels=labels).loss * (labels != -100).sum()


Loss = Callable[[Any, Tensor, Tensor], Tensor]


def largest_difference(model: nn.Module, plain: nn.Module, loss_of: Loss, n_steps: int = 1) -> float:
    """Return the largest difference between the losses and gradients of a wrapped model on all ranks and a plain model."""
    inputs, targets = batch()
    count = (targets != -100).sum()
    difference = 0.0
    for _ in range(n_steps):
        model.zero_grad()
        plain.zero_grad()
        expected = loss_of(plain, inputs, targets) / count
        expected.backward()
        loss = loss_of(model, mine(inputs), mine(targets)) / count
        (loss * dist.get_world_size()).backward()  # the wrappers average gradients over the ranks
        theirs, ours = gradients(plain), gradients(model)
        assert ours.keys() == theirs.keys()
        differences = [(ours[name] - theirs[name]).abs().max().item() for name in theirs]
        difference = max(difference, abs(sum_over_ranks(loss) - expected).item(), *differences)
    return difference


def sharded(model: GPTModel, **options: Any) -> GPTModel:
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def replicated(model: GPTModel) -> GPTModel:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for block in model.transformer.h:
        replicate(block)
    return replicate(model)


def composed(model: GPTModel) -> GPTModel:
    from torch.distributed._composable import replicate

    return replicate(model)


def static(model: GPTModel) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True)


def sharded_and_checkpointed(model: GPTModel) -> GPTModel:
    model.gradient_checkpointing = True
    return sharded(model).train()


def sharded_whole(model: GPTModel) -> GPTModel:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def sharded_in_bf16(model: GPTModel) -> GPTModel:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def sharded_with_offload(model: GPTModel) -> GPTModel:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def sharded_with_the_head_in_a_group(model: GPTModel) -> GPTModel:
    from torch.distributed.fsdp import fully_shard

    fully_shard([model.transformer.wte, model.transformer.ln_f, model.lm_head])
    return fully_shard(model)


def sharded_and_compiled(model: GPTModel) -> GPTModel:
    for block in model.transformer.h:
        block.compile(backend="eager")
    return sharded(model)


def accelerated(model: GPTModel) -> nn.Module:
    from accelerate import Accelerator

    wrapped = Accelerator(cpu=True).prepare(model)
    assert isinstance(wrapped, DistributedDataParallel)
    return wrapped


EVERY_CALL = (by_targets, by_token_loss, by_row_losses, by_labels)
CASES: list[tuple[str, Callable[[GPTModel], nn.Module], tuple[Loss, ...]]] = [
    ("new", DistributedDataParallel, (by_targets, by_labels)),
    ("new", static, (by_targets, by_labels)),
    ("new", composed, EVERY_CALL),
    ("new", replicated, (by_token_loss, by_labels)),
    ("new", sharded, EVERY_CALL),
    ("new", sharded_whole, (by_token_loss,)),
    ("new", sharded_and_checkpointed, (by_token_loss,)),
    ("new", sharded_and_compiled, (by_token_loss,)),
    ("new", sharded_with_offload, (by_token_loss,)),
    ("new", sharded_with_the_head_in_a_group, (by_token_loss,)),
    ("new", accelerated, (by_targets, by_labels)),
    ("untied", static, (by_labels,)),
    ("untied", sharded, (by_token_loss,)),
    ("opened", DistributedDataParallel, (by_targets,)),
    ("opened", replicated, (by_token_loss,)),
    ("opened", sharded, (by_token_loss,)),
    ("adapted", DistributedDataParallel, (by_targets,)),
    ("adapted", static, (by_labels,)),
    ("adapted", sharded_whole, (by_targets,)),
]


def adapted(model: GPTModel) -> Any:
    """Return a PEFT model whose adapter has an effect."""
    peft_model = add_lora(model, dropout=0.0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model


def differences(directory: Path) -> dict[tuple[str, str, str], float]:
    torch.manual_seed(0)
    models = {
        "new": GPTModel(CONFIG),
        "untied": GPTModel(dataclasses.replace(CONFIG, tie_weights=False)),
        "opened": GPTModel.from_pretrained(directory),
        "adapted": adapted(GPTModel(CONFIG)),
    }
    found = {}
    for kind, wrap, losses in CASES:
        for loss_of in losses:
            wrapped = wrap(copy.deepcopy(models[kind]))
            n_steps = 2 if wrap is static else 1  # static_graph=True learns the graph in the first step
            difference = largest_difference(wrapped, copy.deepcopy(models[kind]), loss_of, n_steps)
            found[kind, wrap.__name__, loss_of.__name__] = difference
    # bf16 has 8 bits: gradients up to 1 differ by up to 2**-8.
    rounded = largest_difference(
        sharded_in_bf16(copy.deepcopy(models["new"])), copy.deepcopy(models["new"]), by_token_loss
    )
    assert 1e-5 < rounded < 2**-8
    return found


@pytest.mark.torchrun
def test_losses_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    torch.manual_seed(1)
    GPTModel(CONFIG).save_pretrained(tmp_path)
    for found in run_on_ranks(2, differences, tmp_path, seconds=180):
        assert len(found) == sum(len(losses) for _, _, losses in CASES)
        assert max(found.values()) < TOLERANCE, found


def has_weights_of(model: GPTModel, plain: GPTModel) -> bool:
    """Return True if the models have bit-equal weights, and the first one is tied like the second."""
    theirs = plain.state_dict()
    are_equal = all(torch.equal(whole(weight), theirs[name]) for name, weight in model.state_dict().items())
    return are_equal and (model.lm_head.weight is model.transformer.wte.weight) == plain.config.tie_weights


def check_generation(plain: GPTModel) -> None:
    model, ids = sharded(copy.deepcopy(plain)), batch()[0][:2, :5]
    assert not hasattr(model.new_cache(2).storage, "full_tensor")
    for use_cache in (True, False):  # past the context of 16 tokens
        options = {"temperature": 1.0, "seed": 3, "use_cache": use_cache}
        assert torch.equal(generate(model, ids, 14, **options), generate(plain, ids, 14, **options))
    model.reshard()
    with pytest.raises(ValueError, match="is sharded: save the model and open it again"):
        accelerate(model)
    narrow, cache = sharded_in_bf16(copy.deepcopy(plain)), plain.new_cache(2)
    with torch.no_grad():
        narrow(ids, cache=cache)
    assert cache.storage.dtype == torch.bfloat16  # what the model computes in, not the dtype of its weights
    bf16 = copy.deepcopy(plain).bfloat16()
    assert torch.equal(generate(narrow, ids, 9), generate(bf16, ids, 9))


def check_numbers(plain: GPTModel) -> None:
    model = sharded(copy.deepcopy(plain))
    for _ in range(2):
        for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
            assert model.num_parameters(**options) == plain.num_parameters(**options)
        assert model.estimate_flops() == plain.estimate_flops()
        assert model.train().training and not model.eval().training
        model(batch()[0])  # some parameters are whole after a forward pass
    model = sharded(copy.deepcopy(plain)).half()
    assert model.lm_head.weight is model.transformer.wte.weight and model(batch()[0]).dtype == torch.float16


def check_saving(plain: GPTModel, directory: Path) -> None:
    """All ranks return after rank 0 has written what one process writes, in one file or several, or raise its error."""
    model, is_first = sharded(copy.deepcopy(plain)), dist.get_rank() == 0
    for n_bytes in (huggingface.MAX_SHARD_BYTES, 50_000):
        with mock.patch.object(huggingface, "MAX_SHARD_BYTES", n_bytes):
            model.save_pretrained(directory / f"sharded-{n_bytes}")
            saved = contents(directory / f"sharded-{n_bytes}")
            plain.save_pretrained(directory / f"plain-{n_bytes}-{dist.get_rank()}")
        assert saved == contents(directory / f"plain-{n_bytes}-{dist.get_rank()}")
        model(batch()[0])  # some parameters are whole after a forward pass
    n_files = 0

    def fill_the_disk(*arguments: Any, **options: Any) -> None:
        nonlocal n_files
        n_files += 1
        if n_files == 2:
            raise OSError(28, "No space left on device")
        write(*arguments, **options)

    write = huggingface.write_safetensors
    with (
        mock.patch.object(huggingface, "MAX_SHARD_BYTES", 50_000),
        mock.patch.object(huggingface, "write_safetensors", fill_the_disk),
        pytest.raises(OSError, match="No space left"),
    ):
        model.save_pretrained(directory / "sharded-50000")
    assert n_files == 2 * is_first and contents(directory / "sharded-50000") == saved
    (directory / "file").touch()
    with pytest.raises(OSError, match="not a directory"):  # before the first weight is gathered
        model.save_pretrained(directory / "file" / "model")
    untied = sharded(copy.deepcopy(plain))
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match="is not saved with tie_weights=True"):
        untied.save_pretrained(directory / "untied")


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def check_adapter(plain: GPTModel, directory: Path) -> None:
    model = adapted(copy.deepcopy(plain))
    alone = KeptAdapter(copy.deepcopy(model), "base", ALPACA)
    alone.save(directory / f"plain-{dist.get_rank()}")
    sharded_whole(model.get_base_model())  # all parameters are whole after a forward pass
    kept = KeptAdapter(model, "base", ALPACA)
    place = kept.save(directory)
    assert contents(place) == contents(directory / f"plain-{dist.get_rank()}" / "adapter")
    logits = model(batch()[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.zero_()
    assert not torch.equal(model(batch()[0]), logits)
    kept.restore(directory)
    assert torch.equal(model(batch()[0]), logits)


def check_drawing() -> None:
    """A model made on the meta device, sharded and then drawn has the weights of a plain model with the same seed."""
    for options in ({}, {"tie_weights": False}, {"init": "local"}, {"tie_weights": False, "init_std": None}):
        config = dataclasses.replace(CONFIG, **options)
        with torch.device("meta"):
            model = sharded(GPTModel(config))
        model.to_empty(device="cpu")
        torch.manual_seed(5)
        model.reset_parameters()
        torch.manual_seed(5)
        plain = GPTModel(config)
        assert has_weights_of(model, plain)
        assert largest_difference(model, plain, by_token_loss) < TOLERANCE
    model(batch()[0])  # some parameters are whole after a forward pass
    torch.manual_seed(6)
    model.reset_parameters()
    torch.manual_seed(6)
    assert has_weights_of(model, GPTModel(config))


def check_loading(plain: GPTModel) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model = sharded(copy.deepcopy(plain))
    complete = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert list(complete) == (list(plain.state_dict()) if dist.get_rank() == 0 else [])
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for assign in (False, True):
        other = sharded(GPTModel(CONFIG))
        other.load_state_dict(model.state_dict(), assign=assign)
        assert has_weights_of(other, plain)
    other = sharded(GPTModel(CONFIG))
    other(batch()[0])
    load_weights_into_gpt(other, plain.state_dict())
    assert has_weights_of(other, plain)
    for is_empty in (True, False):
        with torch.device("meta"):
            other = sharded(GPTModel(CONFIG))
        if is_empty:
            other.to_empty(device="cpu")
        set_model_state_dict(other, dict(complete), options=from_first)
        assert has_weights_of(other, plain)
        assert largest_difference(other, copy.deepcopy(plain), by_token_loss) < TOLERANCE


def checks(directory: Path) -> None:
    torch.manual_seed(0)
    plain = GPTModel(CONFIG).eval()
    check_generation(plain)
    check_numbers(plain)
    check_saving(plain, directory)
    check_adapter(plain, directory)
    check_drawing()
    check_loading(plain)


@pytest.mark.torchrun
def test_a_sharded_model_generates_saves_draws_and_loads_like_a_plain_one(tmp_path: Path) -> None:
    run_on_ranks(2, checks, tmp_path, seconds=180)
