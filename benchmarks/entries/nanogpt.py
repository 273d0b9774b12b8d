"""nanoGPT's published recipe for a CPU, written without MyGPT: an example of an entry that is a Python file.

The recipe is Karpathy's `train_shakespeare_char` with the options that his README gives for a laptop: 4 layers, 4 heads, width
128, no biases, context 64, random windows, batches of 12, and 2,000 steps of AdamW whose learning rate falls from 1e-3 to 1e-4
along a cosine. His README reports a validation loss of 1.88.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, N_HEADS, N_LAYERS, CONTEXT, BATCH, N_STEPS, N_WARMUP = 128, 4, 4, 64, 12, 2000, 100


def start(text: str, seed: int) -> NanoGPT:
    """Return the entry, ready for its first step, for a training text."""
    torch.manual_seed(seed)
    return NanoGPT(text)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        parts = self.qkv(self.norm1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(n, t, N_HEADS, WIDTH // N_HEADS).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(n, t, WIDTH))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(n_tokens, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(N_LAYERS))), nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_last = name.endswith(("out.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * N_LAYERS) if is_last else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class NanoGPT:
    """The model, its optimizer and its batches. Every token is a byte of the text; in tinyshakespeare it is a character."""

    context_length = CONTEXT

    def __init__(self, text: str) -> None:
        # The rarest of the bytes may be missing from the training text, unless all characters are ASCII.
        self.bytes = sorted(set(text.encode())) if text.isascii() else list(range(256))
        self.id_of = {byte: id_ for id_, byte in enumerate(self.bytes)}
        self.ids = torch.tensor(self.encode(text))
        self.model = GPT(len(self.bytes))
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self.n_done = 0

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return [self.id_of[byte] for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return bytes(self.bytes[id_] for id_ in ids).decode()

    def step(self, share: float | None) -> bool:
        """Take a training step, and return False if it was the last."""
        number = self.n_done if share is None else share * N_STEPS  # with a time limit, the schedule follows the clock
        risen, fallen = (number + 1) / (N_WARMUP + 1), (number - N_WARMUP) / (N_STEPS - N_WARMUP)
        rate = 1e-3 * risen if number < N_WARMUP else 1e-4 + 9e-4 * (1 + math.cos(math.pi * fallen)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(self.ids) - CONTEXT, (BATCH,)).tolist()
        inputs = torch.stack([self.ids[i : i + CONTEXT] for i in starts])
        targets = torch.stack([self.ids[i + 1 : i + 1 + CONTEXT] for i in starts])
        loss = F.cross_entropy(self.model(inputs).view(-1, len(self.bytes)), targets.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        self.n_done += 1
        return share is not None or self.n_done < N_STEPS

    def logits(self, ids: Tensor) -> Tensor:
        """Return the scores of the next token after each of the ids (B, T), a tensor (B, T, number of tokens)."""
        return self.model(ids)
