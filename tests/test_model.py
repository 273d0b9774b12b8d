"""GPTModel, compared with transformers' GPT-2 with the same weights: logits, gradients, loss, initial weights, sizes, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from conftest import lively_model
from MyGPT import GPT2_CONFIGS, GPTConfig, GPTModel, KVCache
from MyGPT.inside.tracing import plain_attention
from oracles_model import gradients_by_our_names, hugging_face_config, transformers_twin

V, T = 67, 9


def config(**changes: Any) -> GPTConfig:
    sizes = {"vocab_size": V, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 3, "drop_rate": 0.0}
    return GPTConfig(**{**sizes, **changes})


def random_ids(B: int = 4, T: int = T) -> Tensor:
    return torch.randint(V, (B, T))


def padding(side: str, T: int = T) -> Tensor | None:
    """Return the mask of four rows with T, T - 1, T // 2 and 1 tokens; None for side="none"."""
    if side == "none":
        return None
    places = torch.arange(T) if side == "right" else torch.arange(T).flip(0)
    return (places < torch.tensor([[T], [T - 1], [T // 2], [1]])).long()


def their_logits(twin: GPT2LMHeadModel, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    if mask is None:
        return twin(ids, **options).logits
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return twin(ids, attention_mask=mask, position_ids=positions, **options).logits


def assert_logits_and_gradients_are_theirs(
    model: GPTModel, twin: GPT2LMHeadModel, mask: Tensor | None, tolerance: float
) -> None:
    ids = random_ids()
    ours, theirs = model(ids, attention_mask=mask), their_logits(twin, ids, mask)
    real = torch.ones_like(ids) if mask is None else mask
    assert (ours - theirs)[real == 1].abs().max() < tolerance
    # A random factor per logit lets every logit contribute to the gradients. Padding has factor 0.
    upstream = torch.randn(ours.shape, dtype=ours.dtype) * real[..., None]
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    expected = gradients_by_our_names(twin)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = max(1.0, float(expected[name].abs().max()))
        assert (parameter.grad - expected[name]).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_logits_and_gradients_are_those_of_transformers(
    qkv_bias: bool, tie_weights: bool, attention: str, side: str
) -> None:
    model = lively_model(config(qkv_bias=qkv_bias, tie_weights=tie_weights)).double()
    assert_logits_and_gradients_are_theirs(model, transformers_twin(model, attention), padding(side), 1e-10)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients_are_those_of_transformers_in_float32(side: str) -> None:
    """Logits of size 10 after about a hundred float32 roundings of 6e-8 have errors of 1e-5; the tolerance is ten times that."""
    model = lively_model(config(qkv_bias=True))
    assert_logits_and_gradients_are_theirs(model, transformers_twin(model), padding(side), 1e-4)


@pytest.mark.parametrize(("emb_dim", "n_heads"), [(15, 5), (21, 3), (7, 1), (6, 6)])
def test_any_number_and_width_of_heads_gives_transformers_logits(emb_dim: int, n_heads: int) -> None:
    model = lively_model(config(emb_dim=emb_dim, n_heads=n_heads, qkv_bias=True)).double()
    assert_logits_and_gradients_are_theirs(model, transformers_twin(model), padding("left"), 1e-10)


def test_a_wide_float32_model_as_initialised_is_within_1e_4_of_transformers() -> None:
    model = GPTModel(config(vocab_size=1000, context_length=64, emb_dim=192, n_heads=12, n_layers=4, qkv_bias=True))
    ids = torch.randint(1000, (2, 64))
    with torch.no_grad():
        difference = model.eval()(ids) - transformers_twin(model)(ids).logits
    assert difference.abs().max() < 1e-4


def test_dropout_falls_where_transformers_has_it() -> None:
    """With the same seed both draw equal masks only if they drop the same tensors in the same order at the same rate."""
    model = lively_model(config(drop_rate=0.3, qkv_bias=True)).double().train()
    twin = transformers_twin(model, "sdpa").train()
    ids = random_ids()
    torch.manual_seed(7)
    ours = model(ids)
    torch.manual_seed(7)
    theirs = twin(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert not torch.equal(ours, model(ids))


def test_nothing_is_dropped_in_evaluation() -> None:
    model = lively_model(config(drop_rate=0.5))
    undisturbed = GPTModel(config(drop_rate=0.0))
    undisturbed.load_state_dict(model.state_dict())
    ids = random_ids()
    assert torch.equal(model(ids), undisturbed.train()(ids))


def test_loss_is_that_of_transformers_and_of_cross_entropy_with_ignored_labels() -> None:
    model = lively_model(config()).double()
    ids = random_ids()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    output = model(input_ids=ids, labels=labels)
    shifted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(shifted.item(), abs=1e-12)
    # transformers computes the loss in float32, so only seven digits can agree.
    assert output.loss.item() == pytest.approx(transformers_twin(model)(ids, labels=labels).loss.item(), rel=1e-5)
    assert torch.equal(output.logits, model(ids))


def test_loss_without_any_label_is_nan_as_in_transformers() -> None:
    model = lively_model(config())
    ids = random_ids()
    nothing = torch.full_like(ids, -100)
    assert model(ids, labels=nothing).loss.isnan()
    assert transformers_twin(model)(ids, labels=nothing).loss.isnan()


def test_token_loss_sums_what_cross_entropy_sums() -> None:
    model = lively_model(config()).double()
    ids, mask = random_ids(), padding("left")
    targets = random_ids().masked_fill(mask == 0, -100)
    total, count = model.token_loss(ids, targets, mask)
    logits = model(ids, attention_mask=mask)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert total.item() == pytest.approx(expected.item(), abs=1e-10)
    assert count.item() == mask.sum().item()


def test_token_loss_goes_through_a_head_that_was_replaced() -> None:
    """A classification head has a bias, which a loss computed only from the head's weight would leave out."""
    model = lively_model(config(tie_weights=False)).double()
    model.lm_head = nn.Linear(24, 5).double()
    ids, targets = random_ids(), torch.randint(5, (4, T))
    total, _ = model.token_loss(ids, targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    assert total.item() == pytest.approx(expected.item(), abs=1e-10)


def test_forward_with_targets_returns_the_losses_as_sums() -> None:
    """Wrappers such as DistributedDataParallel add hooks to calls of the model, so the losses must be such calls."""
    model = lively_model(config()).double()
    ids, mask = random_ids(), padding("left")
    targets, n_calls = random_ids().masked_fill(mask == 0, -100), []
    model.register_forward_hook(lambda *_: n_calls.append(1))
    total, count = model(ids, mask, targets=targets)
    rows = model(inputs_embeds=model.transformer.wte(ids), attention_mask=mask, targets=targets, per_row=True)
    logits = model(ids, mask)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(total, expected.sum(), rtol=0, atol=1e-10)
    assert count.item() == (targets != -100).sum().item()
    assert torch.equal(model.token_loss(ids, targets, mask)[0], total)
    assert torch.equal(model.row_losses(ids, targets, mask), rows)
    assert len(n_calls) == 5


def test_an_output_with_labels_is_a_pytree_of_its_two_tensors() -> None:
    """DistributedDataParallel(static_graph=True) and fully_shard find tensors in this way."""
    output = lively_model(config())(random_ids(), labels=random_ids())
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    assert [id(leaf) for leaf in leaves] == [id(output.loss), id(output.logits)]
    again = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert type(again) is type(output) and again.loss is output.loss


def test_a_cache_has_the_dtype_in_which_the_model_computes() -> None:
    model = lively_model(config()).eval()
    ids, cache = random_ids(), model.new_cache(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(ids)
        parts = [model(ids[:, :3], cache=cache), model(ids[:, 3:], cache=cache)]
    assert cache.storage.dtype == torch.bfloat16 and cache.length == T
    # bf16 has 8 bits, and the lengths of the products differ.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=2**-6, atol=2**-5)


def test_embeddings_in_place_of_ids_give_the_same_logits() -> None:
    model = lively_model(config())
    ids, mask = random_ids(), padding("right")
    embeddings = model.transformer.wte(ids)
    assert torch.equal(model(ids, mask), model(inputs_embeds=embeddings, attention_mask=mask))


def test_last_only_gives_the_last_column() -> None:
    model = lively_model(config()).double()
    ids = random_ids()
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["torch's", "the plain"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_finite_logits_and_gradients_everywhere(
    side: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query that sees no key gives NaN by the formula and in some kernels, although not in torch's current one."""
    if kernel == "the plain":
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, **_: plain_attention(q, k, v, attn_mask)
        )
    model = lively_model(config())
    logits = model(random_ids(), attention_mask=padding(side))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_padding_cannot_be_seen() -> None:
    model = lively_model(config()).double()
    ids, mask = random_ids(), padding("left")
    other = torch.where(mask == 1, ids, random_ids())
    assert torch.equal(model(ids, mask)[mask == 1], model(other, mask)[mask == 1])


def test_no_logit_depends_on_a_later_token() -> None:
    model = lively_model(config()).double()
    embeddings = model.transformer.wte(random_ids(B=1)).detach().requires_grad_()
    for t in range(T):
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings)[0, t].sum(), embeddings)
        touched = gradient[0].abs().sum(1) > 0
        assert touched[: t + 1].all() and not touched[t + 1 :].any()


@pytest.mark.slow
@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=8).filter(lambda pieces: sum(pieces) <= 16),
    side=st.sampled_from(["none", "left", "right"]),
)
@settings(deadline=None, max_examples=40)
def test_logits_in_any_pieces_through_the_cache_are_those_of_one_forward(pieces: list[int], side: str) -> None:
    model = lively_model(config(qkv_bias=True)).double()
    length = sum(pieces)
    ids, mask = random_ids(4, length), padding(side, length) if length > 1 else None
    cache, logits, start = model.new_cache(4, length), [], 0
    with torch.no_grad():
        for piece in pieces:
            end = start + piece
            seen = None if mask is None else mask[:, :end]
            logits.append(model(ids[:, start:end], attention_mask=seen, cache=cache))
            start = end
        whole = model(ids, attention_mask=mask)
    real = torch.ones_like(ids) if mask is None else mask
    assert (torch.cat(logits, dim=1) - whole)[real == 1].abs().max() < 1e-10
    assert cache.length == length


def test_a_cache_is_used_under_bf16_autocast() -> None:
    """bf16 has 8 bits, so two orders of summation may differ by a few hundredths of the largest logit."""
    model = lively_model(config())
    ids, cache = random_ids(), model.new_cache(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :4], cache=cache)
        pieces, whole = model(ids[:, 4:], cache=cache), model(ids)[:, 4:]
    assert (pieces - whole).abs().max() < 0.05 * whole.abs().max()


def test_a_deep_copy_keeps_the_head_tied() -> None:
    twin = copy.deepcopy(GPTModel(config())).double()
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_untied_weights_are_two() -> None:
    model = GPTModel(config(tie_weights=False))
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_initial_weights_are_normal_with_gpt2s_deviations(tie_weights: bool) -> None:
    """The mean, the standard deviation and the share within one deviation must each be within 6 standard errors.

    A correct initialisation fails with a probability below 1e-7 per run.
    """
    n_layers = 5
    model = GPTModel(config(vocab_size=500, emb_dim=96, n_layers=n_layers, qkv_bias=True, tie_weights=tie_weights))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            ones = name.endswith("weight")
            assert torch.equal(parameter, torch.ones_like(parameter) if ones else torch.zeros_like(parameter)), name
            continue
        std = 0.02 / math.sqrt(2 * n_layers) if "c_proj" in name else 0.02
        n = parameter.numel()
        assert abs(parameter.mean()) < 6 * std / math.sqrt(n), name
        assert abs(parameter.std() / std - 1) < 6 / math.sqrt(2 * n), name
        within = (parameter.abs() < std).double().mean()
        assert abs(within - 0.682689) < 6 * math.sqrt(0.6827 * 0.3173 / n), name


def test_without_init_std_the_weights_are_those_that_torchs_layers_begin_with() -> None:
    """Linear weights are uniform up to 1 / √C and embeddings are normal, within 6 standard errors.

    A correct initialisation fails with a probability below 1e-7 per run.
    """
    model = GPTModel(config(vocab_size=500, emb_dim=96, init_std=None, tie_weights=False, qkv_bias=True))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in module.parameters():
                assert 0.9 * bound < parameter.abs().max() <= bound, name
            n = module.weight.numel()
            assert abs(module.weight.abs().mean() / bound - 0.5) < 6 / math.sqrt(12 * n), name
        elif isinstance(module, nn.Embedding):
            n = module.weight.numel()
            assert abs(module.weight.std() - 1) < 6 / math.sqrt(2 * n), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_init_std_scales_the_start() -> None:
    small, large = ((torch.manual_seed(3), GPTModel(config(init_std=std)))[1] for std in (0.01, 0.04))
    torch.testing.assert_close(4 * small.lm_head.weight, large.lm_head.weight)


@pytest.mark.parametrize(
    ("size", "alias", "expected"),
    [
        ("124M", "gpt2", 124_439_808),
        ("355M", "gpt2-medium", 354_823_168),
        ("774M", "gpt2-large", 774_030_080),
        ("1558M", "gpt2-xl", 1_557_611_200),
    ],
)
def test_released_sizes_have_the_published_number_of_parameters(size: str, alias: str, expected: int) -> None:
    assert GPT2_CONFIGS[size] == GPT2_CONFIGS[alias]
    with torch.device("meta"):
        assert GPTModel(GPT2_CONFIGS[size]).num_parameters() == expected


def test_the_books_untied_model_has_163_009_536_parameters() -> None:
    with torch.device("meta"):
        assert GPTModel(GPTConfig(tie_weights=False)).num_parameters() == 163_009_536


@pytest.mark.parametrize("tie_weights", [True, False])
def test_names_and_counts_of_parameters_are_transformers(tie_weights: bool) -> None:
    ours = GPTModel(config(tie_weights=tie_weights, qkv_bias=True))
    theirs = GPT2LMHeadModel(hugging_face_config(ours.config))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for model in (ours, theirs):
        model.transformer.h[0].requires_grad_(False)
    for only_trainable in (False, True):
        for exclude_embeddings in (False, True):
            options = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
            assert ours.num_parameters(**options) == theirs.num_parameters(**options), options


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("n_tokens", [5, 16])
def test_flops_are_those_that_torch_counts(n_tokens: int, tie_weights: bool) -> None:
    """torch counts 2 operations per multiplication, and attention without the causal mask, as we do."""
    model = GPTModel(config(tie_weights=tie_weights))
    ids = random_ids(2, n_tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(ids)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == ids.numel() * model.estimate_flops(n_tokens, backward=False)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == ids.numel() * model.estimate_flops(n_tokens)
    assert model.estimate_flops() == model.estimate_flops(16)


def test_a_dict_describes_a_model_too() -> None:
    sizes = {"vocab_size": V, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 3}
    assert GPTModel(sizes).config == GPTConfig(**sizes)


IDS = torch.arange(10).reshape(2, 5)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too long": ({"input_ids": torch.zeros(2, 17, dtype=torch.int64)}, ValueError, "17 tokens.*16"),
    "id outside": ({"input_ids": IDS + 62}, IndexError, "id 67 .*0 to 66"),
    "negative id": ({"input_ids": IDS - 3}, IndexError, "id -3 .*0 to 66"),
    "float ids": ({"input_ids": IDS.float()}, ValueError, "int64.*float32"),
    "int32 ids": ({"input_ids": IDS.int()}, ValueError, "int64.*int32"),
    "no tokens": ({"input_ids": IDS[:, :0]}, ValueError, r"at least one token.*\(2, 0\)"),
    "one row without batch": ({"input_ids": IDS[0]}, ValueError, r"\(batch, time\).*\(5,\)"),
    "short mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, ValueError, r"\(2, 5\).*\(2, 4\)"),
    "mask of one row": ({"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, ValueError, r"\(2, 5\).*\(1, 5\)"),
    "short labels": ({"input_ids": IDS, "labels": IDS[:, 1:]}, ValueError, r"labels.*\(2, 4\).*\(2, 5\)"),
    "int32 labels": ({"input_ids": IDS, "labels": IDS.int()}, ValueError, "labels.*int64.*int32"),
    "label outside": ({"input_ids": IDS, "labels": IDS + 62}, IndexError, "label 67 .*0 to 66.*-100"),
    "negative label": ({"input_ids": IDS, "labels": IDS - 1}, IndexError, "label -1 .*0 to 66.*-100"),
    "nothing": ({}, ValueError, "either input_ids or inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 5, 24)}, ValueError, "either input_ids or"),
    "narrow embeddings": ({"inputs_embeds": torch.ones(2, 5, 23)}, ValueError, r"inputs_embeds.*24.*\(2, 5, 23\)"),
    "flat embeddings": ({"inputs_embeds": torch.ones(5, 24)}, ValueError, r"inputs_embeds.*24.*\(5, 24\)"),
    "no embeddings": ({"inputs_embeds": torch.ones(2, 0, 24)}, ValueError, r"inputs_embeds.*24.*\(2, 0, 24\)"),
    "long embeddings": ({"inputs_embeds": torch.ones(2, 17, 24)}, ValueError, "17 tokens.*16"),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, ValueError, "output_attentions"),
    "hidden states": ({"input_ids": IDS, "output_hidden_states": True}, ValueError, "output_hidden_states"),
}


def refuse_to_run(model: GPTModel) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise AssertionError(f"{type(module).__name__} ran")

    for module in list(model.modules())[1:]:
        module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_any_layer_runs(case: str, tiny_model: GPTModel) -> None:
    arguments, error, message = WRONG[case]
    refuse_to_run(tiny_model)
    with pytest.raises(error, match=message):
        tiny_model(**arguments)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_leaves_the_cache_as_it_was(case: str, tiny_model: GPTModel) -> None:
    arguments, error, _ = WRONG[case]
    cache = tiny_model.new_cache(2)
    before = cache.storage.clone()
    with pytest.raises(error), torch.no_grad():
        tiny_model(**arguments, cache=cache)
    assert cache.length == 0 and torch.equal(cache.storage.nan_to_num(), before.nan_to_num())


CACHES: list[tuple[Callable[[GPTModel], KVCache], Tensor, str]] = [
    (lambda model: model.new_cache(2, 6), IDS, "8 tokens.*6"),
    (lambda model: model.new_cache(2), torch.zeros(2, 14, dtype=torch.int64), "17 tokens.*16"),
    (lambda model: model.new_cache(2), IDS[:1], "2 sequences.*1"),
]


@pytest.mark.parametrize(("make", "ids", "message"), CACHES, ids=["full", "past the context", "another batch"])
def test_a_cache_that_does_not_fit_is_refused_and_left_as_it_was(
    make: Callable[[GPTModel], KVCache], ids: Tensor, message: str, tiny_model: GPTModel
) -> None:
    cache = make(tiny_model)
    with torch.no_grad():
        tiny_model(IDS[:, :3], cache=cache)
    before = cache.storage.clone()
    refuse_to_run(tiny_model)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        tiny_model(ids, cache=cache)
    assert cache.length == 3 and torch.equal(cache.storage.nan_to_num(), before.nan_to_num())


def test_a_cache_is_refused_where_gradients_are_asked_for(tiny_model: GPTModel) -> None:
    """Otherwise the gradients would be wrong without a warning, or torch would report views modified in place."""
    refuse_to_run(tiny_model)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        tiny_model(IDS, cache=tiny_model.new_cache(2))


def test_labels_with_last_only_are_refused(tiny_model: GPTModel) -> None:
    refuse_to_run(tiny_model)
    with pytest.raises(ValueError, match="last_only"):
        tiny_model(IDS, labels=IDS, last_only=True)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (IDS[:, 1:], ValueError, r"\(2, 4\).*\(2, 5\)"),
        (IDS.int(), ValueError, "int64.*int32"),
        (IDS + 62, IndexError, "67 .*0 to 66"),
    ],
)
def test_wrong_targets_of_token_loss_are_refused_before_any_layer_runs(
    targets: Tensor, error: type[Exception], message: str, tiny_model: GPTModel
) -> None:
    refuse_to_run(tiny_model)
    with pytest.raises(error, match=message):
        tiny_model.token_loss(IDS, targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": IDS, "labels": IDS}, "either labels.* or targets"),
        ({"targets": IDS, "last_only": True}, "leave out last_only"),
    ],
)
def test_targets_that_exclude_another_argument_are_refused(
    arguments: dict[str, Any], message: str, tiny_model: GPTModel
) -> None:
    refuse_to_run(tiny_model)
    with pytest.raises(ValueError, match=message):
        tiny_model(IDS, **arguments)


def test_a_call_that_fails_can_be_followed_by_one_that_does_not(tiny_model64: GPTModel) -> None:
    cache = tiny_model64.new_cache(2)
    with torch.no_grad():
        tiny_model64(IDS[:, :2], cache=cache)
        with pytest.raises(IndexError):
            tiny_model64(IDS[:, 2:] + 99, cache=cache)
        after = tiny_model64(IDS[:, 2:], cache=cache)
        torch.testing.assert_close(after, tiny_model64(IDS)[:, 2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [0, -1, 17, 2.5])
def test_a_cache_longer_than_the_context_or_empty_is_refused(length: Any, tiny_model: GPTModel) -> None:
    with pytest.raises(ValueError, match=f"1 to 16.*{length}"):
        tiny_model.new_cache(2, length)
