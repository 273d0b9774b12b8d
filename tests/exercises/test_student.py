# ruff: noqa: E501
"""Whatever a student's file does, the result is one clear sentence. Solutions written in another way pass."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from MyGPT.exercises.checking import Result, check_file
from MyGPT.exercises.student import MAX_PRINTED

ATTENTION = "import torch\ndef attention(q, k, v, mask=None):\n"

LOOPS = """
import math, torch

def attention(q, k, v, mask=None):
    B, H, T, D = q.shape
    S = k.shape[2]
    if mask is None:
        mask = torch.arange(S) <= torch.arange(T)[:, None] + S - T
    mask = mask.expand(B, H, T, S)
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(S) if mask[b, h, t, s]]
                scores = torch.stack([q[b, h, t] @ k[b, h, s] for s in seen]) / math.sqrt(D)
                weights = scores.softmax(0)
                rows.append(sum(w * v[b, h, s] for w, s in zip(weights, seen)))
    return torch.stack(rows).view(B, H, T, D)
"""
EINSUM = """
import torch

def attention(q, k, v, mask=None):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * q.size(-1) ** -0.5
    if mask is None:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.size(2) - q.size(2))
    else:
        hidden = ~mask
    scores = scores + torch.zeros_like(scores).masked_fill(hidden, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdim=True), v)
"""
LISTS = """
def learn_merges(ids, n_merges):
    words, merges = [bytes([i]) for i in ids], []
    ids = [int(i) for i in ids]
    for step in range(n_merges):
        pairs = {}
        for i in range(len(ids) - 1):
            pairs[ids[i], ids[i + 1]] = pairs.get((ids[i], ids[i + 1]), 0) + 1
        if pairs == {}:
            return merges
        most = max(pairs.values())
        best = sorted(pair for pair in pairs if pairs[pair] == most)[0]
        merges.append(best)
        ids = apply_merges(ids, [best], 256 + step)
    return merges

def apply_merges(ids, merges, first=256):
    for number, (a, b) in enumerate(merges):
        out = []
        for i in ids:
            if out and out[-1] == a and i == b:
                out[-1] = first + number
            else:
                out.append(i)
        ids = out
    return list(ids)
"""
LOOPED_LOSS = """
import math, torch

def next_token_loss(logits, ids):
    losses = []
    for row, text in zip(logits, ids):
        for scores, target in zip(row[:-1], text[1:]):
            top = scores.max()
            losses.append(torch.log(torch.exp(scores - top).sum()) + top - scores[target])
    return sum(losses) / len(losses)

def perplexity(loss):
    return torch.tensor(math.e) ** loss
"""
LOOPED_SAMPLING = """
import torch

def next_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    rows = []
    for row in logits:
        if temperature == 0:
            p = torch.zeros_like(row)
            p[row.argmax()] = 1.0
            rows.append(p)
            continue
        p = torch.softmax(row / temperature, 0)
        order = sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]
        total = sum(float(p[i]) for i in order)
        if top_p is not None:
            kept, mass = [], 0.0
            for i in order:
                if kept and mass >= top_p:
                    break
                kept.append(i)
                mass += float(p[i]) / total
            order = kept
        keep = torch.zeros_like(p)
        keep[order] = p[order]
        rows.append(keep / keep.sum())
    return torch.stack(rows)
