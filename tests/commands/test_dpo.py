"""`mygpt dpo`: what a run writes, its losses, the forms of the records, and kills."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl.data_utils import maybe_extract_prompt

from conftest import lively_model
from killing import Kill, differences, leftovers, remains, run, run_with_kills
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, load_tokenizer, open_model
from MyGPT.cli import main
from MyGPT.data.templates import load_template
from MyGPT.finetuning.lora import add_lora
from MyGPT.finetuning.preference import PLAIN, PreferenceLoss, PreferencePairs, preferences, with_answers
from MyGPT.finetuning.splits import SplitOptions, read_parts
from MyGPT.training.metrics import read_metrics

RECORDS = [
    {"prompt": f"Say {word} {n}.", "chosen": f" {word}, please", "rejected": f" no {word} at all"}
    for word in ("cat", "dog", "owl", "fox")
    for n in range(6)
]
SIZES = {"context_length": 48, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
QUICK = "--batch_size 4 --learning_rate 1e-2 --warmup_steps 1 --eval_every 3 --sample_tokens 4 --device cpu".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model, its tokenizer and a file of pairs."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = BPETokenizer.train([text for record in RECORDS for text in record.values()], 300, progress=False)
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **SIZES)).save_pretrained(directory / "base", tokenizer)
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return directory


def command(base: Path, out: Path, *options: str) -> list[str]:
    data = ["--model", str(base / "base"), "--data", str(base / "pairs.jsonl"), "--out", str(out)]
    return ["dpo", *data, *QUICK, *options]


@pytest.mark.slow
def test_a_run_prefers_the_chosen_answers_and_opens_in_peft(base: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(command(base, tmp_path / "run", "--epochs", "2", "--lora.dropout", "0")) == 0
    printed = capsys.readouterr().out
    assert "training: 20 pairs" in printed and "test: loss" in printed and "mean margin" in printed
    assert f"try: mygpt chat --model {tmp_path / 'run'}" in printed
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names >= {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "split.json", "loss.png"}
    records = read_metrics(tmp_path / "run")
    first = next(record for record in records if "loss" in record)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["reward_margin"] == pytest.approx(0, abs=1e-4)
    last = records[-1]
    assert last["final_val_loss"] < 0.6 and last["final_val_reward_accuracy"] == 1
    assert last["final_val_reward_margin"] > 0.2
    ours, _ = open_model(str(tmp_path / "run"), "cpu")
    with warnings.catch_warnings():  # PEFT's and transformers' own, of names that they will change
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base / "base"), tmp_path / "run/adapter"
        ).eval()
    ids = torch.arange(20).reshape(2, 10) * 3
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.slow
def test_the_final_loss_is_that_of_the_formula_on_two_models(base: Path, tmp_path: Path) -> None:
    """The log-probabilities are computed with transformers, pair by pair and without padding."""
    options = ["--beta", "0.3", "--label_smoothing", "0.1", "--merge", "--epochs", "1"]
    assert main(command(base, tmp_path / "run", *options)) == 0
    final = read_metrics(tmp_path / "run")[-1]
    split = json.loads((tmp_path / "run/split.json").read_text())
    tokenizer = load_tokenizer(base / "base")
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "run/model", base / "base")]
    losses, margins = [], []
    for index in split["val"]:
        gains = []
        for key in ("chosen", "rejected"):
            prompt = tokenizer.encode(RECORDS[index]["prompt"])
            answer = [*tokenizer.encode(RECORDS[index][key]), tokenizer.eot_token]
            with torch.no_grad():
                logits = [model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for model in models]
            policy, reference = (-F.cross_entropy(part, torch.tensor(answer), reduction="sum") for part in logits)
            gains.append(policy - reference)
        margins.append(0.3 * (gains[0] - gains[1]))
        losses.append(-0.9 * F.logsigmoid(margins[-1]) - 0.1 * F.logsigmoid(-margins[-1]))
    assert final["final_val_loss"] == pytest.approx(float(sum(losses)) / len(losses), abs=1e-4)
    assert final["final_val_reward_margin"] == pytest.approx(float(sum(margins)) / len(margins), abs=1e-3)


def test_micro_batches_have_the_loss_of_the_whole_batch(base: Path) -> None:
    model, tokenizer = open_model(str(base / "base"), "cpu")
    peft_model = add_lora(model.double(), dropout=0.0).double()
    pairs = PreferencePairs(RECORDS[:5], tokenizer, 48)
    objective = PreferenceLoss(peft_model, 0.2)
    inputs, targets = pairs.examples([0, 3, 4])
    assert inputs.shape[:2] == (3, 2) and objective.count(inputs, targets) == 3
    parts = [objective(inputs[i : i + 1], targets[i : i + 1])[0] for i in range(3)]
    whole = preferences(peft_model, *pairs.batch([0, 3, 4]), beta=0.2)
    assert sum(float(part[0].detach()) for part in parts) == pytest.approx(3 * float(whole.loss.detach()), abs=1e-9)


USER, ANSWER, OTHER = (
    {"role": r, "content": c} for r, c in (("user", "Hi."), ("assistant", "Yes"), ("assistant", "No"))
)


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "Hi. Yes", "rejected": "Hi. No"},
        {"chosen": "H: Hi.\n A: no", "rejected": "H: Hi.\n A: yes"},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi.", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Hi.", "chosen": " Yes", "rejected": " No"},
    ],
)
def test_prompt_and_answers_are_those_of_trl(record: Any) -> None:
    expected = maybe_extract_prompt(record)
    for key, ours in zip(("chosen", "rejected"), with_answers(record, "record 1"), strict=True):
        if isinstance(expected["prompt"], str):
            assert ours == {"prompt": expected["prompt"], "completion": expected[key]}
        else:
            assert ours == {"messages": [*expected["prompt"], *expected[key]]}


ASKED = "### Instruction:\nHi.\n\n### Response:"
CONVERSATIONS = [{"from": "human", "value": "Hi."}]


@pytest.mark.parametrize(
    ("record", "template", "prompt"),
    [
        ({"prompt": "Hi.", "chosen": "Yes", "rejected": "No"}, PLAIN, "Hi."),
        ({"prompt": "Hi.", "chosen": "Yes", "rejected": "No"}, "alpaca", load_template("alpaca").prompt({"instruction": "Hi."})),
        ({"prompt": "Hi.", "chosen": [ANSWER], "rejected": [OTHER]}, PLAIN, ASKED),
        ({"prompt": [USER], "chosen": "Yes", "rejected": "No"}, PLAIN, ASKED),
        ({"conversations": CONVERSATIONS, "chosen": {"from": "gpt", "value": "Yes"}, "rejected": OTHER}, PLAIN, ASKED),
        (
            {"instruction": "Hi.", "input": None, "chosen": "Yes", "rejected": "No"},
            PLAIN,
            load_template("alpaca").prompt({"instruction": "Hi."}),
        ),
    ],
)  # fmt: skip
def test_each_form_of_a_record_becomes_the_text_on_which_chat_asks(
    record: Any, template: Any, prompt: str, base: Path
) -> None:
    tokenizer = load_tokenizer(base / "base")
    used = load_template(template) if isinstance(template, str) else template
    pair = PreferencePairs([record], tokenizer, 1000, used).pairs[0]
    assert [tokenizer.decode(ids) for ids in pair] == [prompt, "Yes<|endoftext|>", "No<|endoftext|>"]


def test_an_end_token_in_a_record_is_not_doubled(base: Path) -> None:
    tokenizer = load_tokenizer(base / "base")
    record = {"prompt": "Hi.", "chosen": "Yes<|endoftext|>", "rejected": ""}
    _, chosen, rejected = PreferencePairs([record], tokenizer, 40).pairs[0]
    assert chosen == [*tokenizer.encode("Yes"), tokenizer.eot_token] and rejected == [tokenizer.eot_token]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 25: the key 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": [ANSWER]}, "line 25: 'chosen' and 'rejected' must be both texts or both"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "line 25: the prompt is missing: give the key 'prompt'"),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [OTHER]}, "each answer must be one message of the assistant"),
        ({"prompt": [{"role": "pirate", "content": "a"}], "chosen": "b", "rejected": "c"}, "got 'pirate'"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_named_by_its_line(record: Any, words: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*RECORDS, record])))
    assert main([*command(base, tmp_path / "run"), "--data", str(tmp_path / "pairs.jsonl")]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--beta", "0"], "beta must be a number above 0, got 0.0"),
        (["--label_smoothing", "0.5"], "label_smoothing must be from 0 to below 0.5, got 0.5"),
        (["--epochs", "0"], "epochs must be a number above 0, got 0"),
        (["--max_length", "0"], "max_length must be a whole number of at least 1, got 0"),
        (["--test_data", "nowhere.json"], "cannot read the records in nowhere.json: there is no such file"),
        (["--template", "vicuna"], "there is no template 'vicuna'"),
        (["--train_fraction", "2"], "train_fraction must be from 0 to 1, got 2"),
    ],
)
def test_options_are_checked_before_the_model_is_opened(
    options: list[str], words: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main([*command(base, tmp_path / "run", *options), "--model", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert words in error and "no model at" not in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["dpo", "finetune"])
def test_a_model_of_characters_is_refused_with_a_way_out_before_the_data_are_read(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = CharTokenizer.from_text("abc")
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **SIZES)).save_pretrained(tmp_path / "base", tokenizer)
    (tmp_path / "data.json").write_text("damaged")
    arguments = [
        "--model",
        str(tmp_path / "base"),
        "--data",
        str(tmp_path / "data.json"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([name, *arguments]) == 2
    error = capsys.readouterr().err
    assert (
        f"{tmp_path / 'base'} has no <|endoftext|> token, with which mygpt {name} marks the end of an answer" in error
    )
    assert "train a model with mygpt train --tokenizer bpe" in error and len(error.splitlines()) == 1


def test_given_files_replace_parts_of_the_data(tmp_path: Path) -> None:
    for name, n in (("data", 20), ("val", 3), ("test", 4)):
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(n)))

    def sizes(**files: str) -> tuple[int, ...]:
        options = SplitOptions("data", train_fraction=0.7, test_fraction=0.2, **files)
        parts = read_parts(options, lambda path: (tmp_path / path).read_text().split())
        return tuple(len(part.records) for part in (parts.train, parts.val, parts.test) if part is not None)

    assert sizes() == (14, 2, 4)
    assert sizes(test_data="test") == (18, 2, 4)
    assert sizes(val_data="val") == (16, 3, 4)
    assert sizes(val_data="val", test_data="test") == (20, 3, 4)


@pytest.mark.slow
def test_a_run_that_is_killed_ends_like_an_untouched_one(base: Path, tmp_path: Path) -> None:
    options = [
        "--epochs",
        "3",
        "--lora.dropout",
        "0.2",
        "--checkpoint_every",
        "3",
        "--merge",
        "--micro_batch_size",
        "3",
    ]
    assert run(command(base, tmp_path / "untouched", *options)) == 0
    kills = [Kill("step", 5), Kill("half_file", 3), Kill("fsync", 12), Kill("rename", 3)]
    struck = run_with_kills([*command(base, tmp_path / "killed", *options), "--resume", "auto"], kills)
    assert struck >= 3
    assert differences(remains(tmp_path / "untouched"), remains(tmp_path / "killed")) == []
    assert leftovers(tmp_path / "killed") == []
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("untouched", "killed"))
    assert one == other
