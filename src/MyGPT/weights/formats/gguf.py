"""GPT-2 models in the GGUF format of llama.cpp: one file with the weights, the sizes and the tokenizer.

The format is described in ggml's docs/gguf.md. MyGPT reads it without other packages, except the rarer quantized types.
Writing needs the package gguf, which also reads the file again, so that the result can be compared with the model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.files import MAX_JSON_BYTES, atomic_write, begins_with
from MyGPT.parts import refuse_parts
from MyGPT.tokenizers import BPETokenizer, Tokenizer
from MyGPT.tokenizers.added import AddedToken
from MyGPT.tokenizers.bpe import from_visible
from MyGPT.tokenizers.gpt2 import has_gpt2_merges
from MyGPT.tokenizers.settings import token_name
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.layout import to_gguf
from MyGPT.weights.lazy import LazyTensor, MappedFile

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
"""The types in which the matrices can be written. q8_0 stores 8 bits per weight, and a scale for every 32 weights of a row."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Maps the type of a number in the header to its letter in Python's module struct."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Maps the number of a tensor type that is not quantized to torch's dtype."""
_Q8_0, _Q8_0_BLOCK = 8, 32
_SIZES = {
    "context_length": "gpt2.context_length",
    "emb_dim": "gpt2.embedding_length",
    "n_heads": "gpt2.attention.head_count",
    "n_layers": "gpt2.block_count",
}
_EPSILON = "gpt2.attention.layer_norm_epsilon"
_ACTIVATION, _QKV_BIAS = "mygpt.activation", "mygpt.qkv_bias"
"""Keys for the two options that GGUF cannot express. Only MyGPT reads them."""
_VOCABULARY = "tokenizer.ggml"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Maps the special tokens of a tokenizer_config.json to GGUF's names in the keys tokenizer.ggml.eos_token_id and so on."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PRE_TOKENIZER = "gpt-2"
_END_NAMES = ("eos", "eot", "eom")
"""GGUF's names of the tokens at which llama.cpp ends a text."""
_MAX_AXES = 4


