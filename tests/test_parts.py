"""Custom parts: models with a hand-written attention, MLP or block train, save, open and generate, and mistakes are found.

Losses of a hand-written attention may differ from the library's by the order of summation: 1e-6 is twice the last place of a
float32 number between 4 and 8.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from MyGPT import (
    CharTokenizer,
    GPTConfig,
    GPTModel,
    TrainConfig,
    Trainer,
    accelerate,
    as_transformers,
    generate,
    open_model,
)
from MyGPT.acceleration.captured import CapturedModel
from MyGPT.cli import main
from MyGPT.ecosystem.onnx import write_onnx
from MyGPT.ecosystem.transformers import GPTForCausalLM
from MyGPT.finetuning.classification import GPTForClassification
from MyGPT.finetuning.lora import add_lora, merge
from MyGPT.inside.live import LivePage
from MyGPT.inside.tracing import ablate_heads, places, trace
from MyGPT.inside.walk import walk_data
from MyGPT.messages import FileWarning
from MyGPT.parts import PARTS_FILE, PartsError, check_parts, load_parts
from MyGPT.sampling import SamplingConfig
from MyGPT.serving.engine import Engine
from MyGPT.weights.formats import open_checkpoint
from MyGPT.weights.formats.gguf import write_gguf
from test_cli import error_of

CONFIG = GPTConfig(vocab_size=27, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, init_std=0.1)
TEXT = "the quick brown fox jumps over the lazy dog and sleeps " * 20
TOKENIZER = CharTokenizer(sorted({*TEXT}))
IDS = torch.tensor(TOKENIZER.encode(TEXT))
STEPS = TrainConfig(max_steps=6, batch_size=4, eval_every=3, eval_windows=4, sample_every=3, sample_tokens=4, warmup_steps=1,
                    checkpoint_every=3, log_every=1)  # fmt: skip

MATRIX = """
import math

import torch


def attention(q, k, v, mask):
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v
"""
LOOP = """
import torch


def attention(q, k, v, mask):
    B, H, T, D = q.shape
    S = k.shape[2]
    rows = []
    for t in range(T):
        last = S - T + t
        scores = (k * q[:, :, t : t + 1]).sum(3) / D**0.5  # (B, H, S)
        seen = torch.arange(S) <= last if mask is None else mask[:, :, t]
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = (scores - scores.amax(2, keepdim=True)).exp()
        rows.append((weights[..., None] * v).sum(2) / weights.sum(2, keepdim=True))
    return torch.stack(rows, dim=2)
"""
CLASS = (
    MATRIX
    + """

from torch import nn


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_heads = layer, config.n_heads
        self.c_attn = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x, mask, cache):
        B, T, C = x.shape
        q, k, v = (it.view(B, T, self.n_heads, -1).transpose(1, 2) for it in self.c_attn(x).chunk(3, dim=2))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.c_proj(attention(q, k, v, mask).transpose(1, 2).reshape(B, T, C))
"""
)
BLOCK = """
from torch import nn

from MyGPT.model import CausalSelfAttention, MLP


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))
"""
DIFFERENT = '''
import math

import torch
from torch import nn


def attention(q, k, v, mask):
    """Attention with linear biases (ALiBi)."""
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)  # (T, S)
    if mask is None:
        mask = distance >= 0
    slopes = (2.0 ** -torch.arange(1, H + 1)).to(q.dtype)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) - slopes[:, None, None] * distance
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


class MLP(nn.Module):
    """A narrow MLP with the activation ReLU² and a learned scale."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.emb_dim, 2 * config.emb_dim, bias=False)
        self.c_proj = nn.Linear(2 * config.emb_dim, config.emb_dim)
        self.scale = nn.Parameter(torch.full((), 0.5))
        self.register_buffer("shift", torch.linspace(0, 1, config.emb_dim), persistent=False)
        self.register_buffer("is_odd", torch.arange(config.emb_dim) % 2 == 1)

    def forward(self, x):
        return self.scale * self.c_proj(self.c_fc(x + self.shift * self.is_odd).relu().square())
