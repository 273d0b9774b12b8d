"""The table of weight names and matrix layouts of all known GPT-2 formats.

MyGPT uses Hugging Face's names. Matrices of linear layers have the shape (out, in) in MyGPT, as in `nn.Linear`, and
(in, out) in the files of OpenAI and Hugging Face. No other module renames or transposes weights. All functions work on
lazy tensors, so a checkpoint of any size is read one tensor at a time. C is the embedding width, T the context length.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.weights.lazy import LazyTensor, LazyTensors

WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# The names outside the blocks: MyGPT's, OpenAI's (without the prefix "model/"), the book's and GGUF's.
TOP = (
    (WTE, "wte", "tok_emb.weight", "token_embd.weight"),
    (WPE, "wpe", "pos_emb.weight", "position_embd.weight"),
    ("transformer.ln_f.weight", "ln_f/g", "final_norm.scale", "output_norm.weight"),
    ("transformer.ln_f.bias", "ln_f/b", "final_norm.shift", "output_norm.bias"),
    (HEAD, None, "out_head.weight", "output.weight"),
)
# The names inside a block, in the same order, and the shape of MyGPT's tensor in multiples of C. The book has separate
# matrices for queries, keys and values.
BLOCK: tuple[tuple[str, str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("ln_1.weight", "ln_1/g", ("norm1.scale",), (1,)),
    ("ln_1.bias", "ln_1/b", ("norm1.shift",), (1,)),
    ("attn.c_attn.weight", "attn/c_attn/w", ("att.W_query.weight", "att.W_key.weight", "att.W_value.weight"), (3, 1)),
    ("attn.c_attn.bias", "attn/c_attn/b", ("att.W_query.bias", "att.W_key.bias", "att.W_value.bias"), (3,)),
    ("attn.c_proj.weight", "attn/c_proj/w", ("att.out_proj.weight",), (1, 1)),
    ("attn.c_proj.bias", "attn/c_proj/b", ("att.out_proj.bias",), (1,)),
    ("ln_2.weight", "ln_2/g", ("norm2.scale",), (1,)),
    ("ln_2.bias", "ln_2/b", ("norm2.shift",), (1,)),
    ("mlp.c_fc.weight", "mlp/c_fc/w", ("ff.layers.0.weight",), (4, 1)),
    ("mlp.c_fc.bias", "mlp/c_fc/b", ("ff.layers.0.bias",), (4,)),
    ("mlp.c_proj.weight", "mlp/c_proj/w", ("ff.layers.2.weight",), (1, 4)),
    ("mlp.c_proj.bias", "mlp/c_proj/b", ("ff.layers.2.bias",), (1,)),
)
# GGUF's names of the parts of a block. The tensors are called blk.0.attn_norm.weight, and so on.
_GGUF_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_MATRIX = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_WIDENING = re.compile(r"\.(attn\.c_attn|mlp\.c_fc)\.weight$")  # out > in, so the shape shows the orientation
# Buffers of old versions: the causal mask and the value used as minus infinity. `c_attn.bias` is a weight.
_BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$|\.att\.mask$")
# Names that torch.compile, DistributedDataParallel, FSDP and checkpointing add, before the name of the part that they wrap.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The token embedding's name. What is before it is the name of the module that contains the model, such as "model." or "m.".
_OWNER = re.compile(r"^((?:\w+\.)*?)(?:(?:transformer\.)?wte\.weight|tok_emb\.weight)$")


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in the state dict of a model with this config."""
    C = config.emb_dim
    block = {ours: tuple(n * C for n in shape) for ours, _, _, shape in BLOCK}
    if not config.qkv_bias:
        del block["attn.c_attn.bias"]
    return {
        WTE: (config.vocab_size, C),
        WPE: (config.context_length, C),
        **{f"transformer.h.{i}.{name}": shape for i in range(config.n_layers) for name, shape in block.items()},
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
        HEAD: (config.vocab_size, C),
    }


