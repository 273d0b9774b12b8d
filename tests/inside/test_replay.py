"""Test the page that replays a run: its numbers, its safety against any text, and its behaviour in a browser."""

from __future__ import annotations

import base64
import json
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GPT2LMHeadModel

from browser import open_browser
from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, TrainConfig, Trainer, open_model
from MyGPT.cli import main
from MyGPT.inside import induction_scores, replay
from MyGPT.inside.replay import findings, read_samples, replay_data, replay_page, uniform_scores, word_numbers

# The texts, the vocabulary and the name of the run are hostile.
LINE = "</script> <b>Tom</b>\u2028\u202e\"'&\ud7ff --- step 4 --- "
TEXT = LINE * 60
TOKENIZER = CharTokenizer.from_text(TEXT + "\n")
CONFIG = TrainConfig(
    max_steps=10, batch_size=4, warmup_steps=0, eval_every=3, eval_windows=4, sample_every=4, sample_tokens=12, log_every=2,
    keep_every=4, checkpoint_every=0, checkpoint_minutes=0, learning_rate=1e-2, sample_prompt="</script>",
)  # fmt: skip
STEPS = [0, 4, 8, 10]
L, H = 2, 3


def open_kept(path: Path) -> tuple[GPTModel, Any]:
    return open_model(path, "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four kept models."""
    directory = tmp_path_factory.mktemp("runs") / "<i>mine & {{data}}"
    torch.manual_seed(0)
    model = GPTModel(
        {
            "vocab_size": TOKENIZER.n_vocab,
            "context_length": 24,
            "emb_dim": 24,
            "n_heads": H,
            "n_layers": L,
            "drop_rate": 0.0,
        }
    )
    with torch.no_grad():  # so that the heads differ from step 0 on
        for parameter in model.parameters():
            parameter.mul_(8)
    ids = TOKENIZER.encode(TEXT)
    Trainer(model, CONFIG, ids[:1500], ids[1500:1700], tokenizer=TOKENIZER, run_dir=directory, progress=False).run()
    (directory / "config.yaml").write_text(json.dumps(vars(CONFIG)))
    return directory


@pytest.fixture(scope="module")
def data(run: Path) -> dict[str, Any]:
    return replay_data(run, CONFIG, open_kept, "<b>Tom</b> <b>Tom</b>")


def unpack(data: dict[str, Any]) -> Tensor:
    """Return the attention weights of a page as a tensor (models, layers, heads, T, T), with zeros above the diagonal."""
    T = len(data["tokens"])
    packed = torch.frombuffer(bytearray(base64.b64decode(data["attention"])), dtype=torch.uint8) / 255
    weights = torch.zeros(len(data["models"]), L, H, T, T)
    rows = [row for row in range(T) for _ in range(row + 1)]
    columns = [column for row in range(T) for column in range(row + 1)]
    weights[..., rows, columns] = packed.view(len(data["models"]), L, H, -1)
    return weights


@torch.no_grad()
def test_attention_and_scores_equal_those_of_transformers(run: Path, data: dict[str, Any]) -> None:
    text = "<b>Tom</b> <b>Tom</b>"
    assert [it["step"] for it in data["models"]] == STEPS
    assert "".join(data["tokens"]) == text.replace(" ", "·")
    ids = torch.tensor([TOKENIZER.encode(text)])
    words = [text[: t + 1].count(" ") for t in range(len(text))]
    found = unpack(data)
    for i, step in enumerate(STEPS):
        place = run / f"history/step-{step:06d}"
        theirs = GPT2LMHeadModel.from_pretrained(place, attn_implementation="eager")
        weights = torch.stack(theirs(ids, output_attentions=True).attentions)[:, 0]
        assert (found[i] - weights).abs().max() <= 0.5 / 255 + 1e-5
        scores = data["models"][i]["scores"]
        previous, same = torch.zeros(L, H), torch.zeros(L, H)
        for t in range(1, len(text)):
            previous += weights[:, :, t, t - 1] / (len(text) - 1)
            same += sum(weights[:, :, t, s] for s in range(t) if words[s] == words[t]) / (len(text) - 1)
        assert scores["previous"] == pytest.approx(previous.flatten().tolist(), abs=6e-5)
        assert scores["word"] == pytest.approx(same.flatten().tolist(), abs=6e-5)
        induction = induction_scores(open_model(place, "cpu")[0]).flatten()
        assert scores["induction"] == pytest.approx(induction.tolist(), abs=6e-5)


def test_without_a_prompt_in_the_run_the_given_text_is_continued(run: Path) -> None:
    config = replace(CONFIG, sample_prompt="", sample_tokens=3)
    data = replay_data(run, config, open_kept, "<b>Tom</b> <b>")
    assert data["prompt"] == "<b>Tom</b> <b>"
    assert all(it["written"].startswith(data["prompt"]) for it in data["models"])


def test_losses_and_texts_are_those_of_the_run(run: Path, data: dict[str, Any]) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert data["train"] == [[it["step"], it["loss"]] for it in records if "loss" in it]
    assert data["val"] == [[it["step"], it["val_loss"]] for it in records if "val_loss" in it]
    assert [step for step, _ in data["val"]] == [3, 6, 9, 10]
    samples = (run / "samples.txt").read_bytes().decode()
    assert data["prompt"] == "</script>"
    for it in data["models"]:
        # With the prompt, the seed and the sampling options of the run, a kept model writes what the run wrote.
        assert it["written"].startswith("</script>") and len(it["written"]) == len("</script>") + 12
        if it["step"] in (4, 8):
            assert f"--- step {it['step']} ---\n{it['written']}\n\n" in samples
            assert it["sample"] == it["written"]
        else:
            assert it["sample"] == ""


def test_uniform_scores_are_those_of_a_model_that_attends_equally(run: Path) -> None:
    model, _ = open_kept(run / "history/step-000000")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
    words = word_numbers(["a", "b", " c", "d", "e", " ", "f"])
    assert words.tolist() == [0, 0, 1, 1, 1, 2, 2]
    uniform = uniform_scores(words, model.config.context_length)
    assert induction_scores(model).flatten().tolist() == pytest.approx([uniform["induction"]] * 6, abs=1e-5)
    assert uniform["previous"] == pytest.approx(sum(1 / t for t in range(2, 8)) / 6)
    assert uniform["word"] == pytest.approx((1 / 2 + 0 + 1 / 4 + 2 / 5 + 0 + 1 / 7) / 6)


def test_findings_name_the_best_head_or_say_that_there_is_none() -> None:
    scores = [[0.1, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.1], [0.1, 0.2, 0.7, 0.1]]
    flat = [0.05, 0.02, 0.03, 0.04]
    shown = [
        {"step": 10 * i, "scores": {"previous": it, "word": flat, "induction": flat}} for i, it in enumerate(scores)
    ]
    previous, word, induction = findings(shown, {"previous": 0.1, "word": 0.04, "induction": 0.02}, 2)
    assert previous == (
        "Previous token: layer 1, head 0 learned this. Its score rises from 0.10 to 0.70, and is halfway at step 20."
    )
    assert "no head of this run learned this. The highest score is 0.05 (layer 0, head 0, step 0)" in induction
    assert word.startswith("Same word: no head")


def test_long_runs_and_long_texts_are_cut_with_a_note(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_MODELS", 3)
    monkeypatch.setattr(replay, "MAX_LOSSES", 2)
    monkeypatch.setattr(replay, "MAX_ATTENTION_BYTES", 18 * 50)
    data = replay_data(run, CONFIG, open_kept, "<b>Tom</b>" * 3)
    assert [it["step"] for it in data["models"]] == [0, 8, 10]
    assert len(data["tokens"]) == 10
    assert data["notes"] == [
        "The run kept 4 models; the page shows 3 of them.",
        "The text has 30 tokens; the page shows the first 10.",
    ]
    assert [step for step, _ in data["train"]] == [2, 10]


def test_the_page_ends_before_a_model_that_is_not_finite(run: Path, tmp_path: Path) -> None:
    def open_damaged(path: Path) -> tuple[GPTModel, Any]:
        model, tokenizer = open_kept(path)
        if path.name == "step-000008":
            with torch.no_grad():
                model.transformer.h[0].attn.c_attn.weight.fill_(float("nan"))
        return model, tokenizer

    data = replay_data(run, CONFIG, open_damaged, "Tom")
    assert [it["step"] for it in data["models"]] == [0, 4]
    assert re.fullmatch(r"The page ends before step 8, whose model is not usable: .*\.", data["notes"][0])
    assert len(unpack(data)) == 2


def test_samples_are_read_by_step(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == {}
    (tmp_path / "samples.txt").write_bytes(b"--- step 5 ---\na\n\nb\n\n--- step 10 ---\n\xff\0\n\n")
    assert read_samples(tmp_path) == {5: "a\n\nb", 10: "\ufffd\0"}


def test_command_writes_the_page_and_reports_errors_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a.html")
    assert main(["explain", "--replay", str(run), "Tom", "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = replay_page(run, CONFIG, open_kept, "Tom")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page
    assert main(["explain", "--model", str(run), "--replay", "Tom", "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.yaml").write_text("max_steps: 5")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/config.yaml").write_text("train_only: head\nmodel: gpt2")
    for arguments, words in [
        ([], "--replay needs the directory of a run"),
        ([str(tmp_path / "nothing")], "there is no run "),
        ([str(run / "history")], "history: it has no config.yaml"),
        (
            [str(tmp_path / "bare")],
            "--max_steps 10 --keep_every 1 --allow_changed keep_every --allow_changed max_steps",
        ),
        ([str(tmp_path / "labels")], "is a run of mygpt classify"),
        ([str(run), "é"], "'é'"),
        ([str(run), "T"], "at least 2 tokens, got 1"),
        (["--model", str(run), "--precision", "int8"], "--precision does not apply to --replay"),
        ([str(run), "--live"], "--live does not apply to --replay"),
    ]:
        assert main(["explain", *arguments, "--replay", "--out", str(tmp_path / "b.html")]) == 2
        errors = capsys.readouterr().err
        assert words in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "b.html").exists()


RECORDS = [
    {"prompt": f"Say {word}.", "chosen": f" {word}", "rejected": f" no {word}"} for word in ("cat", "dog", "owl")
] * 4
TUNING = "--batch_size 2 --learning_rate 1e-2 --warmup_steps 0 --eval_every 9 --sample_tokens 6 --epochs 1 --device cpu"


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["finetune --full", "finetune", "dpo"])
def test_runs_of_finetune_and_dpo_are_replayed_with_a_question(
    tuning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers and the attention are those of transformers and PEFT."""
    tokenizer = BPETokenizer.train([text for record in RECORDS for text in record.values()], 280, progress=False)
    config = GPTConfig(tokenizer.n_vocab, context_length=192, emb_dim=24, n_heads=H, n_layers=L, drop_rate=0.0)
    lively_model(config).save_pretrained(tmp_path / "base", tokenizer)
    as_instructions = [{"instruction": it["prompt"], "input": "", "output": it["chosen"]} for it in RECORDS]
    records = RECORDS if tuning == "dpo" else as_instructions
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    run, out = tmp_path / "run", str(tmp_path / "a.html")
    files = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "data.jsonl"), "--out", str(run)]
    assert main([*tuning.split(), *files, *TUNING.split(), "--keep_every", "3"]) == 0, capsys.readouterr().err
    assert main(["explain", str(run), "Say owl.", "--replay", "--out", out, "--device", "cpu"]) == 0
    found = data_of(Path(out).read_text(encoding="utf-8"))
    assert len(found["models"]) >= 3
    before, after = ("", "") if tuning == "dpo" else ("### Instruction:\n", "\n\n### Response:")
    assert found["prompt"].endswith(f"{before}Say owl.{after}")
    for it, weights in zip(found["models"], unpack(found), strict=True):
        kept = run / f"history/step-{it['step']:06d}"
        is_adapter = tuning != "finetune --full"
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "base" if is_adapter else kept, attn_implementation="eager")
        if is_adapter:
            with warnings.catch_warnings():  # PEFT warns about the layout of GPT-2's weights.
                warnings.simplefilter("ignore")
                theirs = PeftModel.from_pretrained(theirs, kept)
        ids = torch.tensor([tokenizer.encode(found["prompt"])])
        greedy = theirs.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        assert it["written"] == tokenizer.decode(greedy[0].tolist()).removesuffix("<|endoftext|>")
        ids = torch.tensor([tokenizer.encode("Say owl.")])
        expected = torch.stack(theirs(ids, output_attentions=True).attentions)[:, 0]
        assert (weights - expected).abs().max() <= 0.5 / 255 + 1e-5
    capsys.readouterr()
    assert main(["explain", str(run), "--replay", "--out", out]) == 2
    words = f"{run} is a run of mygpt {tuning.split()[0]}: give a question for its models, as in mygpt explain {run} QUESTION"
    assert words in capsys.readouterr().err
    (run / "history").rename(tmp_path / "kept")
    assert main(["explain", str(run), "Say owl.", "--replay", "--out", out]) == 2
    words = f"{run} kept no models to replay: repeat mygpt {tuning.split()[0]} with --keep_every 20"
    assert words in capsys.readouterr().err
    (tmp_path / "kept").rename(run / "history")
    (tmp_path / "base").rename(tmp_path / "moved")
    if is_adapter:
        assert main(["explain", str(run), "Say owl.", "--replay", "--out", out]) == 2
        assert (
            f"is an adapter of {tmp_path / 'base'}, which is not on this machine: put it back there"
            in capsys.readouterr().err
        )


def test_runs_with_custom_parts_are_replayed_with_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attention of this file is the mean of all tokens so far, so the weights are known."""
    mean = (
        "n = 1 + torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]\n    return v.cumsum(2)[:, :, -len(n):] / n"
    )
    (tmp_path / "mine.py").write_text(f"import torch\ndef attention(q, k, v, mask):\n    {mean}\n")
    (tmp_path / "class.py").write_text(
        "from MyGPT.model import CausalSelfAttention as Base\nclass CausalSelfAttention(Base):\n    pass\n"
    )
    (tmp_path / "book.txt").write_text("The cat sat. " * 200)
    sizes = f"--context_length 16 --emb_dim 24 --n_heads {H} --n_layers {L} --drop_rate 0 --tokenizer chars"
    steps = "--max_steps 2 --keep_every 1 --batch_size 2 --sample_tokens 5 --device cpu"
    for name in ("mine", "class"):
        files = ["--data", str(tmp_path / "book.txt"), "--out", str(tmp_path / name), "--with", f"{tmp_path / name}.py"]
        assert main(["train", *files, *sizes.split(), *steps.split()]) == 0, capsys.readouterr().err
    out = tmp_path / "a.html"
    replay_ = ["explain", str(tmp_path / "mine"), "The cat", "--replay", "--out", str(out), "--device", "cpu"]
    assert main([*replay_, "--with", str(tmp_path / "mine.py")]) == 0
    found = data_of(out.read_text(encoding="utf-8"))
    even = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    assert [it["step"] for it in found["models"]] == [0, 1, 2]
    assert (unpack(found) - even).abs().max() <= 0.5 / 255 + 1e-5
    assert "Previous token: no head of this run learned this." in found["findings"][0]
    out.unlink()
    capsys.readouterr()
    assert main(replay_) == 2 and "pass --with " in capsys.readouterr().err
    replay_[1] = str(tmp_path / "class")
    assert main([*replay_, "--with", str(tmp_path / "class.py")]) == 2
    assert "only a function attention(q, k, v, mask) that is linear in v shows them" in capsys.readouterr().err
    assert not out.exists()


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.mark.slow
def test_the_page_follows_the_slider_the_keys_and_play_in_a_browser(browser: Any, run: Path, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def text(id_: str) -> str:
        return browser.find_element(By.ID, id_).text

    def press(*keys: str) -> None:
        browser.switch_to.active_element.send_keys(*keys)

    data = replay_data(run, CONFIG, open_kept, "<b>Tom</b> <b>Tom</b>")
    (tmp_path / "page.html").write_text(replay_page(run, CONFIG, open_kept, "<b>Tom</b> <b>Tom</b>"), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.title == "How <i>mine & {{data}} learned"
    assert text("step") == "step 10 of 10" and text("prompt") == "</script>"
    assert text("findings").splitlines() == data["findings"]

    press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert text("step") == "step 4 of 10"
    model = data["models"][1]
    shown = browser.execute_script("return document.getElementById('written').textContent")
    assert shown == model["written"]
    assert (
        f"Training loss {data['train'][1][1]:.3f} (step 4), validation loss {data['val'][0][1]:.3f} (step 3)."
        == text("losses")
    )

    # A thumbnail chooses a head; the numbers, the line and the map follow.
    browser.find_element(By.CSS_SELECTOR, "#heads button[data-head='4']").click()
    previous, word, induction = (model["scores"][name][4] for name in ("previous", "word", "induction"))
    assert text("scores").startswith("At step 4, layer 1, head 1 scores ")
    assert [float(it) for it in re.findall(r"\d\.\d\d", text("scores"))] == pytest.approx(
        [previous, word, induction], abs=6e-3
    )
    assert [it.get_attribute("data-head") for it in browser.find_elements(By.CSS_SELECTOR, "#word .chosen")] == ["4"]
    weights = unpack(data)[1, 1, 1, -1]
    shown = [
        it.text.removesuffix(" %").removeprefix("< ") for it in browser.find_elements(By.CSS_SELECTOR, "#tokens small")
    ]
    assert [float(it) for it in shown] == pytest.approx([100 * float(weight) for weight in weights], abs=0.51)
    labels = [it.text for it in browser.find_elements(By.CSS_SELECTOR, "#tokens .mono")]
    assert labels == data["tokens"]
    assert browser.execute_script("return location.hash") == "#step=4&layer=1&head=1"
    _, _, _, alpha = browser.execute_script(
        "const canvas = document.querySelector('#heads .chosen canvas');"
        "return [...canvas.getContext('2d').getImageData(0, 5, 1, 1).data]"
    )
    assert alpha == pytest.approx(255 * float(unpack(data)[1, 1, 1, 5, 0]) ** 0.5, abs=1)

    # A click on a line chooses its head and the nearest step.
    browser.execute_script(
        "const line = document.querySelector('#previous .wide[data-head=\"2\"]');"
        "const box = line.ownerSVGElement.getBoundingClientRect();"
        "line.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: box.left + 36, clientY: box.top + 20}))"
    )
    assert text("step") == "step 0 of 10" and "layer 0, head 2 scores" in text("scores")
    assert "not measured yet" in text("losses")

    browser.find_element(By.ID, "slider").send_keys(Keys.ARROW_RIGHT)
    assert text("step") == "step 4 of 10"
    browser.find_element(By.ID, "play").click()
    assert text("play") == "Pause"
    deadline = time.monotonic() + 30
    while text("play") == "Pause" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text("play") == "Play" and text("step") == "step 10 of 10"

    browser.set_window_size(400, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_hostile_samples_and_address_do_no_harm_in_a_browser(browser: Any, run: Path, tmp_path: Path) -> None:
    """samples.txt may come from somebody else, and an address may name what does not exist."""
    hostile = (
        "</script><script>document.title = 'hit'</script><img src=x onerror=\"document.title = 'hit'\">\u2028\u202e\0"
    )
    with (run / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"--- step 10 ---\n{hostile}\n\n")
    page = replay_page(run, CONFIG, open_kept, LINE[:20])
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri() + "#step=3&layer=9&head=x")
    assert browser.title == "How <i>mine & {{data}} learned"
    assert browser.execute_script("return document.getElementById('sample').textContent") == hostile
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.get_log("browser") == []
