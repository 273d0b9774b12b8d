"""Write one HTML page that contains a model and runs it in the browser, as the reader types.

The page is the template web/live.html. It has the data of `live_data` as JSON, and each weight in base64 in an inert script
element of its own. model.js, tokenizer.js, sampling.js and answers.js compute in a worker, and source.js asks it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from MyGPT.acceleration.packed import row_scales
from MyGPT.generation import end_ids
from MyGPT.inside.page import MAX_TOKENS, WEB, describe, embedded_json, fill_page
from MyGPT.model import GPTModel
from MyGPT.parts import refuse_parts
from MyGPT.sampling import require_finite
from MyGPT.tokenizers import BPETokenizer, CharTokenizer, SimpleTokenizer
from MyGPT.tokenizers.base import ids_without_token
from MyGPT.tokenizers.bpe import CHARACTER_TO_BYTE
from MyGPT.tokenizers.codec import NEW_CHARACTERS
from MyGPT.weights.layout import shapes

LivePrecision = Literal["fp16", "int8"]
"""The number formats of the weights in a live page."""
MAX_PARAMETERS = 32_000_000
"""The maximum number of parameters of a model in a live page. Larger pages load and answer slowly."""
_START = "Once upon a time"
_MARKER = "<!-- tensors -->"


class LivePage:
    """An HTML page that contains a model. `n_bytes` is its size, and `pieces` yields its text.

    Args:
        model: the model. Merge adapters first.
        tokenizer: its tokenizer, one of MyGPT's.
        text: the text with which the page starts. Default: "Once upon a time", or no text if the tokenizer cannot represent it.
        name: the name of the model in the title of the page.
        precision: "fp16" stores float16 weights. "int8" stores matrices with one scale per row, in half the space, and
            vectors in float32.

    Raises:
        ValueError: the model has too many parameters, custom parts or an unmerged adapter; a weight does not fit into float16; or
            the tokenizer is not one of MyGPT's, or does not know a character of the text.
        FloatingPointError: a weight is NaN or infinite.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Any,
        text: str | None = None,
        name: str = "a GPT",
        precision: LivePrecision = "fp16",
    ) -> None:
        if precision not in get_args(LivePrecision):
            raise ValueError(f"precision must be {' or '.join(get_args(LivePrecision))}, got {precision!r}")
        refuse_parts(model, "a live page")
        n = model.num_parameters()
        if n > MAX_PARAMETERS:
            way_out = "use mygpt serve, whose page shows the same view"
            raise ValueError(f"the model has {n:,} parameters, a live page can hold {MAX_PARAMETERS:,}: {way_out}")
        if text is None:
            text = _START if _is_representable(tokenizer, _START) else ""
        tokenizer.encode(text)  # raises ValueError for an unknown character
        self._tensors = _tensors(model, precision)
        data = live_data(model, tokenizer, text, name, precision)
        data["weight_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        values = {"title": html.escape(f"Watch {name} read and write"), "data": embedded_json(data), "tensors": _MARKER}
        page = fill_page(WEB / "live.html", values, "worker-src blob:")
        self._head, _, self._tail = page.partition(_MARKER)

    @property
    def n_bytes(self) -> int:
        """The size of the page in bytes."""
        around = len(self._head.encode()) + len(self._tail.encode())
        return around + sum(
            len(_opening(name, tensor)) + len(_CLOSING) + 4 * -(-tensor.numel() * tensor.element_size() // 3)
            for name, tensor in self._tensors.items()
        )

    def pieces(self) -> Iterator[str]:
        """Yield the text of the page in pieces of one weight each, so that the whole page is never in memory."""
        yield self._head
        for name, tensor in self._tensors.items():
            packed = np.ascontiguousarray(tensor.numpy()).astype(tensor.numpy().dtype.newbyteorder("<"), copy=False)
            yield _opening(name, tensor) + base64.b64encode(packed.tobytes()).decode() + _CLOSING
        yield self._tail


_CLOSING = "</script>\n"


def _opening(name: str, tensor: Tensor) -> str:
    kind, shape = str(tensor.dtype).removeprefix("torch."), " ".join(map(str, tensor.shape))
    return f'<script type="application/octet-stream" data-tensor="{name}" data-type="{kind}" data-shape="{shape}">'


def _tensors(model: GPTModel, precision: LivePrecision) -> dict[str, Tensor]:
    """Return the weights of a page on the CPU, by their names without "transformer."."""
    state = model.state_dict()
    missing = [name for name in shapes(model.config) if name not in state]
    if missing:
        raise ValueError(f"the model has no weight {missing[0]}: merge an adapter first")
    packed: dict[str, Tensor] = {}
    for name in shapes(model.config):
        weight, short = state[name].detach().cpu(), name.removeprefix("transformer.")
        require_finite(f"a weight of {name}", weight)
        weight = weight.float()
        if precision == "fp16":
            packed[short] = weight.half()
            if not packed[short].isfinite().all():
                largest = float(weight.abs().max())
                limit = "float16 ends at 65,504: use --precision int8"
                raise ValueError(f"a weight of {name} is as large as {largest:.4g}, but {limit}")
        elif weight.dim() == 1:
            packed[short] = weight
        else:
            scales = row_scales(weight)
            packed[short] = (weight / scales[:, None]).round().to(torch.int8)
            packed[f"{short}.scale"] = scales
    return packed


def live_data(model: GPTModel, tokenizer: Any, text: str, name: str, precision: str) -> dict[str, Any]:
    """Return everything that a live page contains apart from the weights, as a dict for JSON.

    `excluded` has ranges [first, last] of ids that are never generated, because they have no token. At the ids in `ends`,
    generation ends.
    """
    config, ends = model.config, end_ids(model, tokenizer)
    excluded = [id_ for id_ in ids_without_token(tokenizer, config.vocab_size) if id_ not in ends]
    fields = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "activation", "layer_norm_eps")
    return {
        "name": name,
        "description": describe(model),
        "text": text,
        "precision": precision,
        "n_parameters": model.num_parameters(),
        "max_inside": min(MAX_TOKENS, config.context_length),
        "config": {field: getattr(config, field) for field in fields},
        "tokenizer": tokenizer_data(tokenizer),
        "excluded": _ranges(excluded),
        "ends": [id_ for id_ in ends if id_ < config.vocab_size],
    }


def tokenizer_data(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer as a dict for JSON, from which tokenizer.js builds it.

    A byte-level BPE has the ids of the 256 bytes, and its merges as pairs of token numbers in base64: 0 to 255 for the bytes,
    and 256 + i for the result of merge i. The vocabulary follows from the merges. For GPT-2, this takes 0.3 MB instead of the
    2.1 MB of its tokenizer.json.
    """
    if not isinstance(tokenizer, (CharTokenizer, SimpleTokenizer, BPETokenizer)):
        kind = type(tokenizer).__name__
        raise ValueError(f"a live page needs a tokenizer of MyGPT, got a {kind}: open it with get_tokenizer")
    content = tokenizer.to_json()
    added = content["added_tokens"]
    vocab = content["model"]["vocab"]
    if not isinstance(tokenizer, BPETokenizer):
        kind = "chars" if isinstance(tokenizer, CharTokenizer) else "words"
        return {"kind": kind, "tokens": [*map(list, vocab.items())], "added": added}
    merges = content["model"]["merges"]
    numbers = CHARACTER_TO_BYTE | {first + second: 256 + i for i, (first, second) in enumerate(merges)}
    n_bytes = 2 if len(numbers) <= 1 << 16 else 4
    pairs = np.array([[numbers[first], numbers[second]] for first, second in merges], f"<u{n_bytes}")
    ids = [vocab[first + second] for first, second in merges]
    names = {token["content"] for token in added}
    others = {token: id_ for token, id_ in vocab.items() if token not in numbers and token not in names}
    unmerged = [[id_, list(tokenizer.decode_tokens_bytes([id_])[0])] for id_ in others.values()]
    return {
        "kind": "bpe",
        "newer": NEW_CHARACTERS.pattern[1:-1],
        "bytes": [vocab[character] for character, _ in sorted(CHARACTER_TO_BYTE.items(), key=lambda pair: pair[1])],
        "merges": base64.b64encode(pairs.tobytes()).decode(),
        "merge_bytes": n_bytes,
        "ids": None if ids == [*range(256, 256 + len(ids))] else ids,
        "unmerged": unmerged,
        "added": added,
    }


def _is_representable(tokenizer: Any, text: str) -> bool:
    """Return True if the tokenizer encodes a text to ids that it decodes to the same text."""
    try:
        return bool(tokenizer.decode(tokenizer.encode(text)) == text)
    except ValueError:
        return False


def _ranges(ids: list[int]) -> list[list[int]]:
    """Return the ranges [first, last] of consecutive numbers in an ascending list."""
    ranges: list[list[int]] = []
    for id_ in ids:
        if ranges and ranges[-1][1] == id_ - 1:
            ranges[-1][1] = id_
        else:
            ranges.append([id_, id_])
    return ranges
