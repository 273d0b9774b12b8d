"""The accelerated model, compared with the plain one: every precision, with and without a C++ compiler."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import lively_model
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.kernel import Build, Kernel
from MyGPT.acceleration.packed import PanelLinear, PlainLinear
from MyGPT.acceleration.step import FastModel, accelerate
from MyGPT.acceleration.storage import Arrays
from MyGPT.config import GPTConfig
from MyGPT.generation import generate
from MyGPT.model import GPTModel
from MyGPT.weights.lazy import LazyTensor

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
ways = pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])

CONFIGS: dict[str, dict[str, Any]] = {
    "GPT-2's": {"tie_weights": True},
    "untied": {},
    "no qkv bias": {"qkv_bias": False},
    "exact GELU": {"activation": "gelu"},
    "one head, one layer, odd sizes": {"emb_dim": 5, "n_heads": 1, "n_layers": 1, "vocab_size": 11},
    "wide": {"emb_dim": 320, "n_heads": 5, "n_layers": 1, "vocab_size": 130},
}
configs = pytest.mark.parametrize("name", CONFIGS)


def make_model(**changes: Any) -> GPTModel:
    sizes = {"vocab_size": 67, "context_length": 48, "emb_dim": 24, "n_heads": 3, "n_layers": 3}
    return lively_model(
        GPTConfig(**{**sizes, "drop_rate": 0.0, "qkv_bias": True, "tie_weights": False, **changes})  # type: ignore[arg-type]
    )


def ragged(model: GPTModel, B: int = 3, T: int = 9) -> tuple[Tensor, Tensor]:
    """Return left-padded prompts of T, T - 1, ... tokens and their mask."""
    ids = torch.randint(0, model.config.vocab_size, (B, T))
    return ids, (torch.arange(T) >= torch.arange(B)[:, None]).long()


def in_pieces(model: Any, ids: Tensor, mask: Tensor, *lengths: int) -> Tensor:
    """Return the logits (B, T, V), computed with a cache in pieces of these lengths."""
    cache = model.new_cache(len(ids), ids.shape[1])
    pieces = []
    with torch.no_grad():
        for n in lengths:
            end = cache.length + n
            pieces.append(model(ids[:, end - n : end], attention_mask=mask[:, :end], cache=cache))
    assert cache.length == ids.shape[1]
    return torch.cat(pieces, dim=1)


def error(logits: Tensor, exact: Tensor, mask: Tensor) -> float:
    """Return the relative error of the logits, without the padding."""
    real = mask.bool()
    return float((logits.double() - exact)[real].norm() / exact[real].norm())


@pytest.mark.slow
@ways
@configs
@pytest.mark.parametrize("lengths", [(9,), (1,) * 9, (4, 1, 3, 1)], ids=str)
def test_float32_logits_are_as_near_to_float64_as_the_plain_models(
    name: str, compiled: bool, lengths: tuple[int, ...]
) -> None:
    model = make_model(**CONFIGS[name])
    ids, mask = ragged(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask)
        plain = model(ids, attention_mask=mask)
    fast = in_pieces(accelerate(model, compiled=compiled), ids, mask, *lengths)
    # Both round, in another order. A factor of 3 allows for chance; a mistake would give a factor of 1e5.
    assert error(fast, exact, mask) < 3 * error(plain, exact, mask)


def narrowed(model: GPTModel, precision: str) -> GPTModel:
    """Return the model in float64 with weights rounded to bf16 or int8 by torch's own conversions."""
    narrow = copy.deepcopy(model).double()
    for name, parameter in narrow.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith("wpe.weight")
        if not is_matrix or (name.endswith("wte.weight") and not model.config.tie_weights):
            continue
        with torch.no_grad():
            if precision == "bf16":
                parameter.copy_(parameter.bfloat16())
            else:
                scales = (parameter.abs().amax(1) / 127).float()
                zeros = torch.zeros(len(scales), dtype=torch.int32)
                parameter.copy_(torch.fake_quantize_per_channel_affine(parameter.float(), scales, zeros, 0, -127, 127))
    return narrow