def openai_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every variable in OpenAI's checkpoint of a model with this config.

    OpenAI's linear layers are convolutions of width 1, so their matrices have the shape (1, in, out).
    """
    ours = shapes(config)
    names = _openai_names(config.n_layers).items()
    return {f"model/{path}": (1, *ours[name][::-1]) if _MATRIX.search(name) else ours[name] for path, name in names}


def to_ours(tensors: LazyTensors) -> tuple[dict[str, LazyTensor], str]:
    """Return the weights with MyGPT's names and shapes, and the name of the layout that `tensors` had.

    The layout is detected from the tensor names and shapes. Raises ValueError if the names belong to no known layout.
    """
    bare = {name: tensor for name, tensor in _without_wrappers(tensors).items() if not _BUFFER.search(name)}
    if "wte" in bare:
        return _from_openai(bare), "OpenAI's"
    if "token_embd.weight" in bare:
        name_of = {theirs: name for name, theirs in gguf_names(bare).items()}
        return {name_of.get(name, name): tensor for name, tensor in bare.items()}, "GGUF's"
    if "tok_emb.weight" in bare:
        return _from_book(bare), "the book's"
    prefixes = ("transformer.", "lm_head.", "score.")  # a classifier has score.weight
    ours = {name if name.startswith(prefixes) else f"transformer.{name}": bare[name] for name in bare}
    widening = [tensor.shape for name, tensor in ours.items() if _WIDENING.search(name) and len(tensor.shape) == 2]
    if not widening or len(ours) < len(bare):
        names = ", ".join([*tensors][:4] + ["…"] * (len(tensors) > 4)) or "none"
        raise ValueError(f"these are not the weights of a GPT-2 model; the tensor names are {names}")
    if widening[0][0] < widening[0][1]:  # (in, out)
        return {name: _transposed(name, tensor) for name, tensor in ours.items()}, "Hugging Face's"
    if not any(name.endswith(".bias") for name in ours):
        return _with_zero_biases(ours), "nanoGPT's"
    return ours, "nanoGPT's or MyGPT's own"


def _without_wrappers(tensors: LazyTensors) -> dict[str, LazyTensor]:
    """Return the tensors under the names that they have in the model itself.

    A training script saves the weights with the names of the wrappers around the model, and of the object that contains the
    model, such as a LightningModule. Raises ValueError if the object has other tensors besides one model.
    """
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    owners = {found[1] for found in map(_OWNER.match, bare) if found} - {""}
    if not owners:
        return bare
    prefix = min(owners)
    other = next((name for name in bare if not name.startswith(prefix)), None)
    if other is not None:
        way_out = f"keep only the tensors of the model, such as those whose names begin with {prefix}"
        raise ValueError(
            f"these are not only the weights of one GPT-2 model: there is {other} besides {prefix}: {way_out}"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in bare.items()}


def gguf_names(tensors: Iterable[str]) -> dict[str, str]:
    """Return a dict from MyGPT's names of all tensors to the names in GGUF files.

    `tensors` are the names of a model's tensors, either MyGPT's or GGUF's, which show how many blocks there are.
    """
    names = {ours: theirs for ours, *_, theirs in TOP}
    for i in _block_numbers(tensors):
        for ours, *_ in BLOCK:
            part, _, kind = ours.rpartition(".")
            names[f"transformer.h.{i}.{ours}"] = f"blk.{i}.{_GGUF_PARTS[part]}.{kind}"
    return names


def config_of(tensors: LazyTensors, n_heads: int) -> GPTConfig:
    """Infer the config from tensors under MyGPT's names. The shapes determine everything except `n_heads`."""
    for name in (WTE, WPE):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"the weights do not show the model's sizes: {name} is missing or not a matrix")
    vocab_size, emb_dim = tensors[WTE].shape
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=tensors[WPE].shape[0],
        emb_dim=emb_dim,
        n_heads=n_heads,
        n_layers=len(_block_numbers(tensors)),
        qkv_bias="transformer.h.0.attn.c_attn.bias" in tensors,
        tie_weights=HEAD not in tensors or tensors[HEAD].equals(tensors[WTE]),
    )


