"""benchmarks/two_core_speedrun.py: what it times and measures, which entries it refuses, and how it judges a session."""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from benchmarks_modules import load
from places import ALICE, ROOT

RECIPE = """
data: tinyshakespeare
tokenizer: {tokenizer}
tokenizer_size: 300
context_length: 8
emb_dim: 8
n_heads: 2
n_layers: 1
max_steps: 3
batch_size: 2
"""


@pytest.fixture
def speedrun(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with a short text on all tracks."""
    module = load("two_core_speedrun")
    short = ALICE[:4000], ALICE[4000:4300]
    monkeypatch.setattr(module, "TEXTS", dict.fromkeys(module.TEXTS, lambda path: short))
    return module


def recipe(directory: Path, tokenizer: str = "bpe") -> str:
    path = directory / "mine.yaml"
    path.write_text(RECIPE.format(tokenizer=tokenizer))
    return str(path)


class Uniform:
    """An entry that learns nothing: it gives the same probability to all of 128 characters."""

    context_length = 7

    def __init__(self) -> None:
        self.shares: list[float | None] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("ascii")

    def step(self, share: float | None) -> bool:
        self.shares.append(share)
        return share is not None or len(self.shares) < 4

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 128)


def test_a_recipe_trains_its_steps_and_its_loss_is_that_of_the_model(speedrun: Any, tmp_path: Path) -> None:
    found = speedrun.run(recipe(tmp_path, "chars"), "1.88", None, 10, seed=5)
    assert found["steps"] == 3 and found["seed"] == 5 and found["seconds"] > 0
    assert found["loss"] == pytest.approx(math.log(len(set(ALICE[:4000]))), rel=0.05)  # three steps teach little
    recipe(tmp_path)
    train, val = speedrun.TEXTS["django"](None)
    entry = speedrun.starter(tmp_path / "mine.yaml")(train, 5)
    assert speedrun.train(entry, None)[1] == 3
    loss = speedrun.evaluate(entry, val, speedrun.TRACKS["bytes"], "mine")
    ids = torch.tensor(entry.encode(val))
    nats = 0.0
    for first in range(0, len(ids) - 1, 8):
        inputs, targets = ids[first : first + 8][: len(ids) - 1 - first], ids[first + 1 : first + 9]
        with torch.no_grad():
            nats += F.cross_entropy(entry.model(inputs[None])[0].double(), targets, reduction="sum").item()
    n_bytes = len(val.encode()) - len(entry.decode([int(ids[0])]).encode())
    assert loss == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_with_a_time_limit_the_schedule_of_a_recipe_follows_the_clock(speedrun: Any, tmp_path: Path) -> None:
    entry = speedrun.RecipeEntry(Path(recipe(tmp_path)), speedrun.TEXTS["django"](None)[0], 1)
    for number in range(6):
        assert entry.step(number / 8)  # eight steps fit into the time, not the three of the recipe
    assert entry.trainer.config.max_steps == 8


def test_the_loss_of_equal_probabilities_is_the_logarithm_of_their_number(speedrun: Any) -> None:
    text = "one two three"
    assert speedrun.evaluate(Uniform(), text, speedrun.TRACKS["1.88"], "") == pytest.approx(math.log(128))
    assert speedrun.evaluate(Uniform(), text, speedrun.TRACKS["bytes"], "") == pytest.approx(7)


def test_an_entry_ends_by_itself_or_when_the_time_is_up(speedrun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Uniform()
    assert speedrun.train(entry, None)[1] == 4 and entry.shares == [None] * 4
    seconds = iter([100.0, 100.0, 104.0, 108.0, 112.0, 112.5])
    monkeypatch.setattr(speedrun.time, "perf_counter", lambda: next(seconds))
    entry = Uniform()
    assert speedrun.train(entry, 10) == (12.5, 3)
    assert entry.shares == [0, 0.4, 0.8]


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 4096, 4097, 10_000])
def test_windows_cover_each_token_once(speedrun: Any, n_tokens: int) -> None:
    ids = torch.arange(n_tokens)
    batches = list(speedrun.windows(ids, 8))
    assert torch.equal(torch.cat([targets.flatten() for _, targets in batches]), ids[1:])
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in batches)
    assert all(inputs.shape[1] <= 8 and inputs.numel() <= 4096 for inputs, _ in batches)


def test_an_entry_that_breaks_a_rule_is_refused(speedrun: Any, tmp_path: Path) -> None:
    class Ahead(Uniform):
        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            return F.one_hot(ids.roll(-1, 1), 128).float()

    class Pairs(Uniform):
        def encode(self, text: str) -> list[int]:
            return [128 * one + two for one, two in zip(text.encode()[::2], text.encode()[1::2], strict=True)]

        def decode(self, ids: list[int]) -> str:
            return bytes(part for id_ in ids for part in divmod(id_, 128)).decode()

    class Lossy(Uniform):
        def decode(self, ids: list[int]) -> str:
            return super().decode(ids).lower()

    for entry, message in ((Ahead(), "looks ahead"), (Pairs(), "one per character"), (Lossy(), "is not the text")):
        with pytest.raises(SystemExit, match=message):
            speedrun.evaluate(entry, "Once upon a time", speedrun.TRACKS["1.88"], "mine")
    for name, text, message in (("a.txt", "", "neither a recipe"), ("a.py", "begin = 1", "no function start")):
        (tmp_path / name).write_text(text)
        with pytest.raises(SystemExit, match=message):
            speedrun.starter(tmp_path / name)
    (tmp_path / "shakespeare.txt").write_text("To be")
    with pytest.raises(SystemExit, match="not the text of the contest"):
        speedrun.tinyshakespeare(str(tmp_path / "shakespeare.txt"))


def test_nanogpts_recipe_is_an_entry(speedrun: Any) -> None:
    train, val = speedrun.TEXTS["django"](None)
    entry = speedrun.starter(ROOT / "benchmarks/entries/nanogpt.py")(train, 1)
    n_weights = sum(parameter.numel() for parameter in entry.model.parameters())
    assert n_weights == 4 * (12 * 128**2 + 2 * 128) + 128 + (64 + len(entry.bytes)) * 128
    before = speedrun.evaluate(entry, val, speedrun.TRACKS["bytes"], "nanogpt")
    assert before == pytest.approx(math.log2(len(entry.bytes)), rel=0.05)  # nothing is learned yet
    speedrun.train(entry, None, n_steps=2)
    assert entry.n_done == 2
    assert speedrun.evaluate(entry, val, speedrun.TRACKS["bytes"], "nanogpt") < before


def session(speedrun: Any, track: str = "1.88", **entries: tuple[list[float], list[float], float]) -> Any:
    """Return a session with the seconds and the losses of entries, and the time of their first run."""
    results = speedrun.Results("test", {"track": track, "train_minutes": 10})
    for name, (seconds, losses, began) in entries.items():
        row = results.add(name, "training time", "s", *seconds)
        results.add(name, "loss", speedrun.TRACKS[track].unit, *losses)
        row.about |= {"started": [began + 60 * i for i in range(len(seconds))], "steps": [10] * len(seconds)}
    return results


LOSSES = [1.871, 1.868, 1.874, 1.865, 1.87]


def test_a_record_needs_five_runs_a_low_loss_and_a_time_that_is_significantly_lower(speedrun: Any) -> None:
    slow, fast, level = [20.0, 20.5, 21.0, 20.2, 20.8], [14.0, 14.4, 13.9, 14.2, 14.1], [13.9, 14.5, 13.8, 14.1, 14.2]
    found = speedrun.verdicts(
        session(
            speedrun, missed=(fast, [loss + 0.009 for loss in LOSSES], 0), first=(slow, LOSSES, 0),
            few=(fast[:4], LOSSES[:4], 0), better=(fast, LOSSES, 0), same=(level, LOSSES, 0), late=(level, LOSSES, 3600),
        )
    )  # fmt: skip
    assert [one.name for one in found if one.is_record] == ["first", "better"]
    reasons = {one.name: one.reason for one in found}
    assert "4 of 5 runs" in reasons["few"] and "not below 1.88" in reasons["missed"]
    assert "not better" in reasons["same"] and "same hour" in reasons["late"]
    expected = stats.ttest_ind(slow, fast, equal_var=False).pvalue
    assert reasons["better"].endswith(f"time: p = {expected:.1g}")


def test_the_p_value_of_a_loss_is_that_of_a_one_sided_t_test(speedrun: Any) -> None:
    for target in (1.86, 1.8696, 1.88):
        expected = stats.ttest_1samp(LOSSES, target, alternative="less").pvalue
        assert speedrun.p_above(LOSSES, target) == pytest.approx(expected, rel=1e-9)
    assert speedrun.p_above([1.8] * 5, 1.88) == 0 and speedrun.p_above([1.9] * 5, 1.88) == 1


def test_on_the_track_of_bytes_the_loss_decides(speedrun: Any) -> None:
    seconds = [600.0] * 5
    entries = {"old": (seconds, LOSSES, 0), "new": (seconds, [loss - 0.1 for loss in LOSSES], 0)}
    found = speedrun.verdicts(session(speedrun, "bytes", **entries))
    assert [one.is_record for one in found] == [True, True] and "bits: p" in found[1].reason


def test_the_text_of_ten_megabytes_is_made_from_the_archive(
    speedrun: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The archive is a small one of the same shape, whose hashes replace those of Django."""
    files = {
        "docs/a.txt": b"documentation " * 700_000,
        "django/b.py": b"import c\n" * 200_000,
        "docs/c.png": b"no" * 99,
    }
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"Django-5.2/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    names = sorted(list(files)[:2], key=lambda name: hashlib.sha256(f"Django-5.2/{name}".encode()).digest())
    whole = b"".join(files[name] for name in names)
    archive_hash = hashlib.sha256((tmp_path / "small.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(speedrun, "DJANGO", ("Django-5.2", archive_hash))
    with pytest.raises(SystemExit, match="not the text of the contest"):
        speedrun.django(str(tmp_path / "small.tar.gz"))
    monkeypatch.setattr(speedrun, "DJANGO_TEXT", hashlib.sha256(whole[:10_000_000]).hexdigest())
    train, val = speedrun.django(str(tmp_path / "small.tar.gz"))
    assert (train + val).encode() == whole[:11_000_000] and len(train) == 10_000_000


RESULTS = ROOT / "benchmarks/results"


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("speedrun_*.json")))
def test_the_records_are_those_of_unchanged_entries(speedrun: Any, name: str) -> None:
    results = speedrun.Results.load(RESULTS / f"{name}.json")
    track = results.settings["track"]
    assert name == speedrun.results_name(track) and set(results.names) <= set(speedrun.TRACKS[track].entries)
    for entry, row in results.of("training time").items():
        content = (ROOT / entry).read_bytes()
        assert row.about["sha256"] == hashlib.sha256(content).hexdigest(), f"{entry} has changed since it was measured"
    assert speedrun.session_table(results).count("\n") == 2 + len(results.names)


def test_the_entries_of_the_page_exist(speedrun: Any) -> None:
    for rules in speedrun.TRACKS.values():
        for name in rules.entries:
            assert callable(speedrun.starter(ROOT / name))
