"""`mygpt finetune`, and the functions that the command calls."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from conftest import lively_model
from MyGPT import BPETokenizer, GPTConfig, GPTModel, TrainConfig, load_tokenizer
from MyGPT.cli import main
from MyGPT.commands.chat import Conversation
from MyGPT.data.records import load_split
from MyGPT.data.templates import load_template
from MyGPT.finetuning.examples import ExampleOptions, Examples
from MyGPT.finetuning.lora import KeptAdapter, add_lora, merge
from MyGPT.serving import Engine
from MyGPT.training.metrics import read_metrics
from MyGPT.training.trainer import Trainer

RECORDS = [
    {"instruction": f"Say {word} {n} times.", "input": "" if n % 2 else "please", "output": " ".join([word] * n)}
    for word in ("cat", "dog", "owl", "fox")
    for n in range(1, 8)
]
QUICK = "--epochs 1.2 --batch_size 4 --warmup_steps 1 --eval_every 3 --sample_every 3 --sample_tokens 5 --device cpu".split()
IDS = torch.arange(20).reshape(2, 10) * 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model, its tokenizer and a file of records."""
    directory = tmp_path_factory.mktemp("base")
    texts = [load_template("alpaca").prompt(record) + record["output"] for record in RECORDS]
    tokenizer = BPETokenizer.train(texts, 400, progress=False)
    sizes = {"context_length": 128, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)).save_pretrained(directory / "base", tokenizer)
    (directory / "records.json").write_text(json.dumps(RECORDS))
    return directory


def finetune(base: Path, run: Path, *options: str) -> int:
    data = ["--model", str(base / "base"), "--data", str(base / "records.json")]
    return main(["finetune", *data, "--out", str(run), *QUICK, *options])


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that trained an adapter."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    assert finetune(base, run, "--lora.r", "4", "--lora.dropout", "0.1") == 0
    return run


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def all_losses_of(run: Path) -> list[tuple[str, int, float]]:
    """Return the training, validation and final losses of a run with their steps."""
    return [(key, record["step"], record[key]) for record in read_metrics(run) for key in record if "loss" in key]


