"""The one table of what a weight is called and how it lies in the formats of others.

Our names are Hugging Face's; our kernels are (out, in), as `nn.Linear` has them. OpenAI's and Hugging Face's are (in, out).
Nothing else in the library renames or transposes. Tensors are `Lazy`, so that a checkpoint of any size is read one tensor at
a time. C embedding width, T context length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from MyGPT.config import GPTConfig


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not read before it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for a type that is no floating-point number, of which no weight is."""
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, array: Any) -> Lazy:
        """A torch tensor or numpy array that is in memory already."""
        if isinstance(array, Tensor):
            return cls(tuple(array.shape), array.dtype if array.is_floating_point() else None, lambda: array)
        if not array.flags.writeable:  # torch cannot share it
            return cls(array.shape, float_type(array.dtype), lambda: torch.from_numpy(array.copy()))
        return cls(array.shape, float_type(array.dtype), lambda: torch.from_numpy(array))

    def map(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Lazy:
        """The same, changed on reading."""
        return Lazy(shape, self.dtype, lambda: change(self.load()))


Tensors = Mapping[str, Lazy]

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# Ours, OpenAI's (after "model/"), the book's.
TOP = (
    (WTE, "wte", "tok_emb.weight"),
    (WPE, "wpe", "pos_emb.weight"),
    ("transformer.ln_f.weight", "ln_f/g", "final_norm.scale"),
    ("transformer.ln_f.bias", "ln_f/b", "final_norm.shift"),
    (HEAD, None, "out_head.weight"),
)
# The same in a block; the book's queries, keys and values are three.
BLOCK: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ln_1.weight", "ln_1/g", ("norm1.scale",)),
    ("ln_1.bias", "ln_1/b", ("norm1.shift",)),
    ("attn.c_attn.weight", "attn/c_attn/w", ("att.W_query.weight", "att.W_key.weight", "att.W_value.weight")),
    ("attn.c_attn.bias", "attn/c_attn/b", ("att.W_query.bias", "att.W_key.bias", "att.W_value.bias")),
    ("attn.c_proj.weight", "attn/c_proj/w", ("att.out_proj.weight",)),
    ("attn.c_proj.bias", "attn/c_proj/b", ("att.out_proj.bias",)),
    ("ln_2.weight", "ln_2/g", ("norm2.scale",)),
    ("ln_2.bias", "ln_2/b", ("norm2.shift",)),
    ("mlp.c_fc.weight", "mlp/c_fc/w", ("ff.layers.0.weight",)),
    ("mlp.c_fc.bias", "mlp/c_fc/b", ("ff.layers.0.bias",)),
    ("mlp.c_proj.weight", "mlp/c_proj/w", ("ff.layers.2.weight",)),
    ("mlp.c_proj.bias", "mlp/c_proj/b", ("ff.layers.2.bias",)),
)
_KERNEL = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_WIDENING = re.compile(r"\.(attn\.c_attn|mlp\.c_fc)\.weight$")  # whose shape tells which way round kernels are
# Buffers: the causal mask, and the value that stood for minus infinity. `c_attn.bias` is a weight.
_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$|\.att\.mask$")
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # torch.compile's and DistributedDataParallel's


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in the state dict of a model."""
    C = config.emb_dim
    in_block: dict[str, tuple[int, ...]] = {
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
    }
    block = {ours: in_block.get(ours, (C,)) for ours, _, _ in BLOCK if config.qkv_bias or ours != "attn.c_attn.bias"}
    return {
        WTE: (config.vocab_size, C),
        WPE: (config.context_length, C),
        **{f"transformer.h.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()},
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        HEAD: (config.vocab_size, C),
    }


def openai_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every variable of OpenAI's graph: kernels are those of a convolution of width 1, (1, in, out)."""
    ours = shapes(config)
    return {
        f"model/{path}": (1, *reversed(ours[name])) if _KERNEL.search(name) else ours[name]
        for path, name in _openai_names(config.n_layers).items()
    }