'''
GATED_BLOCK = '''
import torch
from torch import nn

from MyGPT.model import CausalSelfAttention


class Block(nn.Module):
    """Attention beside an MLP, of which no layer has a name of GPT-2's."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm = nn.RMSNorm(config.emb_dim)
        self.heads = CausalSelfAttention(config, layer)
        self.gate, self.up, self.down = (nn.Linear(config.emb_dim, config.emb_dim) for _ in range(3))

    def forward(self, x, mask, cache):
        y = self.norm(x)
        return x + self.heads(y, mask, cache) + self.down(self.gate(y).sigmoid() * self.up(y))
'''


def write(place: Path, source: str, name: str = "own.py") -> Path:
    path = place / name
    path.write_text(source, encoding="utf-8")
    return path


def new_model(parts: Any = None, seed: int = 1, **changes: Any) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel({**vars(CONFIG), **changes}, parts)


def trainer_of(model: GPTModel, run_dir: Path | None = None, config: TrainConfig = STEPS, **options: Any) -> Trainer:
    return Trainer(model, config, IDS[:800], IDS[800:], tokenizer=TOKENIZER, run_dir=run_dir, progress=False, **options)


def losses_of(model: GPTModel, **options: Any) -> list[float]:
    with trainer_of(model, **options) as trainer:
        return [trainer.step()["loss"] for _ in range(4)] + [trainer.evaluate()]


@pytest.fixture(scope="module")
def library_losses() -> list[float]:
    return losses_of(new_model())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a model with the parts in DIFFERENT. The code also leaves a mark whenever it runs."""
    place = tmp_path_factory.mktemp("trained")
    mark = f"with open({str(place / 'mark')!r}, 'a') as file:\n    file.write('x')\n"
    source = write(place, mark + DIFFERENT)
    trainer_of(new_model(source), place / "run", recipe={**vars(STEPS), "with": str(source)}).run()
    return place / "run"


@pytest.mark.parametrize(
    "source", [MATRIX, LOOP, CLASS, BLOCK, MATRIX + BLOCK], ids=["matrix", "loop", "class", "block", "both"]
)
def test_the_same_parts_written_by_hand_train_to_the_same_losses(
    source: str, tmp_path: Path, library_losses: list[float]
) -> None:
    model = new_model(write(tmp_path, source))
    assert losses_of(model) == pytest.approx(library_losses, abs=1e-6)


def test_recomputed_blocks_and_micro_batches_give_the_same_losses(tmp_path: Path, library_losses: list[float]) -> None:
    config = TrainConfig(**{**vars(STEPS), "gradient_checkpointing": True, "micro_batch_size": 2})
    assert losses_of(new_model(write(tmp_path, MATRIX)), config=config) == pytest.approx(library_losses, abs=1e-6)


def test_training_in_bf16_computes_the_own_attention(tmp_path: Path) -> None:
    config = TrainConfig(**{**vars(STEPS), "precision": "bf16"})
    own = losses_of(new_model(write(tmp_path, MATRIX)), config=config)
    assert own == pytest.approx(
        losses_of(new_model(), config=config), abs=0.02
    )  # bf16 has 8 bits, the losses are near 3


def test_the_function_is_called_in_every_way_of_computing(tmp_path: Path) -> None:
    """Attention whose output is zero shows that no faster code computes GPT-2's attention in its place."""
    parts = {"attention": lambda q, k, v, mask: torch.zeros_like(q)}
    model, without = new_model(parts), new_model()
    with torch.no_grad():
        for block in without.transformer.h:
            block.attn.c_proj.weight.zero_()
    config = TrainConfig(**{**vars(STEPS), "learning_rate": 1e-20, "min_learning_rate": 0.0})
    assert losses_of(model, config=config) == pytest.approx(losses_of(without, config=config), abs=1e-6)
    ids = IDS[None, :6]
    expected = generate(without.eval(), ids, 8)
    assert torch.equal(generate(model.eval(), ids, 8), expected)
    with Engine(model, TOKENIZER, slots=2) as engine:
        texts = ["".join(engine.stream_text(ids[0].tolist(), 8, SamplingConfig())) for _ in range(2)]
    assert texts == [TOKENIZER.decode(expected[0, 6:].tolist())] * 2


