"""A trained model made fast for generation on a processor. It is called as the model is, and gives the same logits.

`accelerate` lays the weights out once (packed.py). Then a few new tokens at a time go through kernel.cpp in one call; prompts,
and everything where there is no compiler, go through the same layers here, stated with torch.
B batch, T new tokens, S tokens seen, C width, H heads, D = C // H, V vocabulary.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.acceleration import kernel as c
from MyGPT.acceleration.packed import DTYPES, AnyLinear, HugePages, PanelLinear, PlainLinear, Precision, panel_bytes
from MyGPT.model import Block, GPTModel, KVCache, TiedHead, _positions_and_mask

FEW = 32
"""Up to so many new tokens of a sequence go through the kernel whole; for more, torch's attention is faster."""


def accelerate(
    model: GPTModel, precision: Precision = "fp32", *, build: c.Build | None = None, compiled: bool | None = None
) -> FastModel:
    """The model with its weights laid out for generation on this processor, to give to `generate` in its place.

    precision "fp32" gives the model's logits but for the rounding of sums; "bf16" and "int8" keep the weights in a half
    and a quarter of the memory, which is what generation waits for. The first call on a machine compiles a kernel (3 s);
    without a compiler torch's own operators are used, and a line on stderr says so: compiled=True makes that an error,
    compiled=False asks for it. The weights are copied: training the model afterwards does not change the fast one. A
    model on a GPU, in float64, or with an unmerged adapter is refused.
    """
    _check_model(model, precision)
    loaded: c.Kernel | None = None
    if compiled is not False:
        try:
            loaded = (build or c.Build()).wait()
        except OSError as error:
            if compiled:
                raise
            print(f"{error}; generating with torch's operators, which is slower", file=sys.stderr)
    return FastModel(model, precision, loaded)


def _check_model(model: GPTModel, precision: str) -> None:
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    if not isinstance(model, GPTModel):
        raise ValueError(f"accelerate takes a GPTModel, got a {type(model).__name__}: merge an adapter first")
    for name, module in model.named_modules():
        plain = type(module) in (nn.Linear, nn.Embedding, nn.LayerNorm, TiedHead)
        if not plain and name.endswith(("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f", "wte", "wpe", "lm_head")):
            raise ValueError(f"{name} is a {type(module).__name__}, not GPT-2's own layer: merge an adapter first")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                "accelerate takes a model on the CPU, in float32, bfloat16 or float16; "
                f"{name} is {parameter.dtype} on {parameter.device.type}"
            )


