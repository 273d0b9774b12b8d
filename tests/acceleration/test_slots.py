"""Forward passes over slots of different lengths: every row is as if its sequence were alone."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import lively_model
from MyGPT.acceleration.captured import CapturedModel
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.step import FastModel, accelerate
from MyGPT.cache import Piece, SlotCache, VocabularyError
from MyGPT.config import GPTConfig
from MyGPT.model import GPTModel
from oracles_model import transformers_twin

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
SIZES = {"vocab_size": 67, "context_length": 90, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
ODD = {"vocab_size": 67, "context_length": 90, "emb_dim": 30, "n_heads": 6, "n_layers": 2}  # D = 5


def make_model(**sizes: int) -> GPTModel:
    return lively_model(GPTConfig(**(sizes or SIZES), drop_rate=0.0, qkv_bias=True))  # type: ignore[arg-type]


def run_mix(model: Any, seed: int, slots: int = 4) -> list[tuple[list[int], Tensor]]:
    """Run random pieces of random sequences in random slots. Return the ids and the logits (T, V) of every sequence."""
    rng = random.Random(seed)
    cache: SlotCache = model.new_slot_cache(slots)
    ids: list[list[int]] = [[] for _ in range(slots)]
    logits: list[list[Tensor]] = [[] for _ in range(slots)]
    finished = []
    for _ in range(rng.randint(4, 12)):
        pieces = []
        for slot in rng.sample(range(slots), rng.randint(1, slots)):
            n = rng.choice([1, 1, 1, 2, 7, 33, 60])
            event = rng.random()
            if len(ids[slot]) + n > cache.capacity or event < 0.1:  # replace the sequence
                finished.append((ids[slot], logits[slot]))
                ids[slot], logits[slot] = [], []
                cache.truncate(slot, 0)
            elif event < 0.2:  # begin like the sequence in another slot
                source = rng.randrange(slots)
                kept = rng.randint(0, len(ids[source]))
                if kept + n <= cache.capacity:
                    finished.append((ids[slot], logits[slot]))
                    ids[slot], rows = ids[source][:kept], logits[source]
                    logits[slot] = [torch.cat([*rows, torch.empty(0, 67)])[:kept]]
                    cache.copy_prefix(source, slot, kept)
            pieces.append(Piece(slot, [rng.randrange(67) for _ in range(n)], n))
        parts = model.forward_slots(pieces, cache).split([piece.n_logits for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            ids[piece.slot] = ids[piece.slot] + piece.ids
            logits[piece.slot] = [*logits[piece.slot], part]
        assert cache.lengths == [len(text) for text in ids]
    finished += zip(ids, logits, strict=True)
    return [(text, torch.cat(rows)) for text, rows in finished if text]


# --- torch's operators


@pytest.mark.parametrize("wrapper", [None, CapturedModel])
def test_a_mix_gives_the_logits_of_each_sequence_alone(wrapper: Any) -> None:
    """In float64, sums in another order differ by 1e-15 each."""
    model = make_model().double()
    slow = model if wrapper is None else wrapper(model)
    for seed in range(3):
        for ids, logits in run_mix(slow, seed):
            with torch.no_grad():
                expected = model(torch.tensor([ids]))[0]
            assert (logits - expected).abs().max() < 1e-12


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_without_a_compiler_a_mix_gives_nearly_the_logits_of_each_sequence_alone(precision: Any) -> None:
    """torch's operators for narrow weights use another arithmetic for few rows, which rounds activations to bf16."""
    model = accelerate(make_model(), precision, compiled=False)
    for ids, logits in run_mix(model, 1):
        error = (logits - model(torch.tensor([ids]))[0]).norm() / logits.norm()
        assert error < (1e-5 if precision == "fp32" else 0.1)


def test_logits_are_those_of_transformers() -> None:
    """The logits are about 10, and 1e-4 is about a hundred roundings."""
    model = make_model()
    theirs = transformers_twin(model)
    for ids, logits in run_mix(model, 3):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_nothing_of_an_earlier_sequence_remains() -> None:
    """A hidden entry is multiplied by 0, and 0 times NaN would be NaN."""
    model = make_model()
    cache = model.new_slot_cache(2)
    model.forward_slots([Piece(0, [1] * 20, 0), Piece(1, [2] * 20, 0)], cache)
    cache.storage[:, :, 0, :, 5:20] = torch.nan
    cache.truncate(0, 5)
    logits = model.forward_slots([Piece(0, [3], 1), Piece(1, [4], 1)], cache)
    assert logits.isfinite().all()
    cache.storage[:, :, 1, :, 7:21] = torch.nan
    cache.copy_prefix(0, 1, 3)
    cache.copy_prefix(1, 1, 2)
    assert cache.lengths == [6, 2] and cache.storage.isfinite().all()


