"""Tests of `mygpt train --data '{web: 0.8, code: 0.2}'`, and of recipes with such data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from MyGPT.cli import main
from MyGPT.commands._findings import missing_data
from MyGPT.commands._recipe import read_plan
from MyGPT.commands.info import explain
from MyGPT.tokenizers import load_tokenizer
from MyGPT.training.metrics import read_metrics

TINY = "--context_length 8 --emb_dim 8 --n_layers 1 --n_heads 2 --batch_size 5 --max_steps 4 --warmup_steps 0"
OPTIONS = f"{TINY} --eval_every 2 --log_every 2 --sample_every 2 --sample_tokens 4 --order shuffled --out run"


@pytest.fixture
def sources(in_tmp_path: Path) -> Path:
    (in_tmp_path / "web.txt").write_text("the cat sat on the mat and the dog ran. " * 30)
    (in_tmp_path / "code").mkdir()
    for name in "ab":
        (in_tmp_path / f"code/{name}.txt").write_text(f"def {name}(x): return x + 1\n" * 30)
    return in_tmp_path


def train(data: str, more: str = "") -> int:
    return main(["train", "--data", data, *shlex.split(f"{OPTIONS} {more}")])


def test_a_mixture_of_texts_trains_resumes_and_reports_its_tokens(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("{web.txt: 8, 'code/*.txt': 2}") == 0
    printed = capsys.readouterr().out
    assert "web.txt: 80.0% of each batch; 1,080 training and 120 validation tokens" in printed
    assert "tokens in the batches of 4 steps: code/*.txt 32 (20.00%), web.txt 128 (80.00%)" in printed
    assert "validation loss/code/*.txt " in printed and "--- sample at step 4 ---" in printed
    recipe = yaml.safe_load(Path("run/config.yaml").read_text())
    assert recipe["data"] == {"web.txt": 8.0, "code/*.txt": 2.0}
    records = read_metrics("run")
    assert [record["tokens/web.txt"] for record in records if "loss" in record] == [64, 128]
    assert len(load_tokenizer("run/model").encode("mx+")) == 3  # The tokenizer has learned from both sources.
    assert "final_val_loss/web.txt" in records[-1]
    # Another order and other paths of the same texts are the same mixture.
    Path("web.txt").rename("texts.txt")
    assert main(["train", "--resume", "run", "--data", "{'code/*.txt': 0.2, texts.txt: 0.8}"]) == 0
    assert main(["train", "--resume", "run", "--data", "{'code/*.txt': 0.3, texts.txt: 0.7}"]) == 2
    assert "data_content: the training data differ" in capsys.readouterr().err


def test_an_interrupted_mixture_equals_an_uninterrupted_one(sources: Path) -> None:
    data = "{web.txt: 0.7, 'code/*.txt': 0.3}"
    assert train(data, "--max_steps 2 --schedule constant") == 0
    assert main(shlex.split("train --resume run --max_steps 4 --allow_changed max_steps")) == 0
    assert train(data, "--max_steps 4 --schedule constant --out long") == 0
    weights = [Path(f"{name}/model/model.safetensors").read_bytes() for name in ("run", "long")]
    assert weights[0] == weights[1]
    assert [record["tokens/web.txt"] for record in read_metrics("run") if "loss" in record] == [56, 112]
    assert Path("run/samples.txt").read_text() == Path("long/samples.txt").read_text()


def test_prepared_directories_and_texts_share_a_tokenizer(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bpe = "--tokenizer bpe --tokenizer_size 270 --workers 1"
    assert main(shlex.split(f"prepare web.txt --out data/web {bpe}")) == 0
    assert main(shlex.split("prepare code/a.txt --out data/a --tokenizer data/web --workers 1")) == 0
    assert main(shlex.split(f"prepare code/b.txt --out data/b {bpe}")) == 0
    assert train("{data/web: 1, data/a: 1, code/b.txt: 2}") == 0
    printed = capsys.readouterr()
    assert "code/b.txt: encoded with the tokenizer of data/a" in printed.err
    assert (
        "tokens in the batches of 4 steps: code/b.txt 80 (50.00%), data/a 40 (25.00%), data/web 40 (25.00%)"
        in printed.out
    )
    assert train("{data/web: 1, data/b: 1}", "--overwrite") == 2
    assert "data/b and data/web were prepared with different tokenizers: run mygpt prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{}", "a mixture needs at least one source"),
        ("{web.txt: 0}", "the weight of the source 'web.txt' must be a number above 0, got 0.0: leave the source out"),
        ("{web.txt: much}", "data must map each source to a number, as in '{web: 0.8, code: 0.2}', got"),
        ("{web.txt: 1", "data must map each source to a number"),
        ("{wep.txt: 1, code/a.txt: 1}", "no text 'wep.txt'"),
        ("{code/a.txt: 1, 'code/*.txt': 1}", "a.txt is named more than once, but a file may belong to one source of a"),
        ("{web.txt: 1, tiny.txt: 1}", "the source 'tiny.txt': the text has 3 tokens"),
    ],
)
def test_an_impossible_mixture_is_one_sentence(
    sources: Path, data: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny.txt").write_text("abc")
    assert train(data) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("mygpt train: ") and not Path("run").exists()


@pytest.mark.parametrize("value", [{"web.txt": None}, {"web.txt": "much"}, {"web.txt": [1]}])
def test_a_recipe_with_an_impossible_mixture_is_refused(
    sources: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(json.dumps({"data": value, "max_steps": 2}))
    assert main(["train", "--config", "recipe.yaml"]) == 2
    assert "a mapping of texts to numbers such as '{web: 0.8, code: 0.2}'" in capsys.readouterr().err


def test_info_and_doctor_read_a_recipe_with_a_mixture(sources: Path) -> None:
    assert main(shlex.split("prepare web.txt --out web --tokenizer bpe --tokenizer_size 270 --workers 1")) == 0
    recipe = {"data": {"other.txt": 1, "web": 3}, "max_steps": 2, "emb_dim": 8, "n_heads": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert read_plan("recipe.yaml")[0].vocab_size == load_tokenizer("web").n_vocab
    assert "vocabulary" in explain("recipe.yaml")
    assert str(missing_data(recipe["data"])).startswith("the data other.txt does not exist: choose other data")
    assert missing_data({"web": 1, "code/*.txt": 1, "alice": 1}) is None
    assert missing_data({3: 1, None: 2}) is not None
