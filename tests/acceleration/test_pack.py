"""Files of packed weights: they give the logits of the model, and any file that does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from conftest import lively_model
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.kernel import Build
from MyGPT.acceleration.packed import PanelLinear
from MyGPT.acceleration.packed_file import packed_path
from MyGPT.acceleration.step import FastModel, accelerate, write_packed_model
from MyGPT.acceleration.storage import Arrays
from MyGPT.config import GPTConfig
from MyGPT.model import GPTModel
from MyGPT.weights.formats import open_checkpoint
from MyGPT.weights.lazy import LazyTensor, release_pages

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
CONFIG = GPTConfig(vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    lively_model(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pack(directory: Path, precision: Any = "int8") -> Path:
    return write_packed_model(open_checkpoint(directory), precision, Build())


def logits(fast: FastModel) -> torch.Tensor:
    return fast(IDS, cache=fast.new_cache(1, 8))


def is_from_file(fast: FastModel) -> bool:
    return fast.arrays.are_filled


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_stored_weights_give_the_logits_of_the_model_to_the_last_bit(
    precision: Any, tie_weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lively_model(dataclasses.replace(CONFIG, tie_weights=tie_weights))
    model.save_pretrained(tmp_path)
    Build().wait()
    capsys.readouterr()  # the first test compiles the kernel
    expected = logits(accelerate(model, precision))
    from_model_file = accelerate(tmp_path, precision)
    assert not is_from_file(from_model_file)
    assert torch.equal(logits(from_model_file), expected)
    pack(tmp_path, precision)
    from_packed_file = accelerate(tmp_path, precision)
    assert is_from_file(from_packed_file)
    assert torch.equal(logits(from_packed_file), expected)
    assert capsys.readouterr().err == ""


def test_the_layout_has_its_number() -> None:
    """If this test fails, the panels have another layout: change packed_file.LAYOUT, or old files give wrong results."""
    kernel = Build().wait()
    P, N, K = kernel.panel, kernel.panel + 3, 5
    weight = torch.randn(N, K)
    padded = torch.zeros(2 * P, 6)
    padded[:N, :5] = weight
    by_precision = {"fp32": padded[:, :5].reshape(2, P, 5, 1).transpose(1, 2)}
    pairs = padded.reshape(2, P, 3, 2).transpose(1, 2)
    by_precision["bf16"] = pairs.bfloat16()
    scale = torch.ones(2 * P)
    scale[:N] = weight.abs().amax(1) / 127
    by_precision["int8"] = (padded / scale[:, None]).round().to(torch.int8).reshape(2, P, 3, 2).transpose(1, 2)
    for precision, expected in by_precision.items():
        linear = PanelLinear("layer", LazyTensor.of(weight), None, precision, kernel, Arrays())
        assert torch.equal(linear.panels, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_matrices_of_every_dtype_and_order_are_packed_alike(dtype: torch.dtype, precision: Any) -> None:
    kernel = Build().wait()
    weight = (torch.randn(50, 33) * torch.logspace(-8, 4, 33)).to(dtype)  # in fp16, subnormal numbers too

    def packed(matrix: torch.Tensor) -> PanelLinear:
        return PanelLinear("layer", LazyTensor.of(matrix), None, precision, kernel, Arrays())

    expected = packed(weight.float())
    if precision == "fp32":
        assert torch.equal(expected.rows(torch.arange(50)[None])[0], weight.float())
    for matrix in (weight, weight.T.contiguous().T, weight.repeat(1, 2)[:, ::2].T.contiguous().T[:, :33]):
        linear = packed(matrix)
        same = weight if matrix is weight or torch.equal(matrix, weight) else matrix
        assert torch.equal(linear.panels, packed(same.float().contiguous()).panels)


def test_every_fp16_number_is_converted_as_torch_converts_it() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(256, 256)
    numbers = torch.where(numbers.isnan(), torch.zeros_like(numbers), numbers)
    linear = PanelLinear("layer", LazyTensor.of(numbers), None, "fp32", Build().wait(), Arrays())
    assert torch.equal(linear.rows(torch.arange(256)[None])[0], numbers.float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"])
def test_a_damaged_model_is_not_packed_in_int8(value: float, name: str, directory: Path) -> None:
    model = GPTModel.from_pretrained(directory)
    with torch.no_grad():
        model.get_parameter(name)[..., 7] = value
    model.save_pretrained(directory)
    with pytest.raises(FloatingPointError, match=f"a weight of {name} is {value}"):
        accelerate(directory, "int8")
    with pytest.raises(FloatingPointError, match=f"a weight of {name} is {value}"):
        pack(directory)
    assert not list(directory.glob("*.packed"))


# --- files that are not used


def refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that says why the packed file is not used, after checking that the results are right."""
    fast = accelerate(directory, "int8")
    assert not is_from_file(fast)
    assert torch.equal(logits(fast), logits(accelerate(GPTModel.from_pretrained(directory), "int8")))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_no_damaged_byte_is_ever_used(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(directory)
    good = path.read_bytes()
    n_header = 8 + int.from_bytes(good[:8], "little")
    generator = torch.Generator().manual_seed(0)
    expected = logits(accelerate(directory, "int8"))
    places = [*range(8), *torch.randint(8, n_header, (40,), generator=generator).tolist()]
    places += torch.randint(n_header, len(good), (20,), generator=generator).tolist()
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        # A damaged time of the source is harmless, because the source's SHA-256 is compared then. So is a damaged space.
        assert torch.equal(logits(accelerate(directory, "int8")), expected)
        error = capsys.readouterr().err
        assert place < n_header or "it is damaged: its checksum is wrong; mygpt pack writes a new one" in error


@pytest.mark.parametrize("n_bytes", [0, 3, 8, 500, -1])
def test_a_truncated_file_is_not_used(n_bytes: int, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(directory)
    path.write_bytes(path.read_bytes()[:n_bytes])
    assert "is not used: it is damaged" in refused(directory, capsys)


def change_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def change_weights_and_keep_the_time(directory: Path) -> None:
    before = (directory / "model.safetensors").stat()
    change_weights(directory)
    os.utime(directory / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))


def take_the_file_of_another_model(directory: Path) -> None:
    other = directory.with_name("other")
    model = GPTModel.from_pretrained(directory)
    with torch.no_grad():
        model.transformer.wpe.weight.add_(1)
    model.save_pretrained(other)
    shutil.copy(pack(other), directory)


@pytest.mark.parametrize("change", [change_weights, change_weights_and_keep_the_time, take_the_file_of_another_model])
def test_a_file_of_other_weights_is_not_used(
    change: Callable[[Path], None], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(directory)
    change(directory)
    assert "model.safetensors has changed since it was written" in refused(directory, capsys)


def test_a_file_for_another_kind_of_cpu_is_not_used(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(directory)
    other = packed_path(directory / "model.safetensors", "int8", 7)
    path.rename(other)
    assert refused(directory, capsys) == (
        f"{other} is not used: it is for another kind of CPU; mygpt pack writes a new one"
    )
    other.rename(path)
    text = path.read_bytes()
    path.write_bytes(text.replace(f'"panel": "{Build().wait().panel}"'.encode(), b'"panel": "96"'))
    assert "another precision or another kind of CPU" in refused(directory, capsys)


def test_a_file_of_another_version_is_not_used(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(directory)
    path.write_bytes(path.read_bytes().replace(b'"layout": "1"', b'"layout": "0"'))
    assert "another version of MyGPT wrote it" in refused(directory, capsys)


def test_a_file_of_another_architecture_is_not_used(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(directory)
    config = json.loads((directory / "config.json").read_text())
    # Only the config changes, and the kernel takes the number of heads from it.
    (directory / "config.json").write_text(json.dumps({**config, "n_head": 4}))
    fast = accelerate(directory, "int8")
    assert is_from_file(fast)
    assert torch.equal(logits(fast), logits(accelerate(GPTModel.from_pretrained(directory), "int8")))
    assert capsys.readouterr().err == ""


def test_a_copied_model_still_uses_its_file(directory: Path, tmp_path: Path) -> None:
    pack(directory)
    shutil.copytree(directory, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    assert is_from_file(accelerate(tmp_path / "copy", "int8"))


def test_saving_a_model_removes_the_old_packed_weights(directory: Path) -> None:
    path = pack(directory)
    GPTModel.from_pretrained(directory).save_pretrained(directory)
    assert not path.exists()


def test_a_full_disk_leaves_the_old_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(directory)
    old = path.read_bytes()

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        pack(directory)
    assert path.read_bytes() == old
    assert sorted(p.name for p in directory.glob("*.packed*")) == [path.name]


def test_safetensors_reads_the_file(directory: Path) -> None:
    path = pack(directory)
    arrays = accelerate(directory, "int8").arrays.named
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(arrays)
        assert all(torch.equal(file.get_tensor(name), array) for name, array in arrays.items())
        assert file.metadata()["precision"] == "int8"


def test_an_openai_checkpoint_in_several_files_is_described_whole(tmp_path: Path) -> None:
    from MyGPT.acceleration.packed_file import describe_source, is_unchanged

    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.ckpt.int8-24.packed"):
        (tmp_path / name).write_bytes(name.encode())
    source = describe_source(tmp_path / "model.ckpt")
    assert [entry["name"] for entry in source] == ["model.ckpt.data-00000-of-00001", "model.ckpt.index"]
    assert is_unchanged(source, tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt.index").write_bytes(b"MODEL.ckpt.index")
    assert not is_unchanged(source, tmp_path / "model.ckpt")


# --- memory


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's page tables")
def test_released_pages_come_back_from_the_file_and_changed_pages_stay(tmp_path: Path) -> None:
    page = resource.getpagesize() // 4
    original = torch.arange(64 * page, dtype=torch.float32)
    path = tmp_path / "numbers"
    path.write_bytes(original.numpy().tobytes())
    numbers = torch.from_file(str(path), shared=False, size=len(original))
    numbers[10 * page] = -1  # a private copy of this page
    expected = original.clone()
    expected[10 * page] = -1
    assert torch.equal(numbers, expected)
    resident = resident_pages(numbers)
    assert resident == 64
    release_pages(numbers)
    assert resident_pages(numbers) < 20
    assert torch.equal(numbers, expected)
    memory = torch.ones(64 * page)
    release_pages(memory)
    assert torch.equal(memory, torch.ones(64 * page))


def resident_pages(tensor: torch.Tensor) -> int:
    """Return how many pages of a tensor, which begins at a page, are in the memory of this process."""
    page = resource.getpagesize()
    assert tensor.data_ptr() % page == 0
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * (tensor.data_ptr() // page))
        data = file.read(8 * (tensor.nbytes // page))
    return sum(data[i + 7] >> 7 for i in range(0, len(data), 8))


def test_packing_does_not_change_a_model_that_was_modified_in_memory(directory: Path) -> None:
    model = GPTModel.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    accelerate(model, "int8")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's count of the peak memory")
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_peak_is_little_above_the_packed_weights(is_packed: bool, tmp_path: Path) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from memory import Peak

    config = GPTConfig(vocab_size=50257, context_length=64, emb_dim=512, n_heads=8, n_layers=4)
    GPTModel(config).save_pretrained(tmp_path)
    accelerate(tmp_path, "int8")  # loads the kernel
    if is_packed:
        pack(tmp_path)
    with Peak() as peak:
        fast = accelerate(tmp_path, "int8")
    size = sum(array.nbytes for array in fast.arrays.named.values())
    # One slice of the head, one matrix of 4 MB and the last large page are 12 MB together; the model file has 160 MB.
    assert peak.n_bytes < size + (12 << 20)