@dataclass(frozen=True)
class _Entry:
    """The description of a tensor in the header. `offset` is counted from the first byte after the header."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class _Header:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, _Entry]
    data_start: int


def matches(path: Path) -> bool:
    """Return whether `path` is a GGUF file, by its first four bytes."""
    return begins_with(path, _MAGIC)


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in a GGUF file.

    Quantized weights are converted to float32 when they are loaded. So are all other weights if the file has several types,
    because a model has one type, and float32 keeps every value. Raises ValueError if the file is damaged, contains
    another architecture, or has a type that needs the package gguf, which is not installed.
    """
    header = _read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture != "gpt2":
        raise ValueError(f"{path} contains a model of the architecture {architecture!r}, but MyGPT opens only gpt2")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(f"{path} is only a part of a model: join the parts with llama-gguf-split --merge")
    file, n_bytes = MappedFile(path), path.stat().st_size
    try:
        tensors = {
            name: _lazy_tensor(file, header.data_start, n_bytes, name, entry) for name, entry in header.tensors.items()
        }
        kinds = {tensor.dtype or torch.float32 for tensor in tensors.values()}
        common = reduce(torch.promote_types, kinds, torch.float32) if len(kinds) > 1 else None
        tensors = {name: tensor if common is None else _converted(tensor, common) for name, tensor in tensors.items()}
        config = _read_config(header.metadata, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Checkpoint.of(path, tensors, config, "a GGUF file")


def read_tokenizer(path: Path) -> BPETokenizer | None:
    """Return the tokenizer in a GGUF file, or None if the file contains none.

    Raises ValueError if it is not a byte-level BPE that splits text as GPT-2 does.
    """
    metadata = _read_header(path).metadata
    kind, pre = metadata.get(f"{_VOCABULARY}.model"), metadata.get(f"{_VOCABULARY}.pre", _PRE_TOKENIZER)
    if kind in (None, "none", "no_vocab"):
        return None
    if (kind, pre) != ("gpt2", _PRE_TOKENIZER):
        supported = f"MyGPT supports only 'gpt2' and {_PRE_TOKENIZER!r}"
        raise ValueError(f"{path} has a tokenizer of the model {kind!r} and the pre-tokenizer {pre!r}; {supported}")
    try:
        tokens, merges = metadata[f"{_VOCABULARY}.tokens"], metadata[f"{_VOCABULARY}.merges"]
        types = metadata.get(f"{_VOCABULARY}.token_type") or [_NORMAL] * len(tokens)
        used = [(id_, token, type_) for id_, (token, type_) in enumerate(zip(tokens, types, strict=True))]
        used = [(id_, token, type_) for id_, token, type_ in used if type_ != _UNUSED]
        added = [
            AddedToken(token, id_, special=type_ == _CONTROL)
            for id_, token, type_ in used
            if type_ in (_CONTROL, _USER_DEFINED)
        ]
        pairs = [tuple(merge.split(" ")) for merge in merges]
        vocabulary = {token: id_ for id_, token, _ in used}
        tokenizer = from_visible(vocabulary, pairs, added, known=has_gpt2_merges(pairs))
        ids = {role: metadata.get(f"{_VOCABULARY}.{name}_token_id") for role, name in _SPECIAL.items()}
        settings = {role: tokens[id_] for role, id_ in ids.items() if type(id_) is int and 0 <= id_ < len(tokens)}
        if (template := metadata.get("tokenizer.chat_template")) is not None:
            settings["chat_template"] = template
        tokenizer = tokenizer.with_settings({"clean_up_tokenization_spaces": False, **settings})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged tokenizer: {type(error).__name__}: {error}") from None
    tokenizer.source = f"the tokenizer in {path}"
    return tokenizer


def write_gguf(model: Any, path: str | Path, tokenizer: Tokenizer | None, dtype: GGUFType = "f32") -> list[str]:
    """Write a model to a GGUF file for llama.cpp, read it again, and compare all values with the model.

    Biases, LayerNorms and the position embedding are always stored in float32, as llama.cpp's own converter does.

    Args:
        model: a GPTModel with GPT-2's parts, without an unmerged adapter.
        path: the file to write.
        tokenizer: the model's tokenizer. None writes a file without a vocabulary, for programs that pass token ids.
        dtype: the type of the matrices.

    Returns:
        Sentences about what the file expresses differently, which may be empty.

    Raises:
        ValueError: the model has custom parts, the package gguf is missing, the tokenizer is not a byte-level BPE with an
            end-of-text token, a weight is not finite or exceeds the range of the type, or the file that was read again
            differs from the model.
        OSError: the file cannot be written.
    """
    refuse_parts(model, "a GGUF file")
    config = model.config
    gguf = _import_gguf("writing a GGUF file")
    if dtype not in get_args(GGUFType):
        raise ValueError(f"dtype must be {', '.join(get_args(GGUFType))}, got {dtype!r}")
    wanted, notes = gguf.GGMLQuantizationType[dtype.upper()], []
    writer = gguf.GGUFWriter(None, "gpt2")
    _add_config(writer, config, wanted)
    writer.add_name(Path(path).stem)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        notes += _add_tokenizer(writer, config, tokenizer)
    if config.activation == "gelu":
        notes.append("llama.cpp approximates GELU by tanh, so its logits differ slightly from the model's exact GELU")
    tensors, types, others = to_gguf(model.state_dict(), config), {}, 0
    for name, tensor in tensors.items():
        types[name] = wanted
        if len(tensor.shape) == 1 or name == "position_embd.weight":
            types[name] = gguf.GGMLQuantizationType.F32
        elif dtype == "q8_0" and tensor.shape[-1] % _Q8_0_BLOCK:
            types[name] = gguf.GGMLQuantizationType.F16
            others += 1
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        n_bytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, types[name])
    if others:
        notes.append(
            f"{others} matrices are stored in f16, because their rows are not a multiple of {_Q8_0_BLOCK} long"
        )
    with atomic_write(path, "wb") as file:
        try:
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                values = _float32(name, tensor, types[name].name)
                writer.write_tensor_data(gguf.quants.quantize(values, types[name]))
        finally:
            writer.close()
        _compare(Path(file.name), {key: item.value for key, item in writer.kv_data[0].items()}, tensors, types)
    return notes