def test_text_is_the_same_with_and_without_a_cache_and_in_padded_batches(tmp_path: Path) -> None:
    for source in (LOOP, CLASS, DIFFERENT, GATED_BLOCK):
        model = new_model(write(tmp_path, source)).double().eval()
        prompts, mask = IDS[:10].view(2, 5).clone(), torch.ones(2, 5, dtype=torch.int64)
        mask[0, :2] = 0
        cached = generate(model, prompts, 9, attention_mask=mask)
        assert torch.equal(cached, generate(model, prompts, 9, attention_mask=mask, use_cache=False))
        alone = generate(model, prompts[:1, 2:], 9)
        assert torch.equal(cached[:1, 5:], alone[:, 3:])


def test_a_run_resumes_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    source = trained.parent / "own.py"
    half = TrainConfig(**{**vars(STEPS), "max_steps": 3, "schedule": "constant"})
    whole = TrainConfig(**{**vars(half), "max_steps": 6})
    once, twice = new_model(source), new_model(source)
    with trainer_of(once, config=whole) as trainer:
        for _ in range(6):
            trainer.step()
    trainer_of(twice, tmp_path / "run", half).run()
    again = new_model(source, seed=5)
    trainer = trainer_of(again, tmp_path / "run", whole, resume=True, allow_changed="max_steps")
    with trainer:
        assert trainer.step_number == 3
        for _ in range(3):
            trainer.step()
    assert all(torch.equal(one, other) for one, other in zip(once.parameters(), again.parameters(), strict=True))


def test_a_run_stores_the_file_and_its_hash(trained: Path) -> None:
    source = (trained.parent / "own.py").read_bytes()
    assert (trained / PARTS_FILE).read_bytes() == (trained / "model" / PARTS_FILE).read_bytes() == source
    config = json.loads((trained / "model" / "config.json").read_text())
    expected = {"names": ["attention", "MLP"], "file": "own.py", "sha256": hashlib.sha256(source).hexdigest()}
    assert config["custom_parts"] == expected
    assert config["model_type"] == "mygpt" and config["architectures"] == ["GPTModel"]


