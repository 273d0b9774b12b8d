"""References for the tests of the model: transformers, formulas in numpy, and the book's loops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from MyGPT import GPTConfig, GPTModel


def hugging_face_config(config: GPTConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.emb_dim,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        resid_pdrop=config.drop_rate,
        embd_pdrop=config.drop_rate,
        attn_pdrop=config.drop_rate,
        layer_norm_epsilon=config.layer_norm_eps,
        tie_word_embeddings=config.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
    )


def transformers_twin(model: GPTModel, attention: str = "eager") -> GPT2LMHeadModel:
    """Return transformers' GPT-2 in evaluation mode with a copy of our weights."""
    twin = GPT2LMHeadModel._from_config(hugging_face_config(model.config), attn_implementation=attention)
    twin = twin.to(model.lm_head.weight.dtype).eval()
    ours = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, module in twin.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                weight = ours.pop(f"{name}.{kind}", None)
                if weight is None:
                    assert name.endswith("c_attn") and kind == "bias" and not model.config.qkv_bias, f"{name}.{kind}"
                    parameter.zero_()
                else:
                    parameter.copy_(weight.T if isinstance(module, Conv1D) and kind == "weight" else weight)
    assert not ours, f"not in the twin: {list(ours)}"
    return twin


def gradients_by_our_names(twin: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Return the gradients of the twin under our names; matrices are transposed to (out, in)."""
    return {
        f"{name}.{kind}": parameter.grad.T if isinstance(module, Conv1D) and kind == "weight" else parameter.grad
        for name, module in twin.named_modules()
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.grad is not None
    }


def naive_attention(q: Any, k: Any, v: Any, visible: Any) -> Any:
    """Return attention in float64, computed for one query at a time as in the paper.

    q (T, D); k and v (S, D); visible (T, S) is True where a query may see a key.
    """
    out = np.zeros((len(q), v.shape[1]))
    for t, query in enumerate(q):
        places = [s for s in range(len(k)) if visible[t, s]]
        scores = [float(query @ k[s]) / math.sqrt(len(query)) for s in places]
        weights = [math.exp(score - max(scores)) for score in scores]
        for weight, s in zip(weights, places, strict=True):
            out[t] += weight / sum(weights) * v[s]
    return out


def naive_distribution(
    logits: list[float],
    seen: set[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
) -> list[float]:
    """Return the probabilities of the next token, computed filter by filter with Python floats. Logits must be distinct."""
    penalty = 1.0 if repetition_penalty is None else repetition_penalty
    scores = {
        i: (x if i not in seen else x / penalty if x > 0 else x * penalty) / temperature for i, x in enumerate(logits)
    }
    if top_k is not None:
        scores = dict(sorted(scores.items(), key=lambda item: -item[1])[:top_k])
    if top_p is not None:
        kept, total = {}, 0.0
        for i, probability in sorted(_softmax(scores).items(), key=lambda item: -item[1]):
            if total >= top_p and kept:
                break
            kept[i] = scores[i]
            total += probability
        scores = kept
    if min_p is not None:
        probabilities = _softmax(scores)
        scores = {i: x for i, x in scores.items() if probabilities[i] >= min_p * max(probabilities.values())}
    probabilities = _softmax(scores)
    return [probabilities.get(i, 0.0) for i in range(len(logits))]


def _softmax(scores: dict[int, float]) -> dict[int, float]:
    largest = max(scores.values())
    weights = {i: math.exp(x - largest) for i, x in scores.items()}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


def chi_square_odds(counts: Tensor, probabilities: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test that counts were drawn with these probabilities."""
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(possible.sum() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


class ForeignGPT(nn.Module):
    """A language model of torch's own layers, with the book's attribute names and without a config."""

    def __init__(self, vocab_size: int = 29, context_length: int = 8, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Embedding(context_length, width)
        self.block = nn.TransformerEncoderLayer(
            width, nhead=2, dim_feedforward=32, dropout=dropout, batch_first=True, norm_first=True
        )
        self.out_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        T = in_idx.shape[1]
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(T))
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.out_head(self.block(x, src_mask=hidden))


def greedy_by_hand(model: nn.Module, ids: Tensor, n: int, context_size: int) -> Tensor:
    """Generate as the book's `generate_text_simple`: a full forward pass over the last context_size tokens per new token."""
    for _ in range(n):
        with torch.no_grad():
            logits = model(ids[:, -context_size:])
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def train_by_hand(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, epochs: int
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Train as the book's loop, and return the loss of each step and the weights after it."""
    losses, weights = [], []
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    return losses, weights


class ScriptedModel(nn.Module):
    """A model that predicts the ids of a given script for each row, whatever its input is."""

    def __init__(self, scripts: list[list[int]], prompt_length: int, vocab_size: int) -> None:
        super().__init__()
        longest = max(map(len, scripts))
        self.scripts = torch.tensor([script + script[-1:] * (longest - len(script)) for script in scripts])
        self.prompt_length = prompt_length
        self.vocab_size = vocab_size

    def forward(self, ids: Tensor) -> Tensor:
        predicted = self.scripts[:, ids.shape[1] - self.prompt_length]
        return F.one_hot(predicted, self.vocab_size).float()[:, None].expand(-1, ids.shape[1], -1)