@pytest.mark.slow
def test_a_run_keeps_the_adapter_and_all_that_is_needed_to_repeat_it(base: Path, tuned: Path, tmp_path: Path) -> None:
    names = {path.name for path in tuned.iterdir() if not path.name.startswith(".")}
    assert names == {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "split.json", "loss.png", "samples.txt"}
    split = load_split(tuned / "split.json")
    assert split.train == tuple(range(23)) and split.test == (23, 24) and split.val == (25, 26, 27)
    assert main(["finetune", "--config", str(tuned / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert losses_of(tmp_path / "again") == losses_of(tuned)
    first, again = (run / "adapter/adapter_model.safetensors" for run in (tuned, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.slow
def test_the_adapter_opens_in_peft_on_transformers_gpt2_with_equal_logits(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    """The commands open the same adapted model. In float32, logits of size 10 agree to 1e-4."""
    from MyGPT import open_model

    ours, tokenizer = open_model(str(tuned), "cpu")
    assert tokenizer.n_vocab == ours.config.vocab_size
    with warnings.catch_warnings():  # PEFT's and transformers' own, of names that they will change
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base / "base"), tuned / "adapter"
        ).eval()
    untuned = GPTModel.from_pretrained(base / "base")
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-4
        assert (ours(IDS) - untuned(IDS)).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_merging_gives_a_model_directory_with_the_adapters_logits(
    dtype: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    """The adapter is merged into the original weights, also if it was trained on rounded ones."""
    assert finetune(base, tmp_path / "run", "--merge", "--frozen_dtype", dtype) == 0
    assert "model saved in" in capsys.readouterr().out
    merged = GPTModel.from_pretrained(tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        assert (merged(IDS) - theirs(IDS).logits).abs().max() < 1e-4
    assert load_tokenizer(tmp_path / "run/model").encode("cat") == load_tokenizer(base / "base").encode("cat")
    assert load_template(tmp_path / "run/model") == load_template("alpaca") == load_template(tmp_path / "run/adapter")
    from MyGPT.finetuning.foreign_adapters import open_adapter

    adapted = open_adapter(GPTModel.from_pretrained(base / "base"), tmp_path / "run/adapter")
    assert (adapted(IDS) - merged(IDS)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--full", "--learning_rate", "1e-3"],
        ["--rows", "packed", "--template", "book", "--mask_prompt", "false"],
        ["--frozen_dtype", "bf16", "--gradient_checkpointing", "--lora.dora"],
        ["--frozen_dtype", "int8", "--gradient_checkpointing"],
        ["--split_seed", "3", "--test_fraction", "0", "--lora.targets", "c_attn"],
        ["--lora.targets", "all-linear"],
    ],
)
def test_each_way_of_tuning_lowers_the_loss(options: list[str], base: Path, tmp_path: Path, capsys: Any) -> None:
    assert finetune(base, tmp_path / "run", "--epochs", "6", "--learning_rate", "1e-2", *options) == 0
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < sum(losses[:5])
    printed = capsys.readouterr().out
    assert "training: 23 examples" in printed and "validation loss" in printed
    assert ("test loss" in printed) == ("--test_fraction" not in options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--lora.dropout", "0.2", "--rows", "packed"], ["--full"], ["--gradient_checkpointing", "--lora.dropout", "0.2"]],
)
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(
    options: list[str], base: Path, tmp_path: Path
) -> None:
    for run, seed in (("one", "7"), ("again", "7"), ("other", "8")):
        assert finetune(base, tmp_path / run, "--seed", seed, *options) == 0
    assert {key for key, _, _ in all_losses_of(tmp_path / "one")} == {"loss", "val_loss", "final_val_loss"}
    assert all_losses_of(tmp_path / "one") == all_losses_of(tmp_path / "again")
    assert all_losses_of(tmp_path / "one") != all_losses_of(tmp_path / "other")


def test_only_what_trains_has_optimizer_state(base: Path) -> None:
    model = GPTModel.from_pretrained(base / "base")
    examples = Examples(ExampleOptions(str(base / "records.json")), load_tokenizer(base / "base"), 128)
    add_lora(model, r=2)
    trainer = Trainer(model, TrainConfig(max_steps=1, warmup_steps=0), examples.sampler(4, 0), progress=False)
    trainer.run()
    moments = [state["exp_avg"].numel() for optimizer in trainer.optimizers for state in optimizer.state.values()]
    assert sum(moments) == model.num_parameters(only_trainable=True) < model.num_parameters() / 4


def test_gradient_checkpointing_gives_the_same_gradients(base: Path) -> None:
    model = GPTModel.from_pretrained(base / "base").double().train()
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.token_loss(IDS[:, :-1], IDS[:, 1:])[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_packed_and_padded_rows_give_the_same_loss(base: Path) -> None:
    """Both kinds of rows see each example once. In float64 only the order of summation differs."""
    model = GPTModel.from_pretrained(base / "base", dtype=torch.float64)
    totals = []
    for rows in ("padded", "packed"):
        options = ExampleOptions(str(base / "records.json"), rows=rows, train_fraction=1.0, test_fraction=0.0)  # type: ignore[arg-type]
        sampler = Examples(options, load_tokenizer(base / "base"), 128).sampler(1, 0)
        with torch.no_grad():
            parts = [model.token_loss(*sampler.batch(step)) for step in range(sampler.batches_per_epoch)]
        totals.append((sum(float(total) for total, _ in parts), sum(int(count) for _, count in parts)))
    assert totals[0][1] == totals[1][1]
    assert abs(totals[0][0] - totals[1][0]) < 1e-9


@pytest.mark.slow
def test_micro_batches_of_unequal_counts_give_the_gradient_of_the_whole_batch(base: Path) -> None:
    examples = Examples(ExampleOptions(str(base / "records.json")), load_tokenizer(base / "base"), 128)
    weights = []
    for micro in (None, 1, 3):
        model = GPTModel.from_pretrained(base / "base", dtype=torch.float64)
        config = TrainConfig(max_steps=3, warmup_steps=0, micro_batch_size=micro, sample_every=0)
        Trainer(model, config, examples.sampler(8, 0), progress=False).run()
        weights.append(model.transformer.wte.weight.detach())
    assert all((weight - weights[0]).abs().max() < 1e-9 for weight in weights)


def test_the_loss_is_the_mean_over_answers_of_transformers_cross_entropy(base: Path) -> None:
    examples = Examples(ExampleOptions(str(base / "records.json")), load_tokenizer(base / "base"), 128)
    model = GPTModel.from_pretrained(base / "base")
    theirs = AutoModelForCausalLM.from_pretrained(base / "base").eval()
    trainer = Trainer(model, TrainConfig(), [0] * 200, examples.validation(examples.val), progress=False)
    total, count = 0.0, 0
    for record in RECORDS[25:28]:
        prompt = examples.tokenizer.encode(load_template("alpaca").prompt(record))
        answer = [*examples.tokenizer.encode(record["output"]), examples.tokenizer.eot_token]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert trainer.evaluate() == pytest.approx(total / count, abs=1e-5)


def test_the_best_adapter_is_put_back(base: Path, tmp_path: Path) -> None:
    model = GPTModel.from_pretrained(base / "base")
    keeper = KeptAdapter(add_lora(model), "gpt2", load_template("book"))
    keeper.save(tmp_path)
    before = model(IDS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert (model(IDS) - before).abs().max() > 0.01
    keeper.restore(tmp_path)
    assert torch.equal(model(IDS), before)
    assert merge(keeper.peft_model) is model


def test_the_config_of_an_adapter_is_written_in_one_order_and_read_by_peft(tmp_path: Path) -> None:
    """PEFT writes a set's elements in an order that differs from process to process."""
    model = lively_model(GPTConfig(67, 16, 24, 3, 4))
    names = [f"h.{i}.attn.{layer}" for i in range(4) for layer in ("c_proj", "c_attn")]
    kept = KeptAdapter(
        add_lora(model, target_modules=names, exclude_modules=["wpe", "wte"]), "gpt2", load_template("book")
    )
    path = kept.save(tmp_path) / "adapter_config.json"
    config = json.loads(path.read_text())
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(names) and config["exclude_modules"] == ["wpe", "wte"]
    assert LoraConfig.from_pretrained(path.parent).target_modules == set(names)


@pytest.mark.slow
def test_examples_that_are_too_long_are_counted(base: Path, tmp_path: Path, capsys: Any) -> None:
    assert finetune(base, tmp_path / "run", "--max_length", "45") == 0
    assert "more left out because they are longer than 45 tokens" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--full", "--merge"], "--merge cannot be used with --full"),
        (["--full", "--frozen_dtype", "bf16"], "--frozen_dtype bf16 cannot be used with --full"),
        (["--frozen_dtype", "int8", "--lora.dora"], "--frozen_dtype int8 cannot be used with --lora.dora"),
        (["--frozen_dtype", "int8", "--parallel", "fsdp"], "--frozen_dtype int8 cannot be used with --parallel fsdp"),
        (["--epochs", "0"], "epochs must be a number above 0, got 0"),
        (["--lora.targets", "[c_atn]"], "the model has no layer called 'c_atn'"),
        (["--lora.r", "0"], "lora.r must be a whole number of at least 1, got 0"),
        (["--lora.alpha", "0"], "lora.alpha must be a whole number of at least 1, got 0"),
        (["--lora.dropout", "1"], "lora.dropout must be at least 0 and less than 1, got 1.0"),
        (["--lora.targets", "[]"], "lora.targets must name at least one layer, got none"),
        (["--template", "vicuna"], "no template 'vicuna': give alpaca, book"),
        (["--max_length", "3"], "there are no examples to learn from: 23 records, 23 too long for max_length=3"),
        (["--rows", "loose"], "rows"),
        (["--lora.rank", "3"], "lora.rank"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_run(
    options: list[str], words: str, base: Path, tmp_path: Path, capsys: Any
) -> None:
    assert finetune(base, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_is_told_by_its_number_and_key(base: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "records.json").write_text(json.dumps([*RECORDS, {"instruction": "Say owl."}]))
    assert finetune(base, tmp_path / "run", "--data", str(tmp_path / "records.json")) == 2
    assert "records.json, line 1, record 29: the key 'output' is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_chat_and_generate_take_the_run_and_the_adapter(
    base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import io

    outputs = []
    for place in (["--model", str(tuned)], ["--model", str(base / "base"), "--adapter", str(tuned)]):
        options = [*place, "--temperature", "0", "--max_new_tokens", "8"]
        monkeypatch.setattr("sys.stdin", io.StringIO("Say cat 3 times.\nSay cat 3 times.\n"))
        assert main(["chat", *options]) == 0
        first, second = capsys.readouterr().out.splitlines()[:2]
        assert first == second  # each question alone
        assert main(["generate", *options, "--prompt", "Say"]) == 0
        outputs.append((first, capsys.readouterr().out))
    assert outputs[0] == outputs[1]


def test_chat_asks_as_the_model_was_taught(base: Path) -> None:
    tokenizer, alpaca, book = load_tokenizer(base / "base"), load_template("alpaca"), load_template("book")

    def text(conversation: Conversation) -> str:
        return tokenizer.decode(conversation.ids("Say cat.", tokenizer, 1000))

    one = Conversation(alpaca, remembers=False, turns=[("before", "that")])
    assert text(one) == alpaca.prompt({"instruction": "Say cat."})
    assert alpaca.stops() == ["\n### Instruction:"]
    given = Conversation(book, remembers=False, system="now")
    assert text(given).endswith("### Instruction:\nSay cat.\n\n### Input:\nnow\n\n### Response:\n")
    several = Conversation(alpaca, turns=[("Say owl.", "owl")])
    messages = [("user", "Say owl."), ("assistant", "owl"), ("user", "Say cat.")]
    assert text(several) == alpaca.prompt({"messages": [{"role": role, "content": said} for role, said in messages]})


QUESTION = "Say cat 2 times."
KINDS = {
    "messages": (
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "cat cat"}]},
        f"### Instruction:\n{QUESTION}\n\n### Response:",
    ),
    "prompt": ({"prompt": QUESTION, "completion": " cat cat"}, QUESTION),
    "text": ({"text": f"{QUESTION} cat cat"}, QUESTION),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_chat_asks_in_the_form_of_the_records_that_the_model_was_tuned_on(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model trained on conversations or plain prompts has never seen Alpaca's introduction."""
    import io

    record, expected = KINDS[kind]
    (tmp_path / "records.jsonl").write_text("\n".join([json.dumps(record)] * 20))
    assert finetune(base, tmp_path / "run", "--data", str(tmp_path / "records.jsonl"), "--sample_every", "0") == 0
    asked: list[str] = []

    def spy(engine: Engine, ids: list[int], *rest: Any) -> list[str]:
        asked.append(engine.tokenizer.decode(ids))
        return []

    monkeypatch.setattr(Engine, "stream_text", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert main(["chat", "--model", str(tmp_path / "run")]) == 0
    assert asked == [expected]


def test_a_system_text_goes_where_the_records_of_its_kind_have_it(base: Path) -> None:
    tokenizer, alpaca = load_tokenizer(base / "base"), load_template("alpaca")
    texts = {
        kind: tokenizer.decode(
            Conversation(dataclasses.replace(alpaca, asks=kind), False, "Be brief.").ids("Say cat.", tokenizer, 1000)
        )
        for kind in ("instruction", "messages", "prompt")
    }
    assert texts["instruction"] == alpaca.prompt({"instruction": "Say cat.", "input": "Be brief."})
    assert texts["messages"] == "Be brief.\n\n### Instruction:\nSay cat.\n\n### Response:"
    assert texts["prompt"] == "Be brief.\n\nSay cat."


@pytest.mark.slow
def test_an_adapter_is_found_in_a_merged_run_and_by_its_own_directory(
    base: Path, tuned: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(tuned, tmp_path / "merged")
    shutil.copytree(base / "base", tmp_path / "merged/model")
    options = ["--prompt", "Say", "--temperature", "0", "--max_new_tokens", "8"]
    outputs = []
    for place in (
        ["--model", str(tuned)],
        ["--model", str(tuned / "adapter")],
        ["--model", str(base / "base"), "--adapter", str(tmp_path / "merged")],
    ):
        assert main(["generate", *place, *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


def test_an_adapter_whose_model_has_moved_says_how_to_name_it(
    base: Path, tuned: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(tuned, tmp_path / "run")
    config = tmp_path / "run/adapter/adapter_config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps({**described, "base_model_name_or_path": str(tmp_path / "gone")}))
    assert main(["generate", "--model", str(tmp_path / "run"), "--prompt", "Say"]) == 2
    error = capsys.readouterr().err
    assert "gone, which does not exist" in error and "--adapter" in error and len(error.splitlines()) == 1


def test_an_adapter_alone_cannot_be_tuned(tuned: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert finetune(base, tmp_path / "run", "--model", str(tuned)) == 2
    assert "holds only an adapter" in capsys.readouterr().err


def test_an_empty_record_is_told_by_its_number_in_the_file(base: Path, tmp_path: Path, capsys: Any) -> None:
    """The error once gave the number within the validation part instead of the number in the file."""
    template = {"without_input": "{instruction}", "with_input": "{instruction} {input}"}
    (tmp_path / "bare.json").write_text(json.dumps(template))
    records = [*RECORDS[:26], {"instruction": "", "output": ""}, RECORDS[27]]
    (tmp_path / "records.json").write_text(json.dumps(records))
    options = ["--data", str(tmp_path / "records.json"), "--template", str(tmp_path / "bare.json")]
    assert finetune(base, tmp_path / "run", *options) == 2
    assert "records.json, validation: record 27 has no tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_that_leave_no_room_for_a_sample_are_said(base: Path, tmp_path: Path, capsys: Any) -> None:
    assert finetune(base, tmp_path / "run", "--sample_tokens", "127") == 0
    assert "every held-out prompt is too long to add sample_tokens=127" in capsys.readouterr().out


def test_the_recipe_says_every_option(tuned: Path) -> None:
    recipe = yaml.safe_load((tuned / "config.yaml").read_text())
    assert recipe["lora"] == {
        "r": 4, "alpha": 16, "dropout": 0.1, "targets": ["c_attn", "c_proj", "c_fc"], "dora": False, "rslora": False,
    }  # fmt: skip
    assert recipe["epochs"] == 1.2 and "max_steps" not in recipe
