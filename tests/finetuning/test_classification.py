"""Test the classifier against transformers' GPT2ForSequenceClassification."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from conftest import lively_model
from MyGPT import BPETokenizer, GPTConfig
from MyGPT.finetuning.classification import (
    GPTForClassification,
    accuracy,
    classify,
    collate_texts,
    confusion_table,
    read_labelled,
    train_classifier,
)

EXAMPLES = [
    (f"{word} {n} times", label) for word, label in (("buy now", "spam"), ("see you", "ham")) for n in range(12)
]
LABELS = ["ham", "spam"]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([text for text, _ in EXAMPLES], 280, progress=False)


def fresh(tokenizer: BPETokenizer, **options: Any) -> GPTForClassification:
    sizes = {"context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}
    return GPTForClassification(lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)), LABELS, **options)


def texts(tokenizer: BPETokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    return collate_texts(["buy", "see you 3 times", "now"], tokenizer, 32)


def test_transformers_opens_the_directory_with_equal_scores_loss_and_gradients(
    tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    """The batch is padded on the right, because transformers finds the last token by the id of the padding."""
    ours = fresh(tokenizer).double()
    ours.save_pretrained(tmp_path, tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    ids, mask = texts(tokenizer)
    labels = torch.tensor([1, 0, 1])
    loss, scores = ours(ids, mask, labels)
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    assert (scores - expected.logits).abs().max() < 1e-12 and abs(loss - expected.loss) < 1e-6  # their loss is float32
    loss.backward()
    expected.loss.backward()
    assert (ours.score.weight.grad - theirs.score.weight.grad).abs().max() < 1e-6
    mine, other = ours.gpt.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad
    assert mine is not None and (mine - other).abs().max() < 1e-6


def test_a_saved_classifier_opens_with_bit_identical_scores(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    model = fresh(tokenizer).eval()
    model.save_pretrained(tmp_path, tokenizer)
    again = GPTForClassification.from_pretrained(tmp_path)
    ids, mask = texts(tokenizer)
    assert torch.equal(again(ids, mask), model(ids, mask)) and again.labels == LABELS


def test_padding_on_either_side_changes_nothing(tokenizer: BPETokenizer) -> None:
    model = fresh(tokenizer).double().eval()
    ids, mask = texts(tokenizer)
    alone = torch.cat([model(row[kept.bool()][None]) for row, kept in zip(ids, mask, strict=True)])
    order = mask.argsort(dim=1, stable=True)
    assert (model(ids, mask) - alone).abs().max() < 1e-12
    assert (model(ids.gather(1, order), mask.gather(1, order)) - alone).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("way", ["head", "last_block", "all", "lora"])
def test_each_way_of_training_learns_to_tell_the_labels(way: Any, tokenizer: BPETokenizer, tmp_path: Path) -> None:
    model: Any = fresh(tokenizer, train_only="all" if way == "lora" else way)
    if way == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn", "c_proj", "c_fc"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if way == "head":
        assert trained == {"score.weight"}
    if way == "last_block":
        assert (
            all(".h.1." in name or ".ln_f." in name or name == "score.weight" for name in trained)
            and len(trained) == 14
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = train_classifier(model, EXAMPLES, tokenizer, optimizer, epochs=14)
    assert len(losses) == 14 * 3 and sum(losses[-3:]) < sum(losses[:3]) / 2
    table = confusion_table(model, EXAMPLES, tokenizer, batch_size=5)
    assert table.sum() == len(EXAMPLES) and accuracy(table) >= 0.95
    if way == "lora":
        merged = model.merge_and_unload()
        assert torch.equal(confusion_table(merged, EXAMPLES, tokenizer), table)
        merged.save_pretrained(tmp_path, tokenizer)
        model = GPTForClassification.from_pretrained(tmp_path)
    assert classify(model, ["buy now 3 times", "see you 3 times"], tokenizer) == ["spam", "ham"]


def test_a_step_equals_one_with_torchs_cross_entropy_on_unpadded_texts(tokenizer: BPETokenizer) -> None:
    model = fresh(tokenizer).double()
    twin = copy.deepcopy(model)
    train_classifier(model, EXAMPLES[10:13], tokenizer, torch.optim.SGD(model.parameters(), lr=0.1))
    for text, label in EXAMPLES[10:13]:
        scores = twin(torch.tensor([tokenizer.encode(text)]))
        (torch.nn.functional.cross_entropy(scores, torch.tensor([LABELS.index(label)])) / 3).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-12


def test_a_classifier_of_transformers_opens_with_equal_scores(tmp_path: Path) -> None:
    """transformers does not write its default label names."""
    config = GPT2Config(
        vocab_size=67, n_positions=32, n_embd=24, n_layer=2, n_head=3, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    theirs = GPT2ForSequenceClassification(config).double().eval()
    theirs.save_pretrained(tmp_path)
    ours = GPTForClassification.from_pretrained(tmp_path)
    ids = torch.arange(1, 13).reshape(2, 6)
    assert ours.labels == ["LABEL_0", "LABEL_1"]
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize("keyword", ["inputs_embeds", "output_attentions", "output_hidden_states"])
def test_unsupported_arguments_raise_an_error(keyword: str, tokenizer: BPETokenizer) -> None:
    with pytest.raises(ValueError, match="not supported"):
        fresh(tokenizer)(texts(tokenizer)[0], **{keyword: torch.ones(1)})


def test_the_confusion_table_counts_labels_and_predictions(tokenizer: BPETokenizer) -> None:
    model = fresh(tokenizer)
    with torch.no_grad():
        model.score.weight.copy_(
            torch.stack([torch.zeros(24), torch.zeros(24)])
        )  # equal scores: argmax is the first label, "ham"
    assert confusion_table(model, EXAMPLES, tokenizer).tolist() == [[12, 0], [12, 0]]
    assert accuracy(confusion_table(model, EXAMPLES, tokenizer)) == 0.5
    with pytest.raises(ValueError, match="the model has no label 'eggs'; its labels are ham, spam"):
        confusion_table(model, [("x", "eggs")], tokenizer)


def test_texts_and_labels_are_read_from_csv_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('label,text\nspam,"buy, ""now""\nplease"\nham,see you\n')
    (tmp_path / "a.jsonl").write_text(
        '{"text": "buy, \\"now\\"\\nplease", "label": "spam"}\n\n{"label": "ham", "text": "see you"}\n'
    )
    expected = [('buy, "now"\nplease', "spam"), ("see you", "ham")]
    assert read_labelled(tmp_path / "a.csv") == read_labelled(tmp_path / "a.jsonl") == expected
    (tmp_path / "a.json").write_text('[{"Label": 1, "Text": "buy"}]')
    assert read_labelled(tmp_path / "a.json", "Text", "Label") == [("buy", "1")]


def test_a_form_feed_and_a_unicode_line_end_stay_within_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nbuy\x0cnow,spam\nsee\u2028you,ham\n", encoding="utf-8")
    assert read_labelled(tmp_path / "a.csv") == [("buy\x0cnow", "spam"), ("see\u2028you", "ham")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\nbuy,spam\nsee,\n", r"a\.csv, line 3: the key 'label' is missing or empty"),
        ("a.csv", "text,kind\nbuy,spam\n", r"a\.csv, line 2: the key 'label' is missing"),
        (
            "a.jsonl",
            '{"text": "a", "label": "b"}\n[1]\n',
            r"a\.jsonl, line 2: a record must be a JSON object, got \[1\]",
        ),
        ("a.jsonl", '{"text": 3, "label": "b"}\n', r"a\.jsonl, line 1: 'text' must be a text, got 3"),
        ("a.jsonl", '{"text": "a", "label": [3]}\n', r"a\.jsonl, line 1: 'label' must be a text, got \[3\]"),
        ("a.csv", "text,label\nHello, friend,ham\n", r"a\.csv, line 2: more values than columns"),
        (
            "a.csv",
            'text,label\n"Hello,ham\n',
            r"a\.csv, line \d: the value in quotation marks that begins in line \d has no end",
        ),
        ("a.csv", f"text,label\n{'a' * 200_000},ham\n", r"a\.csv, line \d: field larger than field limit"),
        ("a.jsonl", "{\n", r"a\.jsonl, line 1: not JSON"),
        ("a.csv", "text,label\n", r"a\.csv has no records"),
    ],
)
def test_an_invalid_record_raises_an_error_with_file_line_and_key(
    name: str, content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_labelled(tmp_path / name)


def test_invalid_classifiers_raise_an_error(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two labels, all different"):
        GPTForClassification(fresh(tokenizer).gpt, ["a", "a"])
    with pytest.raises(
        ValueError, match="the model must be a GPTForClassification or a PeftModel of one, got GPTModel"
    ):
        classify(fresh(tokenizer).gpt, ["buy"], tokenizer)
    with pytest.raises(ValueError, match="there are no examples"):
        confusion_table(fresh(tokenizer), [], tokenizer)
    with pytest.raises(ValueError, match="train_only must be"):
        fresh(tokenizer, train_only="some")
    fresh(tokenizer).gpt.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not contain a classifier"):
        GPTForClassification.from_pretrained(tmp_path)