def _add_config(writer: Any, config: GPTConfig, dtype: Any) -> None:
    """Add the model's sizes and options to the header."""
    gguf = _import_gguf("writing a GGUF file")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(4 * config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[names[dtype.name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(_ACTIVATION, config.activation)
    writer.add_bool(_QKV_BIAS, config.qkv_bias)


def _add_tokenizer(writer: Any, config: GPTConfig, tokenizer: Tokenizer) -> list[str]:
    """Add the vocabulary, the merges, the special tokens and the chat template to the header. Return notes for the user."""
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(
            f"llama.cpp has no tokenizer like {type(tokenizer).__name__}, only byte-level BPE: leave the tokenizer out with "
            "--without_tokenizer, for programs that pass token ids"
        )
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_vocab:,} tokens, but the model has only {config.vocab_size:,}"
        )
    if not tokenizer.merges:
        raise ValueError("llama.cpp requires a tokenizer with at least one merge")
    ends = config.end_ids or (() if tokenizer.eot_token is None else (tokenizer.eot_token,))
    if not ends:
        raise ValueError("llama.cpp requires a token that ends a text, and the tokenizer has none")
    model = tokenizer.to_json()["model"]
    tokens, types = [f"[PAD{id_}]" for id_ in range(config.vocab_size)], [_UNUSED] * config.vocab_size
    for token, id_ in model["vocab"].items():
        tokens[id_], types[id_] = token, _NORMAL
    for added in tokenizer.added_tokens:
        tokens[added.id], types[added.id] = added.content, _CONTROL if added.special else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    for add, id_ in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(id_)
    start, padding = config.special_ids("bos_token_id"), config.special_ids("pad_token_id")
    unknown = token_name(tokenizer.settings, "unk_token")
    for add, id_ in (
        (writer.add_bos_token_id, start[0] if start else tokenizer.bos_token),
        (writer.add_pad_token_id, padding[0] if padding else tokenizer.pad_token),
        (writer.add_unk_token_id, None if unknown is None else tokenizer.id_of(unknown)),
    ):
        if id_ is not None:
            add(id_)
    writer.add_add_bos_token(False)
    if tokenizer.settings.get("chat_template") is not None:
        writer.add_chat_template(tokenizer.settings["chat_template"])
    notes = []
    if ends[len(_END_NAMES) :]:
        notes.append(f"llama.cpp knows {len(_END_NAMES)} tokens that end a text; the model has {len(ends)}")
    if special := [
        token.content for token in tokenizer.added_tokens if token.single_word or token.lstrip or token.rstrip
    ]:
        notes.append(f"llama.cpp ignores single_word, lstrip and rstrip of added tokens such as {special[0]!r}")
    return notes


def _float32(name: str, tensor: LazyTensor, dtype: str) -> NDArray[np.float32]:
    """Return the values of a weight in float32. Raises ValueError if the type `dtype` cannot represent them."""
    values = tensor.load().cpu().float().contiguous()
    largest = values.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(f"{name} contains numbers that are not finite")
    if dtype == "F16" and largest > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} contains {largest:.0f}, which exceeds the range of f16: use bf16 or f32")
    return values.numpy()