def align(tensors: LazyTensors, config: GPTConfig) -> tuple[dict[str, LazyTensor], GPTConfig]:
    """Return the weights and the config, changed so that they agree on qkv biases and context length.

    If only the weights have qkv biases, the returned config has them too. If only the config has qkv biases, biases of
    zero are added to the weights. If the config has a shorter context than the weights, the position embedding is cut.
    """
    aligned = dict(tensors)
    if any(name in tensors for name in _qkv_biases(config)):
        config = dataclasses.replace(config, qkv_bias=True)
    elif config.qkv_bias:
        aligned |= dict.fromkeys(_qkv_biases(config), _zeros((3 * config.emb_dim,), tensors))
    positions, T = tensors.get(WPE), config.context_length
    if positions is not None and len(positions.shape) == 2 and positions.shape[0] > T:
        aligned[WPE] = positions.map((T, positions.shape[1]), lambda table: table[:T])
    return aligned, config


def fit(tensors: LazyTensors, config: GPTConfig) -> dict[str, LazyTensor]:
    """Return exactly the tensors that a model with this config has, in the order of its state dict.

    A missing output head is replaced by the token embedding. Raises ValueError with a list of all mismatches if names,
    shapes or dtypes are wrong.
    """
    found = dict(tensors)
    if HEAD not in found and WTE in found:
        found[HEAD] = found[WTE]
    expected = shapes(config)
    if "score.weight" in found:
        raise ValueError(
            "it is a text classifier, which mygpt classify uses; it cannot generate text or be trained further"
        )
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} is {tensor.shape}, expected {expected[name]}")
        elif tensor.dtype is None:
            problems.append(f"{name} does not hold floating-point numbers")
    if config.tie_weights and WTE in found and _are_different(found[HEAD], found[WTE]):
        problems.append(f"{HEAD} differs from {WTE}, but the model shares one tensor for both (tie_weights)")
    if problems:
        count = f"{len(problems)} mismatches: " if len(problems) > 1 else ""
        raise ValueError(f"the weights do not fit the config: {count}{'; '.join(problems)}")
    return {name: found[name] for name in expected}


def reconcile(tensors: LazyTensors, config: GPTConfig) -> tuple[dict[str, LazyTensor], GPTConfig, list[str]]:
    """Return the weights and the config of a saved model, changed so that they agree, and a note about each contradiction.

    The tensors decide where the config says something else, as in transformers:

    - The model has qkv biases if one of them is not zero. If all are zero and the config says that the model has none, they
      are removed: Hugging Face's layout always has them, so `to_hugging_face` writes zeros.
    - A bias is zero if no block has it, and a qkv bias also if only some blocks lack it. Other biases that are missing in
      some blocks, and missing weights, are left to `fit`, which raises an error.
    - An output head that differs from the token embedding is kept, also if the config ties the two. One of the two is
      used for both if the other is missing.
    """
    found, notes = dict(tensors), []
    qkv_biases = _qkv_biases(config)
    present = [name for name in qkv_biases if name in found]
    if not config.qkv_bias and any(_has_nonzero(found[name]) for name in present):
        config = dataclasses.replace(config, qkv_bias=True)
        notes.append("it has query, key and value biases although its config says qkv_bias=false: they are used")
    if not config.qkv_bias:
        for name in present:
            del found[name]
    optional, kinds = set(qkv_biases), set(map(_kind, found))
    lacking = {
        name: _zeros(shape, found)
        for name, shape in shapes(config).items()
        if name.endswith(".bias") and name not in found and (name in optional or _kind(name) not in kinds)
    }
    if lacking:
        found |= lacking
        more = f" and {len(lacking) - 1} more biases" if len(lacking) > 1 else ""
        notes.append(f"it lacks {next(iter(lacking))}{more}: missing biases are taken as zero")
    head, embedding = found.get(HEAD), found.get(WTE)
    if not config.tie_weights and head is None and embedding is not None:
        found[HEAD] = embedding.map(embedding.shape, torch.clone)
        notes.append(f"it lacks {HEAD} although its config says tie_word_embeddings=false: {WTE} is copied")
    elif config.tie_weights and head is not None and embedding is None:
        found[WTE] = head
    elif config.tie_weights and head is not None and embedding is not None and _are_different(head, embedding):
        config = dataclasses.replace(config, tie_weights=False)
        notes.append(f"{HEAD} differs from {WTE} although its config ties the two: both are used")
    return found, config, notes


