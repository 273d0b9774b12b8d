"""Test traces against transformers, and edits by their effect, their place and their duration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel, generate
from MyGPT.inside.tracing import (
    Trace,
    ablate_heads,
    ablate_mlps,
    edit,
    induction_scores,
    logit_lens,
    nearest_tokens,
    patch,
    patching_effects,
    places,
    trace,
)
from oracles_model import transformers_twin

# In float64, with numbers from 1 to 100, rounding errors are about 1e-13 and mistakes 1e-3 or more.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(67, (2, 11))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def all_hooks(model: GPTModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Recorder:
    """The inputs and outputs of the modules of a transformers model, by module name."""

    def __init__(self, twin: GPT2LMHeadModel) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name, module in twin.named_modules():
            module.register_forward_hook(lambda _, args, output, name=name: self.record(name, args, output))

    def record(self, name: str, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if args:
            self.inputs[name] = args[0]
        self.outputs[name] = output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_attention_and_hidden_states_equal_those_of_transformers(tiny_model64: GPTModel, ids: Tensor) -> None:
    theirs = transformers_twin(tiny_model64)(ids, output_attentions=True, output_hidden_states=True)
    ours = trace(tiny_model64, ids)
    same(ours.attention, torch.stack(theirs.attentions))
    # The last hidden state of transformers is the output of the final LayerNorm.
    same(ours.residual[:-1], torch.stack(theirs.hidden_states[:-1]))
    same(ours["ln_f"], theirs.hidden_states[-1])
    same(ours["logits"], theirs.logits)


@torch.no_grad()
def test_every_other_place_equals_the_same_module_of_transformers(tiny_model64: GPTModel, ids: Tensor) -> None:
    twin = transformers_twin(tiny_model64)
    recorder = Recorder(twin)
    twin(ids)
    ours = trace(tiny_model64, ids)
    into, out = recorder.inputs, recorder.outputs
    same(ours["wte"], out["transformer.wte"])
    same(ours["wpe"], out["transformer.wpe"].squeeze(0))
    same(ours["embeddings"], into["transformer.h.0"])
    heads, D = tiny_model64.config.n_heads, tiny_model64.config.emb_dim // tiny_model64.config.n_heads
    for i in range(tiny_model64.config.n_layers):
        layer, theirs = f"h.{i}", f"transformer.h.{i}"
        for part in ("ln_1", "attn", "ln_2", "mlp.c_fc", "mlp"):
            same(ours[f"{layer}.{part}"], out[f"{theirs}.{part}"])
        same(ours[f"{layer}.after_attn"], into[f"{theirs}.ln_2"])
        same(ours[f"{layer}.mlp.activations"], out[f"{theirs}.mlp.act"])
        gathered = into[f"{theirs}.attn.c_proj"]
        for name, part in zip("qkv", out[f"{theirs}.attn.c_attn"].split(heads * D, dim=2), strict=True):
            for head in range(heads):
                same(ours[f"{layer}.attn.{name}"][:, head], part[..., head * D : (head + 1) * D])
        for head in range(heads):
            same(ours[f"{layer}.attn.heads"][:, head], gathered[..., head * D : (head + 1) * D])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_masked_in_the_attention_weights_too(tiny_model64: GPTModel, ids: Tensor, side: str) -> None:
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(7, None)] = 0
    twin = transformers_twin(tiny_model64)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = twin(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    ours = trace(tiny_model64, ids, attention_mask=mask)
    tokens = mask.bool()
    for i, weights in enumerate(theirs):
        for row in range(2):
            # The weights of padding queries are undefined and differ.
            same(ours[f"h.{i}.attn.weights"][row, :, tokens[row]], weights[row, :, tokens[row]])
    assert not ours["h.0.attn.weights"][0, :, tokens[0]][..., ~tokens[0]].any()


def test_a_trace_has_every_place_in_order_and_no_gradients(tiny_model: GPTModel, ids: Tensor) -> None:
    traced = trace(tiny_model, ids)
    assert list(traced) == places(tiny_model)
    assert not any(value.requires_grad for value in traced.values())


def test_a_trace_removes_its_hooks_restores_the_mode_and_disables_dropout(ids: Tensor) -> None:
    config = GPTConfig(vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.5)
    model = lively_model(config).train()
    first, second = trace(model, ids), trace(model, ids)
    assert torch.equal(first["logits"], second["logits"])
    assert torch.equal(first["logits"], model.eval()(ids))
    model.train()
    with pytest.raises(IndexError):
        trace(model, ids + 67)
    assert model.training and model.transformer.h[0].attn.training
    assert all_hooks(model) == 0


@torch.no_grad()
def test_the_logit_lens_equals_a_model_with_fewer_layers(tiny_model64: GPTModel, ids: Tensor) -> None:
    """The oracle is a transformers model with only the first layers and the same output head."""
    lens = logit_lens(tiny_model64, trace(tiny_model64, ids))
    assert torch.equal(lens[-1], tiny_model64(ids))
    for n_layers in range(len(lens)):
        short = transformers_twin(tiny_model64)
        short.transformer.h = short.transformer.h[:n_layers]
        short.config.n_layer = n_layers
        same(lens[n_layers], short(ids).logits)


@torch.no_grad()
def test_ablating_heads_equals_zeroing_their_rows_of_the_projection(tiny_model64: GPTModel, ids: Tensor) -> None:
    twin = transformers_twin(tiny_model64)
    D = tiny_model64.config.emb_dim // tiny_model64.config.n_heads
    ablated = [(0, 2), (2, 0), (2, 1)]
    for layer, head in ablated:
        twin.transformer.h[layer].attn.c_proj.weight[head * D : (head + 1) * D] = 0  # (in, out)
    with ablate_heads(tiny_model64, ablated):
        same(tiny_model64(ids), twin(ids).logits)
    assert all_hooks(tiny_model64) == 0


@torch.no_grad()
def test_ablating_an_mlp_equals_zeroing_its_projection(tiny_model64: GPTModel, ids: Tensor) -> None:
    twin = transformers_twin(tiny_model64)
    twin.transformer.h[1].mlp.c_proj.weight.zero_()
    twin.transformer.h[1].mlp.c_proj.bias.zero_()
    with ablate_mlps(tiny_model64, [1]):
        same(tiny_model64(ids), twin(ids).logits)


def test_generation_with_an_ablation_is_the_same_with_and_without_the_cache(
    tiny_model64: GPTModel, ids: Tensor
) -> None:
    plain = generate(tiny_model64, ids, 8)
    with ablate_heads(tiny_model64, [(0, 0), (1, 2)]), ablate_mlps(tiny_model64, [2]):
        cached, uncached = generate(tiny_model64, ids, 8), generate(tiny_model64, ids, 8, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(generate(tiny_model64, ids, 8), plain)


@torch.no_grad()
def test_a_trace_within_an_edit_shows_the_edit(tiny_model64: GPTModel, ids: Tensor) -> None:
    plain = trace(tiny_model64, ids)
    with edit(tiny_model64, {"h.1.attn": lambda x: 2 * x, "embeddings": lambda x: x + 1}):
        edited = trace(tiny_model64, ids)
    same(edited["embeddings"], plain["embeddings"] + 1)
    same(edited["h.1.after_attn"], edited["h.0"] + edited["h.1.attn"])
    with edit(tiny_model64, {"embeddings": lambda x: x + 1}):
        same(edited["h.1.attn"], 2 * trace(tiny_model64, ids)["h.1.attn"])


@pytest.mark.parametrize("place", ["wte", "embeddings", "h.0", "h.2.attn", "h.1.mlp", "h.0.attn.heads", "ln_f"])
@torch.no_grad()
def test_a_patch_with_its_own_trace_changes_nothing_and_a_full_patch_gives_the_clean_logits(
    tiny_model64: GPTModel, ids: Tensor, place: str
) -> None:
    other = torch.randint(67, ids.shape)
    clean, plain = trace(tiny_model64, ids), tiny_model64(other)
    with patch(tiny_model64, trace(tiny_model64, other), place):
        same(tiny_model64(other), plain)
    with patch(tiny_model64, clean, place):
        patched = tiny_model64(other)
    if place in ("wte", "embeddings", "h.0", "ln_f"):  # the rest of the model reads nothing else
        same(patched, clean["logits"])
    else:
        assert (patched - plain).abs().max() > 1e-3 < (patched - clean["logits"]).abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_patching_effects_equal_edits_of_the_states_of_transformers(tiny_model64: GPTModel) -> None:
    twin = transformers_twin(tiny_model64)
    clean, corrupted = torch.randint(67, (1, 6)), torch.randint(67, (1, 6))

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 9]

    recorder = Recorder(twin)
    twin(clean)
    source, into = dict(recorder.outputs), dict(recorder.inputs)
    D = tiny_model64.config.emb_dim // tiny_model64.config.n_heads
    for part, n in (("", 6), ("attn", 6), ("mlp", 6), ("attn.heads", 3)):
        effects = patching_effects(tiny_model64, clean, corrupted, metric, part)
        assert effects.shape == (3, n)
        for layer in range(3):
            for index in range(n):
                name = f"transformer.h.{layer}.{part}".rstrip(".").replace(".heads", ".c_proj")
                module = twin.get_submodule(name)

                def out(_: object, args: object, output: object, name: str = name, t: int = index) -> object:
                    first = output[0] if isinstance(output, tuple) else output
                    first[:, t] = source[name][:, t]
                    return (first, *output[1:]) if isinstance(output, tuple) else first

                def head(_: object, args: tuple[Tensor], name: str = name, h: int = index) -> tuple[Tensor]:
                    args[0][..., h * D : (h + 1) * D] = into[name][..., h * D : (h + 1) * D]
                    return args

                hook = module.register_forward_hook(out)
                if part == "attn.heads":
                    hook.remove()
                    hook = module.register_forward_pre_hook(head)
                expected = metric(twin(corrupted).logits)
                hook.remove()
                assert float(effects[layer, index]) == pytest.approx(float(expected), abs=1e-9)


def test_a_patch_of_the_last_token_after_the_last_layer_gives_the_clean_answer(tiny_model64: GPTModel) -> None:
    clean, corrupted = torch.randint(67, (1, 6)), torch.randint(67, (1, 6))
    effects = patching_effects(tiny_model64, clean, corrupted, lambda logits: logits[0, -1, 3])
    plain, aimed = (tiny_model64(ids)[0, -1, 3].item() for ids in (corrupted, clean))
    assert effects[-1].tolist() == pytest.approx([plain] * 5 + [aimed])


def test_uniform_attention_has_the_expected_induction_score(tiny_model64: GPTModel) -> None:
    for block in tiny_model64.transformer.h:
        torch.nn.init.zeros_(block.attn.c_attn.weight)
        torch.nn.init.zeros_(block.attn.c_attn.bias)
    scores = induction_scores(tiny_model64, length=8)
    expected = sum(1 / (t + 1) for t in range(8, 16)) / 8  # token t attends uniformly to t + 1 tokens
    same(scores, torch.full((3, 3), expected, dtype=torch.float64))


def test_a_head_that_attends_after_the_previous_copy_scores_one() -> None:
    """Position embeddings are one-hot and queries match position t - n + 1, so the score is 1 only at this length."""
    n, width = 8, 32
    model = GPTModel(
        {"vocab_size": 11, "context_length": 2 * n, "emb_dim": width, "n_heads": 1, "n_layers": 1}
    ).double()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(2 * n, width))
        weight = torch.zeros(3, width, width, dtype=torch.float64)
        for t in range(n, 2 * n):
            weight[0, t - n + 1, t] = 100.0
        weight[1] = torch.eye(width)
        model.transformer.h[0].attn.c_attn.weight.copy_(weight.flatten(0, 1))
    assert float(induction_scores(model, length=n)) > 0.999
    assert float(induction_scores(model, length=n - 2)) < 0.01


def test_nearest_tokens_have_the_largest_cosine_similarity(tiny_model: GPTModel) -> None:
    ids, cosines = nearest_tokens(tiny_model, 5, k=4)
    weight = tiny_model.transformer.wte.weight.detach()
    expected = sorted(
        ((float(torch.cosine_similarity(weight[5], weight[i], dim=0)), i) for i in range(67) if i != 5), reverse=True
    )
    assert ids.tolist() == [i for _, i in expected[:4]]
    assert cosines.tolist() == pytest.approx([cosine for cosine, _ in expected[:4]], abs=1e-6)


def test_invalid_arguments_raise_errors_of_one_sentence(tiny_model: GPTModel, ids: Tensor) -> None:
    traced = trace(tiny_model, ids)
    identity = {"h.0.attn.weights": lambda x: x}
    for wrong, words in [
        (
            lambda: edit(tiny_model, identity).__enter__(),
            r"'h.0.attn.weights' cannot be edited; .*embeddings.* h.i.attn",
        ),
        (lambda: ablate_heads(tiny_model, [(0, 3)]).__enter__(), "head must be a whole number from 0 to 2, got 3"),
        (lambda: ablate_heads(tiny_model, [(-1, 0)]).__enter__(), "layer must be .* got -1"),
        (lambda: ablate_mlps(tiny_model, [3]).__enter__(), "layer must be a whole number from 0 to 2, got 3"),
        (lambda: patch(tiny_model, traced, "h.9").__enter__(), "the trace has no activation 'h.9'"),
        (lambda: patch(tiny_model, traced, "h.0", 11).__enter__(), "index must be a whole number from 0 to 10, got 11"),
        (lambda: patching_effects(tiny_model, ids, ids[:1], torch.sum), "same number of sequences and tokens"),
        (lambda: patching_effects(tiny_model, ids, ids, torch.sum, "nose"), "part must be one of .* got 'nose'"),  # type: ignore[arg-type]
        (lambda: induction_scores(tiny_model, length=9), "length must be a whole number from 2 to 8.* got 9"),
        (lambda: nearest_tokens(tiny_model, 67), "id must be a whole number from 0 to 66, got 67"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(TypeError, match="the model must be a GPTModel, got Linear"):
        trace(torch.nn.Linear(2, 2), ids)  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match=r"edit of h.0 returned shape \(2, 11\), the activation has \(2, 11, 24\)"),
        edit(tiny_model, {"h.0": lambda x: x[..., 0]}),
    ):
        tiny_model(ids)
    with (
        pytest.raises(ValueError, match=r"h.0 has shape \(2, 5, 24\), in the trace \(2, 11, 24\)"),
        patch(tiny_model, traced, "h.0"),
    ):
        tiny_model(ids[:, :5])
    assert all_hooks(tiny_model) == 0
    assert isinstance(traced, Trace)
