"""The decoding loop, compared with transformers, with full forward passes, and with models that recite a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, SimpleTokenizer, generate, generate_stream
from MyGPT.acceleration.step import accelerate
from MyGPT.generation import TextStream, evaluation_mode
from oracles_model import ForeignGPT, ScriptedModel, greedy_by_hand, transformers_twin

CONTEXT = 16
NO_DROPOUT = GPTConfig(vocab_size=67, context_length=CONTEXT, emb_dim=24, n_heads=3, n_layers=3, drop_rate=0.0)
PROMPT = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]])
TEXT = "The wizard’s cat sat by the fire. Then the cat left – naïve, 🐈 and 🔥, as cats are! " * 3


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return lively_model(NO_DROPOUT).double()


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 256 + 1 + 60, progress=False)


# --- the choice of tokens


def test_greedy_is_that_of_transformers(model: GPTModel) -> None:
    theirs = transformers_twin(model).generate(PROMPT, do_sample=False, max_new_tokens=11, pad_token_id=0)
    assert torch.equal(generate(model, PROMPT, 11), theirs)


def test_greedy_with_a_repetition_penalty_is_that_of_transformers(model: GPTModel) -> None:
    options = {"do_sample": False, "max_new_tokens": 11, "pad_token_id": 0, "repetition_penalty": 1.7}
    theirs = transformers_twin(model).generate(PROMPT, **options)
    ours = generate(model, PROMPT, 11, repetition_penalty=1.7)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, generate(model, PROMPT, 11))


def test_greedy_of_a_left_padded_batch_with_eos_is_that_of_transformers(model: GPTModel) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    eos = int(generate(model, PROMPT, 4, attention_mask=mask)[0, -1])
    theirs = transformers_twin(model).generate(
        PROMPT, attention_mask=mask, do_sample=False, max_new_tokens=9, pad_token_id=eos, eos_token_id=eos
    )
    assert torch.equal(generate(model, PROMPT, 9, eos_id=eos, attention_mask=mask), theirs)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("context_size", [None, 7, 1, 99])
def test_greedy_past_the_context_sees_the_last_tokens_only(
    context_size: int | None, use_cache: bool, model: GPTModel
) -> None:
    ours = generate(model, PROMPT, 24, context_size, use_cache=use_cache)
    assert torch.equal(ours, greedy_by_hand(model, PROMPT, 24, min(context_size or CONTEXT, CONTEXT)))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_longer_than_the_context_is_cut_from_the_left(use_cache: bool, model: GPTModel) -> None:
    prompt = torch.randint(67, (2, CONTEXT + 5))
    ours = generate(model, prompt, 4, use_cache=use_cache)
    assert torch.equal(ours, greedy_by_hand(model, prompt, 4, CONTEXT))


@pytest.mark.slow
@given(
    length=st.integers(1, 20),
    n=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    context_size=st.none() | st.integers(1, 20),
    repetition_penalty=st.none() | st.just(1.4),
    seed=st.integers(0, 2**40),
)
@settings(deadline=None, max_examples=30)
def test_the_cache_changes_nothing(
    model: GPTModel,
    length: int,
    n: int,
    temperature: float,
    context_size: int | None,
    repetition_penalty: float | None,
    seed: int,
) -> None:
    prompt = torch.randint(67, (2, length), generator=torch.Generator().manual_seed(seed))
    options = {"top_p": 0.95, "repetition_penalty": repetition_penalty, "seed": seed}
    with_cache, without = (
        generate(model, prompt, n, context_size, temperature, 40, **options, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_the_cache_is_used(model: GPTModel) -> None:
    """Check that the cache is really used: every forward pass after the first gets one token."""
    lengths = []
    hook = model.transformer.ln_f.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    generate(model, PROMPT, 5)
    generate(model, PROMPT, 3, use_cache=False)
    hook.remove()
    assert lengths == [5, 1, 1, 1, 1, 5, 6, 7]


def test_the_seed_decides_and_torchs_global_state_does_not(model: GPTModel) -> None:
    first = generate(model, PROMPT, 10, temperature=1.0, seed=4)
    torch.manual_seed(99)
    assert torch.equal(generate(model, PROMPT, 10, temperature=1.0, seed=4), first)
    assert not torch.equal(generate(model, PROMPT, 10, temperature=1.0, seed=5), first)


def test_with_a_seed_torchs_global_state_is_left_as_it_was(model: GPTModel) -> None:
    before = torch.get_rng_state()
    generate(model, PROMPT, 10, temperature=1.0, top_p=0.9, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_global_state_decides(model: GPTModel) -> None:
    torch.manual_seed(7)
    first = generate(model, PROMPT, 10, temperature=1.0)
    assert not torch.equal(generate(model, PROMPT, 10, temperature=1.0), first)
    torch.manual_seed(7)
    assert torch.equal(generate(model, PROMPT, 10, temperature=1.0), first)


ROWS = [[3, 14, 15, 9, 2], [6, 5], [35, 8, 9, 7]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05, "temperature": 1.7},
        {"repetition_penalty": 1.4, "use_cache": False},
        {"context_size": 7},
        {"eos_id": 11, "temperature": 2.0},
    ],
    ids=str,
)
def test_row_r_of_a_batch_is_its_prompt_alone_with_seed_plus_r(
    options: dict[str, Any], side: str, model: GPTModel
) -> None:
    """The prompts have unequal lengths, and the texts are longer than the context of 16 tokens."""
    longest = max(map(len, ROWS))
    pad = [[0] * (longest - len(row)) for row in ROWS]
    ids = [p + row if side == "left" else row + p for p, row in zip(pad, ROWS, strict=True)]
    kept = [[0] * len(p) + [1] * len(row) for p, row in zip(pad, ROWS, strict=True)]
    mask = torch.tensor([row if side == "left" else row[::-1] for row in kept])
    options = {"temperature": 1.0, **options}
    together = generate(model, torch.tensor(ids), 20, seed=8, attention_mask=mask, **options)[:, longest:]
    for r, row in enumerate(ROWS):
        alone = generate(model, torch.tensor([row]), 20, seed=8 + r, **options)[0, len(row) :]
        assert together[r, : len(alone)].tolist() == alone.tolist()
        assert {*together[r, len(alone) :].tolist()} <= {options.get("eos_id")}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_row_r_of_an_accelerated_model_is_its_prompt_alone_with_seed_plus_r(precision: Any) -> None:
    fast = accelerate(lively_model(NO_DROPOUT), precision, compiled=False)
    together = generate(fast, PROMPT, 20, temperature=1.0, seed=8, use_cache=precision != "bf16")
    for r in range(2):
        assert torch.equal(generate(fast, PROMPT[r : r + 1], 20, temperature=1.0, seed=8 + r)[0], together[r])


def test_equal_prompts_in_a_batch_get_different_texts(model: GPTModel) -> None:
    texts = generate(model, PROMPT[:1].expand(4, -1), 10, temperature=1.0, seed=2)
    assert len({*map(tuple, texts.tolist())}) == 4


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_one_row_has_the_draws_of_torchs_multinomial(seed: int, model: GPTModel) -> None:
    """The text of a seed stays what it always was. The seed of the next row may pass the largest one of torch."""
    generator, ids = torch.Generator().manual_seed(seed), PROMPT[:1]
    for _ in range(9):
        with torch.no_grad():
            probabilities = model(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    assert torch.equal(generate(model, PROMPT, 9, temperature=1.0, seed=seed)[:1], ids)


def test_nothing_to_generate_gives_the_prompt(model: GPTModel) -> None:
    out = generate(model, PROMPT, 0)
    assert torch.equal(out, PROMPT) and out.data_ptr() != PROMPT.data_ptr()


def test_the_stream_yields_what_generate_appends(model: GPTModel) -> None:
    options = {
        "temperature": 1.0,
        "seed": 3,
        "eos_id": 11,
        "attention_mask": torch.tensor([[1] * 5, [0] * 2 + [1] * 3]),
    }
    steps = list(generate_stream(model, PROMPT, 20, **options))
    assert all(step.shape == (2,) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.stack(steps, dim=1), generate(model, PROMPT, 20, **options)[:, 5:])


# --- rows of unequal length


PATTERNS = {
    "left": [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    "mixed": [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]],
    "no row full": [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("repetition_penalty", [None, 1.5])
@pytest.mark.parametrize("n", [8, 24])
def test_each_row_of_a_padded_batch_continues_as_it_would_alone(
    n: int, repetition_penalty: float | None, use_cache: bool, pattern: str, model: GPTModel
) -> None:
    mask = torch.tensor(PATTERNS[pattern])
    ids = torch.randint(67, mask.shape)
    options = {"repetition_penalty": repetition_penalty, "use_cache": use_cache}
    together = generate(model, ids, n, attention_mask=mask, **options)
    assert torch.equal(together[:, :6], ids)
    for row in range(4):
        prompt = ids[row, mask[row] == 1]
        alone = generate(model, prompt[None], n, **options)
        assert torch.equal(together[row, 6:], alone[0, len(prompt) :])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_row_ends_at_its_eos_as_it_would_alone(pattern: str, model: GPTModel) -> None:
    mask = torch.tensor(PATTERNS[pattern])
    ids = torch.randint(67, mask.shape)
    n = 24
    free = generate(model, ids, n, attention_mask=mask)[:, 6:]
    for eos in (int(free[1, 3]), int(free[3, 20])):
        together = generate(model, ids, n, eos_id=eos, attention_mask=mask)[:, 6:]
        alone = [
            generate(model, ids[row, mask[row] == 1][None], n, eos_id=eos)[0, mask[row].sum() :] for row in range(4)
        ]
        width = max(map(len, alone))
        expected = [row.tolist() + [eos] * (width - len(row)) for row in alone]
        assert together.tolist() == expected


def test_a_mask_of_ones_is_no_mask(model: GPTModel) -> None:
    assert torch.equal(generate(model, PROMPT, 5, attention_mask=torch.ones(2, 5)), generate(model, PROMPT, 5))


# --- the end of a row


def recite(scripts: list[list[int]], n: int, vocab_size: int = 60, **options: Any) -> list[list[int]]:
    """Return the new ids that a model with these scripts generates."""
    prompt = torch.zeros(len(scripts), 2, dtype=torch.int64)
    return generate(ScriptedModel(scripts, 2, vocab_size), prompt, n, **options)[:, 2:].tolist()


def test_a_single_row_stops_before_its_eos() -> None:
    assert recite([[5, 6, 7, 8]], 4, eos_id=7) == [[5, 6]]


def test_a_single_row_that_begins_with_eos_is_empty() -> None:
    assert recite([[7, 6]], 2, eos_id=7) == [[]]


def test_a_finished_row_is_filled_with_eos_until_the_last_row_finishes() -> None:
    assert recite([[5, 7, 1, 1, 1, 1], [1, 2, 3, 4, 7, 1]], 6, eos_id=7) == [[5, 7, 7, 7], [1, 2, 3, 4]]


def test_rows_that_do_not_finish_run_to_the_end() -> None:
    assert recite([[5, 7, 1, 1], [1, 2, 3, 4]], 4, eos_id=7) == [[5, 7, 7, 7], [1, 2, 3, 4]]


def test_an_eos_in_the_prompt_ends_nothing() -> None:
    assert recite([[5, 6]], 2, eos_id=0) == [[5, 6]]


def test_no_step_is_computed_after_the_last_row_has_finished() -> None:
    model = ScriptedModel([[5, 7], [7, 7]], 1, 10)  # a third step would raise an IndexError
    assert generate(model, torch.zeros(2, 1, dtype=torch.int64), 50, eos_id=7).tolist() == [[0, 5], [0, 7]]


@pytest.mark.parametrize("stop", [[6, 7], [[6, 7]], [(9, 9), (6, 7)], (6, 7)])
def test_stop_ids_end_a_row_and_are_kept(stop: Any) -> None:
    assert recite([[5, 6, 6, 7, 8, 9]], 6, stop=stop) == [[5, 6, 6, 7]]


def test_stop_ids_are_looked_for_in_new_tokens_only() -> None:
    assert recite([[0, 5, 0, 0, 5]], 5, stop=[0, 0]) == [[0, 5, 0, 0]]


@pytest.mark.parametrize(("eos_id", "fill"), [(None, 0), (3, 3)])
def test_a_row_that_a_stop_has_ended_is_filled(eos_id: int | None, fill: int) -> None:
    scripts = [[5, 6, 1, 1, 1], [1, 2, 2, 5, 6]]
    assert recite(scripts, 5, stop=[5, 6], eos_id=eos_id) == [[5, 6, fill, fill, fill], [1, 2, 2, 5, 6]]


def test_stop_and_eos_in_one_batch() -> None:
    scripts = [[5, 7, 1, 1], [1, 5, 6, 1], [1, 1, 1, 7]]
    assert recite(scripts, 4, stop=[5, 6], eos_id=7) == [[5, 7, 7], [1, 5, 6], [1, 1, 1]]


def test_without_an_eos_the_tokenizers_end_of_text_fills(bpe: BPETokenizer) -> None:
    scripts = [bpe.encode("a b c d"), bpe.encode("a b c.d")]
    new = recite(scripts, 7, bpe.n_vocab, stop=["c"], tokenizer=bpe)
    ends = [next(n for n in range(8) if "c" in bpe.decode(script[:n])) for script in scripts]
    assert new == [
        script[:end] + [bpe.eot_token] * (max(ends) - end) for script, end in zip(scripts, ends, strict=True)
    ]


def first_with_a_stop(ids: list[int], stops: list[str], bpe: BPETokenizer) -> int:
    return next((n for n in range(1, len(ids) + 1) if any(stop in bpe.decode(ids[:n]) for stop in stops)), len(ids))


@st.composite
def text_and_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    start, length = draw(st.integers(0, 100)), draw(st.integers(10, 100))
    text = TEXT[start : start + length]
    stops = []
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text) - 1))
        stops.append(text[begin : begin + draw(st.integers(1, 12))])
    return text, stops


@pytest.mark.slow
@given(st.lists(text_and_stops(), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_a_stop_text_ends_each_row_at_the_token_that_completes_it(
    bpe: BPETokenizer, drawn: list[tuple[str, list[str]]]
) -> None:
    """Stops may begin and end within a token, and within the four bytes of an emoji."""
    stops = drawn[0][1]
    scripts = [bpe.encode(text) for text, _ in drawn]
    n = max(map(len, scripts))
    scripts = [script + script[-1:] * (n - len(script)) for script in scripts]
    ends = [first_with_a_stop(script, stops, bpe) for script in scripts]
    assert bpe.eot_token is not None
    expected = [script[:end] + [bpe.eot_token] * (max(ends) - end) for script, end in zip(scripts, ends, strict=True)]
    assert recite(scripts, n, bpe.n_vocab, stop=stops, tokenizer=bpe) == expected


def test_a_stop_can_lie_within_one_token_and_over_many(bpe: BPETokenizer) -> None:
    """Check that the vocabulary has a token that is longer than a stop, and a character that takes several tokens."""
    whole = next(token for token in bpe.encode(TEXT) if len(bpe.decode([token])) > 3)
    inside = bpe.decode([whole])[1:3]
    assert recite([[whole, 70]], 2, bpe.n_vocab, stop=inside, tokenizer=bpe) == [[whole]]
    emoji = bpe.encode("🦉")
    assert len(emoji) > 1
    assert recite([[*emoji, 70]], 6, bpe.n_vocab, stop="🦉", tokenizer=bpe) == [emoji]


def test_a_stop_text_can_span_words(bpe: BPETokenizer) -> None:
    words = SimpleTokenizer.from_text("the cat sat by the fire, and left.")
    script = words.encode("the cat sat, and left.")
    assert recite([script], 6, words.n_vocab, stop="sat, and", tokenizer=words) == [script[:5]]


# --- what does not change


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.fixture
def mixed_modes(tiny_model: GPTModel) -> GPTModel:
    """Return a model in training mode, except for one frozen block, whose MLP is in training mode."""
    tiny_model.train()
    tiny_model.transformer.h[0].eval()
    tiny_model.transformer.h[0].mlp.train()
    return tiny_model


def test_every_module_keeps_its_mode(mixed_modes: GPTModel) -> None:
    before = modes(mixed_modes)
    generate(mixed_modes, PROMPT, 3)
    assert modes(mixed_modes) == before


def test_every_module_keeps_its_mode_between_steps_and_when_they_are_abandoned(mixed_modes: GPTModel) -> None:
    before = modes(mixed_modes)
    steps = generate_stream(mixed_modes, PROMPT, 9)
    next(steps)
    assert modes(mixed_modes) == before and torch.is_grad_enabled()
    del steps
    assert modes(mixed_modes) == before and torch.is_grad_enabled()


def test_every_module_keeps_its_mode_when_the_model_fails(mixed_modes: GPTModel) -> None:
    before = modes(mixed_modes)
    with pytest.raises(IndexError):
        generate(mixed_modes, PROMPT + 60, 3)
    assert modes(mixed_modes) == before and torch.is_grad_enabled()


def test_nothing_is_dropped_while_generating() -> None:
    model = ForeignGPT(dropout=0.9).train()
    prompt = torch.tensor([[1, 2, 3]])
    expected = greedy_by_hand(model.eval(), prompt, 5, 8)
    assert torch.equal(generate(model.train(), prompt, 5, 8), expected)


def test_evaluation_mode_is_over_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), evaluation_mode(model):
        assert modes(model) == [False, False, False]
        raise KeyError
    assert modes(model) == [True, True, False]


# --- models of other code


@pytest.mark.parametrize("context_size", [8, 3])
def test_a_model_without_config_or_cache_generates(context_size: int) -> None:
    model = ForeignGPT().eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    ours = generate(model, prompt, 12, context_size)
    assert torch.equal(ours, greedy_by_hand(model, prompt, 12, context_size))


def test_a_wrapped_model_generates_as_the_model_in_it(model: GPTModel) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    wrapped = generate(Wrapper(model), PROMPT, 20, CONTEXT, attention_mask=mask)
    assert torch.equal(wrapped, generate(model, PROMPT, 20, attention_mask=mask))


# --- text that arrives token by token


def shown(stream: TextStream, ids: list[int]) -> Iterator[str]:
    for id_ in ids:
        yield stream.add(id_)
    yield stream.end()


@pytest.mark.slow
@given(st.data())
@settings(deadline=None, max_examples=150)
def test_any_ids_are_shown_as_they_are_decoded_together(bpe: BPETokenizer, data: st.DataObject) -> None:
    """Most of these ids are single bytes, which are only parts of characters or no valid UTF-8 at all."""
    ids = data.draw(st.lists(st.integers(0, bpe.n_vocab - 1), max_size=30))
    assert "".join(shown(TextStream(bpe, stop=["\x00never"]), ids)) == bpe.decode(ids)


@given(st.text(max_size=20))
@settings(deadline=None, max_examples=150)
def test_of_a_character_nothing_is_shown_before_its_last_byte(bpe: BPETokenizer, text: str) -> None:
    assume("\ufffd" not in text)
    parts = list(shown(TextStream(bpe), bpe.encode(text)))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


def test_a_whole_character_is_shown_at_once(bpe: BPETokenizer) -> None:
    stream = TextStream(bpe)
    *first, last = bpe.encode("🦉")
    assert [stream.add(id_) for id_ in first] == [""] * len(first)
    assert stream.add(last) == "🦉"
    assert stream.end() == ""


@pytest.mark.slow
@given(text_and_stops())
@settings(deadline=None, max_examples=150)
def test_no_part_of_a_stop_text_is_shown(bpe: BPETokenizer, drawn: tuple[str, list[str]]) -> None:
    text, stops = drawn
    ids = bpe.encode(text)
    ids = ids[: first_with_a_stop(ids, stops, bpe)]
    whole = bpe.decode(ids)
    end = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
    assert "".join(shown(TextStream(bpe, stop=stops), ids)) == whole[:end]


def test_no_part_of_a_stop_text_is_shown_when_its_next_character_is_half_there(bpe: BPETokenizer) -> None:
    """The x of the stop "x🦉" was once shown as soon as the owl's first byte arrived, so the stop was not found."""
    x, *owl = bpe.encode("x") + bpe.encode("🦉")
    stream = TextStream(bpe, stop=["x🦉"])
    assert "".join(shown(stream, [x, *owl])) == ""
    stream = TextStream(bpe, stop=["x🦉"])
    assert "".join(shown(stream, [x, owl[0], x])) == "x\ufffdx"