def _has_nonzero(tensor: LazyTensor) -> bool:
    """Return whether a tensor contains a number other than 0. A tensor without floating-point numbers counts as one that does."""
    return tensor.dtype is None or bool(torch.any(tensor.load()))


def _are_different(head: LazyTensor, embedding: LazyTensor) -> bool:
    """Return whether an output head could be an embedding's tied weight, by shape and type, but has other values."""
    are_comparable = head.shape == embedding.shape and head.dtype is not None and embedding.dtype is not None
    return are_comparable and not head.equals(embedding)


def _kind(name: str) -> str:
    """Return a tensor's name without the number of its block, and with one name for all LayerNorms."""
    return re.sub(r"(h\.\d+\.)?ln_[12f]\b|h\.\d+\.", lambda found: "ln" if "ln_" in found[0] else "", name)


def to_hugging_face(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, LazyTensor]:
    """Return a model's state dict in the layout of `model.safetensors`.

    Matrices are transposed to (in, out), a tied output head is left out, and missing qkv biases are added as zeros.
    """
    return {name: _transposed(name, tensor) for name, tensor in _to_save(state_dict, config).items()}


def to_own(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, LazyTensor]:
    """Return the state dict of a model with custom parts as it is saved: unchanged, but without a tied output head.

    Buffers that are not floating-point numbers are left out, because the parts make them again. A weight that layers share
    has the name of the first. transformers' GPT-2 refuses these matrices, which have the shape (out, in).
    """
    weights = {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}
    first_names = {id(tensor): name for name, tensor in reversed(weights.items())}
    ours = _without_tied_head(weights, config)
    return {name: tensor for name, tensor in ours.items() if first_names[id(weights[name])] == name}


def to_gguf(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, LazyTensor]:
    """Return a model's state dict under the names of llama.cpp's GGUF files.

    A tied output head is left out, and missing qkv biases are added as zeros, because llama.cpp requires them.
    """
    ours = _to_save(state_dict, config)
    names = gguf_names(ours)
    return {names[name]: tensor for name, tensor in ours.items()}


def _to_save(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, LazyTensor]:
    """Return a model's state dict without a tied output head, and with zeros for missing qkv biases."""
    ours = _without_tied_head(state_dict, config)
    if not config.qkv_bias:
        ours |= dict.fromkeys(_qkv_biases(config), _zeros((3 * config.emb_dim,), ours))
    return ours


def _without_tied_head(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, LazyTensor]:
    """Return a model's state dict as lazy tensors, without a tied output head."""
    # A tensor with two names becomes one lazy tensor, so that sharded weights are not gathered twice to compare them.
    lazy = {id(tensor): LazyTensor.of(tensor.detach()) for tensor in state_dict.values()}
    ours = {name: lazy[id(tensor)] for name, tensor in state_dict.items()}
    if config.tie_weights:
        if not ours[HEAD].equals(ours[WTE]):
            way_out = "set model.config = dataclasses.replace(model.config, tie_weights=False)"
            raise ValueError(f"{HEAD} differs from {WTE}, but is not saved with tie_weights=True: {way_out}")
        del ours[HEAD]
    return ours


