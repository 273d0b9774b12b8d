"""The book's GPT and nanoGPT's, written with their attribute names and without our code.

They make the state dicts that MyGPT must recognise, and the logits that it must reproduce.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BookAttention(nn.Module):
    """The book's attention, with separate projections for queries, keys and values."""

    def __init__(self, width: int, n_heads: int, context: int, qkv_bias: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.W_query = nn.Linear(width, width, bias=qkv_bias)
        self.W_key = nn.Linear(width, width, bias=qkv_bias)
        self.W_value = nn.Linear(width, width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(context, context).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.n_heads, -1)) for part in (self.W_query(x), self.W_key(x), self.W_value(x)))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        T = x.shape[1]
        weights = scores.masked_fill(self.mask[:T, :T].bool(), float("-inf")).softmax(-1)
        return self.out_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


class BookNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + self.shift


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class BookBlock(nn.Module):
    def __init__(self, width: int, n_heads: int, context: int, qkv_bias: bool) -> None:
        super().__init__()
        self.att = BookAttention(width, n_heads, context, qkv_bias)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(nn.Linear(width, 4 * width), TanhGELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = BookNorm(width), BookNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff.layers(self.norm2(x))


class BookGPT(nn.Module):
    """The book's model, with its names: tok_emb, trf_blocks.{i}.att.W_query, ff.layers.0, norm1.scale, out_head (untied)."""

    def __init__(self, vocab: int, context: int, width: int, n_heads: int, n_layers: int, qkv_bias: bool) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.trf_blocks = nn.Sequential(*(BookBlock(width, n_heads, context, qkv_bias) for _ in range(n_layers)))
        self.final_norm = BookNorm(width)
        self.out_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb.weight[: ids.shape[1]]
        return self.out_head(self.final_norm(self.trf_blocks(x)))


class NanoAttention(nn.Module):
    def __init__(self, width: int, n_heads: int, context: int, bias: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.register_buffer(
            "bias", torch.ones(context, context).tril()[None, None]
        )  # the causal mask, which nanoGPT stores where torch has no fused attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self, width: int, n_heads: int, context: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = NanoAttention(width, n_heads, context, bias)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's model, with its names, its exact GELU, its `bias` option and its tied head."""

    def __init__(self, vocab: int, context: int, width: int, n_heads: int, n_layers: int, bias: bool) -> None:
        super().__init__()
        self.model_args = {
            "n_layer": n_layers, "n_head": n_heads, "n_embd": width, "block_size": context, "bias": bias,
            "vocab_size": vocab, "dropout": 0.2,
        }  # fmt: skip
        blocks = nn.ModuleList(NanoBlock(width, n_heads, context, bias) for _ in range(n_layers))
        parts = {"wte": nn.Embedding(vocab, width), "wpe": nn.Embedding(context, width), "h": blocks}
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(width, bias=bias)})
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    def checkpoint(self) -> dict[str, Any]:
        """Return the checkpoint that nanoGPT's training script saves for a compiled model."""
        return {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in self.state_dict().items()},
            "optimizer": torch.optim.AdamW(self.parameters()).state_dict(),
            "model_args": self.model_args,
            "iter_num": 7,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "shakespeare_char"},
        }


def write_llmc(path: Path, model: Any, dtype: torch.dtype, multiple: int = 128) -> None:
    """Write a GPTModel as llm.c's train_gpt2.py does: a header of 256 int32, then one weight of all blocks after another."""
    config, weights = model.config, model.state_dict()
    n_rows = -(-config.vocab_size // multiple) * multiple
    header = np.zeros(256, np.int32)
    version = {torch.float32: 3, torch.bfloat16: 5}[dtype]
    sizes = [config.context_length, config.vocab_size, config.n_layers, config.n_heads, config.emb_dim, n_rows]
    header[:8] = [20240326, version, *sizes]
    parts = ("ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight attn.c_proj.bias "
             "ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias")  # fmt: skip
    blocks = [f"transformer.h.{i}.{part}" for part in parts.split() for i in range(config.n_layers)]
    padding = torch.zeros(n_rows - config.vocab_size, config.emb_dim)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for values in (weights["transformer.wte.weight"], padding, weights["transformer.wpe.weight"]):
            file.write(values.contiguous().to(dtype).view(torch.uint8).numpy().tobytes())
        for name in (*blocks, "transformer.ln_f.weight", "transformer.ln_f.bias"):
            file.write(weights[name].contiguous().to(dtype).view(torch.uint8).numpy().tobytes())
