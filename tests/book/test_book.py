"""Test the book's names against numbers printed in the book, the plain model in the oracles, and loops by hand."""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import MyGPT
from http_server import file, serving
from MyGPT import book, get_tokenizer
from MyGPT.weights.formats.openai import read_settings
from oracles_layouts import BookBlock, BookGPT
from oracles_model import greedy_by_hand, naive_attention, train_by_hand
from oracles_openai import openai_logits, openai_params
from places import FIXTURES, ROOT

V, T = 29, 6
CONFIG = {"vocab_size": V, "context_length": 8, "emb_dim": 12, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
BIASED: dict[str, Any] = {**CONFIG, "qkv_bias": True}
OPENAI: dict[str, Any] = {"vocab_size": 503, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
OPENAI_CONFIG = MyGPT.GPTConfig(**OPENAI, qkv_bias=True, tie_weights=False, init_std=None)
GPT2_SMALL = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
GPT2_SMALL |= {"drop_rate": 0.1, "qkv_bias": False}
DOCUMENT = ROOT / "docs/coming_from_the_book.md"
# The beginning of The Verdict (Edith Wharton, 1908), on which the book trains.
VERDICT = (
    "I HAD always thought Jack Gisburn rather a cheap genius--though a good fellow enough--so it was no great surprise to me "
    "to hear that, in the height of his glory, he had dropped his painting, married a rich widow, and established himself in "
    "a villa on the Riviera."
)
EXACT = 1e-12
"""The tolerance for numbers from 1 to 10 in float64, computed in another order of summation."""


def lively(model: nn.Module) -> Any:
    """Give a model random weights, float64 and evaluation mode; the weights are large so that continuations vary."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def small(**changes: Any) -> book.GPTModel:
    return lively(book.GPTModel({**BIASED, **changes}))


def random_ids(B: int, T: int = T) -> Tensor:
    return torch.randint(V, (B, T))


# Names


def test_all_names_of_the_interface_exist() -> None:
    names = """
    SimpleTokenizerV1 SimpleTokenizerV2 GPTDatasetV1 create_dataloader_v1 SelfAttention_v1 SelfAttention_v2
    CausalAttention MultiHeadAttentionWrapper MultiHeadAttention LayerNorm GELU FeedForward TransformerBlock GPTModel
    generate_text_simple generate text_to_token_ids token_ids_to_text calc_loss_batch calc_loss_loader evaluate_model
    generate_and_print_sample train_model_simple plot_losses assign load_weights_into_gpt download_and_load_gpt2
    SpamDataset calc_accuracy_loader train_classifier_simple classify_review format_input InstructionDataset
    custom_collate_fn LoRALayer LinearWithLoRA replace_linear_with_lora train_model
    download_and_unzip_spam_data create_balanced_dataset random_split
    """.split()
    imported: dict[str, Any] = {}
    exec("from MyGPT.book import *", imported)
    assert set(names) <= set(imported)
    assert set(book.__all__) - set(names) == {"load_gpt2_params_from_tf_ckpt", "plot_values"}
    assert all(imported[name].__doc__ for name in book.__all__)


NONE = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "create_dataloader_v1": {
        "txt": NONE, "batch_size": 4, "max_length": 256, "stride": 128, "shuffle": True, "drop_last": True,
        "num_workers": 0,
    },
    "GPTDatasetV1": dict.fromkeys(["txt", "tokenizer", "max_length", "stride"], NONE),
    "CausalAttention": {**dict.fromkeys(["d_in", "d_out", "context_length", "dropout"], NONE), "qkv_bias": False},
    "MultiHeadAttention": {
        **dict.fromkeys(["d_in", "d_out", "context_length", "dropout", "num_heads"], NONE), "qkv_bias": False,
    },
    "generate_text_simple": dict.fromkeys(["model", "idx", "max_new_tokens", "context_size"], NONE),
    "generate": {
        "model": NONE, "idx": NONE, "max_new_tokens": NONE, "context_size": None, "temperature": 0.0, "top_k": None,
        "eos_id": None,
    },
    "train_model_simple": {
        **dict.fromkeys(["model", "train_loader", "val_loader", "optimizer", "device", "num_epochs"], NONE),
        "eval_freq": 5, "eval_iter": 5, "start_context": None, "tokenizer": None,
    },
    "calc_loss_loader": {"data_loader": NONE, "model": NONE, "device": NONE, "num_batches": None},
    "load_weights_into_gpt": {"gpt": NONE, "params": NONE},
    "SpamDataset": {"csv_file": NONE, "tokenizer": NONE, "max_length": None, "pad_token_id": 50256},
    "classify_review": {
        "text": NONE, "model": NONE, "tokenizer": NONE, "device": NONE, "max_length": None, "pad_token_id": 50256,
    },
    "custom_collate_fn": {
        "batch": NONE, "pad_token_id": 50256, "ignore_index": -100, "allowed_max_length": None, "device": "cpu",
    },
    "LoRALayer": dict.fromkeys(["in_dim", "out_dim", "rank", "alpha"], NONE),
    "LinearWithLoRA": dict.fromkeys(["linear", "rank", "alpha"], NONE),
    "replace_linear_with_lora": dict.fromkeys(["model", "rank", "alpha"], NONE),
    "SelfAttention_v1": dict.fromkeys(["d_in", "d_out"], NONE),
    "SelfAttention_v2": {**dict.fromkeys(["d_in", "d_out"], NONE), "qkv_bias": False},
    "MultiHeadAttentionWrapper": {
        **dict.fromkeys(["d_in", "d_out", "context_length", "dropout", "num_heads"], NONE), "qkv_bias": False,
    },
    "LayerNorm": {"emb_dim": NONE}, "FeedForward": {"cfg": NONE}, "TransformerBlock": {"cfg": NONE},
    "GPTModel": {"cfg": NONE},
    "text_to_token_ids": dict.fromkeys(["text", "tokenizer"], NONE),
    "token_ids_to_text": dict.fromkeys(["token_ids", "tokenizer"], NONE),
    "calc_loss_batch": dict.fromkeys(["input_batch", "target_batch", "model", "device"], NONE),
    "evaluate_model": dict.fromkeys(["model", "train_loader", "val_loader", "device", "eval_iter"], NONE),
    "generate_and_print_sample": dict.fromkeys(["model", "tokenizer", "device", "start_context"], NONE),
    "plot_losses": dict.fromkeys(["epochs_seen", "tokens_seen", "train_losses", "val_losses"], NONE),
    "plot_values": {
        **dict.fromkeys(["epochs_seen", "examples_seen", "train_values", "val_values"], NONE), "label": "loss",
    },
    "assign": dict.fromkeys(["left", "right"], NONE),
    "download_and_load_gpt2": dict.fromkeys(["model_size", "models_dir"], NONE),
    "load_gpt2_params_from_tf_ckpt": dict.fromkeys(["ckpt_path", "settings"], NONE),
    "calc_accuracy_loader": {**dict.fromkeys(["data_loader", "model", "device"], NONE), "num_batches": None},
    "train_classifier_simple": dict.fromkeys(
        ["model", "train_loader", "val_loader", "optimizer", "device", "num_epochs", "eval_freq", "eval_iter"], NONE
    ),
    "download_and_unzip_spam_data": dict.fromkeys(["url", "zip_path", "extracted_path", "data_file_path"], NONE),
    "create_balanced_dataset": {"df": NONE},
    "random_split": dict.fromkeys(["df", "train_frac", "validation_frac"], NONE),
    "format_input": {"entry": NONE}, "InstructionDataset": dict.fromkeys(["data", "tokenizer"], NONE),
    "train_model": {
        **dict.fromkeys(["model", "train_loader", "val_loader", "optimizer", "device", "n_epochs"], NONE),
        **dict.fromkeys(["eval_freq", "eval_iter", "start_context", "tokenizer", "warmup_steps"], NONE),
        "initial_lr": 3e-05, "min_lr": 1e-6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_the_order_and_defaults_of_the_book(name: str) -> None:
    """Additional arguments of ours must be keyword-only."""
    parameters = inspect.signature(getattr(book, name)).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is not p.KEYWORD_ONLY}
    assert positional == SIGNATURES[name] and list(positional) == list(SIGNATURES[name])


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(code, DOCUMENT.name, "exec"), {})
    assert capsys.readouterr().out


# Chapter 2


def test_the_second_tokenizer_gives_the_ids_of_the_book() -> None:
    """The book's vocabulary has the 1,130 words of The Verdict; words that the sentence does not need are omitted here."""
    vocab = {",": 5, ".": 7, "?": 10, "In": 55, "do": 355, "like": 628, "of": 722, "sunlit": 956, "tea": 975,
             "terraces": 984, "the": 988, "you": 1126, "<|endoftext|>": 1130, "<|unk|>": 1131}  # fmt: skip
    tokenizer = book.SimpleTokenizerV2(vocab)
    ids = tokenizer.encode("Hello, do you like tea? <|endoftext|> In the sunlit terraces of the palace.")
    assert ids == [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
    assert tokenizer.decode(ids) == "<|unk|>, do you like tea? <|endoftext|> In the sunlit terraces of the <|unk|>."


def test_an_unknown_word_raises_an_error_in_the_first_tokenizer() -> None:
    tokenizer = book.SimpleTokenizerV1({"tea": 0, ".": 1})
    assert tokenizer.encode("tea.") == [0, 1]
    with pytest.raises(ValueError, match="'Hello' is not in the vocabulary"):
        tokenizer.encode("Hello tea.")


def test_the_loader_begins_as_in_the_book() -> None:
    loader = book.create_dataloader_v1(VERDICT, batch_size=8, max_length=4, stride=4, shuffle=False)
    inputs, targets = next(iter(loader))
    assert inputs.shape == targets.shape == (8, 4) and inputs.dtype == torch.int64
    assert inputs[0].tolist() == [40, 367, 2885, 1464] and targets[0].tolist() == [367, 2885, 1464, 1807]
    assert inputs[1, 0] == targets[0, 3]


def test_without_drop_last_the_last_batch_is_smaller_and_no_window_is_padded() -> None:
    ids = get_tokenizer("gpt2").encode(VERDICT)
    loader = book.create_dataloader_v1(VERDICT, 8, 4, 3, False, False)
    inputs, targets = (torch.cat(parts).tolist() for parts in zip(*loader, strict=True))
    starts = range(0, len(ids) - 4, 3)
    assert len(starts) % 8
    assert inputs == [ids[i : i + 4] for i in starts] and targets == [ids[i + 1 : i + 5] for i in starts]


def test_a_seed_shuffles_like_torchs_loader() -> None:
    windows = list(book.GPTDatasetV1(VERDICT, get_tokenizer("gpt2"), 4, 2))
    torch.manual_seed(123)
    expected = [inputs.tolist() for inputs, _ in DataLoader(windows, batch_size=4, shuffle=True, drop_last=True)]
    torch.manual_seed(123)
    assert [inputs.tolist() for inputs, _ in book.create_dataloader_v1(VERDICT, 4, 4, 2)] == expected


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_text_too_short_for_a_window_raises_an_error(drop_last: bool) -> None:
    with pytest.raises(ValueError, match="the text has 2 tokens"):
        book.create_dataloader_v1("Hello world", drop_last=drop_last)


# Chapter 3


def test_the_attention_layers_equal_the_formula_of_the_paper() -> None:
    x = torch.randn(T, 3, dtype=torch.float64)
    bare = book.SelfAttention_v1(3, 2).double()
    q, k, v = (x @ weight for weight in (bare.W_query, bare.W_key, bare.W_value))
    everywhere, past = torch.ones(T, T).bool(), torch.ones(T, T).tril().bool()
    expected = naive_attention(*(part.detach().numpy() for part in (q, k, v)), everywhere)
    assert (bare(x) - torch.from_numpy(expected)).abs().max() < EXACT

    linear = book.SelfAttention_v2(3, 2).double()
    for name in ("W_query", "W_key", "W_value"):
        getattr(linear, name).weight = nn.Parameter(getattr(bare, name).T)
    assert (linear(x) - bare(x)).abs().max() < EXACT

    causal = book.CausalAttention(3, 2, T, 0.0).double()
    causal.load_state_dict({**linear.state_dict(), "mask": causal.mask})
    expected = naive_attention(*(part.detach().numpy() for part in (q, k, v)), past)
    assert (causal(torch.stack([x, x])) - torch.from_numpy(expected)).abs().max() < EXACT


# The embeddings of the six words in the example of chapter 3.
WORDS = torch.tensor(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
)


@pytest.mark.parametrize(
    ("name", "seed", "arguments", "first", "last"),
    [
        ("SelfAttention_v1", 123, (), [0.2996, 0.8053], [0.2990, 0.8040]),
        ("SelfAttention_v2", 789, (), [-0.0739, 0.0713], [-0.0754, 0.0693]),
        ("CausalAttention", 123, (6, 0.0), [-0.4519, 0.2216], [-0.5299, -0.1081]),
        (
            "MultiHeadAttentionWrapper", 123, (6, 0.0, 2),
            [-0.4519, 0.2216, 0.4772, 0.1063], [-0.5299, -0.1081, 0.5077, 0.3493],
        ),
        ("MultiHeadAttention", 123, (6, 0.0, 2), [0.3190, 0.4858], [0.2575, 0.4028]),
    ],
)  # fmt: skip
def test_a_seed_gives_the_numbers_printed_in_chapter_three(
    name: str, seed: int, arguments: Any, first: list[float], last: list[float]
) -> None:
    """The book prints four digits; the first and the last word are compared."""
    torch.manual_seed(seed)
    layer = getattr(book, name)(3, 2, *arguments)
    out = layer(torch.stack([WORDS, WORDS]))
    for row, printed in ((0, first), (-1, last)):
        torch.testing.assert_close(out[1, row], torch.tensor(printed), rtol=0, atol=6e-5)


def test_the_wrapper_concatenates_its_heads() -> None:
    wrapper = book.MultiHeadAttentionWrapper(3, 2, T, 0.0, num_heads=2)
    x = torch.randn(2, T, 3)
    assert torch.equal(wrapper(x), torch.cat([wrapper.heads[0](x), wrapper.heads[1](x)], dim=-1))
    assert wrapper(x).shape == (2, T, 4)


def test_dropout_removes_the_same_weights_as_in_the_book() -> None:
    """The oracle is the formula with dropout between softmax and values, from the same seed."""
    heads, x = book.MultiHeadAttention(12, 12, T, 0.5, 3, True).double(), torch.randn(2, T, 12, dtype=torch.float64)
    q, k, v = (layer(x).unflatten(2, (3, 4)).transpose(1, 2) for layer in (heads.W_query, heads.W_key, heads.W_value))
    scores = (q @ k.transpose(2, 3)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf) / 2
    torch.manual_seed(7)
    weights = F.dropout(scores.softmax(-1), 0.5)
    expected = heads.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.manual_seed(7)
    assert (heads(x) - expected).abs().max() < EXACT


def test_heads_that_do_not_divide_the_width_raise_an_error() -> None:
    with pytest.raises(ValueError, match="d_out must be divisible by num_heads, got 4 and 3"):
        book.MultiHeadAttention(4, 4, 8, 0.0, 3)


# Chapter 4: the model


@pytest.mark.slow
def test_seed_123_continues_as_in_the_book() -> None:
    torch.manual_seed(123)
    model = book.GPTModel(GPT2_SMALL)
    # Training mode comes first, as in the book, because dropout draws random numbers from the seed.
    batch = [get_tokenizer("gpt2").encode(text) for text in ("Every effort moves you", "Every day holds a")]
    logits = model(torch.tensor(batch))[:, :, [0, 1, 2, -3, -2, -1]]
    printed = torch.tensor(
        [[0.3613, 0.4222, -0.0711, 0.3483, 0.4661, -0.2838], [-0.1565, 0.3926, 0.3288, 1.2630, -0.1858, 0.0388]]
    )
    torch.testing.assert_close(torch.stack([logits[0, 0], logits[1, 3]]), printed, rtol=0, atol=1e-4)
    model.eval()
    ids = book.text_to_token_ids("Hello, I am", get_tokenizer("gpt2"))
    out = book.generate_text_simple(model=model, idx=ids, max_new_tokens=10, context_size=1024)
    assert out.tolist() == [[15496, 11, 314, 716, 27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]]


def test_parameter_counts_equal_those_of_the_book() -> None:
    """163,009,536 with an untied head; 124,441,346 with biases and a two-class head, of which LoRA trains 2,666,528."""
    with torch.device("meta"):
        assert count(book.GPTModel(GPT2_SMALL)) == 163_009_536
        model = book.GPTModel({**GPT2_SMALL, "qkv_bias": True})
        model.out_head = nn.Linear(768, 2)
        assert count(model) == 124_441_346
        model.requires_grad_(False)
        book.replace_linear_with_lora(model, rank=16, alpha=16)
    assert count(model) == 2_666_528


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_names_order_and_initial_weights_equal_those_of_the_book(qkv_bias: bool) -> None:
    torch.manual_seed(5)
    ours = book.GPTModel({**CONFIG, "qkv_bias": qkv_bias})
    torch.manual_seed(5)
    theirs = BookGPT(V, 8, 12, 2, 2, qkv_bias)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@torch.no_grad()
def test_state_dicts_load_in_both_directions_and_give_equal_logits(tmp_path: Path) -> None:
    theirs, ours, ids = lively(BookGPT(V, 8, 12, 2, 2, True)), small(), random_ids(3)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    ours.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert (ours(ids) - theirs(ids)).abs().max() < EXACT
    again = small()
    theirs.load_state_dict(again.state_dict())
    assert (again(ids) - theirs(ids)).abs().max() < EXACT


@torch.no_grad()
def test_our_model_loads_the_weights_of_the_books_model() -> None:
    model, ids = small(), random_ids(3)
    ours = MyGPT.GPTModel({**BIASED, "tie_weights": False}).double().eval()
    MyGPT.load_weights_into_gpt(ours, model.state_dict())
    assert (ours(ids) - model(ids)).abs().max() < EXACT


def test_gelu_and_layer_norm_equal_those_of_the_book() -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    assert (
        book.GELU()(x) - 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ).abs().max() < EXACT
    norm = book.LayerNorm(12).double()
    out = norm(x)
    assert out.mean(-1).abs().max() < EXACT and (out.var(-1, unbiased=False) - 1).abs().max() < 1e-3  # because of eps


def test_every_part_can_be_replaced() -> None:
    model, ids = small(), random_ids(2)
    tokens, positions = nn.Embedding(V, 12).double(), nn.Embedding(8, 12).double()
    model.tok_emb, model.pos_emb = tokens, positions
    model.drop_emb, model.trf_blocks, model.final_norm = nn.Dropout(0.0), nn.Sequential(), nn.Identity()
    model.out_head = nn.Linear(12, 2).double()
    expected = model.out_head(tokens(ids) + positions.weight[:T])
    assert (model(ids) - expected).abs().max() < EXACT


def test_blocks_can_be_indexed_frozen_and_assigned_as_in_the_book() -> None:
    model = book.GPTModel(CONFIG)
    model.requires_grad_(False)
    for parameter in model.trf_blocks[-1].parameters():
        parameter.requires_grad = True
    assert {name[:13] for name, p in model.named_parameters() if p.requires_grad} == {"trf_blocks.1."}
    query = model.trf_blocks[0].att.W_query
    query.weight = book.assign(query.weight, torch.ones(12, 12).numpy())
    assert model.state_dict()["trf_blocks.0.att.W_query.weight"].eq(1).all()


def test_a_sequence_longer_than_the_context_raises_an_error() -> None:
    with pytest.raises(ValueError, match="the sequence has 9 tokens, the model's context_length is 8"):
        small()(random_ids(1, 9))


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (book.GPTModel, {**CONFIG, "ctx_len": 8}, "lacks qkv_bias, but has the unknown key 'ctx_len'"),
        (book.GPTModel, {key: CONFIG[key] for key in CONFIG if key != "n_layers"}, "lacks n_layers"),
        (book.TransformerBlock, {**CONFIG, "n_heads": 5}, "divisible"),
        (book.TransformerBlock, {"emb_dim": 12, "n_heads": 2}, "lacks context_length"),
        (book.FeedForward, {"emb_din": 12}, "lacks emb_dim, but has the unknown key 'emb_din'"),
        (book.FeedForward, {"emb_dim": "12"}, "emb_dim must be a whole number"),
    ],
)
def test_an_invalid_config_raises_an_error(layer: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(config)


def test_every_layer_accepts_a_config_with_keys_of_the_reader() -> None:
    """Exercise 4.3 of the book replaces drop_rate with three rates, and uses FeedForward with this config."""
    readers = {**BIASED, "drop_rate_emb": 0.1, "drop_rate_shortcut": 0.2, "drop_rate_attn": 0.3, "name": "mine"}
    for layer in (book.FeedForward, book.TransformerBlock, book.GPTModel):
        torch.manual_seed(5)
        with_extra_keys = layer(readers)
        torch.manual_seed(5)
        plain = layer(BIASED)
        assert all(map(torch.equal, with_extra_keys.parameters(), plain.parameters()))
    del readers["drop_rate"]
    assert book.FeedForward(readers).layers[0].weight.shape == (48, 12)
    assert book.FeedForward({"emb_dim": 5}).layers[0].weight.shape == (20, 5)


# Chapters 4 and 5: generation


@pytest.mark.parametrize("context_size", [8, 5])
def test_cached_generation_equals_full_forward_passes_past_the_context(context_size: int) -> None:
    model, ids = small(), random_ids(3, 3)
    expected = greedy_by_hand(model, ids, 10, context_size)
    assert len(set(expected[:, 3:].flatten().tolist())) > 2
    assert torch.equal(book.generate_text_simple(model, ids, 10, context_size), expected)
    assert torch.equal(book.generate(model, ids, 10, context_size, temperature=0.0), expected)


def test_a_cache_accepts_several_tokens_per_step() -> None:
    model, ids = small(), random_ids(2)
    cache = model.new_cache(2, T)
    with torch.no_grad():
        last = model(ids, last_only=True)
        assert last.shape == (2, 1, V) and (last - model(ids)[:, -1:]).abs().max() < EXACT
        parts = [model(ids[:, start : start + 2], cache=cache) for start in range(0, T, 2)]
        assert (torch.cat(parts, dim=1) - model(ids)).abs().max() < EXACT


def test_a_replaced_block_generates_without_the_cache() -> None:
    model, ids = small(), random_ids(2, 3)
    model.trf_blocks = nn.Sequential(model.trf_blocks[0], lively(BookBlock(12, 2, 8, True)))
    assert model.new_cache(2, 8) is None
    assert torch.equal(book.generate_text_simple(model, ids, 5, 8), greedy_by_hand(model, ids, 5, 8))


def test_lora_generates_with_the_cache() -> None:
    model, ids = small(), random_ids(2, 3)
    book.replace_linear_with_lora(model, 2, 4)
    lively(model)
    assert model.new_cache(2, 8) is not None
    assert torch.equal(book.generate_text_simple(model, ids, 5, 8), greedy_by_hand(model, ids, 5, 8))


def test_a_seed_samples_like_the_loop_of_the_book() -> None:
    model, ids = small(), random_ids(1, 3)
    torch.manual_seed(123)
    expected = ids
    for _ in range(5):
        with torch.no_grad():
            logits = model(expected)[:, -1]
        logits = logits.masked_fill(logits < logits.topk(4).values[:, -1:], -math.inf)
        expected = torch.cat([expected, torch.multinomial((logits / 1.4).softmax(-1), 1)], dim=1)
    torch.manual_seed(123)
    assert torch.equal(book.generate(model, ids, 5, 8, top_k=4, temperature=1.4), expected)


def test_padding_raises_an_error() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="does not support padding"):
        book.generate(small(), random_ids(2, 3), 1, 8, attention_mask=mask)


def test_text_and_ids_convert_in_both_directions() -> None:
    tokenizer = get_tokenizer("gpt2")
    ids = book.text_to_token_ids("Every effort moves you<|endoftext|>", tokenizer)
    assert ids.tolist() == [[6109, 3626, 6100, 345, 50256]]
    assert book.token_ids_to_text(ids, tokenizer) == "Every effort moves you<|endoftext|>"
    assert book.text_to_token_ids("", tokenizer).dtype == torch.int64


# Chapter 5: losses


def test_the_loss_is_cross_entropy_of_tokens_or_classes() -> None:
    own = lively(BookGPT(V, 8, 12, 2, 2, True))
    for model in (small(), own):
        x, tokens, classes = random_ids(3), random_ids(3), torch.randint(2, (3,))
        tokens[0, 2:] = -100
        expected = F.cross_entropy(model(x).flatten(0, 1), tokens.flatten())
        assert book.calc_loss_batch(x, tokens, model, "cpu").item() == pytest.approx(expected.item(), abs=EXACT)
        model.out_head = nn.Linear(12, 2).double()
        expected = F.cross_entropy(model(x)[:, -1], classes)
        assert book.calc_loss_batch(x, classes, model, "cpu").item() == pytest.approx(expected.item(), abs=EXACT)
        assert book.calc_loss_batch(x, tokens % 2, model, "cpu").requires_grad


def test_loader_losses_are_means_over_targets() -> None:
    model = small(drop_rate=0.5).train()
    batches = [(random_ids(3), random_ids(3)), (random_ids(1), random_ids(1))]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x)
    whole = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    first = F.cross_entropy(logits[:3].flatten(0, 1), y[:3].flatten()).item()
    assert book.evaluate_model(model, batches, batches[:1], "cpu", 2) == pytest.approx((whole, first), abs=EXACT)
    assert model.training
    model.eval()
    assert book.calc_loss_loader(batches, model, "cpu") == pytest.approx(whole, abs=EXACT)
    assert book.calc_loss_loader(batches, model, "cpu", 1) == pytest.approx(first, abs=EXACT)
    assert math.isnan(book.calc_loss_loader([], model, "cpu"))


