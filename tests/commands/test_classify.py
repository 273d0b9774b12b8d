"""`mygpt classify`: training, the saved directory in transformers, predictions, forms of the data, and kills."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from conftest import lively_model
from killing import Kill, differences, leftovers, remains, run, run_with_kills
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, load_tokenizer
from MyGPT.cli import main
from MyGPT.finetuning.classification import GPTForClassification, read_labelled, read_unlabelled
from MyGPT.training.metrics import read_metrics

EXAMPLES = [
    (f"{text} {n} times", label) for n in range(12) for text, label in (("buy now", "spam"), ("see you", "ham"))
]
SIZES = {"context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
QUICK = "--epochs 4 --batch_size 4 --learning_rate 2e-2 --warmup_steps 1 --eval_every 4 --device cpu".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model, its tokenizer and a file of labelled texts."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = BPETokenizer.train([text for text, _ in EXAMPLES], 280, progress=False)
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **SIZES)).save_pretrained(directory / "base", tokenizer)
    (directory / "spam.csv").write_text("text,label\n" + "\n".join(map(",".join, EXAMPLES)))
    return directory


def command(base: Path, out: Path, *options: str) -> list[str]:
    data = ["--model", str(base / "base"), "--data", str(base / "spam.csv"), "--out", str(out)]
    return ["classify", *data, *QUICK, *options]


@pytest.mark.slow
@pytest.mark.parametrize("train_only", ["head", "last_block", "all", "lora"])
def test_a_run_trains_a_classifier_that_transformers_opens_with_equal_scores(
    train_only: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command(base, tmp_path / "run", "--train_only", train_only, "--learning_rate", "5e-3")) == 0
    printed = capsys.readouterr().out
    assert "training: 16 texts" in printed and "training accuracy" in printed and "test accuracy" in printed
    assert "rows: true labels, columns: predicted labels" in printed
    assert f'try: mygpt classify --model {tmp_path / "run"} --text "..."' in printed
    assert {"accuracy", "val_accuracy", "final_val_accuracy"} <= {
        key for r in read_metrics(tmp_path / "run") for key in r
    }
    ours = GPTForClassification.from_pretrained(tmp_path / "run/model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    ids = torch.randint(0, 280, (3, 9), generator=torch.Generator().manual_seed(1)).masked_fill_(
        torch.zeros(3, 9) > 0, 0
    )
    with torch.no_grad():
        assert (ours(ids) - theirs(input_ids=ids).logits).abs().max() < 1e-4
        final = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
        split = json.loads((tmp_path / "run/split.json").read_text())
        tokenizer = load_tokenizer(base / "base")
        losses = [
            torch.nn.functional.cross_entropy(
                theirs(input_ids=torch.tensor([tokenizer.encode(EXAMPLES[i][0])])).logits,
                torch.tensor([["ham", "spam"].index(EXAMPLES[i][1])]),
            )
            for i in split["val"]
        ]
    assert final["final_val_loss"] == pytest.approx(float(sum(losses)) / len(losses), abs=1e-4)


@pytest.mark.slow
def test_texts_are_classified_from_the_command_line_a_pipe_and_files(
    base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The labels and probabilities are those of transformers for each text alone, without padding."""
    assert main(command(base, tmp_path / "run", "--epochs", "1")) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = load_tokenizer(base / "base")

    def expected(text: str) -> str:
        with torch.no_grad():
            probabilities = theirs(input_ids=torch.tensor([tokenizer.encode(text)])).logits.softmax(1)[0]
        return f"{theirs.config.id2label[int(probabilities.argmax())]}\t{float(probabilities.max()):.4f}"

    capsys.readouterr()
    (tmp_path / "texts.txt").write_text("buy now 3 times\n\nsee you 3 times\n")
    classify = ["classify", "--model", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*classify, "--text", "buy now 3 times"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("see you 3 times"))
    assert main([*classify, "--text", "-"]) == 0
    assert main([*classify, "--file", str(tmp_path / "texts.txt")]) == 0
    assert main([*classify, "--file", str(base / "spam.csv")]) == 0
    texts = [
        "buy now 3 times",
        "see you 3 times",
        "buy now 3 times",
        "see you 3 times",
        *(text for text, _ in EXAMPLES),
    ]
    assert capsys.readouterr().out.splitlines() == [expected(text) for text in texts]
    assert main([*classify, "--text", "buy now " * 30]) == 0
    assert "1 of 1 texts were cut to the model's context of 32 tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            [],
            "give --data to train a classifier, or --text or --file to classify texts with a trained one, got none of them",
        ),
        (["--data", "spam.csv", "--text", "buy"], "got --data and --text"),
        (["--file", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--data", "nowhere.csv"], "nowhere.csv: there is no such file"),
        (
            ["--data", "nowhere.csv", "--train_only", "tail"],
            "--train_only must be head, last_block, all or lora, got 'tail'",
        ),
        (["--data", "nowhere.csv", "--epochs", "0"], "epochs must be a number above 0, got 0"),
    ],
)
def test_wrong_options_are_one_line_before_the_model_is_opened(options: list[str], words: str, capsys: Any) -> None:
    assert main(["classify", "--model", "nowhere", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "no model at" not in error and len(error.splitlines()) == 1


def test_a_language_model_is_no_classifier(base: Path, capsys: Any) -> None:
    assert main(["classify", "--model", str(base / "base"), "--text", "buy"]) == 2
    assert "does not contain a classifier" in capsys.readouterr().err


SMS = 'ham\tGo until jurong point, crazy..\nspam\tFree "entry in 2\nham\t"Ok" lar...\n'


def test_the_sms_collection_is_read_as_it_is_distributed(tmp_path: Path) -> None:
    """Tabs, no header, and quotation marks that are not closed. Its name has no suffix."""
    expected = [("Go until jurong point, crazy..", "ham"), ('Free "entry in 2', "spam"), ('"Ok" lar...', "ham")]
    for name in ("SMSSpamCollection", "SMSSpamCollection.tsv", "sms.csv"):
        (tmp_path / name).write_text(SMS)
        assert read_labelled(tmp_path / name, "2", "1") == expected
        assert read_unlabelled(tmp_path / name, "2") == [text for text, _ in expected]
    (tmp_path / "a.csv").write_text('"x, y",1\nz,0\n')
    assert read_labelled(tmp_path / "a.csv", "1", "2") == [("x, y", "1"), ("z", "0")]
    (tmp_path / "short.tsv").write_text("ham\tyes\nspam\n")
    with pytest.raises(ValueError, match=r"short\.tsv, line 2: the key '2' is missing or empty"):
        read_labelled(tmp_path / "short.tsv", "2", "1")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.ndjson"])
def test_columns_can_have_other_names_in_every_format(name: str, tmp_path: Path) -> None:
    rows = [{"Kind": 1, "Message": 'a, "b"'}, {"Kind": 0, "Message": "c"}]
    with open(tmp_path / name, "w", newline="") as file:
        if name.endswith("sv"):
            writer = csv.DictWriter(file, ["Kind", "Message"], delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    assert read_labelled(tmp_path / name, "Message", "Kind") == [('a, "b"', "1"), ("c", "0")]


def test_labels_balance_and_given_files(base: Path, tmp_path: Path, capsys: Any) -> None:
    """Whole numbers are sorted by size, --balance leaves out texts, and test texts come from their own file."""
    rows = [f"{text},{label}" for text, label in [("buy", 10), ("see", 2)] * 4 + [("now", 10)] * 20]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "test.csv").write_text("text,label\nbuy,10\nyou,7\n")
    options = [
        "--data",
        str(tmp_path / "data.csv"),
        "--test_data",
        str(tmp_path / "test.csv"),
        "--balance",
        "--epochs",
        "1",
    ]
    assert main([*command(base, tmp_path / "run"), *options]) == 0
    printed = capsys.readouterr()
    assert "warning: no training text has the label '7'" in printed.err
    assert "training: 7 texts (" in printed.out and "test: 2 texts (0 2, 1 7, 1 10)" in printed.out
    assert GPTForClassification.from_pretrained(tmp_path / "run/model").labels == ["2", "7", "10"]


@pytest.mark.slow
def test_a_model_of_characters_can_be_a_classifier(tmp_path: Path, capsys: Any) -> None:
    tokenizer = CharTokenizer.from_text("".join(text for text, _ in EXAMPLES))
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **SIZES)).save_pretrained(tmp_path / "base", tokenizer)
    (tmp_path / "spam.csv").write_text("text,label\n" + "\n".join(map(",".join, EXAMPLES)))
    assert main(command(tmp_path, tmp_path / "run", "--epochs", "1")) == 0
    assert main(["classify", "--model", str(tmp_path / "run"), "--text", "buy"]) == 0
    (tmp_path / "spam.csv").write_text("text,label\n" + "\n".join(map(",".join, EXAMPLES)) + "\nbuy!,spam\n")
    assert main(command(tmp_path, tmp_path / "other", "--epochs", "1")) == 2
    assert "spam.csv, record 25: character '!' at position 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("train_only", ["last_block", "lora"])
def test_a_run_that_is_killed_ends_like_an_untouched_one(train_only: str, base: Path, tmp_path: Path) -> None:
    options = [
        "--train_only",
        train_only,
        "--lora.dropout",
        "0.2",
        "--checkpoint_every",
        "3",
        "--micro_batch_size",
        "3",
    ]
    assert run(command(base, tmp_path / "untouched", *options)) == 0
    kills = [Kill("step", 5), Kill("half_file", 3), Kill("fsync", 12), Kill("rename", 3)]
    struck = run_with_kills([*command(base, tmp_path / "killed", *options), "--resume", "auto"], kills)
    assert struck >= 3
    assert differences(remains(tmp_path / "untouched"), remains(tmp_path / "killed")) == []
    assert leftovers(tmp_path / "killed") == []