def _compare(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, LazyTensor], types: Mapping[str, Any]
) -> None:
    """Read a GGUF file with the package gguf. Raises ValueError if it differs from what should have been written."""
    gguf = _import_gguf("writing a GGUF file")
    reader = gguf.GGUFReader(path)
    for key, value in metadata.items():
        field = reader.get_field(key)
        if field is None or field.contents() != (np.float32(value).item() if isinstance(value, float) else value):
            raise ValueError(f"the file that was written has another value of {key} than the model: nothing is kept")
    found = {tensor.name: tensor for tensor in reader.tensors}
    if found.keys() != tensors.keys():
        raise ValueError("the file that was written has other tensors than the model: nothing is kept")
    for name, tensor in tensors.items():
        expected = tensor.load().cpu().float()
        values = torch.from_numpy(gguf.quants.dequantize(np.array(found[name].data), found[name].tensor_type))
        if found[name].tensor_type != types[name] or not _is_equal(values, expected, types[name].name):
            raise ValueError(f"{name} in the file that was written differs from the model: nothing is kept")


def _is_equal(values: Tensor, expected: Tensor, dtype: str) -> bool:
    """Return whether the values that were read are the expected ones, rounded to the type `dtype`."""
    if values.shape != expected.shape:
        return False
    if dtype != "Q8_0":
        rounded = expected.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype])
        return torch.equal(values, rounded.float())
    # Each weight is rounded to a multiple n of the block's scale, |n| <= 127. The scale, max|w| / 127, is rounded to float16,
    # with a relative error of at most 2^-11, or an absolute error of at most 2^-25 if it is subnormal.
    scale = expected.view(*expected.shape[:-1], -1, _Q8_0_BLOCK).abs().amax(-1, keepdim=True) / 127
    error = (values - expected).view(*expected.shape[:-1], -1, _Q8_0_BLOCK).abs()
    return bool((error <= scale * (0.5 + 127 * 2**-11) + 127 * 2**-25).all())