# Chapter 5: OpenAI's weights


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_openais_weights_give_openais_logits_in_both_models(qkv_bias: bool) -> None:
    """The tolerance is the rounding error of float32. A model without qkv biases gets them."""
    ids, expected = openai_logits()
    for model in (book.GPTModel({**OPENAI, "qkv_bias": qkv_bias}), BookGPT(503, 32, 24, 3, 2, qkv_bias)):
        book.load_weights_into_gpt(model, openai_params())
        assert (model.eval()(ids) - expected).abs().max() <= 1e-5
        assert torch.equal(model.out_head.weight, model.tok_emb.weight)
        assert getattr(model, "config", OPENAI_CONFIG) == OPENAI_CONFIG


def test_assigning_single_weights_as_in_the_book_gives_openais_logits() -> None:
    """One weight is overwritten and assigned again; the function loads all others."""
    params, (ids, expected) = openai_params(), openai_logits()
    model = book.GPTModel({**OPENAI, "qkv_bias": True}).eval()
    book.load_weights_into_gpt(model, params)
    att, (q, _, _) = (
        model.trf_blocks[1].att,
        params["blocks"][1]["attn"]["c_attn"]["w"].reshape(24, 3, 24).swapaxes(0, 1),
    )
    att.W_query.weight = nn.Parameter(torch.zeros(24, 24))
    assert (model(ids) - expected).abs().max() > 1e-2
    att.W_query.weight = book.assign(att.W_query.weight, q.T)
    assert (model(ids) - expected).abs().max() <= 1e-5