def test_after_a_stop_text_nothing_more_is_shown(bpe: BPETokenizer) -> None:
    ids = bpe.encode("a.b.c")
    assert "".join(shown(TextStream(bpe, stop=["."]), ids)) == "a"


def test_the_prompt_is_not_shown(bpe: BPETokenizer) -> None:
    prompt, new = bpe.encode("The cat"), bpe.encode(" sat 🔥")
    assert "".join(shown(TextStream(bpe, prompt), new)) == " sat 🔥"


def test_a_character_that_the_prompt_began_is_shown_whole(bpe: BPETokenizer) -> None:
    ids = bpe.encode("a") + bpe.encode("🦉")
    assert "".join(shown(TextStream(bpe, ids[:2]), [*ids[2:], ids[0]])) == "🦉a"


def test_words_are_shown_with_the_spaces_between_them() -> None:
    words = SimpleTokenizer.from_text("the cat sat, and left.")
    ids = words.encode("the cat sat, and left.")
    assert "".join(shown(TextStream(words, ids[:2]), ids[2:])) == " sat, and left."


def test_what_is_shown_is_what_generate_appends(bpe: BPETokenizer) -> None:
    config = GPTConfig(vocab_size=bpe.n_vocab, context_length=CONTEXT, emb_dim=12, n_heads=2, n_layers=2)
    model, ids = lively_model(config), bpe.encode("The cat")
    stream = TextStream(bpe, ids)
    steps = generate_stream(model, torch.tensor([ids]), 30, temperature=1.0, seed=1)
    text = "".join(stream.add(int(new)) for new in steps) + stream.end()
    whole = generate(model, torch.tensor([ids]), 30, temperature=1.0, seed=1)[0].tolist()
    assert "The cat" + text == bpe.decode(whole)