def _read_config(metadata: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> GPTConfig:
    """Return the config that the header and the tensors of a file describe. Raises ValueError if a value is missing."""
    for key in (*_SIZES.values(), _EPSILON):
        if key not in metadata:
            raise ValueError(f"its header lacks {key}")
    embedding, head = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it lacks token_embd.weight")
    ids = {name: metadata.get(f"{_VOCABULARY}.{name}_token_id") for name in ("bos", *_END_NAMES, "padding")}
    ends = tuple(dict.fromkeys(id_ for id_ in (ids[name] for name in _END_NAMES) if id_ is not None))
    epsilon = metadata[_EPSILON]
    return GPTConfig(
        vocab_size=embedding.shape[0],
        **{field: metadata[key] for field, key in _SIZES.items()},
        qkv_bias=metadata.get(_QKV_BIAS, True),
        # Files of older converters contain the embedding twice.
        tie_weights=head is None or (head.shape == embedding.shape and head.equals(embedding)),
        # The header has the float32 nearest to 1e-05, and this is 1e-05 again.
        layer_norm_eps=float(str(np.float32(epsilon))) if isinstance(epsilon, float) else epsilon,
        activation=metadata.get(_ACTIVATION, "gelu_new"),
        bos_token_id=ids["bos"],
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=ids["padding"],
    )


def _lazy_tensor(file: MappedFile, start: int, n_bytes: int, name: str, entry: _Entry) -> LazyTensor:
    """Return the tensor called `name` in a file of `n_bytes` bytes, whose tensors are at byte `start` and after.

    Raises ValueError if the file is too short, or the type of the tensor is unknown.
    """
    dtype, begin = _FLOATS.get(entry.type), start + entry.offset
    if dtype is not None:
        block, size = 1, dtype.itemsize
    elif entry.type == _Q8_0:
        block, size = _Q8_0_BLOCK, 2 + _Q8_0_BLOCK
    else:
        gguf = _import_gguf(f"the type {entry.type} of {name}")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(entry.type)]
        except (ValueError, KeyError):
            raise ValueError(f"{name} has the unknown type {entry.type}") from None
    if entry.shape and entry.shape[-1] % block:
        raise ValueError(f"{name} has rows of {entry.shape[-1]} numbers, which is not a multiple of {block}")
    size *= math.prod(entry.shape) // block
    if begin + size > n_bytes:
        raise ValueError(f"it is incomplete: {name} ends at byte {begin + size:,}, but the file has {n_bytes:,} bytes")

    def load() -> Tensor:
        data = file.read_tensor(name, begin, size)
        if dtype is not None:
            return torch.from_numpy(data).view(dtype).reshape(entry.shape)
        if entry.type == _Q8_0:
            blocks = torch.from_numpy(data).view(-1, 2 + _Q8_0_BLOCK)
            scales = blocks[:, :2].contiguous().view(torch.float16).float()
            return (scales * blocks[:, 2:].view(torch.int8)).reshape(entry.shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(entry.type)
        try:
            return torch.from_numpy(dequantize(data, kind)).float().reshape(entry.shape)
        except NotImplementedError:
            raise ValueError(f"{file.path}: the package gguf cannot convert {name} from the type {kind.name}") from None

    return LazyTensor(entry.shape, dtype or torch.float32, load)


def _converted(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return a lazy tensor that loads `tensor` and converts it to `dtype`."""
    return LazyTensor(tensor.shape, dtype, lambda: tensor.load().to(dtype))


class _HeaderReader:
    """Reads the numbers and texts of a header one after another."""

    def __init__(self, file: BinaryIO, n_bytes: int) -> None:
        self._file = file
        self._left = min(n_bytes, MAX_JSON_BYTES)
        self.position = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes. Raises ValueError if the file ends too early, or the header is too large."""
        if n_bytes > self._left:
            raise ValueError(f"its header has more bytes than the file, or more than {MAX_JSON_BYTES:,}")
        self._left -= n_bytes
        self.position += n_bytes
        return self._file.read(n_bytes)

    def number(self, letter: str) -> Any:
        """Return the next number. `letter` is its type in Python's module struct."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def text(self) -> str:
        """Return the next text."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """Return the next value of the metadata, which has the type `kind`."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            letter = _NUMBERS[kind]
            return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))
        if kind != _STRING:
            raise ValueError(f"its header has a list of the type {kind}")
        return [self.text() for _ in range(count)]

    def tensor(self) -> _Entry:
        """Return the next description of a tensor, without its name."""
        n_axes = self.number("I")
        if n_axes > _MAX_AXES:
            raise ValueError(f"its header has a tensor of {n_axes} dimensions")
        shape = struct.unpack(f"<{n_axes}Q", self.take(8 * n_axes))[::-1]
        return _Entry(shape, self.number("I"), self.number("Q"))


def _read_header(path: Path) -> _Header:
    """Return the header of a GGUF file. Raises ValueError if it is damaged."""
    with open(path, "rb") as file:
        reader = _HeaderReader(file, path.stat().st_size)
        metadata: dict[str, Any] = {}
        tensors: dict[str, _Entry] = {}
        try:
            if reader.take(len(_MAGIC)) != _MAGIC:
                raise ValueError("it does not begin with the letters GGUF")
            version = reader.number("I")
            if version not in _VERSIONS:
                raise ValueError(f"it has the version {version}, MyGPT reads {' and '.join(map(str, _VERSIONS))}")
            n_tensors, n_values = reader.number("Q"), reader.number("Q")
            for _ in range(n_values):
                key = reader.text()
                metadata[key] = reader.value(reader.number("I"))
            for _ in range(n_tensors):
                name = reader.text()
                tensors[name] = reader.tensor()
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            if type(alignment) is not int or alignment <= 0 or alignment % 8:
                raise ValueError(f"general.alignment must be a multiple of 8, got {alignment!r:.80}")
        except ValueError as error:
            raise ValueError(f"{path} is not a valid GGUF file: {error}") from None
    return _Header(metadata, tensors, -(-reader.position // alignment) * alignment)


def _import_gguf(purpose: str) -> ModuleType:
    """Return the package gguf. Raises ValueError if it is not installed. `purpose` is what needs it."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{purpose} needs the package gguf: pip install 'mygpt[gguf]'") from None
    return gguf