def in_our_layout(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the matrices of a state dict that are in Hugging Face's layout, (in, out), transposed to (out, in).

    Return an empty dict if the matrices are in MyGPT's layout. `prefix` is that of the model's names.
    """
    matrices = {
        name: tensor
        for name, tensor in state_dict.items()
        if name.startswith(f"{prefix}transformer.") and _MATRIX.search(name)
    }
    widening = [tensor.shape for name, tensor in matrices.items() if _WIDENING.search(name)]
    is_transposed = bool(widening) and widening[0][0] < widening[0][1]
    return {name: tensor.T for name, tensor in matrices.items()} if is_transposed else {}


def _qkv_biases(config: GPTConfig) -> list[str]:
    """Return the names of the query, key and value biases (one tensor per block) for the config's number of layers."""
    return [f"transformer.h.{i}.attn.c_attn.bias" for i in range(config.n_layers)]


def _openai_names(n_layers: int) -> dict[str, str]:
    """Return a dict from OpenAI's variable names to MyGPT's names."""
    top = {path: ours for ours, path, *_ in TOP if path is not None}
    return top | {f"h{i}/{path}": f"transformer.h.{i}.{ours}" for i in range(n_layers) for ours, path, *_ in BLOCK}


def _from_openai(tensors: LazyTensors) -> dict[str, LazyTensor]:
    """Return OpenAI's weights with MyGPT's names and shapes. Tensors with unknown names are returned unchanged."""
    ours = _openai_names(len({name.partition("/")[0] for name in tensors if re.match(r"h\d+/", name)}))
    return {ours.get(path, path): _transposed(ours.get(path, path), tensor) for path, tensor in tensors.items()}


def _from_book(tensors: LazyTensors) -> dict[str, LazyTensor]:
    """Return `tensors`, which have the names of the model in Raschka's book, under MyGPT's names.

    The separate weights of queries, keys and values in each block are joined into one tensor.
    Tensors with unknown names are returned unchanged.
    """
    parts_of = {ours: [theirs] for ours, _, theirs, _ in TOP}
    for i in _block_numbers(tensors):
        for ours, _, theirs, _ in BLOCK:
            parts_of[f"transformer.h.{i}.{ours}"] = [f"trf_blocks.{i}.{name}" for name in theirs]
    rest, joined = dict(tensors), {}
    for ours, parts in parts_of.items():
        if all(part in tensors for part in parts):
            joined[ours] = _concatenated([rest.pop(part) for part in parts])
    return joined | rest


def _with_zero_biases(ours: LazyTensors) -> dict[str, LazyTensor]:
    """Return the weights of a nanoGPT model that was trained with bias=False, with zeros added for all biases."""
    config = dataclasses.replace(config_of(ours, n_heads=1), qkv_bias=True)
    zeros = {name: _zeros(shape, ours) for name, shape in shapes(config).items() if name.endswith(".bias")}
    return {**ours, **zeros}


def _block_numbers(names: Iterable[str]) -> list[int]:
    """Return the sorted indices of the transformer blocks that occur in these tensor names."""
    found = map(re.compile(r"(?:^|\.)(?:h|trf_blocks|blk)\.(\d+)\.").search, names)
    return sorted({int(match[1]) for match in found if match})


def _transposed(name: str, tensor: LazyTensor) -> LazyTensor:
    """Return the matrix of a linear layer transposed to shape (out, in). Return any other tensor unchanged.

    `name` decides whether `tensor` is such a matrix. The shape of `tensor` is then (in, out) or (1, in, out).
    """
    *outer, n_in, n_out = tensor.shape if len(tensor.shape) >= 2 else (0, 0, 0)
    if not _MATRIX.search(name) or outer not in ([], [1]):
        return tensor
    return tensor.map((n_out, n_in), lambda matrix: matrix.reshape(n_in, n_out).T)


def _concatenated(parts: list[LazyTensor]) -> LazyTensor:
    """Return the tensors concatenated along axis 0.

    If their other axes differ, the result has width 0, so `fit` reports the wrong shape later.
    """
    if len(parts) == 1:
        return parts[0]
    widths = {part.shape[1:] for part in parts}
    width = widths.pop() if len(widths) == 1 else (0,)
    rows = sum(part.shape[0] if part.shape else 0 for part in parts)
    dtype = parts[0].dtype if all(part.dtype for part in parts) else None
    return LazyTensor((rows, *width), dtype, lambda: torch.cat([part.load() for part in parts]))


def _zeros(shape: tuple[int, ...], tensors: LazyTensors) -> LazyTensor:
    """Return a lazy tensor of zeros with this shape and the token embedding's dtype (float32 if `tensors` has none)."""
    dtype = (tensors[WTE].dtype if WTE in tensors else None) or torch.float32
    return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))