@pytest.mark.slow
@needs_compiler
@configs
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_narrow_weights_are_rounded_and_little_else_is(name: str, precision: Any) -> None:
    model = make_model(**CONFIGS[name])
    ids, mask = ragged(model)
    with torch.no_grad():
        exact = narrowed(model, precision)(ids, attention_mask=mask)
        unrounded = copy.deepcopy(model).double()(ids, attention_mask=mask)
        plain = error(model(ids, attention_mask=mask), unrounded, mask)
    # int8 weights are multiplied with 16-bit activations, which are 256 times as precise, so their error is as much smaller
    # (measured: 0.3 to 1.2 times 1/256).
    bound = 3 * plain if precision == "bf16" else error(exact, unrounded, mask) / 128
    fast = accelerate(model, precision, compiled=True)
    for lengths in ((9,), (4, 1, 3, 1)):
        assert error(in_pieces(fast, ids, mask, *lengths), exact, mask) < bound


@configs
@pytest.mark.parametrize(("precision", "rounding"), [("bf16", 2**-8), ("int8", 2**-8)])
def test_narrow_weights_without_a_compiler_are_near_the_plain_model(name: str, precision: Any, rounding: float) -> None:
    model = make_model(**CONFIGS[name])
    ids, mask = ragged(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask)
    fast = accelerate(model, precision, compiled=False)
    # Each of thirteen matrices adds an error of about `rounding` in a random direction, and these weights, 20 times as large
    # as GPT-2's, amplify the error: the measured factor is at most 11. A wrong scale or bias gives an error of 1.
    assert error(in_pieces(fast, ids, mask, 4, 1, 3, 1), exact, mask) < 30 * rounding


@pytest.mark.slow
@ways
@configs
def test_greedy_tokens_are_the_plain_models(name: str, compiled: bool) -> None:
    # 60 tokens exceed the context. The two largest logits differ by at least 1e-3, and rounding changes them by 1e-5.
    model = make_model(**CONFIGS[name])
    ids, mask = ragged(model)
    fast = accelerate(model, compiled=compiled)
    assert torch.equal(generate(fast, ids, 60, attention_mask=mask), generate(model, ids, 60, attention_mask=mask))
    assert torch.equal(generate(fast, ids, 5, use_cache=False), generate(model, ids, 5))


@ways
def test_sampled_tokens_are_the_plain_models(compiled: bool) -> None:
    model = make_model()
    ids, mask = ragged(model)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}
    fast = accelerate(model, compiled=compiled)
    expected = generate(model, ids, 30, attention_mask=mask, **options)
    assert torch.equal(generate(fast, ids, 30, attention_mask=mask, **options), expected)


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_row_does_not_depend_on_the_rows_beside_it(precision: Any) -> None:
    # Equal to the last bit, because the order of summation does not depend on the number of rows. C = 320 has whole and half
    # blocks of K.
    model = make_model(**CONFIGS["wide"])
    fast = accelerate(model, precision, compiled=True)
    ids, mask = torch.randint(0, 130, (9, 7)), torch.ones(9, 7, dtype=torch.int64)
    together = in_pieces(fast, ids, mask, 7)
    for row in range(9):
        assert torch.equal(in_pieces(fast, ids[row : row + 1], mask[:1], *(1,) * 7)[0], together[row])
    assert torch.equal(in_pieces(fast, ids, mask, 2, 4, 1), together)