def _linears(block: Block) -> tuple[nn.Linear, ...]:
    """A block's matrices in the order in which kernel.cpp names them."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


class _Norm:
    """LayerNorm in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps
        self.described = c.Norm(c.address(self.weight), c.address(self.bias))

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FastModel(nn.Module):
    """What `accelerate` returns: input_ids to logits as a GPTModel, without gradients. It has no parameters to train."""

    def __init__(self, model: GPTModel, precision: Precision, kernel: c.Kernel | None) -> None:
        super().__init__()
        self.config = model.config
        self.precision = precision
        self.kernel = kernel
        self.gelu = self.config.activation
        head, transformer = model.lm_head, model.transformer
        layers: Any = transformer.h
        linears = [head, *(linear for h in layers for linear in _linears(h))]
        weights = [linear.weight for linear in linears]
        self._memory = HugePages(panel_bytes(weights, precision, kernel)) if kernel is not None else None
        self.head = self._pack(head)
        # The embedding is the head's panels, or a table of its own.
        self.table = None if head.weight is transformer.wte.weight else transformer.wte.weight.detach().float().clone()
        self.wpe = transformer.wpe.weight.detach().float().clone()  # a view would keep the whole file in memory
        self.norms = [(_Norm(h.ln_1), _Norm(h.ln_2)) for h in layers]
        self.linears = [[self._pack(linear) for linear in _linears(h)] for h in layers]
        self.ln_f = _Norm(transformer.ln_f)
        self.described = self._describe()
        self.train(False)

    def _pack(self, linear: nn.Linear | TiedHead) -> AnyLinear:
        bias = getattr(linear, "bias", None)
        if self.kernel is None or self._memory is None:
            return PlainLinear(linear.weight, bias, self.precision)
        return PanelLinear(linear.weight, bias, self.precision, self.kernel, self._memory)

    def _describe(self) -> c.Model | None:
        """The model as kernel.cpp sees it."""
        if not isinstance(self.head, PanelLinear):
            return None
        blocks = (c.Block * self.config.n_layers)()
        for block, norms, linears in zip(blocks, self.norms, self.linears, strict=True):
            block.ln_1, block.ln_2 = (norm.described for norm in norms)
            block.c_attn, block.attn_proj, block.c_fc, block.mlp_proj = (
                linear.described for linear in linears if isinstance(linear, PanelLinear)
            )
        return c.Model(
            c.address(self.table), c.address(self.wpe), blocks, self.ln_f.described, self.head.described,
            self.config.n_layers, self.config.n_heads, self.head.panels.element_size(), self.gelu == "gelu",
            self.config.layer_norm_eps,
        )  # fmt: skip

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """An empty cache for batch_size sequences of up to `length` tokens (default: the context)."""
        context = self.config.context_length
        length = context if length is None else length
        if type(length) is not int or not 1 <= length <= context:
            raise ValueError(f"a cache's length must be a whole number from 1 to {context}, got {length!r}")
        return KVCache(self.config, batch_size, length, like=self.wpe)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) float32, or the last position's (B, 1, V); input_ids, attention_mask and cache as in GPTModel."""
        B, T = self._check(input_ids, attention_mask, cache)
        first = _first_tokens(attention_mask, B)
        if self.described is not None and cache is not None and first is not None and T <= FEW:
            return self._few(input_ids, first, cache, 1 if last_only else T)
        return self._many(input_ids, attention_mask, cache, last_only)

    def _few(self, input_ids: Tensor, first: Tensor, cache: KVCache, n: int) -> Tensor:
        """Through the kernel; first (B) is where each row begins after its padding on the left."""
        assert self.kernel is not None and self.described is not None
        B, T = input_ids.shape
        logits = torch.empty(B, n, self.config.vocab_size)
        scratch = torch.empty(6 * B * T * self.config.emb_dim)
        self.kernel.forward(
            self.described, input_ids.contiguous(), cache.length, first.int(), cache.storage, logits, scratch
        )
        cache.length += T
        return logits

    def _many(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None, last_only: bool) -> Tensor:
        """A layer after the other, as in model.py."""
        B, T = input_ids.shape
        S = T + (cache.length if cache is not None else 0)
        positions, mask = _positions_and_mask(attention_mask, B, T, S, input_ids.device)
        wte = self.head.rows(input_ids) if self.table is None else F.embedding(input_ids, self.table)
        x = wte + self.wpe[positions]  # (B, T, C)
        layers = zip(self.norms, self.linears, strict=True)
        for layer, ((ln_1, ln_2), (c_attn, attn_proj, c_fc, mlp_proj)) in enumerate(layers):
            q, k, v = c_attn(ln_1(x)).view(B, T, 3, self.config.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            if cache is not None:
                k, v = cache.append(layer, k, v)  # (B, H, S, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
            x = attn_proj(y.transpose(1, 2).reshape(B, T, -1), "add", x)
            x = mlp_proj(c_fc(ln_2(x), self.gelu), "add", x)
        if cache is not None:
            cache.length = S
        return self.head(self.ln_f(x[:, -1:] if last_only else x))

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> tuple[int, int]:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.int64:
            raise ValueError(
                f"input_ids must be int64 (batch, time) with at least one token, got {input_ids.dtype} "
                f"{tuple(input_ids.shape)}"
            )
        if input_ids.device.type != "cpu":
            raise ValueError(f"an accelerated model runs on the CPU, input_ids are on {input_ids.device}")
        for id_ in (int(end) for end in input_ids.aminmax()):
            if not 0 <= id_ < self.config.vocab_size:
                raise IndexError(f"id {id_} is outside the vocabulary, ids are 0 to {self.config.vocab_size - 1}")
        B, T = input_ids.shape
        S = T if cache is None else cache.length + T
        if self.config.context_length < S:
            raise ValueError(f"the sequence has {S} tokens, the model's context_length is {self.config.context_length}")
        if attention_mask is not None and attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask must be (batch, time seen) = {(B, S)}, got {tuple(attention_mask.shape)}")
        if cache is not None:
            cache.check(B, S)
        return B, T


def _first_tokens(attention_mask: Tensor | None, B: int) -> Tensor | None:
    """Where each row begins after padding on the left, (B,); None if the mask says more than that."""
    if attention_mask is None:
        return torch.zeros(B, dtype=torch.int64)
    mask = attention_mask.long()
    first = mask.shape[1] - mask.sum(1)
    is_left_padded = torch.equal(mask, (torch.arange(mask.shape[1]) >= first[:, None]).long())
    return first if is_left_padded else None