# --- invalid arguments


Door = Callable[..., Any]


@pytest.mark.parametrize("door", [generate, generate_stream])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"idx": torch.zeros(1, 0, dtype=torch.int64)}, r"at least one token.*\(1, 0\)"),
        ({"idx": torch.zeros(0, 3, dtype=torch.int64)}, r"at least one token.*\(0, 3\)"),
        ({"idx": PROMPT[0]}, r"\(batch, time\).*\(5,\)"),
        ({"max_new_tokens": -1}, "max_new_tokens .* at least 0, got -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens .* got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens .* got True"),
        ({"context_size": 0}, "context_size .* at least 1, got 0"),
        ({"context_size": 2.5}, "context_size .* got 2.5"),
        ({"temperature": -1.0}, "temperature .* got -1.0"),
        ({"top_k": 0}, "top_k .* got 0"),
        ({"top_p": 0.0}, "top_p .* got 0.0"),
        ({"min_p": 2.0}, "min_p .* got 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty .* got 0.0"),
        ({"attention_mask": torch.ones(2, 4)}, r"\(2, 4\).*\(2, 5\)"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "prompt 1 is empty"),
        ({"stop": "end"}, "stop text 'end' needs the tokenizer"),
        ({"stop": ""}, "stop must be .* got ''"),
        ({"stop": []}, r"stop must be .* got \[\]"),
        ({"stop": ["a", ""]}, "stop must be .* got"),
        ({"stop": [[1], []]}, "stop must be .* got"),
        ({"stop": 13}, "stop must be .* got 13"),
        ({"stop": [13, "a"]}, "stop must be .* got"),
        ({"stop": [1.5]}, "stop must be .* got"),
    ],
)
def test_wrong_input_is_refused_at_the_door(door: Door, changes: dict[str, Any], message: str, model: GPTModel) -> None:
    """generate_stream checks its arguments when it is called, not at the first step."""
    with pytest.raises(ValueError, match=message):
        door(**{"model": model, "idx": PROMPT, "max_new_tokens": 3, **changes})


def test_an_id_outside_the_vocabulary_is_refused(model: GPTModel) -> None:
    with pytest.raises(IndexError, match="id 67 is outside the vocabulary"):
        generate(model, torch.tensor([[1, 67]]), 3)


def test_a_char_tokenizer_serves_for_stop_texts() -> None:
    chars = CharTokenizer.from_text(TEXT)
    script = chars.encode("cat left")
    assert recite([script], 8, chars.n_vocab, stop="t l", tokenizer=chars) == [script[:5]]