def to_ours(tensors: Tensors) -> tuple[dict[str, Lazy], str]:
    """The weights under our names and the right way round, and whose layout it was; told by keys and shapes.

    Keys of none of the known layouts are a ValueError.
    """
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items() if not _BUFFER.search(name)}
    if "wte" in bare:
        return _from_openai(bare), "OpenAI's"
    if "tok_emb.weight" in bare:
        return _from_book(bare), "the book's"
    ours = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": bare[name] for name in bare
    }
    widening = [tensor.shape for name, tensor in ours.items() if _WIDENING.search(name) and len(tensor.shape) == 2]
    if not widening or len(ours) < len(bare):
        some = ", ".join(list(tensors)[:4]) or "none"
        raise ValueError(
            f"these are not the weights of a GPT-2; the keys are {some}{', …' if len(tensors) > 4 else ''}"
        )
    if widening[0][0] < widening[0][1]:  # (in, out)
        return {name: _turned(name, tensor) for name, tensor in ours.items()}, "Hugging Face's"
    if not any(name.endswith(".bias") for name in ours):
        return _with_zero_biases(ours), "nanoGPT's"
    return ours, "nanoGPT's or MyGPT's own"


def config_of(tensors: Tensors, n_heads: int) -> GPTConfig:
    """The model that weights under our names are for. They tell everything but the number of heads."""
    for name in (WTE, WPE):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"the weights do not tell their model: {name} is missing or no matrix")
    vocab_size, emb_dim = tensors[WTE].shape
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=tensors[WPE].shape[0],
        emb_dim=emb_dim,
        n_heads=n_heads,
        n_layers=len(_block_numbers(tensors)),
        qkv_bias="transformer.h.0.attn.c_attn.bias" in tensors,
        tie_weights=HEAD not in tensors or _equal(tensors[HEAD], tensors[WTE]),
    )


def align(tensors: Tensors, config: GPTConfig) -> tuple[dict[str, Lazy], GPTConfig]:
    """Weights under our names, and a model's config, with what may differ between them brought together.

    A model without qkv biases gets those that there are, one with them gets zeros for those that are not there; a shorter
    context takes the first positions.
    """
    aligned = dict(tensors)
    bias_names = [f"transformer.h.{i}.attn.c_attn.bias" for i in range(config.n_layers)]
    if not config.qkv_bias and any(name in tensors for name in bias_names):
        config = dataclasses.replace(config, qkv_bias=True)
    elif config.qkv_bias and not any(name in tensors for name in bias_names):
        aligned |= {name: _zeros((3 * config.emb_dim,), tensors) for name in bias_names}
    positions, T = tensors.get(WPE), config.context_length
    if positions is not None and len(positions.shape) == 2 and positions.shape[0] > T:
        aligned[WPE] = positions.map((T, positions.shape[1]), lambda table: table[:T])
    return aligned, config


def fit(tensors: Tensors, config: GPTConfig) -> dict[str, Lazy]:
    """Exactly the tensors of a model of this config, in their order. Everything that is wrong is in one ValueError.

    A missing head is the token embedding.
    """
    have = dict(tensors)
    if HEAD not in have and WTE in have:
        have[HEAD] = have[WTE]
    expected = shapes(config)
    problems = [f"{name} is missing" for name in expected if name not in have]
    for name, tensor in have.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} is {tensor.shape}, expected {expected[name]}")
        elif tensor.dtype is None:
            problems.append(f"{name} does not hold floating-point numbers")
    head, embedding = have.get(HEAD), have.get(WTE)
    are_alike = head and embedding and head.shape == embedding.shape and head.dtype and embedding.dtype
    if config.tie_weights and are_alike and not _equal(have[HEAD], have[WTE]):
        problems.append(f"{HEAD} is not {WTE}, the model has one for both (tie_weights)")
    if problems:
        n = f"{len(problems)} mismatches: " if len(problems) > 1 else ""
        raise ValueError(f"the weights do not fit the config: {n}{'; '.join(problems)}")
    return {name: have[name] for name in expected}


def drop_zero_biases(tensors: Tensors, config: GPTConfig) -> dict[str, Lazy]:
    """For a config without qkv biases, takes out the zeros that stand for them in a directory; others stay, and do not fit."""
    absent = set() if config.qkv_bias else {f"transformer.h.{i}.attn.c_attn.bias" for i in range(config.n_layers)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in absent or tensor.dtype is None or torch.any(tensor.load())
    }


def to_hugging_face(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Lazy]:
    """Our state dict as `model.safetensors` has it: kernels turned, a tied head left out, missing qkv biases as zeros."""
    ours = {name: Lazy.of(tensor.detach()) for name, tensor in state_dict.items()}
    if config.tie_weights:
        if not _equal(ours[HEAD], ours[WTE]):
            raise ValueError(
                f"{HEAD} is not {WTE}, as tie_weights=True in the config says, and would be lost: set "
                "model.config = dataclasses.replace(model.config, tie_weights=False)"
            )
        del ours[HEAD]
    if not config.qkv_bias:
        zeros = _zeros((3 * config.emb_dim,), ours)
        ours |= {f"transformer.h.{i}.attn.c_attn.bias": zeros for i in range(config.n_layers)}
    return {name: _turned(name, tensor) for name, tensor in ours.items()}


