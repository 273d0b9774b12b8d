"""A model whose weights are NaN or infinite gives one clear FloatingPointError everywhere, and no text, number or page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, GPTModel, accelerate, generate
from MyGPT.acceleration.captured import CapturedModel
from MyGPT.acceleration.lookup import PromptLookup
from MyGPT.book.classification import calc_accuracy_loader, classify_review
from MyGPT.cli import main
from MyGPT.evaluation.perplexity import documents_loss, strided_loss
from MyGPT.evaluation.protocols import measure_last_words, measure_text
from MyGPT.finetuning.classification import GPTForClassification, classify, confusion_table, train_classifier
from MyGPT.finetuning.lora import add_lora
from MyGPT.finetuning.preference import PreferencePairs, train_dpo
from MyGPT.generation import generate_stream, stream_text
from MyGPT.inside import plots
from MyGPT.inside.page import explain_page
from MyGPT.inside.tracing import induction_scores, nearest_tokens, patching_effects
from MyGPT.sampling import SamplingConfig, keep_top_k, pick_next, require_finite
from MyGPT.tokenizers import BPETokenizer
from MyGPT.training.simple import generate_and_print_sample

TOKENIZER = CharTokenizer(list("abcdefg "))
CONFIG = GPTConfig(
    TOKENIZER.n_vocab,
    context_length=16,
    emb_dim=24,
    n_heads=3,
    n_layers=2,
    drop_rate=0.0,
    qkv_bias=True,
    tie_weights=True,
)
IDS = torch.tensor([TOKENIZER.encode("abcab")])
NAMES = [name for name, _ in GPTModel(CONFIG).named_parameters()]
VALUES = [math.nan, math.inf, -math.inf]


def broken(
    value: float = math.nan, name: str = "transformer.h.1.mlp.c_fc.weight", config: GPTConfig = CONFIG
) -> GPTModel:
    """Return a model in which one number of the parameter `name` is `value`."""
    model = lively_model(config)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = value
    return model


# Generation

KINDS: dict[str, Callable[[GPTModel], Any]] = {
    "plain": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "lookup": PromptLookup,
    "captured": CapturedModel,
    **{
        f"{kind}, kernel": lambda model, kind=kind: accelerate(model, kind) for kind in ("fp32", "bf16", "int8", "int4")
    },
    **{
        f"{kind}, torch": lambda model, kind=kind: accelerate(model, kind, compiled=False)
        for kind in ("fp32", "bf16", "int8", "int4")
    },
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", VALUES)
def test_no_token_is_chosen_from_logits_that_are_not_finite(value: float, kind: str, temperature: float) -> None:
    with pytest.raises(FloatingPointError, match=r"is (nan|inf|-inf): the weights are damaged, or the training"):
        generate(KINDS[kind](broken(value)), IDS, 4, temperature=temperature, seed=0)


@pytest.mark.parametrize("kind", ["plain", "fp32, kernel", "bf16, kernel", "int8, kernel", "int8, torch"])
@pytest.mark.parametrize("name", [name for name in NAMES if "wte" not in name])
def test_a_nan_in_any_parameter_reaches_the_logits(name: str, kind: str) -> None:
    model = broken(math.nan, name)
    # Only the last position has a NaN.
    prompt = IDS.repeat(1, 4)[:, :16] if name == "transformer.wpe.weight" else IDS
    with pytest.raises(FloatingPointError):
        generate(KINDS[kind](model), prompt, 1)


@pytest.mark.slow
def test_int8_weights_that_are_not_finite_are_named() -> None:
    for name in NAMES:
        for value in VALUES:
            with pytest.raises(FloatingPointError, match=f"a weight of {name} is {value}"):
                accelerate(broken(value, name), "int8")


def test_one_broken_row_is_enough_and_the_text_before_it_was_shown() -> None:
    with pytest.raises(FloatingPointError):
        pick_next(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), SamplingConfig())
    model, steps = broken(math.nan, "transformer.wpe.weight"), list[torch.Tensor]()
    with pytest.raises(FloatingPointError):
        for new in generate_stream(model, IDS, 16):
            steps.append(new)
    assert len(steps) == 11  # 5 tokens of the prompt and 10 new ones come before position 15


@pytest.mark.parametrize("config", [SamplingConfig(0.0), SamplingConfig(1.0, 2), SamplingConfig(1e-3, top_p=0.5)])
def test_logits_that_a_filter_excluded_are_no_error(config: SamplingConfig) -> None:
    logits = keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 1)
    assert pick_next(logits, config).tolist() == [1]
    with pytest.raises(FloatingPointError, match="is -inf"):
        pick_next(torch.full((1, 3), -math.inf), config)


def test_large_finite_values_are_finite() -> None:
    require_finite("a value", torch.full((9,), 3e38))
    require_finite("a value", torch.full((9, 2), 6e4, dtype=torch.float16))
    require_finite("a value", torch.zeros(0))


# Measurements, pictures and other tasks


def classifier() -> GPTForClassification:
    return GPTForClassification(broken(), ["x", "y"]).eval()


def train_preferences() -> object:
    pytest.importorskip("peft")
    tokenizer = BPETokenizer.train(["ab cd "] * 9, 260, progress=False)
    sizes = {**vars(CONFIG), "vocab_size": tokenizer.n_vocab}
    peft_model = add_lora(broken(config=GPTConfig(**sizes)), r=2, alpha=2)
    pairs = PreferencePairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, 16)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    return train_dpo(peft_model, pairs.batches(1, 0), torch.optim.SGD(trained, 0.1))


def train_labels() -> object:
    model = classifier()
    return train_classifier(model, [("ab", "x")], TOKENIZER, torch.optim.SGD(model.parameters(), 0.1))


def tensors(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan)


class BookModel(torch.nn.Module):
    """A model with the attribute pos_emb of the book's models, whose logits are NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_emb = torch.nn.Embedding(16, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return tensors(*ids.shape, TOKENIZER.n_vocab)