"""
OTHERS = {
    "attention with loops": ("attention", LOOPS),
    "attention with einsum": ("attention", EINSUM),
    "BPE with a stack": ("bpe", LISTS),
    "loss with loops": ("loss", LOOPED_LOSS),
    "sampling with loops": ("sampling", LOOPED_SAMPLING),
}


def checked(task: str, source: str | bytes, directory: Path) -> Result:
    path = directory / f"{task}.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return check_file(path, task)


@pytest.mark.parametrize("name", OTHERS)
def test_a_solution_written_in_another_way_passes(name: str, tmp_path: Path) -> None:
    task, source = OTHERS[name]
    result = checked(task, source, tmp_path)
    assert (result.status, result.sentence) == ("solved", "")


HOSTILE = {
    "syntax": (ATTENTION + "    return (q\n", r"line \d of attention.py is not valid Python: .* was never closed"),
    "indentation": ("def attention(q):\nreturn q\n", "line 2 of attention.py is not valid Python: expected an indented block"),
    "NUL": ("x = 1\0\n", "attention.py is not valid Python: .*null bytes"),
    "encoding": (b"x = '\xff'\n", "is not valid Python: .*utf-8"),
    "nesting": ("x = " + "(" * 500 + ")" * 500, "is not valid Python: .*(nested|parentheses|memory)"),
    "import": ("import no_such_module\n", "opening attention.py: line 1 of attention.py raises ModuleNotFoundError: No module named"),
    "empty": ("", "attention.py has no function or class attention: keep the names"),
    "no function": ("attention = 3\n", "defines attention, but not as a function"),
    "arguments": ("def attention(q):\n    return q\n", "raises TypeError: attention.. takes 1 positional argument but 3 were given"),
    "exception": (ATTENTION + "    return q @ k\n", "line 3 of attention.py raises RuntimeError: "),
    "full stop": (ATTENTION + "    raise ValueError('two sizes differ.')\n", "raises ValueError: two sizes differ$"),
    "helper": ("def half(x):\n    return x / 0\n" + ATTENTION + "    return half(1)\n", "line 2 of attention.py raises ZeroDivisionError"),
    "None": (ATTENTION + "    q + k\n", "the result is None, but a tensor is expected; likely cause: a return statement is missing"),
    "tuple": (ATTENTION + "    return q,\n", "the type tuple, .*a comma at the end of a line"),
    "generator": (ATTENTION + "    yield q\n", "the type generator, .*contains yield"),
    "number": (ATTENTION + "    return 1.5\n", "of the type float, but a tensor is expected"),
    "class": (ATTENTION + "    return torch.Tensor\n", "but a tensor is expected"),
    "integers": (ATTENTION + "    return q.long()\n", "the dtype int64, but float32 is expected"),
    "half": (ATTENTION + "    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).double()\n", "float64, but float32 is expected, as in the input"),
    "meta": (ATTENTION + "    return q.to('meta')\n", "a meta tensor, but an ordinary one"),
    "nan": (ATTENTION + "    return q * float('nan')\n", r"the result at \[0, 0, 0, 0\] is nan, but "),
    "exit": (ATTENTION + "    exit(0)\n", "line 3 of attention.py ends the program"),
    "exit on import": ("import sys\nsys.exit('bye')\n", "line 2 of attention.py ends the program"),
    "interrupt": (ATTENTION + "    raise KeyboardInterrupt\n", "raises KeyboardInterrupt"),
    "recursion": (ATTENTION + "    return attention(q, k, v)\n", "line 3 of attention.py calls itself without an end"),
    "input": (ATTENTION + "    input()\n", "raises EOFError: .*a check cannot answer input"),
    "bad exception": ("class E(Exception):\n    def __str__(self): return 1\n" + ATTENTION + "    raise E\n", "line 5 of attention.py raises E$"),
    "long message": (ATTENTION + "    raise ValueError('x\\x1b' * 9000)\n", r"raises ValueError: x\\x1b.*…$"),
    "view": (ATTENTION + "    return k.transpose(-2, -1).view(-1)\n", "use reshape instead of view"),
    "dtype": ("import torch\ntorch.set_default_dtype(torch.float64)\n", "opening attention.py: it changes torch's default dtype for the whole program"),
    "gradients": (ATTENTION + "    torch.set_grad_enabled(False)\n    return q\n", "changes whether torch records gradients"),
    "threads": (ATTENTION + "    torch.set_num_threads(3)\n    return q\n", "changes the number of torch's threads"),
    "device": (ATTENTION + "    torch.set_default_device('meta')\n    return q\n", "changes torch's default device"),
    "directory": ("import os\nos.chdir('/')\n", "changes the working directory"),
    "other NotImplementedError": (ATTENTION + "    raise NotImplementedError('abc')\n", ""),
    "deleted torch": ("import torch\ntorch.Tensor.masked_fill = None\n" + ATTENTION + "    return q\n", "does attention.py replace a function of Python or torch"),
}  # fmt: skip


def state_of_torch() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        len(_get_current_function_mode_stack()),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        Path.cwd(),
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_failing_file_gives_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sentence = HOSTILE[name]
    monkeypatch.setattr(torch.Tensor, "masked_fill", torch.Tensor.masked_fill)  # restored after the last case
    monkeypatch.setattr("sys.stdin", io.StringIO())
    before = state_of_torch()
    result = checked("attention", source, tmp_path)
    assert state_of_torch() == before
    assert result.status == ("wrong" if sentence else "not started")
    assert re.search(sentence, result.sentence), result.sentence
    assert "\n" not in result.sentence and "Traceback" not in result.sentence and len(result.sentence) < 700


def test_a_file_may_print_a_lot_and_import_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("import math\nroot = math.sqrt\n")
    source = EINSUM.replace(
        "import torch\n",
        "import torch\nimport helper\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint('hello')\n",
    )
    source = source.replace("    scores = ", "    print('y' * 100_000)\n    scores = ", 1)
    result = checked("attention", source, tmp_path)
    assert result.status == "solved"
    assert result.printed.startswith("hello\nyyy") and len(result.printed) == MAX_PRINTED


def test_a_half_written_file_is_not_finished_rather_than_not_started(tmp_path: Path) -> None:
    result = checked(
        "bpe",
        LISTS.replace(
            "    for number, (a, b)", "    if len(merges) > 1: raise NotImplementedError\n    for number, (a, b)"
        ),
        tmp_path,
    )
    assert result.status == "wrong" and result.sentence == "apply_merges is not written yet"
    assert len(result.passed) == 6


def test_a_directory_in_place_of_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "attention.py").mkdir()
    assert "attention.py cannot be read" in check_file(tmp_path / "attention.py", "attention").sentence