@ways
def test_masks_of_other_kinds_mean_what_they_mean_to_the_model(compiled: bool) -> None:
    model = make_model()
    fast = accelerate(model, compiled=compiled)
    ids = torch.randint(0, 67, (3, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2, 3, 3], [0, 1, 1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    # For logits of size 10, 1e-4 is about a hundred roundings.
    torch.testing.assert_close(fast(ids, attention_mask=mask), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_pieces(fast, ids, mask, 5, 3), expected, atol=1e-4, rtol=1e-4)


@ways
def test_the_last_logits_of_a_long_prompt_are_the_models(compiled: bool) -> None:
    model = make_model()
    fast = accelerate(model, compiled=compiled)
    ids, mask = ragged(model, T=40)
    last = fast(ids, attention_mask=mask, cache=fast.new_cache(3, 40), last_only=True)
    assert last.shape == (3, 1, 67)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_pieces(fast, ids, mask, 40)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


@ways
def test_a_merged_adapter_is_in_the_fast_model(compiled: bool) -> None:
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    adapted = get_peft_model(make_model(), lora).eval()
    with pytest.raises(ValueError, match="got a PeftModelForCausalLM: merge an adapter first"):
        accelerate(adapted)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"c_attn is a Linear, not GPT-2's own layer: merge"):
        accelerate(adapted.get_base_model())
    ids = torch.randint(0, 67, (2, 9))
    expected = generate(adapted, ids, 20)
    merged = adapted.merge_and_unload()
    assert torch.equal(generate(accelerate(merged, compiled=compiled), ids, 20), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ways
def test_a_model_stored_in_half_precision_keeps_its_weights(dtype: torch.dtype, compiled: bool) -> None:
    model = make_model().to(dtype)
    ids, mask = ragged(model)
    widened = copy.deepcopy(model).float()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask)
        plain = widened(ids, attention_mask=mask)
    fast = accelerate(model, compiled=compiled)
    assert error(in_pieces(fast, ids, mask, 4, 5), exact, mask) < 3 * error(plain, exact, mask)


# --- matrix products


@pytest.fixture
def kernel() -> Kernel:
    return Build().wait()


def panels(weight: Tensor, bias: Tensor | None, precision: Any) -> PanelLinear:
    lazy_bias = None if bias is None else LazyTensor.of(bias)
    return PanelLinear("layer", LazyTensor.of(weight), lazy_bias, precision, Build().wait(), Arrays())


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 600),
    st.integers(1, 300),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    st.booleans(),
)
def test_products_are_those_of_float64(N: int, K: int, M: int, precision: Any, has_bias: bool) -> None:
    weight, x = torch.randn(N, K), torch.randn(M, K)
    bias = torch.randn(N) if has_bias else None
    linear = panels(weight, bias, precision)
    used = linear.rows(torch.arange(N)[None])[0].double()
    exact = F.linear(x.double(), used, None if bias is None else bias.double())
    # |error| <= (n + 2) u |x| |w| for a sum of n products, u = 2^-24 (Higham, 2002, section 3.1). Here K / 128 blocks of 128.
    bound = (
        (128 + K / 128 + 4) * 2**-24 * F.linear(x.abs().double(), used.abs(), bias.abs().double() if has_bias else None)
    )
    if precision == "int8":  # activations are rounded to multiples of 1/32767 of the block's largest
        half = torch.cat([block.abs().amax(1, keepdim=True).expand_as(block) / 65534 for block in x.split(128, 1)], 1)
        bound += F.linear(half.double(), used.abs())
    if precision == "int4":  # activations are rounded to multiples of 1/127 of the group's largest
        half = torch.cat([group.abs().amax(1, keepdim=True).expand_as(group) / 253.9 for group in x.split(32, 1)], 1)
        bound += F.linear(half.double(), used.abs())
    assert ((linear(x) - exact).abs() <= bound).all()
    onto = torch.randn(M, N)
    before = onto.clone()
    added = linear(x, "add", onto)
    assert added is onto
    torch.testing.assert_close(added, before + linear(x))


