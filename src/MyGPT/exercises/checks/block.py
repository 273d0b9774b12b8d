"""The check of block.py: the block is compared with this library's Block with the same weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.config import GPTConfig
from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, Wrong, expect_tensor
from MyGPT.exercises.student import Student
from MyGPT.exercises.tasks.block import Block as OriginalBlock
from MyGPT.model import Block

Weights = dict[str, Tensor]
C, H = 12, 3
LIBRARY_NAMES = {"c_attn": "attn.c_attn", "attn_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
"""The names of the library's layers, where they differ from the names in the exercise."""

MISTAKES = {
    "no first residual": "the first residual connection is missing: the output of attention must be added to x",
    "no second residual": "the second residual connection is missing: the output of the MLP must be added to the stream",
    "no residual": "both residual connections are missing: the outputs of attention and of the MLP must be added to the stream",
    "post-LN": "the LayerNorms come after the additions (post-LN), but GPT-2 normalises what attention and the MLP read (pre-LN)",
    "normalised residual": "the output is added to the normalised stream; add it to the stream before the LayerNorm",
    "ln_1 twice": "ln_1 is used twice; the MLP reads ln_2 of the stream",
    "ln_2 twice": "ln_2 is used twice; attention reads ln_1 of the stream",
    "exchanged LayerNorms": "ln_1 and ln_2 are exchanged",
    "no ln_1": "ln_1 is missing: attention reads ln_1(x)",
    "no ln_2": "ln_2 is missing: the MLP reads ln_2 of the stream",
    "no LayerNorm": "both LayerNorms are missing",
    "parallel": "the MLP reads the stream before attention was added to it",
    "exact GELU": "the exact GELU is used; GPT-2 uses the approximation: gelu(..., approximate='tanh')",
    "ReLU": "ReLU is used in place of GELU",
    "SiLU": "SiLU is used in place of GELU",
    "no activation": "the MLP has no activation function between its two layers",
    "late activation": "GELU is applied after the second layer of the MLP, but it belongs between the two layers",
    "not causal": "attention is not causal: set is_causal=True",
    "wrong split": "the heads are split in the wrong order: use view(B, T, H, D).transpose(1, 2), not view(B, H, T, D)",
    "wrong split and merge": "the heads are split in the wrong order: use view(B, T, H, D).transpose(1, 2), not view(B, H, T, D)",
    "interleaved heads": "the heads are split in the wrong order: use view(B, T, H, D), not view(B, T, D, H)",
    "wrong merge": "the heads are put together in the wrong order: use transpose(1, 2) before reshape(B, T, C)",
    "heads of q, k and v": "c_attn's output holds all queries, then all keys, then all values: chunk it, then split heads",
    "k, q, v": "the queries and keys are exchanged: c_attn's output holds q, k, v in this order",
    "v, k, q": "c_attn's output holds q, k, v in this order, but it is read as v, k, q",
    "one head": "the queries are not split into heads",
    "no attn_proj": "attn_proj is missing after attention",
    "scaled twice": "the scores are divided by √D twice: scaled_dot_product_attention already does it",
}
"""For each mistake that `block_output` can make, the sentence that explains it."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact GELU": F.gelu, "ReLU": F.relu, "SiLU": F.silu, "no activation": lambda x: x,
}  # fmt: skip
"""The wrong activation functions of `block_output`."""


def block_output(p: Weights, x: Tensor, H: int, mistake: str = "") -> Tensor:
    """Return the output of a block with the parameters p, computed with one of the mistakes in MISTAKES or without one."""

    def norm(name: str, x: Tensor) -> Tensor:
        if mistake in (f"no {name}", "no LayerNorm"):
            return x
        if mistake == "exchanged LayerNorms":
            name = {"ln_1": "ln_2", "ln_2": "ln_1"}[name]
        name = {"ln_1 twice": "ln_1", "ln_2 twice": "ln_2"}.get(mistake, name)
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def attention(x: Tensor) -> Tensor:
        return _attention(linear("c_attn", x), H, mistake)

    def mlp(x: Tensor) -> Tensor:
        x = linear("c_fc", x)
        if mistake in ACTIVATIONS:
            return linear("mlp_proj", ACTIVATIONS[mistake](x))
        if mistake == "late activation":
            return F.gelu(linear("mlp_proj", x), approximate="tanh")
        return linear("mlp_proj", F.gelu(x, approximate="tanh"))

    def project(x: Tensor) -> Tensor:
        return x if mistake == "no attn_proj" else linear("attn_proj", x)

    if mistake == "post-LN":
        x = norm("ln_1", x + project(attention(x)))
        return norm("ln_2", x + mlp(x))
    keeps_first = mistake not in ("no first residual", "no residual")
    keeps_second = mistake not in ("no second residual", "no residual")
    normalised = mistake == "normalised residual"
    before = x
    stream = norm("ln_1", x) if normalised else x
    x = stream * keeps_first + project(attention(norm("ln_1", x)))
    y = mlp(norm("ln_2", before if mistake == "parallel" else x))
    return (norm("ln_2", x) if normalised else x) * keeps_second + y


def _attention(qkv: Tensor, H: int, mistake: str) -> Tensor:
    """Return the outputs of all heads side by side, (B, T, C), given c_attn's output (B, T, 3 C)."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    H = 1 if mistake == "one head" else H
    D = C // H

    def split(x: Tensor) -> Tensor:
        if mistake in ("wrong split", "wrong split and merge"):
            return x.reshape(B, H, T, D)
        if mistake == "interleaved heads":
            return x.reshape(B, T, D, H).permute(0, 3, 1, 2)
        return x.reshape(B, T, H, D).transpose(1, 2)

    if mistake == "heads of q, k and v":
        q, k, v = qkv.view(B, T, H, 3 * D).transpose(1, 2).chunk(3, dim=-1)
    else:
        q, k, v = map(split, qkv.chunk(3, dim=-1))
    if mistake == "k, q, v":
        q, k = k, q
    if mistake == "v, k, q":
        q, v = v, q
    scale = 1 / D if mistake == "scaled twice" else 1 / math.sqrt(D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=mistake != "not causal", scale=scale)  # (B, H, T, D)
    return (
        y.reshape(B, T, C)
        if mistake in ("wrong merge", "wrong split and merge")
        else y.transpose(1, 2).reshape(B, T, C)
    )