def flatten(params: Mapping[str, Any]) -> dict[str, Lazy]:
    """A state dict, or the book's nested parameters, whose keys become OpenAI's paths: h0/attn/c_attn/w, ln_f/g, wte."""
    flat: dict[str, Lazy] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, Lazy):
            flat[path] = value
        elif isinstance(value, (Tensor, np.ndarray)):
            flat[path] = Lazy.of(value)
        else:
            raise ValueError(f"{path} is {type(value).__name__}, weights are tensors or arrays")

    is_nested = isinstance(params.get("blocks"), (list, tuple))
    for key, value in params.items():
        if is_nested and key == "blocks":
            for i, block in enumerate(value):
                walk(block, f"h{i}")
        else:
            walk(value, f"ln_f/{key}" if is_nested and key in ("g", "b") else str(key))
    return flat


def float_type(dtype: np.dtype[Any]) -> torch.dtype | None:
    """torch's name of a floating-point type of numpy's, None for another type."""
    names = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    return names.get(dtype.name) if dtype.isnative else None


def _openai_names(n_layers: int) -> dict[str, str]:
    """OpenAI's path to our name."""
    top = {path: ours for ours, path, _ in TOP if path is not None}
    return top | {f"h{i}/{path}": f"transformer.h.{i}.{ours}" for i in range(n_layers) for ours, path, _ in BLOCK}


def _from_openai(tensors: Tensors) -> dict[str, Lazy]:
    ours = _openai_names(len({name.partition("/")[0] for name in tensors if re.match(r"h\d+/", name)}))
    return {ours.get(path, path): _turned(ours.get(path, path), tensor) for path, tensor in tensors.items()}


def _from_book(tensors: Tensors) -> dict[str, Lazy]:
    parts_of = {ours: [theirs] for ours, _, theirs in TOP}
    for i in _block_numbers(tensors):
        parts_of |= {
            f"transformer.h.{i}.{ours}": [f"trf_blocks.{i}.{name}" for name in theirs] for ours, _, theirs in BLOCK
        }
    whole = {ours: parts for ours, parts in parts_of.items() if all(part in tensors for part in parts)}
    used = {part for parts in whole.values() for part in parts}
    return {
        **{ours: _joined([tensors[part] for part in parts]) for ours, parts in whole.items()},
        **{name: tensor for name, tensor in tensors.items() if name not in used},
    }


def _with_zero_biases(ours: Tensors) -> dict[str, Lazy]:
    """nanoGPT's models with bias=False have none at all, which is the same as zeros."""
    config = dataclasses.replace(config_of(ours, n_heads=1), qkv_bias=True)
    zeros = {name: _zeros(shape, ours) for name, shape in shapes(config).items() if name.endswith(".bias")}
    return {**ours, **zeros}


def _block_numbers(names: Iterable[str]) -> list[int]:
    found = map(re.compile(r"(?:^|\.)(?:h|trf_blocks)\.(\d+)\.").search, names)
    return sorted({int(match[1]) for match in found if match})


def _turned(name: str, tensor: Lazy) -> Lazy:
    """A kernel from (in, out) or OpenAI's (1, in, out) to (out, in), or back; what is no kernel as it is."""
    *outer, n_in, n_out = tensor.shape if len(tensor.shape) >= 2 else (0, 0, 0)
    if not _KERNEL.search(name) or outer not in ([], [1]):
        return tensor
    return tensor.map((n_out, n_in), lambda kernel: kernel.reshape(n_in, n_out).T)


def _joined(parts: list[Lazy]) -> Lazy:
    """The parts one above the other; of unequal widths, a shape that fits nowhere."""
    if len(parts) == 1:
        return parts[0]
    widths = {part.shape[1:] for part in parts}
    width = widths.pop() if len(widths) == 1 else (0,)
    rows = sum(part.shape[0] if part.shape else 0 for part in parts)
    dtype = parts[0].dtype if all(part.dtype for part in parts) else None
    return Lazy((rows, *width), dtype, lambda: torch.cat([part.load() for part in parts]))


def _zeros(shape: tuple[int, ...], beside: Tensors) -> Lazy:
    dtype = (beside[WTE].dtype if WTE in beside else None) or torch.float32
    return Lazy(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def _equal(one: Lazy, other: Lazy) -> bool:
    if one is other:
        return True
    first, second = one.load(), other.load()
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)