@needs_compiler
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-37, 1e-30, 1e30])
def test_int8_products_of_tiny_and_huge_rows_are_finite_and_near(size: float) -> None:
    # Rows below 1e-30 become 0.
    weight, x = torch.randn(5, 300), torch.randn(2, 300) * size
    exact = F.linear(x.double(), weight.double())
    assert ((panels(weight, None, "int8")(x) - exact).abs() <= 0.02 * exact.abs().amax() + 1e-27).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-6, 1e6))
def test_int8_weights_are_off_by_half_a_step_at_most(N: int, K: int, size: float) -> None:
    weight = torch.randn(N, K) * size
    weight[0] = 0  # the scale of a row of zeros must not be 0
    ids = torch.arange(N)[None]
    step = weight.abs().amax(1, keepdim=True) / 127
    plain = PlainLinear(weight, None, "int8").rows(ids)[0]
    assert ((plain - weight).abs() <= step * (0.5 + 1e-4)).all()
    if find_compiler() is not None:
        assert torch.equal(panels(weight, None, "int8").rows(ids)[0], plain)


@needs_compiler
def test_bf16_panels_are_rounded_as_torch_rounds() -> None:
    values = torch.randint(-(2**31), 2**31, (64, 500), dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = torch.where(values.isfinite(), values, 1.0)
    assert torch.equal(panels(values, None, "bf16").rows(torch.arange(64)[None])[0], values.bfloat16().float())


@needs_compiler
@pytest.mark.parametrize(("then", "approximate"), [("gelu_new", "tanh"), ("gelu", "none")])
def test_gelu_is_torchs(then: Any, approximate: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e30, -100.0, -0.0, 100.0, 1e30])])[:, None]
    gelu = panels(torch.ones(1, 1), None, "fp32")(x, then)
    exact = F.gelu(x.double(), approximate=approximate)
    # The tolerance is two roundings of 1 + erf or of the exponential.
    torch.testing.assert_close(gelu.double(), exact, atol=2e-7, rtol=1e-6)


@ways
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_later_changes_of_the_model_do_not_reach_the_fast_copy(
    precision: Any, tie_weights: bool, compiled: bool
) -> None:
    model = make_model(tie_weights=tie_weights)
    ids, mask = ragged(model)
    fast = accelerate(model, precision, compiled=compiled)
    before = in_pieces(fast, ids, mask, 4, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(in_pieces(fast, ids, mask, 4, 5), before)


@ways
def test_automatic_precision_keeps_the_stored_one(compiled: bool) -> None:
    model = make_model()
    assert accelerate(model, "auto", compiled=compiled).precision == "fp32"
    assert accelerate(model.bfloat16(), "auto", compiled=compiled).precision == "bf16"


# --- NaN and infinity


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_a_nan_or_infinite_activation_makes_its_row_not_finite(precision: Any, value: float, place: int) -> None:
    x, weight = torch.randn(3, 300), torch.randn(20, 300)
    expected = panels(weight, None, precision)(x)
    x[1, place] = value
    y = panels(weight, None, precision)(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], expected[::2])


@ways
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(
    "name", ["transformer.wpe.weight", "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"]
)
def test_a_nan_weight_gives_nan_logits_or_an_error(name: str, precision: Any, compiled: bool) -> None:
    """int8 and int4 have no NaN, so a damaged model is refused. It used to generate text without a warning."""
    model = make_model(tie_weights=True)
    with torch.no_grad():
        model.get_parameter(name)[2, 3] = torch.nan
    ids = torch.tensor([[0, 1, 2, 3]])
    assert model(ids)[0, 2:].isnan().all()
    if precision in ("int8", "int4"):
        with pytest.raises(FloatingPointError, match=f"a weight of {name} is nan"):
            accelerate(model, precision, compiled=compiled)
        return
    fast = accelerate(model, precision, compiled=compiled)
    assert in_pieces(fast, ids, torch.ones_like(ids), 3, 1)[0, 2:].isnan().all()