def random_weights(module: nn.Module, seed: int = 0) -> Weights:
    """Set the parameters of a module to large random values, in the order of their names, and return them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = 0.5 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + values if name in ("ln_1.weight", "ln_2.weight") else values)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def make_block(student: Student, C: int, H: int) -> tuple[nn.Module, Weights]:
    """Return the student's block with random weights, and the weights. Raises Wrong if a layer of the original is missing."""
    call = f"Block({C}, {H})"
    kind = student.function("Block")
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise Wrong("Block is not a subclass of nn.Module: keep the class of the original file")
    block = student.call(call, kind, C, H)
    shapes, wanted = (
        {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for module in (block, OriginalBlock(C, H))
    )
    for name in wanted.keys() | shapes.keys():
        if shapes.get(name) != wanted.get(name):
            has, needs = (f"{sizes[name]}" if name in sizes else "none" for sizes in (shapes, wanted))
            raise Wrong(
                f"{call}: the shape of its parameter {name} is {has}, but {needs} is expected: keep the original layers"
            )
    return block, random_weights(block)


def expected_output(weights: Weights, x: Tensor, C: int, H: int) -> Tensor:
    """Return the output of this library's block with the same weights."""
    config = GPTConfig(
        vocab_size=2, context_length=x.shape[1], emb_dim=C, n_heads=H, n_layers=1, drop_rate=0.0, qkv_bias=True
    )
    block = Block(config, 0)
    layers = {name: name.partition(".") for name in weights}
    block.load_state_dict(
        {f"{LIBRARY_NAMES.get(layer, layer)}.{part}": weights[name] for name, (layer, _, part) in layers.items()}
    )
    return block(x, None, None)


def mistakes(weights: Weights, x: Tensor, H: int) -> Mistakes:
    """Return the outputs of blocks with a common mistake."""
    right = block_output(weights, x, H)
    wrong = [(sentence, block_output(weights, x, H, mistake)) for mistake, sentence in MISTAKES.items()]
    return [(sentence, output) for sentence, output in wrong if not torch.allclose(output, right, atol=1e-5)]


def _case(B: int, T: int, C: int, H: int) -> Callable[[Student], None]:
    @torch.no_grad()
    def step(student: Student) -> None:
        block, weights = make_block(student, C, H)
        x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(T))
        call = f"Block({C}, {H}) of x {tuple(x.shape)}"
        got = student.call(call, block, x)
        expect_tensor(call, got, expected_output(weights, x, C, H), mistakes(weights, x, H), tolerance=2e-5)

    return step


def _gradients(student: Student) -> None:
    block, weights = make_block(student, C, H)
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(1))
    ours = x.clone().requires_grad_()
    expected_output(weights, ours, C, H).square().sum().backward()
    call = "the gradient of the block"

    def backward(x: Tensor) -> Tensor | None:
        x = x.clone().requires_grad_()
        block(x).square().sum().backward()
        return x.grad

    assert ours.grad is not None
    expect_tensor(call, student.call(call, backward, x), ours.grad, name="the gradient of x", tolerance=1e-3)


CHECK = Check(
    [
        ("gives this library's numbers for 2 sequences of 5 tokens", _case(2, 5, C, H)),
        ("computes a block with one head", _case(2, 4, 8, 1)),
        ("computes one token of one sequence", _case(1, 1, C, H)),
        ("gives the right gradients", _gradients),
    ],
    library="model.py (Block, CausalSelfAttention and MLP)",
)
"""The check of the task block."""
