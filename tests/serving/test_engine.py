"""Test the engine: results that do not depend on other requests, and requests that end when they should."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, GPTModel, SamplingConfig, generate
from MyGPT.acceleration.step import FastModel, accelerate
from MyGPT.cache import Piece, SlotCache
from MyGPT.serving import Engine, EngineClosed, QueueFull, Request, Token
from MyGPT.serving.engine import MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS_WHILE_GENERATING
from oracles_model import transformers_twin

CONFIG = GPTConfig(vocab_size=97, context_length=40, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
TOKENIZER = CharTokenizer([*(chr(32 + i) for i in range(95)), "\n", "\u2028"])
SECONDS = 20
"""The longest time that a test waits for another thread."""


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return lively_model(CONFIG)


@pytest.fixture(scope="module")
def model64() -> GPTModel:
    return lively_model(CONFIG).double()


@pytest.fixture(scope="module")
def fast(model: GPTModel) -> FastModel:
    return accelerate(model, compiled=True)


class Steps:
    """A model for an engine that records the pieces of every step, and computes a step only when a test allows it."""

    def __init__(self, model: Any, is_held: bool = False) -> None:
        self.model, self.config = model, model.config
        self.pieces: list[list[Piece]] = []
        self.allowed = threading.Semaphore(0)
        self.is_held = is_held
        self.before: Callable[[list[Piece]], None] = lambda pieces: None

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def new_slot_cache(self, slots: int) -> SlotCache:
        return self.model.new_slot_cache(slots)

    def forward_slots(self, pieces: list[Piece], cache: SlotCache) -> Tensor:
        if self.is_held:
            assert self.allowed.acquire(timeout=SECONDS), "the test allowed no further step"
        self.pieces.append(pieces)
        self.before(pieces)
        return self.model.forward_slots(pieces, cache)

    def release(self) -> None:
        self.is_held = False
        self.allowed.release(1000)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ids_of(request: Request) -> list[int]:
    return [token.id for token in request]


def random_options(draw: random.Random) -> dict[str, Any]:
    """Return arguments of `submit` with a random prompt, which often has the beginning of other prompts."""
    common = [[7, 8, 9] * 9, list(range(20, 50)), []]
    prompt = draw.choice(common)[: draw.randrange(1, 31)] + [draw.randrange(97) for _ in range(draw.randrange(1, 6))]
    sampling = SamplingConfig(
        draw.choice([0.0, 0.7, 1.3]), draw.choice([None, 5, 40]), draw.choice([None, 0.8]), draw.choice([None, 0.02]),
        draw.choice([None, None, 1.2]),
    )  # fmt: skip
    return {
        "prompt": prompt,
        "sampling": sampling,
        "max_new_tokens": draw.randrange(1, 12),
        "seed": draw.randrange(1000),
        "logprobs": draw.choice([None, 0, 3]),
        "prompt_logprobs": draw.random() < 0.2,
        "logit_bias": draw.choice([None, None, {draw.randrange(97): draw.uniform(-5, 5)}]),
        "eos_id": draw.choice([None, [1, 2, 3, 4]]),
    }


def run_together(engine: Engine, options: list[dict[str, Any]], draw: random.Random) -> list[Request]:
    """Submit the requests in random order with pauses and with requests in between that are cancelled."""
    requests: dict[int, Request] = {}
    for i in draw.sample(range(len(options)), len(options)):
        requests[i] = engine.submit(**options[i])
        if draw.random() < 0.2:
            engine.submit(options[i]["prompt"], max_new_tokens=30).cancel()
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.004)
    for request in requests.values():
        ids_of(request)
    return [requests[i] for i in range(len(options))]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_request_has_the_same_bits_alone_and_among_others(model: GPTModel, precision: Any) -> None:
    fast = accelerate(model, precision, compiled=True)
    draw = random.Random(1)
    options = [random_options(draw) for _ in range(120)]
    with Engine(fast, TOKENIZER, slots=1) as engine:
        alone = []
        for one in options:
            engine._slots.clear(0)  # nothing is reused
            alone.append(engine.submit(**one))
            ids_of(alone[-1])
    for slots in (2, 5, 32):
        with Engine(fast, TOKENIZER, slots=slots) as engine:
            together = run_together(engine, options, draw)
            assert engine.stats()["running"] == engine.stats()["waiting"] == 0
        for one, other in zip(alone, together, strict=True):
            assert (one.tokens, one.prompt_tokens, one.finish_reason) == (
                other.tokens, other.prompt_tokens, other.finish_reason,
            )  # fmt: skip
        assert sum(request.n_reused for request in together) > 200


def test_without_the_kernel_the_tokens_are_those_of_generate(model64: GPTModel) -> None:
    draw = random.Random(2)
    options = [random_options(draw) for _ in range(120)]
    with Engine(model64, TOKENIZER, slots=6) as engine:
        together = run_together(engine, options, draw)
    for one, request in zip(options, together, strict=True):
        if one["logit_bias"]:
            continue
        sampling = one["sampling"]
        expected = generate(
            model64, torch.tensor([one["prompt"]]), one["max_new_tokens"], eos_id=one["eos_id"], seed=one["seed"],
            **vars(sampling),
        )[0, len(one["prompt"]) :].tolist()  # fmt: skip
        room = CONFIG.context_length - len(one["prompt"]) + 1
        assert [token.id for token in request.tokens] == expected[:room]
        assert request.finish_reason == ("length" if len(expected) >= min(room, one["max_new_tokens"]) else "stop")


def test_logprobs_are_those_of_transformers(model64: GPTModel) -> None:
    twin = transformers_twin(model64)
    prompt = [5, 90, 17, 17, 3]
    with Engine(model64, TOKENIZER) as engine:
        request = engine.submit(prompt, max_new_tokens=4, logprobs=4, prompt_logprobs=True)
        tokens = [*request.prompt_tokens, *request] if request.finished else [*request]
    tokens = [*request.prompt_tokens, *tokens[-4:]]
    ids = [token.id for token in tokens]
    assert ids[:5] == prompt and tokens[0].logprob is None and tokens[0].top == []
    with torch.no_grad():
        expected = twin(torch.tensor([ids])).logits[0].log_softmax(-1)
    for t in range(1, len(ids)):
        # The engine computes log-probabilities in float32, whose numbers near 10 are 1e-6 apart.
        assert tokens[t].logprob == pytest.approx(float(expected[t - 1, ids[t]]), abs=4e-6)
        best = expected[t - 1].topk(4)
        assert [id_ for id_, _ in tokens[t].top] == best.indices.tolist()
        assert [value for _, value in tokens[t].top] == pytest.approx(best.values.tolist(), abs=4e-6)


def test_logprobs_do_not_depend_on_the_sampling_options(fast: FastModel) -> None:
    with Engine(fast, TOKENIZER) as engine:
        plain = engine.submit([1, 2], max_new_tokens=1, logprobs=20)
        options = SamplingConfig(2.0, 3, 0.5, 0.1, 5.0)
        other = engine.submit([1, 2], options, 1, logprobs=20, logit_bias={4: 50.0}, seed=1)
        assert next(iter(plain)).top == next(iter(other)).top
        assert next(iter(other)).id == 4


# Prefixes and pieces.


def test_a_repeated_prompt_computes_only_its_last_token(model: GPTModel) -> None:
    steps = Steps(model)
    with Engine(steps, TOKENIZER, slots=2) as engine:
        first = engine.submit(list(range(30)), max_new_tokens=3)
        expected = ids_of(first)
        again = engine.submit(list(range(30)), max_new_tokens=3)
        assert ids_of(again) == expected
        assert (first.n_reused, again.n_reused) == (0, 29)
        longer = engine.submit([*range(30), *expected, 5], max_new_tokens=1)
        ids_of(longer)
        assert longer.n_reused == 32  # the last token of the earlier request was never computed
    assert [piece.ids for piece in steps.pieces[3]] == [[29]]


def test_equal_prompts_at_the_same_time_are_computed_once(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    with Engine(steps, TOKENIZER, slots=4) as engine:
        with engine._changed:  # the engine admits all of them together
            requests = [engine.submit([*range(30), i], max_new_tokens=2) for i in range(4)]
        steps.release()
        results = [ids_of(request) for request in requests]
    n_computed = sum(len(piece.ids) for pieces in steps.pieces for piece in pieces)
    assert n_computed == 31 + 3 + 4  # the first prompt, the last token of the others, and one new token of each
    for i, new in enumerate(results):
        assert new == generate(model, torch.tensor([[*range(30), i]]), 2)[0, 31:].tolist()


def test_a_request_whose_source_is_cancelled_computes_its_prompt_itself(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    with Engine(steps, TOKENIZER, slots=2) as engine:
        with engine._changed:
            first, second = (engine.submit(list(range(30)), max_new_tokens=2) for _ in range(2))
        until(lambda: engine.stats()["running"] == 2)
        first.cancel()
        steps.release()
        assert ids_of(second) == generate(model, torch.tensor([list(range(30))]), 2)[0, 30:].tolist()
        assert first.finish_reason == "cancelled"


def test_long_prompts_do_not_stall_a_request_that_generates() -> None:
    config = GPTConfig(vocab_size=97, context_length=900, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)
    steps = Steps(lively_model(config))
    arrived = threading.Event()
    with Engine(steps, TOKENIZER, slots=3) as engine:
        steps.before = lambda pieces: (
            arrived.wait(SECONDS) and None if len(steps.pieces) == 5 else None  # type: ignore[func-returns-value]
        )
        talking = engine.submit([1], max_new_tokens=60)
        until(lambda: len(talking.tokens) >= 3)
        long = [engine.submit([i, *range(97)] * 8, max_new_tokens=1) for i in (2, 3)]
        arrived.set()
        for request in [talking, *long]:
            ids_of(request)
    while_both = [pieces for pieces in steps.pieces if len(pieces) > 1 or len(pieces[0].ids) > 1]
    sizes = [sum(len(piece.ids) for piece in pieces) for pieces in while_both]
    assert max(sizes) <= MAX_PROMPT_TOKENS_WHILE_GENERATING + 1
    assert sum(sizes) == 2 * 8 * 98 + len(sizes)  # in each of these steps, `talking` got its token too


def test_a_prompt_alone_is_computed_in_large_pieces() -> None:
    config = GPTConfig(vocab_size=97, context_length=900, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)
    steps = Steps(lively_model(config))
    with Engine(steps, TOKENIZER) as engine:
        ids_of(engine.submit([1] * 900))
    assert [len(pieces[0].ids) for pieces in steps.pieces] == [MAX_PROMPT_TOKENS] * 3 + [900 - 3 * MAX_PROMPT_TOKENS]


# Ends.


def test_max_new_tokens_defaults_to_the_room_in_the_context(model: GPTModel) -> None:
    with Engine(model, TOKENIZER) as engine:
        request = engine.submit([1] * 35, eos_id=None)
        assert len(ids_of(request)) == CONFIG.context_length - 35 + 1
        assert request.finish_reason == "length"


@pytest.mark.parametrize("n_prompt", [1, 35, 40, 55])
def test_a_request_that_slides_is_that_of_generate(n_prompt: int, model64: GPTModel) -> None:
    prompt = [(7 * i) % 97 for i in range(n_prompt)]
    with Engine(model64, TOKENIZER, slots=2) as engine:
        other = engine.submit([3] * 20, max_new_tokens=15)
        request = engine.submit(prompt, max_new_tokens=48, slide=True, eos_id=None)
        assert ids_of(request) == generate(model64, torch.tensor([prompt]), 48)[0, n_prompt:].tolist()
        ids_of(other)


@pytest.mark.parametrize("stop", ["xq", ["a", "q"], [[60]], "k"])
def test_stops_are_those_of_generate(stop: Any, model64: GPTModel) -> None:
    prompt = TOKENIZER.encode("Where do we")
    sampling = SamplingConfig(1.0)
    for seed in range(5):
        expected = generate(
            model64, torch.tensor([prompt]), 20, temperature=1.0, seed=seed, stop=stop, tokenizer=TOKENIZER
        )[0, len(prompt) :].tolist()  # fmt: skip
        with Engine(model64, TOKENIZER) as engine:
            request = engine.submit("Where do we", sampling, 20, stop=stop, seed=seed, eos_id=None)
            assert ids_of(request) == expected
        texts = [stop] if isinstance(stop, str) else [one for one in stop if isinstance(one, str)]
        text = TOKENIZER.decode(expected)
        assert request.text() == text[: min([len(text), *(text.find(one) for one in texts if one in text)])]
        assert request.finish_reason == (
            "stop" if len(expected) < 20 or any(one in text for one in texts) else "length"
        )


def test_ids_without_a_token_are_neither_generated_nor_alternatives() -> None:
    model = lively_model(GPTConfig(vocab_size=128, context_length=40, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0))
    with Engine(model, TOKENIZER) as engine:
        request = engine.submit([1], SamplingConfig(5.0), 30, seed=1, logprobs=20)
        for token in request:
            assert max(token.id, *(id_ for id_, _ in token.top)) < TOKENIZER.n_vocab
        end = engine.submit([1], max_new_tokens=5, logit_bias={127: 10_000}, eos_id=127)
        assert ids_of(end) == [] and end.finish_reason == "stop"


def test_a_cancelled_request_leaves_before_the_next_step(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    with Engine(steps, TOKENIZER, slots=1) as engine:
        request = engine.submit([1, 2, 3], max_new_tokens=30)
        waiting = engine.submit([4], max_new_tokens=1)
        steps.allowed.release(2)
        until(lambda: len(steps.pieces) == 2 and len(request.tokens) >= 1)
        request.cancel()
        steps.release()
        assert len(ids_of(request)) <= 3 and request.finish_reason == "cancelled"
        assert len(ids_of(waiting)) == 1
    assert [pieces[0].ids for pieces in steps.pieces[-1:]] == [[4]]


def test_a_waiting_request_can_be_cancelled_and_can_time_out(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    with Engine(steps, TOKENIZER, slots=1) as engine:
        running = engine.submit([1], max_new_tokens=2)
        until(lambda: engine.stats()["running"] == 1)
        cancelled, late = engine.submit([2]), engine.submit([3], timeout=0.01)
        cancelled.cancel()
        time.sleep(0.02)
        steps.release()
        assert ids_of(cancelled) == ids_of(late) == []
        assert (cancelled.finish_reason, late.finish_reason) == ("cancelled", "timeout")
        assert len(ids_of(running)) == 2


def test_a_running_request_times_out(model: GPTModel) -> None:
    steps = Steps(model)
    steps.before = lambda pieces: time.sleep(0.02)
    with Engine(steps, TOKENIZER) as engine:
        request = engine.submit([1], timeout=0.07, eos_id=None)
        assert 1 <= len(ids_of(request)) <= 5 and request.finish_reason == "timeout"


def test_a_full_queue_and_a_closed_engine_refuse_requests(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    engine = Engine(steps, TOKENIZER, slots=1, max_queue=2)
    first = engine.submit([1], max_new_tokens=1)
    until(lambda: engine.stats()["running"] == 1)
    second, third = (engine.submit([2], max_new_tokens=1) for _ in range(2))
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit([1])
    steps.release()
    engine.close(drain=True)
    assert [request.finish_reason for request in (first, second, third)] == ["length"] * 3
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit([1])


def test_closing_cancels_what_runs_and_waits(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    engine = Engine(steps, TOKENIZER, slots=1)
    requests = [engine.submit([1], max_new_tokens=30) for _ in range(3)]
    steps.allowed.release(1)
    until(lambda: len(steps.pieces) == 1)
    threading.Timer(0.02, steps.release).start()
    engine.close()
    assert [request.finish_reason for request in requests] == ["cancelled"] * 3


# Errors.


def test_logits_that_are_nan_end_only_their_request(model: GPTModel) -> None:
    damaged = lively_model(CONFIG)
    with torch.no_grad():
        damaged.transformer.wte.weight[13] = torch.nan  # a tied head, so that the logits of every text are not finite
    damaged.lm_head = torch.nn.Linear(24, 97, bias=False)
    with torch.no_grad():
        damaged.lm_head.weight.copy_(model.lm_head.weight)
    with Engine(accelerate(damaged), TOKENIZER, slots=3) as engine:
        good = engine.submit([1, 2, 3], max_new_tokens=20, logit_bias={13: -100.0})
        bad = engine.submit([1, 13, 3], max_new_tokens=20)
        after = engine.submit([1, 13, 4], max_new_tokens=2)
        with pytest.raises(FloatingPointError, match="nan"):
            ids_of(bad)
        with pytest.raises(FloatingPointError):
            ids_of(after)
        assert len(ids_of(good)) == 20 and bad.finish_reason is None
        # The slots that held NaN serve the next requests.
        for _ in range(4):
            again = engine.submit([1, 2, 3], max_new_tokens=20, logit_bias={13: -100.0})
            assert ids_of(again) == [token.id for token in good.tokens]


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(model: GPTModel) -> None:
    steps = Steps(model)

    def fail(pieces: list[Piece]) -> None:
        if 60 in pieces[0].ids:
            raise RuntimeError("out of memory")

    steps.before = fail
    with Engine(steps, TOKENIZER, slots=2) as engine:
        with pytest.raises(RuntimeError, match="out of memory"):
            ids_of(engine.submit([60, 1]))
        assert len(ids_of(engine.submit([1, 2], max_new_tokens=3, eos_id=None, logit_bias={60: -100.0}))) == 3
        assert engine.stats()["running"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [97]}, "id 97 is outside the vocabulary, ids are 0 to 96"),
        ({"prompt": [True]}, "id True is outside"),
        ({"prompt": [1] * 41}, "the prompt has 41 tokens, but the model's context is 40"),
        ({"prompt": [1] * 41, "slide": True, "prompt_logprobs": True}, "context is 40"),
        ({"prompt": [1], "max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ({"prompt": [1], "logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        ({"prompt": [1], "logit_bias": {97: 1.0}}, "id 97 is outside the vocabulary"),
        ({"prompt": [1], "logit_bias": {1: float("nan")}}, "logit_bias must have finite numbers"),
        ({"prompt": [1], "stop": ""}, "stop must be"),
        ({"prompt": [1], "seed": 2**64}, "seed must be"),
        ({"prompt": [1], "timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"prompt": [1], "eos_id": "end"}, "eos_id must be"),
    ],
)
def test_wrong_arguments(model: GPTModel, options: dict[str, Any], message: str) -> None:
    with Engine(model, TOKENIZER, slots=1) as engine, pytest.raises((ValueError, IndexError), match=message):
        engine.submit(**options)


# Iterating.


def test_coroutines_and_threads_see_the_same_tokens(fast: FastModel) -> None:
    with Engine(fast, TOKENIZER, slots=2) as engine:

        async def read(request: Request) -> list[Token]:
            return [token async for token in request]

        async def read_all() -> list[list[Token]]:
            one, other = (engine.submit([i], max_new_tokens=12) for i in range(2))
            abandoned = asyncio.create_task(read(one))
            await asyncio.sleep(0)
            abandoned.cancel()
            return await asyncio.gather(read(one), read(one), read(other))

        first, second, third = asyncio.run(read_all())
        assert first == second == list(engine.submit([0], max_new_tokens=12))
        assert third == list(engine.submit([1], max_new_tokens=12))


def test_a_closed_event_loop_does_not_disturb_the_engine(model: GPTModel) -> None:
    steps = Steps(model, is_held=True)
    with Engine(steps, TOKENIZER) as engine:
        request = engine.submit([1], max_new_tokens=3, eos_id=None)

        async def wait_briefly() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(request.wait(), 0.01)

        asyncio.run(wait_briefly())
        steps.release()
        assert len(ids_of(request)) == 3


def test_a_program_may_end_without_closing_its_engine(model: GPTModel, tmp_path: Path) -> None:
    accelerate(model, compiled=True)  # the program finds the compiled kernel, and prints nothing about it
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys\n"
        "from MyGPT import Engine, GPTModel, accelerate\n"
        "engine = Engine(accelerate(GPTModel.from_pretrained(sys.argv[1])), None)\n"
        "request = engine.submit([1], slide=True, max_new_tokens=10**6)\n"
        "print(next(iter(request)).id)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True, timeout=SECONDS
    )
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.strip().isdigit()
