"""The one table of what a weight is called and how it lies in the formats of others.

Our names are Hugging Face's. Their four kernels of a block are (in, out), as OpenAI made them; ours are (out, in), as
`nn.Linear` has them. Nothing else in the library transposes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from MyGPT.config import GPTConfig

_TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# Buffers of old checkpoints: the causal mask and the value that stood for minus infinity. `c_attn.bias` is a weight.
_MASK_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")


def to_hugging_face(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our state dict as `model.safetensors` has it: kernels turned, a tied head left out, missing qkv biases as zeros."""
    if config.tie_weights and not _is_tied(state_dict):
        raise ValueError(
            "lm_head.weight is not transformer.wte.weight, as tie_weights=True in the config says, and would be lost: set "
            "model.config = dataclasses.replace(model.config, tie_weights=False)"
        )
    tensors = {
        name: (tensor.T if _TRANSPOSED.search(name) else tensor).contiguous()
        for name, tensor in state_dict.items()
        if not (config.tie_weights and name == "lm_head.weight")
    }
    if not config.qkv_bias:
        width = state_dict["transformer.wte.weight"].new_zeros(3 * config.emb_dim)
        tensors |= {f"transformer.h.{i}.attn.c_attn.bias": width.clone() for i in range(config.n_layers)}
    return tensors


def from_hugging_face(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The inverse, for names with or without `transformer.`. Every missing, unknown or misshapen tensor is in one ValueError."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _MASK_BUFFER.search(name):
            continue
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        ours[name] = tensor.T.contiguous() if _TRANSPOSED.search(name) and tensor.dim() == 2 else tensor
    is_second_head = config.tie_weights and not _is_tied(ours)
    if config.tie_weights and "transformer.wte.weight" in ours:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    if not config.qkv_bias:
        _drop_zero_biases(ours, config)
    expected = shapes(config)
    problems = [f"{name} is missing" for name in expected if name not in ours]
    problems += [f"{name} is unknown" for name in ours if name not in expected]
    problems += [
        f"{name} is {tuple(ours[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in ours and tuple(ours[name].shape) != shape
    ]
    if is_second_head:
        problems.append("lm_head.weight is not transformer.wte.weight, as tie_word_embeddings in the config says")
    if problems:
        raise ValueError(f"the weights do not fit the config: {'; '.join(problems)}")
    return ours


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in the state dict of a model."""
    C, V = config.emb_dim, config.vocab_size
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    if not config.qkv_bias:
        del block["attn.c_attn.bias"]
    blocks = {f"transformer.h.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()}
    return {
        "transformer.wte.weight": (V, C),
        "transformer.wpe.weight": (config.context_length, C),
        **blocks,
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        "lm_head.weight": (V, C),
    }


def _is_tied(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the head is the token embedding, or is not there."""
    head, embedding = state_dict.get("lm_head.weight"), state_dict.get("transformer.wte.weight")
    if head is None or embedding is None:
        return True
    return head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)


def _drop_zero_biases(ours: dict[str, Tensor], config: GPTConfig) -> None:
    """Takes out the zeros that stand for biases the model does not have; others stay, and are reported as unknown."""
    for i in range(config.n_layers):
        name = f"transformer.h.{i}.attn.c_attn.bias"
        if name in ours and not torch.any(ours[name]):
            del ours[name]
