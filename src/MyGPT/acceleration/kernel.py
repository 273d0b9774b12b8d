"""The functions of kernel.cpp, called through ctypes: packed weights, and GPT-2's forward pass.

Without a compiler, packed.py uses torch's operators, which give the same results more slowly. B batch size, T new tokens, H
heads, D = C // H, C embedding width, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.acceleration import compiler

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
PANELS = 12, 24, 48
"""The possible values of Kernel.panel."""
FUNCTIONS = ("gpt2_panel", "gpt2_pack", "gpt2_rows", "gpt2_linear", "gpt2_forward", "gpt2_pick", "gpt2_exponential")


_STATE_BYTES = 5056
"""Size of the state of torch's CPU generator. sample.h reads the first 5016 bytes."""


class LinearStruct(Structure):
    """The ctypes declaration of `struct Linear` in kernel.cpp: weight, scales, bias, sizes and type of a linear layer."""

    _fields_ = [
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("N", c_int32), ("K", c_int32), ("type", c_int32),
    ]  # fmt: skip


class SourceStruct(Structure):
    """The ctypes declaration of `struct Source` in packing.h: the address, strides and number format of a matrix to pack."""

    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("column_stride", c_int64), ("type", c_int32)]


class NormStruct(Structure):
    """The ctypes declaration of `struct Norm` in kernel.cpp: weight and bias of a LayerNorm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class BlockStruct(Structure):
    """The ctypes declaration of `struct Block` in kernel.cpp: the layers of a transformer block."""

    _fields_ = [
        ("ln_1", NormStruct), ("ln_2", NormStruct),
        ("c_attn", LinearStruct), ("attn_proj", LinearStruct), ("c_fc", LinearStruct), ("mlp_proj", LinearStruct),
    ]  # fmt: skip


class ModelStruct(Structure):
    """The ctypes declaration of `struct Model` in kernel.cpp: the addresses of all weights, and the sizes of the model."""

    _fields_ = [
        ("wte", c_void_p), ("wpe", c_void_p), ("blocks", POINTER(BlockStruct)), ("ln_f", NormStruct),
        ("head", LinearStruct), ("n_layers", c_int32), ("n_heads", c_int32), ("exact_gelu", c_int32),
        ("eps", c_float),
    ]  # fmt: skip


class SamplingStruct(Structure):
    """The ctypes declaration of `struct Sampling` in sample.h: the options of SamplingConfig, with 0 for an unset one.

    `outside` is 1 - top_p.
    """

    _fields_ = [
        ("temperature", c_float), ("outside", c_float), ("min_p", c_float), ("penalty", c_float), ("top_k", c_int32),
    ]  # fmt: skip


class Build(compiler.Build["Kernel"]):
    """A compilation of kernel.cpp in a separate process. See `compiler.Build`."""

    def __init__(self) -> None:
        super().__init__(SOURCE, FUNCTIONS, Kernel)


class Kernel:
    """The functions of the compiled C++ kernel, as Python methods.

    All tensors that are passed to them must be contiguous, on the CPU, and float32 unless a method states another dtype.
    """

    def __init__(self, library: CDLL) -> None:
        self._library = library
        self.panel: int = library.gpt2_panel()
        """Number of rows of a weight matrix that are stored interleaved, as one panel: 12, 24 or 48, depending on the CPU."""
        if self.panel not in PANELS:
            raise OSError(f"the library is not the compiled kernel: its panels have {self.panel} rows")

    def pack(self, rows: Tensor, linear: LinearStruct, first_row: int = 0) -> bool:
        """Copy rows of a weight matrix, (n, K), into the memory of `linear`, in the order in which the kernel reads it.

        int8 weights are divided by their scales, which are also computed and written into the memory of `linear`. int4
        weights are packed by int4.py instead.

        Args:
            rows: the rows in float32, bfloat16 or float16. They need not be contiguous.
            linear: the weight matrix (N, K), with the memory of its panels and scales.
            first_row: the index that the first row has in the matrix. It must be a multiple of `panel`.

        Returns:
            False if a weight that is stored in int8 is NaN or infinite, otherwise True.
        """
        import torch

        types = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
        source = SourceStruct(address(rows), *rows.stride(), types[rows.dtype])
        n_threads = _n_threads()
        return bool(self._library.gpt2_pack(byref(source), byref(linear), first_row, len(rows), n_threads))

    def rows(self, linear: LinearStruct, ids: Tensor, y: Tensor) -> None:
        """Write the rows with the indices `ids` (int64) of the weight matrix (N, K) of `linear` into y, (*ids.shape, K)."""
        self._library.gpt2_rows(byref(linear), address(ids), ids.numel(), address(y))

    def linear(self, linear: LinearStruct, x: Tensor, y: Tensor, then: int) -> None:
        """Write x Wᵀ + bias, for x (M, K) and the weight matrix W (N, K) of `linear`, into y (M, N).

        then=0 stores the result in y, and then=1 adds the result to y. then=2 stores the GELU of the result in the tanh
        approximation, and then=3 stores the exact GELU of the result.
        """
        self._library.gpt2_linear(byref(linear), address(x), len(x), address(y), then, _n_threads())

    def forward(
        self,
        model: ModelStruct,
        sequences: Sequence[tuple[int, int, int, int]],
        ids: Tensor,
        cache: Tensor,
        wanted: Sequence[int],
        logits: Tensor,
        scratch: Tensor,
    ) -> None:
        """Write the logits of the new tokens with the n indices `wanted` into `logits`, (n, V).

        Each of `sequences` has the number of new tokens, the number of earlier tokens, the index of the first token after its
        left padding, and its slot. ids (M) int64 are the new tokens of all sequences, one sequence after another, and must be
        in the vocabulary. cache (n_layers, 2, slots, H, capacity, D) holds the keys and values of the earlier tokens, and
        those of the new tokens are written after them. scratch is memory for 6 M C numbers.
        """
        numbers = [number for sequence in sequences for number in sequence]
        self._library.gpt2_forward(
            byref(model), (c_int32 * len(numbers))(*numbers), len(sequences), address(ids), address(cache), cache.shape[2],
            cache.shape[4], (c_int32 * len(wanted))(*wanted), len(wanted), address(logits), address(scratch), _n_threads(),
        )  # fmt: skip

    def pick(
        self, options: SamplingStruct, logits: Tensor, seen: Tensor | None, states: Sequence[Tensor], tokens: Tensor
    ) -> bool:
        """Write the next token of each row of logits (B, V) into `tokens`, (B) int64.

        seen (B, V) bool is True for tokens that already occurred. `states` are states of CPU generators, which are advanced:
        none if the temperature is 0, one for all rows, or one per row. Returns False, with undefined tokens and states, if the
        largest logit of a row is NaN or infinite.
        """
        addresses = (c_void_p * len(states))(*(state.data_ptr() for state in states))
        is_right: int = self._library.gpt2_pick(
            byref(options), address(logits), address(seen), *logits.shape, addresses, len(states), address(tokens),
            _n_threads(),
        )  # fmt: skip
        return bool(is_right)

    @cached_property
    def draws_as_torch(self) -> bool:
        """True if `pick` draws the random numbers of this version of torch, which is tested once with 1,000 numbers."""
        import torch

        state, own = torch.Generator().manual_seed(1).get_state(), torch.empty(1000)
        other = torch.Generator().manual_seed(1)
        expected = torch.empty(1000).exponential_(generator=other)
        if state.numel() != _STATE_BYTES:
            return False
        self._library.gpt2_exponential(address(state), 1000, address(own))
        return torch.equal(state, other.get_state()) and torch.allclose(own, expected, rtol=1e-5, atol=0)


def address(tensor: Tensor | None) -> c_void_p:
    """Return a pointer to the tensor's memory, as an argument for the kernel. For None, return a null pointer."""
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _n_threads() -> int:
    """Return torch's number of threads, which OpenMP does not know in threads that Python starts."""
    import torch  # here, because a compilation starts before torch is loaded

    return torch.get_num_threads()