def test_only_wanted_logits_are_returned_in_the_order_of_the_pieces(tiny_model64: GPTModel) -> None:
    cache = tiny_model64.new_slot_cache(4)
    pieces = [Piece(3, [1, 2, 3], 2), Piece(0, [4], 1), Piece(2, [5, 6], 0), Piece(1, [7], 0)]
    logits = tiny_model64.forward_slots(pieces, cache)
    with torch.no_grad():
        expected = torch.cat([tiny_model64(torch.tensor([[1, 2, 3]]))[0, 1:], tiny_model64(torch.tensor([[4]]))[0]])
    assert (logits - expected).abs().max() < 1e-12
    assert cache.lengths == [1, 1, 2, 3]
    assert tiny_model64.forward_slots([Piece(2, [1], 0)], cache).shape == (0, 67)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_no_logits_may_be_wanted(precision: Any, compiled: bool) -> None:
    """The first pieces of a long prompt need none."""
    model = accelerate(make_model(**{**SIZES, "emb_dim": 96}), precision, compiled=compiled)
    cache = model.new_slot_cache(2)
    assert model.forward_slots([Piece(0, [1, 2], 0), Piece(1, [3], 0)], cache).shape == (0, 67)
    assert cache.lengths == [2, 1]


def test_autocast_stores_the_keys_in_the_dtype_of_the_weights(tiny_model: GPTModel) -> None:
    """bf16 has 8 bits, so two orders of summation may differ by a few hundredths of the largest logit."""
    cache = tiny_model.new_slot_cache(2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        tiny_model.forward_slots([Piece(0, [1, 2, 3], 0), Piece(1, [4, 5], 0)], cache)
        logits = tiny_model.forward_slots([Piece(0, [6], 1), Piece(1, [7], 1)], cache)
        expected = tiny_model(torch.tensor([[1, 2, 3, 6]]))[0, -1:]
    assert cache.storage.dtype == torch.float32
    assert (logits[:1] - expected).abs().max() < 0.05 * expected.abs().max()


# --- the compiled kernel


def alone(model: FastModel, ids: list[int]) -> Tensor:
    """Return the logits (T, V) of a sequence in a cache of its own, computed token by token."""
    cache = model.new_slot_cache(1)
    return torch.cat([model.forward_slots([Piece(0, [id_], 1)], cache) for id_ in ids])


@needs_compiler
@pytest.mark.parametrize("sizes", [SIZES, ODD], ids=["D = 8", "D = 5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 50), marks=pytest.mark.slow)], ids=["few", "many"])
def test_every_row_of_a_mix_is_bit_identical_to_its_sequence_alone(
    seeds: range, precision: Any, sizes: dict[str, int]
) -> None:
    model = accelerate(make_model(**sizes), precision, compiled=True)
    for seed in seeds:
        for ids, logits in run_mix(model, seed):
            assert torch.equal(logits, alone(model, ids))


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("n", [7, 32, 90])
def test_a_prompt_in_pieces_of_any_length_has_bit_identical_logits(n: int, precision: Any) -> None:
    model = accelerate(make_model(**ODD), precision, compiled=True)
    ids = torch.randint(67, (90,)).tolist()
    cache = model.new_slot_cache(3)
    cut = [ids[start : start + n] for start in range(0, 90, n)]
    logits = torch.cat([model.forward_slots([Piece(1, piece, len(piece))], cache) for piece in cut])
    assert torch.equal(logits, alone(model, ids))


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_left_padded_prompts_have_the_logits_of_slots(precision: Any) -> None:
    """Therefore `generate` and a server continue a prompt with the same tokens."""
    model = accelerate(make_model(**ODD), precision, compiled=True)
    n_padding = torch.tensor([0, 1, 37, 69, 2])
    ids, mask = torch.randint(67, (5, 70)), (torch.arange(70) >= n_padding[:, None]).long()
    cache = model.new_cache(5, 71)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, cache=cache)
    for row, n in enumerate(n_padding.tolist()):
        assert torch.equal(logits[row, n:], alone(model, ids[row, n:].tolist()))


@needs_compiler
def test_an_infinite_key_of_one_slot_reaches_no_other() -> None:
    model = accelerate(make_model(), compiled=True)
    cache = model.new_slot_cache(2)
    model.forward_slots([Piece(0, [1] * 40, 0), Piece(1, [2] * 3, 0)], cache)
    cache.storage[:, :, 0] = torch.inf
    logits = model.forward_slots([Piece(0, [3], 1), Piece(1, [4], 1)], cache)
    assert not logits[0].isfinite().any()
    assert torch.equal(logits[1:], alone(model, [2, 2, 2, 4])[3:])


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc lists the threads")
@pytest.mark.parametrize("n", [1, 3])
def test_the_kernel_uses_torchs_number_of_threads_in_every_thread(n: int) -> None:
    """OpenMP has a number of threads for each thread of Python, and torch may have an OpenMP library of its own."""
    model = accelerate(make_model(), compiled=True)
    cache, results = model.new_slot_cache(1), []

    def serve() -> None:
        before = count_threads()
        results.append(model.forward_slots([Piece(0, [1, 2, 3], 3)], cache))
        results.append(count_threads() - before)

    torch.set_num_threads(n)
    try:
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(1)
    assert results[1] == n - 1
    assert torch.equal(results[0], alone(model, [1, 2, 3]))


@needs_compiler
def test_the_kernel_is_as_near_to_float64_as_torch() -> None:
    model = make_model()
    exact = make_model().double()
    fast = accelerate(model, compiled=True)
    for ids, logits in run_mix(fast, 5):
        with torch.no_grad():
            expected, plain = exact(torch.tensor([ids]))[0], model(torch.tensor([ids]))[0]
        assert (logits - expected).norm() < 3 * (plain - expected).norm() + 1e-5


# --- invalid arguments

WRONG: dict[str, tuple[list[Piece], type[Exception], str]] = {
    "none": ([], ValueError, "there are no pieces"),
    "slot outside": ([Piece(2, [1], 1)], ValueError, "slots 0 to 1, got 2"),
    "negative slot": ([Piece(-1, [1], 1)], ValueError, "slots 0 to 1, got -1"),
    "one slot twice": ([Piece(1, [1], 1), Piece(1, [1], 1)], ValueError, "slot 1 has several pieces"),
    "no ids": ([Piece(0, [], 0)], ValueError, "at least one id.*got 0 and 0"),
    "too many logits": ([Piece(0, [1], 2)], ValueError, "n_logits from 0.*got 1 and 2"),
    "no room": ([Piece(0, [1] * 5, 1)], ValueError, "slot 0 has room for 4 more tokens, got 5"),
    "id outside": ([Piece(0, [1, 67], 1)], VocabularyError, "id 67 .*0 to 66"),
    "negative id": ([Piece(0, [-3, 1], 1)], VocabularyError, "id -3 .*0 to 66"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_wrong_pieces_are_refused_and_leave_the_cache_as_it_was(kind: str, case: str, tiny_model: GPTModel) -> None:
    pieces, error, message = WRONG[case]
    model = tiny_model if kind == "plain" else accelerate(tiny_model, compiled=False)
    cache = model.new_slot_cache(2, 6)
    model.forward_slots([Piece(0, [1, 2], 0)], cache)
    before = cache.storage.clone()
    with pytest.raises(error, match=message):
        model.forward_slots(pieces, cache)
    assert cache.lengths == [2, 0] and torch.equal(cache.storage, before)


def test_wrong_slots_and_prefixes_are_refused(tiny_model: GPTModel) -> None:
    with pytest.raises(ValueError, match=r"number of slots.*got 0"):
        tiny_model.new_slot_cache(0)
    with pytest.raises(ValueError, match=r"1 to 16.*got 17"):
        tiny_model.new_slot_cache(1, 17)
    cache = tiny_model.new_slot_cache(2)
    assert cache.n_bytes == 3 * 2 * 2 * 16 * 24 * 4
    with pytest.raises(ValueError, match="slot 0 has 0 tokens, got a prefix of 1"):
        cache.copy_prefix(0, 1, 1)
    with pytest.raises(ValueError, match="slots 0 to 1, got 5"):
        cache.copy_prefix(0, 5, 0)
    with pytest.raises(ValueError, match="slot 1 has 0 tokens, got a prefix of -1"):
        cache.truncate(1, -1)