LABELS = list("abcab")
DOORS: dict[str, Callable[[], object]] = {
    "stream_text": lambda: list(stream_text(broken(), TOKENIZER, [1], 4, SamplingConfig(1.0))),
    "strided_loss": lambda: strided_loss(broken(), IDS[0]),
    "documents_loss": lambda: documents_loss(broken(), [IDS[0], IDS[0]], batch_size=1),
    "measure_text": lambda: measure_text(broken(), TOKENIZER, ["abc abc"]),
    "measure_last_words": lambda: measure_last_words(broken(), TOKENIZER, ["ab cd"]),
    "explain_page": lambda: explain_page(broken(), TOKENIZER, IDS),
    "patching_effects": lambda: patching_effects(broken(), IDS, IDS, lambda logits: 1.0),
    "induction_scores": lambda: induction_scores(broken(math.nan, "transformer.wpe.weight"), length=8),
    "nearest_tokens": lambda: nearest_tokens(broken(math.nan, "transformer.wte.weight"), 0, 2),
    "plot_attention": lambda: plots.plot_attention(tensors(2, 5, 5), LABELS),
    "plot_layers": lambda: plots.plot_layers(tensors(2, 5), LABELS, "score"),
    "plot_logit_lens": lambda: plots.plot_logit_lens(tensors(2, 5, TOKENIZER.n_vocab), LABELS, TOKENIZER),
    "plot_sampling": lambda: plots.plot_sampling(tensors(TOKENIZER.n_vocab), SamplingConfig(), TOKENIZER),
    "plot_neighbours": lambda: plots.plot_neighbours(broken(math.nan, "transformer.wte.weight"), TOKENIZER, [1], 2),
    "classify": lambda: classify(classifier(), ["ab"], TOKENIZER),
    "confusion_table": lambda: confusion_table(classifier(), [("ab", "x")], TOKENIZER),
    "train_classifier": train_labels,
    "train_dpo": train_preferences,
    "calc_accuracy_loader": lambda: calc_accuracy_loader(DataLoader([(IDS[0], 1)]), BookModel(), "cpu"),
    "classify_review": lambda: classify_review("ab", BookModel(), TOKENIZER, "cpu"),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_function_raises_one_clear_error(door: str) -> None:
    with pytest.raises(
        FloatingPointError, match="is nan: the weights are damaged, or the training of the model diverged"
    ):
        DOORS[door]()


def test_a_sample_of_the_books_loop_says_why_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    generate_and_print_sample(broken(), TOKENIZER, "cpu", "ab")
    assert "no sample text: a logit of the model is nan" in capsys.readouterr().out


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("broken")
    broken().save_pretrained(directory / "model", TOKENIZER)
    (directory / "text.txt").write_text("abc abc")
    return directory


COMMANDS = {
    "generate": "generate --model {0}/model --prompt abc --temperature 0",
    "generate, sampled": "generate --model {0}/model --prompt abc",
    "generate, int8": "generate --model {0}/model --prompt abc --precision int8",
    "generate, lookup": "generate --model {0}/model --prompt abc --lookup",
    "evaluate": "evaluate --model {0}/model --data {0}/text.txt",
    "evaluate, last words": "evaluate --model {0}/model --data {0}/text.txt --protocol lambada",
    "explain": "explain --model {0}/model --out {0}/page.html abc",
    "plot lens": "plot lens --model {0}/model --text abc --out {0}/a.png",
    "plot attention": "plot attention --model {0}/model --text abc --layer 1 --out {0}/a.png",
    "plot sampling": "plot sampling --model {0}/model --text abc --out {0}/a.png",
    "bench": "bench --model {0}/model --n_tokens 2 --prompt 2 --rounds 1",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_one_line_and_fails(
    command: str, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "plot attention":  # The NaN of the other commands is in the MLP of the last layer.
        broken(math.nan, "transformer.h.0.ln_1.weight").save_pretrained(directory / "attention", TOKENIZER)
    place = str(directory)
    arguments = (
        COMMANDS[command]
        .format(place)
        .replace("model --text", "attention --text" if "attention" in command else "model --text")
    )
    before = set(directory.iterdir())
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert "the weights are damaged, or the training of the model diverged" in captured.err
    assert captured.err.count("\n") == 1 and "nan" not in captured.out
    assert set(directory.iterdir()) == before


def test_a_page_is_strict_json(directory: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    page = explain_page(lively_model(CONFIG), TOKENIZER, IDS)
    data = page.partition('type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(data, parse_constant=refuse)["layers"] == 2
