"""Compare MyGPT.inside with TransformerLens on a GPT-2 124M with random weights: the largest differences, and the times.

    pip install 'transformer-lens<3' && python benchmarks/inside.py

TransformerLens 2 has its own implementation of GPT-2, so its numbers are an independent check; version 3 and later wrap
transformers. It gets the same weights, without folding and centring, so that both follow the same conventions. In
float64 the differences must be rounding errors. In float32 both are timed in turn.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from MyGPT import GPT2_CONFIGS, GPTModel
from MyGPT.inside.tracing import ablate_heads, induction_scores, logit_lens, patching_effects, trace

# MyGPT's place, TransformerLens's name, and "heads" where it has (B, T, H, D) instead of (B, H, T, D).
PLACES = {
    "ln_1": ("ln1.hook_normalized", None),
    "attn.q": ("attn.hook_q", "heads"),
    "attn.k": ("attn.hook_k", "heads"),
    "attn.v": ("attn.hook_v", "heads"),
    "attn.weights": ("attn.hook_pattern", None),
    "attn.heads": ("attn.hook_z", "heads"),
    "attn": ("hook_attn_out", None),
    "after_attn": ("hook_resid_mid", None),
    "mlp.c_fc": ("mlp.hook_pre", None),
    "mlp.activations": ("mlp.hook_post", None),
    "mlp": ("hook_mlp_out", None),
    "": ("hook_resid_post", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    ours = GPTModel(GPT2_CONFIGS["124M"]).eval()
    with torch.no_grad():  # biases and LayerNorms are random too
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(50257, (1, options.tokens))
    compare(ours.double(), peer(ours), ids)
    theirs = peer(ours.float())
    times = in_turn(
        {
            "MyGPT, forward alone": lambda: ours(ids),
            "MyGPT, trace": lambda: trace(ours, ids),
            "TransformerLens, forward alone": lambda: theirs(ids),
            "TransformerLens, run_with_cache": lambda: theirs.run_with_cache(ids),
        },
        options.rounds,
    )
    for name, seconds in times.items():
        print(f"{name:<34}{seconds:8.3f} s")


def peer(ours: GPTModel) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = ours.config
    theirs = HookedTransformer(
        HookedTransformerConfig(
            n_layers=config.n_layers,
            d_model=config.emb_dim,
            n_ctx=config.context_length,
            d_head=config.emb_dim // config.n_heads,
            n_heads=config.n_heads,
            d_mlp=4 * config.emb_dim,
            d_vocab=config.vocab_size,
            act_fn="gelu_new",
            eps=config.layer_norm_eps,
            normalization_type="LN",
            device="cpu",
            dtype=ours.lm_head.weight.dtype,
        )
    )
    H, D, C = config.n_heads, config.emb_dim // config.n_heads, config.emb_dim
    state = {
        "embed.W_E": ours.transformer.wte.weight,
        "pos_embed.W_pos": ours.transformer.wpe.weight,
        "ln_final.w": ours.transformer.ln_f.weight,
        "ln_final.b": ours.transformer.ln_f.bias,
        "unembed.W_U": ours.transformer.wte.weight.T,
        "unembed.b_U": torch.zeros(config.vocab_size),
    }
    for i, block in enumerate(ours.transformer.h):
        names = {}
        for kind, weight, bias in zip(
            "QKV", block.attn.c_attn.weight.split(C), block.attn.c_attn.bias.split(C), strict=True
        ):
            names[f"attn.W_{kind}"] = weight.view(H, D, C).transpose(1, 2)  # (H, C, D)
            names[f"attn.b_{kind}"] = bias.view(H, D)
        names["attn.W_O"] = block.attn.c_proj.weight.T.reshape(H, D, C)
        names["attn.b_O"] = block.attn.c_proj.bias
        names["mlp.W_in"], names["mlp.b_in"] = block.mlp.c_fc.weight.T, block.mlp.c_fc.bias
        names["mlp.W_out"], names["mlp.b_out"] = block.mlp.c_proj.weight.T, block.mlp.c_proj.bias
        for number, norm in ((1, block.ln_1), (2, block.ln_2)):
            names[f"ln{number}.w"], names[f"ln{number}.b"] = norm.weight, norm.bias
        state |= {f"blocks.{i}.{name}": value for name, value in names.items()}
    missing = theirs.load_state_dict({name: value.detach().clone() for name, value in state.items()}, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    assert all(key.endswith(("mask", "IGNORE")) for key in missing.missing_keys), missing.missing_keys
    return theirs.eval()


@torch.no_grad()
def compare(ours: GPTModel, theirs: Any, ids: Tensor) -> None:
    """Print the largest difference at each place, relative to the largest value there."""
    traced = trace(ours, ids)
    logits, cache = theirs.run_with_cache(ids)

    def report(name: str, mine: Tensor, other: Tensor) -> None:
        print(f"{name:<34}{float((mine - other).abs().max() / other.abs().max()):10.1e}")

    for place, (name, axes) in PLACES.items():
        mine = torch.stack([traced[f"h.{i}.{place}".rstrip(".")] for i in range(ours.config.n_layers)])
        other = torch.stack([cache[f"blocks.{i}.{name}"] for i in range(ours.config.n_layers)])
        report(f"h.i.{place}".rstrip("."), mine, other.transpose(2, 3) if axes == "heads" else other)
    report("logits", traced["logits"], logits)
    residual, _ = cache.accumulated_resid(incl_mid=False, apply_ln=False, return_labels=True)
    lens = theirs.unembed(theirs.ln_final(residual[:, 0])) if residual.dim() == 4 else None
    report("logit lens", logit_lens(ours, traced)[:, 0], lens)

    def silence(z: Tensor, hook: object) -> Tensor:
        z[:, :, 3] = 0
        return z

    with ablate_heads(ours, [(5, 3)]):
        mine = ours(ids)
    report("ablation of a head", mine, theirs.run_with_hooks(ids, fwd_hooks=[("blocks.5.attn.hook_z", silence)]))

    short, other = ids[:, :3], torch.randint(50257, (1, 3))

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 11] - logits[0, -1, 12]

    from transformer_lens import patching

    _, clean = theirs.run_with_cache(short)
    residual = patching.get_act_patch_resid_pre(
        theirs, other, clean, metric
    )  # the stream before layer i is the stream after layer i - 1
    effects = patching_effects(ours, short, other, metric)
    report("patching of the residual stream", effects[:-1], residual[1:].double())
    heads = patching.get_act_patch_attn_head_out_all_pos(theirs, other, clean, metric)
    report("patching of heads", patching_effects(ours, short, other, metric, "attn.heads"), heads.double())

    n = 20
    once = torch.randint(50257, (8, n), generator=torch.Generator().manual_seed(0))
    _, cache = theirs.run_with_cache(torch.cat([once, once], 1))
    times = torch.arange(n, 2 * n)
    pattern = torch.stack([cache["pattern", i] for i in range(ours.config.n_layers)])
    report("induction scores", induction_scores(ours, n), pattern[..., times, times - n + 1].mean((1, 3)))


@torch.no_grad()
def in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each function. They run in turn in every round, after one warm-up call."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
