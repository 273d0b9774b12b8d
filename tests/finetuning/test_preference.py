"""Test DPO against its formula in plain Python, the loss of TRL, and a separate copy of the reference model."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from trl.trainer.dpo_trainer import DPOTrainer

from conftest import lively_model
from MyGPT import BPETokenizer, GPTConfig, GPTModel
from MyGPT.finetuning.lora import add_lora, merge
from MyGPT.finetuning.preference import PreferencePairs, dpo_loss, preferences, read_preferences, train_dpo

RECORDS = [
    {"prompt": f"Say {word}.", "chosen": f" {word}, please", "rejected": f" no {word} at all"}
    for word in ("cat", "dog", "owl", "fox", "hen", "cow")
]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([text for record in RECORDS for text in record.values()], 300, progress=False)


def fresh(tokenizer: BPETokenizer) -> GPTModel:
    sizes = {"context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}
    return lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)).double()


def adapted(tokenizer: BPETokenizer) -> Any:
    """Return a PeftModel whose adapter changes the output."""
    model = add_lora(fresh(tokenizer), dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.double().eval()


def log_prob(model: Any, tokenizer: BPETokenizer, prompt: str, answer: str) -> torch.Tensor:
    """Return the log-probability of one answer without a batch."""
    prompt_ids, answer_ids = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eot_token]
    logits = model(torch.tensor([prompt_ids + answer_ids]))[0, len(prompt_ids) - 1 : -1]
    return F.log_softmax(logits, dim=-1).gather(1, torch.tensor(answer_ids)[:, None]).sum()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loss_equals_the_formula_of_the_paper(label_smoothing: float) -> None:
    values = torch.randn(4, 5, dtype=torch.float64) * 10
    found = dpo_loss(*values, beta=0.3, label_smoothing=label_smoothing)
    margins = [0.3 * ((c - rc) - (r - rr)) for c, r, rc, rr in values.T.tolist()]
    losses = [
        (1 - label_smoothing) * math.log1p(math.exp(-m)) + label_smoothing * math.log1p(math.exp(m)) for m in margins
    ]
    assert float(found.loss) == pytest.approx(sum(losses) / 5, rel=1e-12)
    assert found.accuracy == pytest.approx(sum(m > 0 for m in margins) / 5)
    assert found.margin == pytest.approx(sum(margins) / 5)


def test_the_loss_equals_that_of_trl() -> None:
    """TRL computes the loss in a method of its trainer, which runs here with a stub model that returns log-probabilities."""
    chosen, rejected, reference_chosen, reference_rejected = torch.randn(4, 5) * 10
    log_probs = torch.zeros(10, 3)
    log_probs[:, 1] = torch.cat([chosen, rejected])
    nothing = torch.zeros(10, 3)  # TRL only logs these
    outputs = SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=0.3,
        loss_types=["sigmoid"], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(), state=SimpleNamespace(num_input_tokens_seen=0),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(10, 4, dtype=torch.long), "attention_mask": torch.ones(10, 4, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1, 1, 1]] * 10),
        "ref_chosen_logps": reference_chosen, "ref_rejected_logps": reference_rejected,
    }  # fmt: skip
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    ours = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.3)
    assert float(ours.loss) == pytest.approx(float(theirs), rel=1e-5)


def test_a_batch_has_the_loss_of_single_answers_and_two_models(tokenizer: BPETokenizer) -> None:
    """Here the reference is a second model without an adapter; the rows of the batch are padded."""
    peft_model, reference = adapted(tokenizer), fresh(tokenizer)
    pairs = PreferencePairs(RECORDS, tokenizer, 32)
    found = preferences(peft_model, *pairs.batch([0, 3, 4]), beta=0.2)
    policy = merge(copy.deepcopy(peft_model)).eval()
    losses = []
    with torch.no_grad():
        for record in (RECORDS[0], RECORDS[3], RECORDS[4]):
            gains = [
                log_prob(policy, tokenizer, record["prompt"], record[key])
                - log_prob(reference, tokenizer, record["prompt"], record[key])
                for key in ("chosen", "rejected")
            ]
            losses.append(-F.logsigmoid(0.2 * (gains[0] - gains[1])))
    assert float(found.loss.detach()) == pytest.approx(float(sum(losses)) / 3, rel=1e-9)


def test_training_starts_at_the_reference_and_learns_to_prefer_the_chosen_answers(tokenizer: BPETokenizer) -> None:
    peft_model = add_lora(fresh(tokenizer).float(), dropout=0.0).train()
    pairs = PreferencePairs(RECORDS, tokenizer, 32)
    frozen = peft_model.get_base_model().transformer.wte.weight.clone()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=5e-3)
    steps = train_dpo(peft_model, pairs.batches(3, seed=1, epochs=6), optimizer)
    assert len(steps) == 12
    assert float(steps[0].loss) == pytest.approx(math.log(2), abs=1e-6) and steps[0].margin == pytest.approx(
        0, abs=1e-5
    )
    assert steps[-1].accuracy == 1 and steps[-1].margin > 0.05 and float(steps[-1].loss) < float(steps[0].loss)
    assert peft_model.training and torch.equal(peft_model.get_base_model().transformer.wte.weight, frozen)


def test_pairs_that_are_too_long_are_counted(tokenizer: BPETokenizer) -> None:
    longer = {"prompt": "Say", "chosen": " cat" * 40, "rejected": " dog"}
    pairs = PreferencePairs([*RECORDS, longer], tokenizer, 32)
    assert (len(pairs), pairs.n_too_long) == (6, 1)
    with pytest.raises(ValueError, match="no pairs to train on: 1 records, 1 too long for max_length=32"):
        PreferencePairs([longer], tokenizer, 32)


def test_pairs_are_read_from_an_array_and_from_lines(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    assert read_preferences(tmp_path / "pairs.json") == read_preferences(tmp_path / "pairs.jsonl") == RECORDS
    (tmp_path / "pairs.jsonl").write_text(f'{json.dumps(RECORDS[0])}\n{{"prompt": "a", "chosen": "b"}}')
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2: the key 'rejected' is missing"):
        read_preferences(tmp_path / "pairs.jsonl")


def test_another_model_raises_an_error(tokenizer: BPETokenizer) -> None:
    other = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="DPO needs a PeftModel of a GPTModel, got a PeftModel of a Sequential"):
        preferences(other, *PreferencePairs(RECORDS, tokenizer, 32).batch([0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "record 2: the key 'rejected' is missing"),
        (
            {"prompt": 3, "chosen": "b", "rejected": "c"},
            "record 2: 'prompt' must be a text or a list of messages, got 3",
        ),
        (["a"], r"record 2: a record must be a JSON object, got \['a'\]"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "record 2: the prompt is empty"),
    ],
)
def test_an_invalid_record_raises_an_error_with_its_number_and_key(
    record: Any, words: str, tokenizer: BPETokenizer
) -> None:
    with pytest.raises(ValueError, match=words):
        PreferencePairs([RECORDS[0], record], tokenizer, 32)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_values_out_of_range_raise_an_error(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        dpo_loss(*torch.randn(4, 2), **options)