# --- compiling the kernel


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_without_a_compiler_torch_does_it_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = make_model()
    fast = accelerate(model)
    assert capsys.readouterr().err == (
        "there is no C++ compiler (no-such-compiler); generating with torch's operators, which is slower\n"
    )
    ids = torch.randint(0, 67, (1, 4))
    assert torch.equal(generate(fast, ids, 10), generate(model, ids, 10))
    with pytest.raises(OSError, match="there is no C\\+\\+ compiler"):
        accelerate(model, compiled=True)
    accelerate(model, compiled=False)
    assert capsys.readouterr().err == ""


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    compiler = tmp_path / "broken++"
    compiler.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    accelerate(make_model())
    assert "could not compile the kernel: kernel.cpp:1: error: no such flag; generating" in capsys.readouterr().err
    assert files_in(tmp_path / "cache") == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc on Linux")
def test_a_c_compiler_links_the_library_of_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "gcc")
    build = Build()
    build.wait()
    # This process has not loaded C++'s library, as torch does.
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(build.library)!r})"], check=True)


@pytest.mark.slow
@needs_compiler
def test_the_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    first = Build()
    assert first.compiler is not None
    first.wait()
    assert Build().compiler is None
    assert sorted(path.suffix for path in files_in(tmp_path)) == [".json", ".so"]


@pytest.mark.slow
@needs_compiler
def test_one_build_serves_several_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    build, ids = Build(), torch.randint(0, 67, (1, 4))
    first, second = (accelerate(make_model(), build=build, compiled=True) for _ in range(2))
    assert torch.equal(first(ids), second(ids))


def test_a_build_that_failed_gives_the_same_error_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    build = Build()
    for _ in range(2):
        with pytest.raises(OSError, match="could not compile the kernel"):
            build.wait()


@pytest.mark.slow
@needs_compiler
def test_a_build_that_is_killed_is_begun_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    build = Build()
    assert build.compiler is not None
    build.compiler.kill()
    with pytest.raises(OSError, match="could not compile"):
        build.wait()
    assert Build().wait().panel > 0


@needs_compiler
def test_a_build_that_no_one_waits_for_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    # mygpt generate starts to compile before it knows that the model exists.
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    build = Build()
    process = build.compiler
    del build
    assert process is not None and process.returncode is not None
    assert files_in(tmp_path) == []


def test_a_cache_that_cannot_be_written_costs_speed_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", "true")
    accelerate(make_model())
    assert "generating with torch's operators" in capsys.readouterr().err


# --- invalid arguments


def test_what_cannot_be_accelerated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of auto, fp32, bf16, int8, int4, got 'int3'"):
        accelerate(make_model(), "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wte\.weight is torch\.float64 on cpu"):
        accelerate(make_model().double())
    with torch.device("meta"), pytest.raises(ValueError, match=r"is torch\.float32 on meta"):
        accelerate(GPTModel(make_model().config))


@pytest.fixture
def fast() -> FastModel:
    return accelerate(make_model(), compiled=False)


def test_wrong_input_is_refused(fast: FastModel) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"at least one token, got \(2, 0\)"):
        fast(ids[:, :0])
    with pytest.raises(ValueError, match="must be int64"):
        fast(ids.int())
    with pytest.raises(IndexError, match="id 67 is outside the vocabulary, ids are 0 to 66"):
        fast(ids + 67)
    with pytest.raises(ValueError, match="has 49 tokens, the model's context_length is 48"):
        fast(torch.zeros(1, 49, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, time seen\) = \(2, 3\), got \(2, 4\)"):
        fast(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="the cache is for 1 sequences, the input has 2"):
        fast(ids, cache=fast.new_cache(1))
    with pytest.raises(ValueError, match="has 3 tokens, the cache has room for 2"):
        fast(ids, cache=fast.new_cache(2, 2))
    with pytest.raises(ValueError, match=r"from 1 to 48.*got 49"):
        fast.new_cache(1, 49)