def test_a_model_with_other_parts_is_saved_opened_traced_and_adapted(trained: Path, tmp_path: Path) -> None:
    source = trained.parent / "own.py"
    model, tokenizer = open_model(trained, parts=source)
    again = GPTModel.from_pretrained(trained / "model" / "config.json", parts=trained / PARTS_FILE)
    ids = IDS[None, :12]
    assert torch.equal(model(ids), again(ids))
    assert not model.training and tokenizer.decode(ids[0].tolist()) == TEXT[:12]
    mlp: Any = model.transformer.get_submodule("h.1.mlp")
    assert torch.equal(mlp.shift, torch.linspace(0, 1, 24)) and mlp.c_fc.weight.shape == (48, 24)
    half = GPTModel.from_pretrained(trained, dtype=torch.bfloat16, parts=source)
    assert torch.allclose(half(ids).float(), model(ids), atol=0.2)  # eight bits, logits up to about 5

    traced = trace(model, ids)
    assert list(traced) == places(model)
    q, k = traced["h.1.attn.q"], traced["h.1.attn.k"]
    distance = torch.arange(12)[:, None] - torch.arange(12)
    scores = q @ k.transpose(2, 3) / 8**0.5 - 2.0 ** -torch.arange(1.0, 4)[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(traced["h.1.attn.weights"], expected)
    assert traced["h.0.mlp.activations"].shape == (1, 12, 48) and traced.residual.shape == (3, 1, 12, 24)
    with ablate_heads(model, [(0, 1)]):
        assert not torch.allclose(model(ids), traced["logits"])

    adapted = add_lora(model, r=2, target_modules=["c_attn", "c_fc"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = adapted.eval()(ids)
    torch.testing.assert_close(merge(adapted).eval()(ids), expected, atol=1e-5, rtol=1e-5)


def test_a_custom_block_is_saved_opened_and_traced(tmp_path: Path) -> None:
    source = write(tmp_path, GATED_BLOCK)
    model = new_model(source).eval()
    ids = IDS[None, :9]
    model.save_pretrained(tmp_path / "model", TOKENIZER)
    opened = open_model(tmp_path / "model", parts=source)[0]
    assert torch.equal(opened(ids), model(ids))
    traced = trace(opened, ids)
    assert list(traced) == ["wte", "wpe", "embeddings", "h.0", "h.1", "ln_f", "logits"]
    assert len(traced.residual) == 3
    with pytest.raises(ValueError, match="attention weights of this model's custom parts are unknown"):
        _ = traced.attention
    with pytest.raises(ValueError, match="cannot be edited"), ablate_heads(model, [(0, 1)]):
        pass


def test_weights_of_a_function_that_is_no_weighted_sum_are_not_shown() -> None:
    parts = {"attention": lambda q, k, v, mask: v[:, :, -q.shape[2] :].tanh()}
    traced = trace(new_model(parts), IDS[None, :9])
    assert "h.0.attn.weights" not in traced and "h.0.attn.heads" in traced


def test_custom_parts_run_on_weights_that_were_trained_without_them(tmp_path: Path) -> None:
    plain = new_model()
    plain.save_pretrained(tmp_path / "plain", TOKENIZER)
    own = open_model(tmp_path / "plain", parts=write(tmp_path, LOOP))[0]
    ids = IDS[None, :16]
    torch.testing.assert_close(own(ids), plain.eval()(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"the weights do not fit .*own.py: transformer.h.0.mlp.scale is missing; .*is unknown"
    ):
        open_model(tmp_path / "plain", parts=write(tmp_path, DIFFERENT))


def test_saving_a_model_with_gpt2s_parts_removes_the_copy_of_the_code(tmp_path: Path) -> None:
    new_model(write(tmp_path, LOOP)).save_pretrained(tmp_path / "model", TOKENIZER)
    assert (tmp_path / "model" / PARTS_FILE).exists()
    new_model().save_pretrained(tmp_path / "model", TOKENIZER)
    assert not (tmp_path / "model" / PARTS_FILE).exists()
    open_model(tmp_path / "model")


def test_parts_can_be_a_module_or_a_dict(tmp_path: Path) -> None:
    module = ModuleType("my_module")
    exec(MATRIX, vars(module))
    ids, expected = IDS[None, :9], new_model().eval()(IDS[None, :9])
    for parts in (module, {"attention": module.attention}):
        model = new_model(parts).eval()
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "model", TOKENIZER)  # without a copy, because there is no file
        assert not (tmp_path / "model" / PARTS_FILE).exists()
        with pytest.raises(PartsError, match="pass --with and the file with their code"):
            open_model(tmp_path / "model")
        assert torch.equal(open_model(tmp_path / "model", parts=parts)[0](ids), model(ids))
    with pytest.raises(
        PartsError, match="unknown part 'attn': the parts are attention, CausalSelfAttention, MLP, Block"
    ):
        new_model({"attn": print})


def test_initial_weights_are_gpt2s_except_for_own_parameters_and_reset_parameters(tmp_path: Path) -> None:
    own = "\n    def reset_parameters(self):\n        nn.init.constant_(self.c_fc.weight, 7.0)\n"
    model, plain = new_model(write(tmp_path, DIFFERENT + own)), new_model()
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    assert model.get_parameter("transformer.h.0.mlp.c_fc.weight").unique().tolist() == [7.0]
    assert model.get_parameter("transformer.h.1.mlp.scale").item() == 0.5
    assert model.get_parameter("transformer.h.1.mlp.c_proj.weight").std().item() == pytest.approx(0.1 / 2, rel=0.1)
    local = new_model(write(tmp_path, DIFFERENT), init="local")
    assert torch.equal(local.transformer.wpe.weight, new_model(init="local").transformer.wpe.weight)


MISTAKES = {
    "def attention(q, k, v, mask):\n    return q @ k.transpose(2, 3)\n": "attention returned (2, 3, 7, 7), expected (2, 3, 7, 8)",
    "def attention(q, k, v, mask):\n    return q, k\n": "attention returned tuple, expected (2, 3, 7, 8)",
    "def attention(q, k, v):\n    return q\n": "TypeError: attention() takes 3 positional arguments but 4 were given",
    "def attention(q, k, v, mask):\n    return helper(q)\n\n\ndef helper(q):\n    return q @ q\n": (
        "own.py, line 6, in helper: RuntimeError: "
    ),
    MATRIX.replace("if mask is None", "if False").replace("~mask", "torch.zeros(T, S, dtype=torch.bool)"): "looks ahead",
    MATRIX.replace("softmax(dim=-1)", "softmax(dim=-2)").replace("-math.inf", "-9.0"): "looks ahead",
    MATRIX.replace("softmax(dim=-1)", "softmax(dim=0)").replace("-math.inf", "-9.0"): "mixes the sequences of a batch",
    MATRIX.replace("tril(S - T)", "tril()"): "other results with a KV cache",
    CLASS.replace("k, v = cache.append", "_ = cache.append"): "(computed with a KV cache: with a cache, the queries are",
    MATRIX.replace("@ v", "@ torch.nn.functional.dropout(v)"): "other results for the same tokens a second time",
    DIFFERENT.replace("self.scale * ", "").replace("def forward(self, x)", "def forward(self)"): (
        "own.py: TypeError: MLP.forward() takes 1 positional argument but 2 were given"
    ),
    DIFFERENT.replace("self.scale * self.c_proj(", "(").replace(" * self.is_odd).relu", ").relu"): (
        "MLP returned (2, 7, 48), expected (2, 7, 24)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("source", "message"), MISTAKES.items())
def test_a_mistake_is_found_before_the_first_step(source: str, message: str, tmp_path: Path) -> None:
    trainer = trainer_of(new_model(write(tmp_path, source)))
    with pytest.raises(PartsError) as caught:
        trainer.setup()
    assert message in str(caught.value) and str(tmp_path / "own.py") in str(caught.value)


def test_ignored_padding_is_a_warning(tmp_path: Path) -> None:
    source = MATRIX.replace("if mask is None:", "if True:")
    with pytest.warns(FileWarning, match="other results after padding"):
        check_parts(new_model(write(tmp_path, source)))


def test_correct_parts_pass_the_check_without_a_warning_and_without_a_trace(tmp_path: Path) -> None:
    for source in (MATRIX, LOOP, CLASS, BLOCK, DIFFERENT, GATED_BLOCK):
        for context in (1, 2, 3, 16):
            model = new_model(write(tmp_path, source), context_length=context).train()
            model.transformer.h[0].eval()
            state = torch.get_rng_state()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check_parts(model)
            assert torch.equal(torch.get_rng_state(), state)
            assert model.training and not model.transformer.h[0].training


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            b"x = 3\n",
            "defines no part of a model: it must define a function attention(q, k, v, mask), or a class Causal",
        ),
        (b"def f(:\n", "own.py, line 1: SyntaxError: "),
        (b"\n\nimport no_such_module\n", "own.py, line 3: ModuleNotFoundError: No module named 'no_such_module'"),
        (b"def f():\n    return 1 / 0\n\n\nf()\n", "own.py, line 2, in f: ZeroDivisionError: division by zero"),
        (b"import sys\nsys.exit('bye')\n", "own.py, line 2: SystemExit: bye"),
        (b"x = '\x00'\n", "SyntaxError"),
        (b"\xff\xfe\x00", "own.py"),
        (b"(" * 5000 + b")" * 5000, "own.py"),
        (b"raise ValueError('\\x1b[31m\\nred')\n", "own.py, line 1: ValueError: \\x1b[31m red"),
        (b"#" * (1 << 20) + b"#", "own.py has 1,048,577 bytes, a file with parts of a model has at most 1,048,576"),
        (b"attention = 3\n", "attention must be a function of q, k, v and mask, got a int"),
        (b"class attention: pass\n", "attention must be a function of q, k, v and mask, got the class attention"),
        (b"class MLP: pass\n", "MLP must be a class derived from torch.nn.Module, got the class MLP"),
        (b"def Block(config, layer): pass\n", "Block must be a class derived from torch.nn.Module, got a function"),
        (b"from MyGPT.model import MLP, Block\n", "defines no part of a model"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    source: bytes, message: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp_path / "own.py").write_bytes(source)
    assert message in error_of(["train", "--with", "own.py", "--out", "run"], capsys)
    assert not (in_tmp_path / "run").exists()


def test_a_missing_file_and_a_directory_are_refused(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "own.py: No such file or directory" in error_of(["train", "--with", "own.py"], capsys)
    assert "is a directory, not a Python file" in error_of(["train", "--with", "."], capsys)
    assert "--with is empty" in error_of(["train", "--with", ""], capsys)


def test_constructors_report_their_errors(tmp_path: Path) -> None:
    source = "from torch import nn\n\n\nclass MLP(nn.Module):\n    pass\n"
    with pytest.raises(
        PartsError, match=r"own.py: TypeError: .*__init__\(\) takes 1 positional argument but 2 were given"
    ):
        new_model(write(tmp_path, source))
    source = source.replace("pass", "def __init__(self, config):\n        super().__init__()\n        config.width\n")
    with pytest.raises(PartsError, match=r"own.py, line 7, in __init__: AttributeError: .*'width'"):
        new_model(write(tmp_path, source))


SIZES = (
    "--max_steps 4 --eval_every 2 --eval_windows 2 --sample_every 0 --batch_size 2 --checkpoint_every 2 --device cpu "
    "--n_layers 1 --n_heads 2 --emb_dim 8 --context_length 8"
)


def test_an_error_in_the_check_leaves_no_directory_and_a_note_is_printed_once(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text(TEXT)
    write(in_tmp_path, "def attention(q, k, v, mask=None):\n    raise NotImplementedError\n")
    command = ["train", "--with", "own.py", "--data", "text.txt", "--out", "run", *SIZES.split()]
    assert error_of(command, capsys) == "mygpt train: own.py, line 2, in attention: NotImplementedError"
    assert not Path("run").exists()
    write(in_tmp_path, MATRIX.replace("if mask is None", "if True"))
    assert main(command) == 0
    assert capsys.readouterr().err.count("gives other results after padding") == 1


def test_an_error_during_training_is_one_line(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(TEXT)
    source = MATRIX + "\ncalls = []\n"
    source = source.replace(
        "    T, S =", "    calls.append(1)\n    if len(calls) == 16:  # after both checks\n        [][0]\n    T, S ="
    )
    write(in_tmp_path, source)
    command = ["train", "--with", "own.py", "--data", "text.txt", "--out", "run", *SIZES.split()]
    assert (
        error_of(command, capsys) == "mygpt train: own.py, line 10, in attention: IndexError: list index out of range"
    )


def test_mygpt_debug_shows_the_traceback(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(in_tmp_path, "1 / 0\n")
    monkeypatch.setenv("MYGPT_DEBUG", "1")
    with pytest.raises(PartsError) as caught:
        main(["train", "--with", "own.py"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.slow
def test_train_and_resume_on_the_command_line(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(TEXT)
    write(in_tmp_path, MATRIX, "a.py")
    Path("recipe.yaml").write_text("with: a.py\ndata: text.txt\n")
    command = ["train", "--config", "recipe.yaml", "--out", "run", *SIZES.split()]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "with attention from a.py\n" in out and out.endswith("try: mygpt generate --model run --with a.py\n")
    more = ["--max_steps", "6", "--allow_changed", '["max_steps"]']
    assert "read run/parts.py, a copy of it, and then resume with --with run/parts.py" in error_of(
        ["train", "--resume", "run", *more], capsys
    )
    write(in_tmp_path, MATRIX + "# changed\n", "b.py")
    changed = ["train", "--resume", "run", "--with", "b.py"]
    error = error_of([*changed, *more], capsys)
    assert "with was 'a.py' and is 'b.py'; with: the custom parts differ from those the run began with" in error
    assert main([*changed, "--max_steps", "6", "--allow_changed", '["max_steps", "with"]']) == 0
    assert Path("run/parts.py").read_bytes() == Path("b.py").read_bytes()
    shutil.copy("b.py", "moved.py")  # the same file at another path is not a change
    moved = ["train", "--resume", "run", "--with", "moved.py", "--max_steps", "8", "--allow_changed", "max_steps"]
    assert main(moved) == 0
    assert main(["generate", "--model", "run", "--with", "moved.py", "--prompt", "the", "--max_new_tokens", "3"]) == 0
    assert main(["train", "--resume", "run", "--max_steps", "9", "--allow_changed", '["max_steps", "with"]']) == 0
    assert "custom_parts" not in Path("run/model/config.json").read_text() or Path("run/model/parts.py").exists()


COMMANDS = [
    "generate --model {}", "chat --model {}", "evaluate --model {} --data text.txt", "explain --model {} the --out a.html",
    "explain --live --model {} --out a.html", "plot attention --model {} --text the", "plot lens --model {} --text the",
    "export {} --format gguf --out a.gguf", "export {} --format onnx --out a.onnx", "pack --model {}", "info {}",
    "bench --model {}", "serve --model {} --port 0", "classify --model {} --text the",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "file"),
    [
        *((command, "") for command in COMMANDS),
        *((command, f"model/{file}") for command in COMMANDS[::4] for file in ("", "config.json", "model.safetensors")),
    ],
)
def test_no_command_runs_the_code_of_a_model_or_ignores_it(
    command: str, file: str, trained: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text(TEXT)
    mark, directory = trained.parent / "mark", trained / "model"
    before = mark.read_text()
    error = error_of(command.format(trained / file).split(), capsys)
    assert (
        f"the model in {directory} has its own attention and MLP, and MyGPT runs code of a model only if you name it"
        in error
    )
    assert f"pass --with {directory / PARTS_FILE}" in error
    assert mark.read_text() == before


def test_fine_tuning_a_model_with_custom_parts_is_refused(
    trained: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "instruction": "a",
        "output": "b",
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "text": "a",
        "label": "x",
    }
    other = {**record, "label": "y", "text": "b"}
    Path("data.json").write_text(json.dumps([record, other] * 10))
    for command in ("finetune", "dpo", "classify"):
        assert "has its own attention and MLP" in error_of(
            [command, "--model", str(trained), "--data", "data.json", "--out", "run"], capsys
        )


@pytest.mark.parametrize("command", ["generate --n_samples 2", "evaluate --data text.txt", "explain the --out a.html",
                                     "plot attention --text the --out a.png"])  # fmt: skip
def test_commands_open_the_model_with_its_parts(
    command: str, trained: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text(TEXT)
    name, *options = command.split()
    kind = [options.pop(0)] if name == "plot" else []
    assert main([name, *kind, *options, "--model", str(trained), "--with", str(trained / PARTS_FILE)]) == 0
    assert capsys.readouterr().err.replace("\n", "") == ""


def test_rounded_precision_and_other_programs_are_refused(
    trained: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(trained / PARTS_FILE)
    options = ["--model", str(trained), "--with", source]
    error = error_of(["generate", *options, "--precision", "int8"], capsys)
    assert f"precision int8 computes only GPT-2's parts, but this model has attention and MLP from {source}" in error
    assert main(["generate", *options, "--precision", "bf16", "--max_new_tokens", "3"]) == 0
    model = new_model(source)
    users: list[Callable[[], object]] = [
        lambda: accelerate(model),
        lambda: accelerate(open_checkpoint(trained, load_parts(source))),
        lambda: CapturedModel(model),
        lambda: GPTForClassification(model, ["a", "b"]),
        lambda: as_transformers(model),
        lambda: GPTForCausalLM(model),
        lambda: write_gguf(model, "a.gguf", None),
        lambda: write_onnx(model, "a.onnx"),
        lambda: walk_data(model, TOKENIZER, IDS[None, :5], 0, 0, 0),
        lambda: LivePage(model, TOKENIZER),
    ]
    for user in users:
        with pytest.raises(ValueError, match="computes only GPT-2's parts, but"):
            user()
    with pytest.raises(PartsError, match="has its own attention and MLP"):
        accelerate(trained)  # by its path


def test_transformers_refuses_the_directory(tmp_path: Path) -> None:
    new_model(write(tmp_path, MATRIX)).save_pretrained(tmp_path / "model", TOKENIZER)
    with pytest.raises(ValueError, match="mygpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError):  # the matrices have the shape (out, in)
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")


def test_another_file_gives_a_warning_and_a_lacking_part_an_error(trained: Path, tmp_path: Path) -> None:
    same = write(tmp_path, DIFFERENT.replace("    distance =", "\n    distance ="))
    with pytest.warns(FileWarning, match="own.py is not the file with which the model was trained"):
        open_model(trained, parts=same)
    with pytest.raises(PartsError, match=r"has its own MLP, but .*own.py does not define it"):
        open_model(trained, parts=write(tmp_path, MATRIX))


@pytest.mark.parametrize(
    "record", [3, None, {}, {"names": []}, {"names": ["os.system"]}, {"names": [3]}, {"names": ["MLP"], "file": 3},
               {"names": "MLP"}, {"names": ["MLP"], "sha256": []}],
)  # fmt: skip
def test_a_hostile_record_is_refused(record: Any, tmp_path: Path) -> None:
    new_model(write(tmp_path, MATRIX)).save_pretrained(tmp_path / "model", TOKENIZER)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "custom_parts": record}))
    with pytest.raises(PartsError, match="does not say which parts the model has"):
        open_model(tmp_path / "model", parts=tmp_path / "own.py")


def test_a_config_without_its_record_does_not_become_a_gpt2(tmp_path: Path) -> None:
    new_model(write(tmp_path, MATRIX)).save_pretrained(tmp_path / "model", TOKENIZER)
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    del content["custom_parts"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model_type='mygpt', MyGPT supports only 'gpt2'"):
        open_model(tmp_path / "model")


def test_the_files_of_a_module_are_run_from_the_bytes_that_are_stored(tmp_path: Path) -> None:
    """Python's cache of compiled files, which goes by the time of the last change, could be older than the file."""
    path = write(tmp_path, MATRIX)
    load_parts(path)
    assert not (tmp_path / "__pycache__").exists()
    assert load_parts(path).source == path.read_bytes()


class Wide(nn.Module):
    """An MLP with shared weights: every layer uses the same matrix."""

    shared: nn.Linear | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if Wide.shared is None:
            Wide.shared = nn.Linear(config.emb_dim, config.emb_dim)
        self.layer = Wide.shared

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).relu()
        return result


def test_weights_that_layers_share_are_still_shared_after_opening(tmp_path: Path) -> None:
    model = new_model({"MLP": Wide}).eval()
    model.save_pretrained(tmp_path / "model", TOKENIZER)
    Wide.shared = None
    opened = open_model(tmp_path / "model", parts={"MLP": Wide})[0]
    first, second = (opened.transformer.get_submodule(f"h.{i}.mlp.layer") for i in (0, 1))
    assert first is second
    assert torch.equal(opened(IDS[None, :9]), model(IDS[None, :9]))
