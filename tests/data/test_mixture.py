"""Tests of weighted mixtures: exact shares, every window once per epoch, and batches that depend on nothing but the step."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT import GPTConfig, GPTModel, TrainConfig, Trainer
from MyGPT.data.mixture import MixtureSampler, MixtureValidation, Shares, check_weights
from MyGPT.data.sampler import WindowSampler
from MyGPT.data.tokens import compact_ids
from MyGPT.training.metrics import read_metrics
from ranks import run_on_ranks
from tiny_parallel import comparable_weights

WEB, CODE, BOOKS = compact_ids(range(1000)), compact_ids(range(1000, 1430)), compact_ids(range(2000, 2121))
SOURCES = {"web": WEB, "code": CODE, "books": BOOKS}
WEIGHTS = {"web": 0.7, "code": 0.25, "books": 0.05}


def source_of(inputs: torch.Tensor) -> list[str]:
    """Return the source of each row of a batch, which its first id shows."""
    return ["web" if first < 1000 else "code" if first < 2000 else "books" for first in inputs[:, 0].tolist()]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"a": 0.8, "b": 0.2}, {"a": Fraction(4, 5), "b": Fraction(1, 5)}),
        ({"a": 8, "b": 2.0}, {"a": Fraction(4, 5), "b": Fraction(1, 5)}),
        ({"a": 0.1, "b": 0.1, "c": 0.1}, dict.fromkeys("abc", Fraction(1, 3))),
        ({"only": 1e-300}, {"only": Fraction(1)}),
    ],
)
def test_weights_are_exact_decimal_numbers(weights: dict[str, float], shares: dict[str, Fraction]) -> None:
    assert check_weights(weights) == shares


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "a mixture needs at least one source"),
        ({"a": 0}, "the weight of the source 'a' must be a number above 0, got 0: leave the source out"),
        ({"a": -1.0}, "above 0, got -1.0"),
        ({"a": float("nan")}, "above 0, got nan"),
        ({"a": float("inf")}, "above 0, got inf"),
        ({"a": True}, "above 0, got True"),
        ({"a": "much"}, "above 0, got 'much'"),
        ({"a": None}, "above 0, got None"),
        ({3: 1.0}, "the name of a source must be a text, got 3: put it in quotation marks"),
        ({"": 1.0}, "the name of a source must be a text, got ''"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[Any, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_weights(weights)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000) | st.floats(1e-6, 1e6), min_size=1, max_size=12),
    n=st.integers(0, 10**15),
)
def test_every_row_has_one_source_and_every_source_its_share(weights: list[float], n: int) -> None:
    """The bound holds after any number of rows: 1/2 row for two sources, below 1 for three, below 1.68 for more."""
    shares = check_weights({str(i): weight for i, weight in enumerate(weights)})
    dealer = Shares(shares)
    counts = dealer.count(np.array(range(n, n + 30), dtype=object))
    rows = np.stack([np.diff(of_source) for of_source in counts.values()])
    assert (rows.sum(0) == 1).all() and set(rows.flatten().tolist()) <= {0, 1}
    bound = {1: Fraction(0), 2: Fraction(1, 2), 3: Fraction(1)}.get(len(weights), Fraction(168, 100))
    assert dealer.count(n) == {name: of_source[0] for name, of_source in counts.items()}
    for name, of_source in counts.items():
        assert all(abs(of_source[i] - shares[name] * (n + i)) <= bound for i in range(30))


def test_many_equal_and_unequal_sources_start_with_their_share() -> None:
    """A naive rule, which gives each row to the source that is furthest behind, is the yardstick."""
    weights = check_weights({str(i): 0.7**i for i in range(12)})
    dealer, naive, worst = Shares(weights), dict.fromkeys(weights, 0), {"tree": Fraction(0), "naive": Fraction(0)}
    for n in range(1, 200):
        behind = max(weights, key=lambda name: weights[name] * n - naive[name])
        naive[behind] += 1
        for kind, counts in (("tree", dealer.count(n)), ("naive", naive)):
            worst[kind] = max(worst[kind], *(abs(counts[name] - weights[name] * n) for name in weights))
    assert worst["tree"] < 1.5 and worst["naive"] < 1.5


@pytest.mark.parametrize("order", ["random", "shuffled", "sequential"])
def test_a_batch_depends_only_on_the_seed_and_the_step(order: Any) -> None:
    one = MixtureSampler(SOURCES, WEIGHTS, 10, 8, order, seed=3)
    batches = [one.batch(step) for step in range(40)]
    renamed = {"y": BOOKS, "z": WEB, "x": CODE}
    other = MixtureSampler(renamed, {"x": 25, "y": 5, "z": 70}, 10, 8, order, seed=3)
    for step in (39, 0, 17):
        assert all(map(torch.equal, other.batch(step), batches[step]))
    assert one.fingerprint() == other.fingerprint()
    assert all(torch.equal(y, x + 1) and x.dtype == y.dtype == torch.int64 for x, y in batches)
    seeded = MixtureSampler(SOURCES, WEIGHTS, 10, 8, order, seed=4)
    assert any(not torch.equal(seeded.batch(i)[0], batches[i][0]) for i in range(40)) == (order != "sequential")


def test_counts_are_those_of_the_rows() -> None:
    sampler = MixtureSampler(SOURCES, WEIGHTS, 10, 7, "shuffled", seed=3)
    found = dict.fromkeys(SOURCES, 0)
    for step in range(100):
        assert sampler.tokens(step) == found
        for name in source_of(sampler.batch(step)[0]):
            found[name] += 10
    assert sampler.metrics(100) == {f"tokens/{name}": n for name, n in found.items()}
    assert found == {"web": 4900, "code": 1750, "books": 350}


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_every_source_has_epochs_of_its_own(order: Any) -> None:
    """The windows of a source are those of a WindowSampler of this source alone, in the same order."""
    sampler = MixtureSampler(SOURCES, WEIGHTS, 10, 8, order, seed=3)
    inputs = torch.cat([sampler.batch(step)[0] for step in range(120)])
    sources = source_of(inputs)
    for name, ids in SOURCES.items():
        rows = inputs[[i for i, source in enumerate(sources) if source == name]]
        alone = WindowSampler(ids, 10, len(rows), order, sampler.samplers[name].seed)
        assert torch.equal(rows, alone.batch(0)[0])
        n = alone.windows_per_epoch
        assert len(rows) > n and len(rows[:n, 0].unique()) == n


def test_changed_weights_or_texts_change_the_fingerprint() -> None:
    def known(sources: Any = SOURCES, weights: Any = WEIGHTS) -> tuple[str, str]:
        sampler, validation = MixtureSampler(sources, weights, 10, 8), MixtureValidation(sources, weights, 10, 20)
        return sampler.fingerprint(), validation.fingerprint()

    first = known()
    exchanged = {**WEIGHTS, "web": WEIGHTS["code"], "code": WEIGHTS["web"]}
    for other in (
        known(weights={**WEIGHTS, "books": 0.06}),
        known(weights=exchanged),
        known({**SOURCES, "web": WEB[1:]}),
    ):
        assert other[0] != first[0] and other[1] != first[1]
    assert known(weights={name: 20 * weight for name, weight in WEIGHTS.items()}) == first


def test_a_source_that_is_too_short_is_named() -> None:
    with pytest.raises(ValueError, match="the source 'b': the text has 5 tokens, a window of 10 tokens"):
        MixtureSampler({"a": WEB, "b": WEB[:5]}, {"a": 1, "b": 1}, 10, 4)


def make_trainer(directory: Path, **options: Any) -> Trainer:
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(2121, context_length=10, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0))
    config = TrainConfig(
        max_steps=6, batch_size=8, warmup_steps=0, eval_every=3, log_every=2, sample_every=0, checkpoint_every=3, order="shuffled"
    )  # fmt: skip
    weights = options.pop("weights", WEIGHTS)
    train, val = MixtureSampler(SOURCES, weights, 10, 8, "shuffled", 3), MixtureValidation(SOURCES, weights, 10, 20)
    return Trainer(model, config, train, val, run_dir=directory, progress=False, **options)


def test_a_run_records_the_tokens_and_the_loss_of_each_source(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    loss = trainer.run()
    records = read_metrics(tmp_path / "run")
    drawn = {
        record["step"]: {k: v for k, v in record.items() if k.startswith("tokens/")}
        for record in records
        if "loss" in record
    }
    assert drawn == {step: trainer.sampler.metrics(step) for step in (2, 4, 6)}
    assert sum(drawn[6].values()) == trainer.tokens_seen == 6 * 8 * 10
    for name, ids in SOURCES.items():  # the loss of each source, measured by a trainer that knows only this source
        alone = Trainer(trainer.model, trainer.config, WEB, ids, progress=False)
        assert records[-1][f"final_val_loss/{name}"] == pytest.approx(alone.evaluate(whole=True), rel=1e-12)
    shares = check_weights(WEIGHTS)
    mean = sum(float(shares[name]) * records[-1][f"final_val_loss/{name}"] for name in SOURCES)
    assert loss == records[-1]["final_val_loss"] == pytest.approx(mean, rel=1e-12)
    assert {"val_loss", "val_loss/web", "val_loss/code", "val_loss/books"} <= records[1].keys()


def test_a_resumed_run_refuses_other_weights(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run").run()
    other = {**WEIGHTS, "books": 0.5}
    with pytest.raises(ValueError, match="data_content: the training data differ"):
        make_trainer(tmp_path / "run", resume=True, weights=other).run()
    make_trainer(tmp_path / "run", resume=True, weights=other, allow_changed="data_content").run()


def results_on_ranks(directory: Path) -> tuple[float, dict[str, float], dict[str, Any]]:
    trainer = make_trainer(directory)
    return trainer.run(), trainer.scores, comparable_weights(trainer.model)


@pytest.mark.torchrun
@pytest.mark.slow
def test_two_ranks_see_the_rows_and_counts_of_one(tmp_path: Path) -> None:
    """The order of summation differs in float32. The losses are about 7.6, where two neighbouring numbers differ by 5e-7."""
    loss, losses, weights = results_on_ranks(tmp_path / "one")
    for other in run_on_ranks(2, results_on_ranks, tmp_path / "two"):
        assert other[0] == pytest.approx(loss, abs=2e-6) and other[1] == pytest.approx(losses, abs=2e-6)
        assert max(np.abs(other[2][name] - weight).max() for name, weight in weights.items()) < 1e-6
    counts = [[r["tokens/code"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("one", "two")]
    assert counts[0] == counts[1] and len(counts[0]) == 3


def test_a_source_without_validation_tokens_is_left_out_of_the_loss() -> None:
    validation = MixtureValidation({"a": WEB, "b": WEB[:1], "c": CODE}, {"a": 1, "b": 5, "c": 3}, 10, 8)
    assert validation.shares == {"a": Fraction(1, 4), "c": Fraction(3, 4)} and list(validation.parts) == ["a", "c"]
    assert sum(len(x) for x, _ in validation.batches(whole=False)) == 4 + 6