def test_weights_that_do_not_fit_leave_the_model_unchanged() -> None:
    changed = book.GPTModel({**OPENAI, "qkv_bias": True})
    changed.out_head = nn.Linear(24, 2)
    with_lora = book.GPTModel({**OPENAI, "qkv_bias": True})
    book.replace_linear_with_lora(with_lora, 2, 4)
    for model, message in (
        (book.GPTModel({**OPENAI, "emb_dim": 12}), "mismatches"),
        (changed, r"out_head.weight is \(503, 24\), the model's is \(2, 24\)"),
        (with_lora, "the model has no out_head.weight"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            book.load_weights_into_gpt(model, openai_params())
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_our_model_loads_the_weights_too() -> None:
    model, (ids, expected) = MyGPT.GPTModel(OPENAI).eval(), openai_logits()
    book.load_weights_into_gpt(model, openai_params())
    assert (model(ids) - expected).abs().max() <= 1e-5


def test_an_assigned_parameter_has_the_dtype_of_the_old_one() -> None:
    for right in (torch.ones(2, 3), torch.ones(2, 3).numpy()):
        assigned = book.assign(torch.zeros(2, 3, dtype=torch.float64), right)
        assert isinstance(assigned, nn.Parameter) and assigned.dtype == torch.float64 and assigned.eq(1).all()
        assigned.data.zero_()
        assert right.all()  # the parameter is a copy


def test_assigning_another_shape_raises_an_error() -> None:
    with pytest.raises(ValueError, match=r"the weights have the shape \(3, 2\), the parameter has \(2, 3\)"):
        book.assign(torch.zeros(2, 3), torch.zeros(3, 2))


def test_the_download_functions_are_those_of_mygpt() -> None:
    directory = FIXTURES / "openai_gpt2_tf"
    assert book.download_and_load_gpt2 is MyGPT.download_and_load_gpt2
    params = book.load_gpt2_params_from_tf_ckpt(str(directory / "model.ckpt"), read_settings(directory))
    assert params["blocks"][0]["attn"]["c_attn"]["w"].shape == (24, 72)


# Chapter 5: figures


@pytest.mark.slow
def test_figures_are_shown_and_saved(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown: list[Any] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    assert book.plot_losses([0.0, 1.0], [12, 24], [3.0, 2.0], [3.5, 2.5]) is None
    book.plot_values([0.0, 1.0], [8, 16], [0.5, 0.9], [0.4, 0.8], label="accuracy")
    assert [[axes.get_xlabel() for axes in figure.axes] for figure in shown] == [
        ["Epochs", "Tokens seen"],
        ["Epochs", "Examples seen"],
    ]
    plt.close("all")
    for name in ("loss-plot.pdf", "accuracy-plot.pdf"):
        assert Path(name).read_bytes().startswith(b"%PDF")


# Chapter 6

CSV = 'Label,Text\n1,"You won, call ""now"""\n0,Tea?\n0,"two\nlines"\n'


@pytest.fixture
def spam(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


def test_spam_texts_are_padded_to_the_longest_or_cut(spam: Path) -> None:
    tokenizer = get_tokenizer("gpt2")
    whole = [tokenizer.encode(text) for text in ('You won, call "now"', "Tea?", "two\nlines")]
    dataset = book.SpamDataset(spam, tokenizer)
    assert len(dataset) == 3 and dataset.max_length == len(whole[0]) == max(map(len, whole))
    for i, ids in enumerate(whole):
        padded, label = dataset[i]
        assert padded.tolist() == ids + [50256] * (dataset.max_length - len(ids))
        assert label.item() == int(i == 0) and padded.dtype == label.dtype == torch.int64
    assert book.SpamDataset(spam, tokenizer, 2, 7)[1][0].tolist() == (whole[1] + [7])[:2]
    inputs, labels = next(iter(DataLoader(dataset, batch_size=3)))
    assert inputs.shape == (3, dataset.max_length) and labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Label\tText\n1\tx\n", "no column Label and Text"),
        ("Label,Text\n", "no examples"),
        ("Label,Text\nspam,x\n", "row 1 of .* has the label 'spam'"),
        ("Label,Text\n0,x\n1\n", "row 2 of .* the text None"),
        ("", "no column"),
    ],
)
def test_an_invalid_spam_file_raises_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        book.SpamDataset(tmp_path / "x.csv", get_tokenizer("gpt2"))


def classifier(**changes: Any) -> book.GPTModel:
    model = small(**changes)
    model.out_head = nn.Linear(12, 2).double()
    return model


def labelled(n: int, B: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(random_ids(B), torch.randint(2, (B,))) for _ in range(n)]


def test_accuracy_uses_the_last_token_without_dropout() -> None:
    model, batches = classifier(drop_rate=0.9).train(), labelled(3)
    twin = copy.deepcopy(model).eval()
    right = [(twin(x)[:, -1].argmax(-1) == y).float().mean().item() for x, y in batches]
    assert len(set(right)) > 1
    assert book.calc_accuracy_loader(batches, model, "cpu") == pytest.approx(sum(right) / 3)
    assert book.calc_accuracy_loader(batches, model, "cpu", 1) == right[0]
    assert model.training and math.isnan(book.calc_accuracy_loader([], model, "cpu"))


def test_classifier_training_equals_a_loop_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    model, train, val = classifier(), labelled(3), labelled(2)
    twin = LastToken(copy.deepcopy(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = book.train_classifier_simple(model, train, val, optimizer, "cpu", 2, 2, 1)
    train_by_hand(twin, train, torch.optim.AdamW(twin.parameters(), lr=0.01), 2)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    train_losses, val_losses, train_accs, val_accs, examples_seen = losses
    assert (len(train_losses), len(val_losses), len(train_accs), len(val_accs), examples_seen) == (3, 3, 2, 2, 24)
    assert val_accs[-1] == book.calc_accuracy_loader(val, model, "cpu", 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Ep 1 (Step 000000): Train loss {train_losses[0]:.3f}, Val loss {val_losses[0]:.3f}"
    assert lines[2] == f"Training accuracy: {train_accs[0] * 100:.2f}% | Validation accuracy: {val_accs[0] * 100:.2f}%"
    assert len(lines) == 5


class LastToken(nn.Module):
    """A wrapper that returns only the logits of the last token, (B, 1, K)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[:, -1:]


@pytest.mark.parametrize(("max_length", "length"), [(5, 5), (2, 2), (99, 8), (None, 3)])
def test_a_review_is_padded_or_cut_to_the_training_length(max_length: int | None, length: int) -> None:
    model, tokenizer = classifier(), MyGPT.CharTokenizer.from_text("abcdefgh")
    answers = set()
    for text in ("abc", "hgf", "eee", "bad", "deb", "fab", "hah", "gag", "fed", "cab"):
        ids = (tokenizer.encode(text) + [7] * 99)[:length]
        expected = "spam" if model(torch.tensor([ids]))[0, -1].argmax() == 1 else "not spam"
        assert book.classify_review(text, model, tokenizer, "cpu", max_length, 7) == expected
        answers.add(expected)
    assert answers == {"spam", "not spam"}


def test_a_review_is_classified_without_dropout() -> None:
    model, tokenizer = classifier(drop_rate=0.9), MyGPT.CharTokenizer.from_text("abcdefgh")
    texts = ("abc", "hgf", "eee", "bad", "deb", "fab", "hah", "gag", "fed", "cab")
    expected = [book.classify_review(text, model, tokenizer, "cpu") for text in texts]
    model.train()
    assert [book.classify_review(text, model, tokenizer, "cpu") for text in texts] == expected
    assert all(module.training for module in model.modules())


def test_a_review_longer_than_the_context_is_cut() -> None:
    model, tokenizer = classifier(), MyGPT.CharTokenizer.from_text("abcdefgh")
    for text in ("abcdefgh", "ahbgcfde", "eeeeeeee", "hgfedcba"):
        expected = book.classify_review(text, model, tokenizer, "cpu")
        assert book.classify_review(text + "abc", model, tokenizer, "cpu", 99) == expected


# Chapter 7


def test_the_collate_function_gives_the_targets_of_the_book() -> None:
    inputs, targets = book.custom_collate_fn(([0, 1, 2, 3, 4], [5, 6], [7, 8, 9]))
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256], [7, 8, 9, 50256, 50256]]
    assert targets.tolist() == [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]]
    cut, _ = book.custom_collate_fn(([0, 1, 2], [5]), 9, -1, 2, "cpu")
    assert cut.tolist() == [[0, 1], [5, 9]]


def test_instructions_are_encoded_with_the_prompt_of_the_book() -> None:
    entry = {"instruction": "Name a colour.", "input": "A warm one.", "output": "Red."}
    prompt = book.format_input(entry)
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Input:\nA warm one."
    )
    tokenizer = get_tokenizer("gpt2")
    dataset = book.InstructionDataset([entry], tokenizer)
    assert dataset[0] == tokenizer.encode(f"{prompt}\n\n### Response:\nRed.") and len(dataset) == 1


# Appendix D


def test_training_has_warmup_cosine_decay_and_clipping_after_the_warmup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = MyGPT.CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyzABC")
    model, train, val = small(), [(random_ids(2), random_ids(2)) for _ in range(4)], [(random_ids(2), random_ids(2))]
    twin, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.4)
    result = book.train_model(model, train, val, optimizer, "cpu", 2, 3, 1, "abc", tokenizer, 2, 0.1, 0.01)
    train_losses, val_losses, tokens_seen, rates = result
    cosine = [0.01 + 0.39 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert rates == pytest.approx([0.1, 0.25, *cosine])
    assert len(train_losses) == len(val_losses) == 3 and tokens_seen == [12, 48, 84]

    by_hand = torch.optim.SGD(twin.parameters(), lr=0.0)
    norms = []
    for step, (x, y) in enumerate(train * 2):
        by_hand.zero_grad()
        F.cross_entropy(twin(x).flatten(0, 1), y.flatten()).backward()
        norms.append(torch.cat([p.grad.flatten() for p in twin.parameters()]).norm().item())
        for p in twin.parameters():
            scale = 1 / (norms[-1] + 1e-6) if step >= 2 and norms[-1] > 1 else 1.0
            p.data -= rates[step] * scale * p.grad
    assert norms[2] > 1  # the condition of the book does not clip at this step
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Ep 1 (Iter 000000): Train loss {train_losses[0]:.3f}, Val loss {val_losses[0]:.3f}"
    assert lines[2].startswith("abc")


def test_training_without_warmup_starts_at_the_peak_rate() -> None:
    """The code of the book divides by warmup_steps."""
    tokenizer = MyGPT.CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyzABC")
    model, train = small(), [(random_ids(2), random_ids(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    *_, rates = book.train_model(model, train, train, optimizer, "cpu", 1, 9, 1, "a", tokenizer, 0, min_lr=0.0)
    assert rates == pytest.approx([0.4, 0.2])


def test_a_non_finite_loss_raises_an_error_and_keeps_the_weights() -> None:
    model = classifier()
    model.out_head.bias.data.fill_(math.nan)
    before = copy.deepcopy(model.trf_blocks.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        book.train_classifier_simple(model, labelled(1), labelled(1), optimizer, "cpu", 1, 1, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.trf_blocks.state_dict().items())


# Appendix E


@pytest.mark.parametrize(("options", "factor"), [({}, 6 / 4), ({"scale_by_rank": False}, 6)])
def test_lora_starts_without_effect_and_adds_its_scaled_product(options: dict[str, bool], factor: float) -> None:
    """The factor is alpha / rank in the book's repository, and alpha in the printed book."""
    model, ids = small(), random_ids(2)
    before = model(ids)
    book.replace_linear_with_lora(model, rank=4, alpha=6, **options)
    assert torch.equal(model(ids), before)
    assert not any(type(child) is nn.Linear for m in model.modules() for child in m.children() if not is_lora(m))
    layers = [module for module in model.modules() if is_lora(module)]
    for layer in (lively(book.LinearWithLoRA(nn.Linear(5, 3), 4, 6, **options)), *map(lively, layers)):
        x = torch.randn(7, layer.linear.in_features, dtype=torch.float64)
        bias = 0 if layer.linear.bias is None else layer.linear.bias
        expected = x @ (layer.linear.weight.T + factor * layer.lora.A @ layer.lora.B) + bias
        assert (layer(x) - expected).abs().max() < EXACT * 100
        assert (layer.lora.rank, layer.lora.alpha) == (4, 6)


def test_the_update_of_the_book_equals_that_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    linear = nn.Linear(5, 3).double()
    ours = lively(book.LinearWithLoRA(copy.deepcopy(linear), rank=4, alpha=6))
    theirs = get_peft_model(nn.Sequential(linear), LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).double()
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        linear.weight.copy_(ours.linear.weight)
        linear.bias.copy_(ours.linear.bias)
        layer.lora_A["default"].weight.copy_(ours.lora.A.T)
        layer.lora_B["default"].weight.copy_(ours.lora.B.T)
    x = torch.randn(7, 5, dtype=torch.float64)
    assert (ours(x) - theirs(x)).abs().max() < EXACT


def is_lora(module: nn.Module) -> bool:
    return isinstance(module, book.LinearWithLoRA)


def test_a_seed_gives_the_initial_lora_weights_of_the_book() -> None:
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(7, 4), a=math.sqrt(5))
    torch.manual_seed(3)
    layer = book.LoRALayer(7, 5, rank=4, alpha=1)
    torch.testing.assert_close(layer.A.data, expected, rtol=0, atol=1e-7)  # the bound is rounded differently
    assert not layer.B.any()


def test_replacing_linear_layers_twice_keeps_the_first_lora() -> None:
    model = small()
    book.replace_linear_with_lora(model, 2, 4)
    layers = [module for module in model.modules() if is_lora(module)]
    book.replace_linear_with_lora(model, 2, 4)
    assert layers == [module for module in model.modules() if is_lora(module)]


def zipped(**files: str) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name, text)
    return archive.getvalue()


@pytest.mark.slow
def test_appendix_e_prepares_the_spam_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of the appendix, on a small collection: 7 spam messages, and 20 others."""
    import pandas

    messages = [("spam" if i % 4 == 1 else "ham", f'message {i}, "quoted"') for i in range(27)]
    collection = zipped(SMSSpamCollection="".join(f"{label}\t{text}\n" for label, text in messages), readme="about")
    zip_path, extracted_path = tmp_path / "spam.zip", tmp_path / "spam"
    data_file_path = extracted_path / "SMSSpamCollection.tsv"
    with serving() as server:
        # The first answer ends early, so the download must be resumed.
        server.will(file(collection, cut=100), file(collection))
        book.download_and_unzip_spam_data(server.url, zip_path, extracted_path, data_file_path)
        book.download_and_unzip_spam_data(server.url, str(zip_path), str(extracted_path), str(data_file_path))
        assert len(server.requests) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"File downloaded and saved as {data_file_path}",
        f"{data_file_path} already exists. Skipping download and extraction.",
    ]
    assert (extracted_path / "readme").read_text() == "about"

    df = pandas.read_csv(data_file_path, sep="\t", header=None, names=["Label", "Text"], quoting=3)
    assert list(df.itertuples(index=False, name=None)) == messages
    balanced_df = book.create_balanced_dataset(df)
    assert balanced_df["Label"].tolist() == ["ham"] * 7 + ["spam"] * 7
    assert balanced_df["Text"].is_unique
    balanced_df["Label"] = balanced_df["Label"].map({"ham": 0, "spam": 1})
    parts = book.random_split(balanced_df, 0.7, 0.1)
    assert [len(part) for part in parts] == [9, 1, 4]
    assert sorted(pandas.concat(parts)["Text"]) == sorted(balanced_df["Text"])
    parts[0].to_csv(tmp_path / "train.csv", index=None)
    dataset = book.SpamDataset(tmp_path / "train.csv", get_tokenizer("gpt2"))
    assert [label for label, _ in dataset.data] == parts[0]["Label"].tolist()
    assert [text for _, text in dataset.data] == parts[0]["Text"].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>sorry</html>", "spam.zip is damaged .*: delete it and download it again"),
        (zipped(SMSSpamCollection="ham\thello\n" * 50)[:-40], "spam.zip is damaged"),
        (zipped(SMSSpamCollection="a" * 50).replace(b"SMSSpam", b"OtherXX"), "it has no file SMSSpamCollection"),
        (zipped(**{"../SMSSpamCollection": "ham\thello\n"}), None),
    ],
)
def test_a_wrong_archive_writes_nothing_outside_its_directory(
    content: bytes, message: str | None, tmp_path: Path
) -> None:
    paths = (tmp_path / "in/spam.zip", tmp_path / "in/spam", tmp_path / "in/spam.tsv")
    with serving() as server:
        server.will(file(content))
        if message is None:
            book.download_and_unzip_spam_data(server.url, *paths)
        else:
            with pytest.raises(ValueError, match=message):
                book.download_and_unzip_spam_data(server.url, *paths)
    assert paths[2].exists() == (message is None)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not (tmp_path / "in/SMSSpamCollection").exists()
