"""The models that the HTTP server serves, and the settings of the server."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property

import torch

from MyGPT import __version__
from MyGPT.data.templates import Template
from MyGPT.model import GPTModel
from MyGPT.serving.engine import Engine
from MyGPT.tokenizers import Tokenizer
from MyGPT.weights.lazy import release_pages


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can name in their requests."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    gpt: GPTModel
    """The model itself, which the page inspects. On a CPU, the engine generates with an accelerated copy."""
    template: Template | None = None
    """The chat template, or None if the model has none."""
    created: int = field(default_factory=lambda: int(time.time()))
    """The Unix time at which the model was opened."""

    @cached_property
    def fingerprint(self) -> str:
        """A short hash that changes when the weights, their precision or the version of MyGPT change, which can change answers.

        Training changes all rows of a matrix, so the hash contains only the first row of each parameter.
        """
        precision = getattr(self.engine.model, "precision", "")
        digest = hashlib.sha256(f"{__version__} {precision} {self.gpt.config}".encode())
        if self.gpt.parts is not None:
            digest.update(f"{self.gpt.parts.sha256}".encode())
        for parameter in self.gpt.parameters():
            digest.update(torch.atleast_1d(parameter.detach())[0].float().cpu().numpy().tobytes())
            release_pages(parameter.detach())  # a row of a transposed matrix touches all pages of the matrix
        return f"fp_{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Settings:
    """The limits and the protections of the server."""

    host: str = "127.0.0.1"
    """The address that the server listens on. It is also accepted in the Host header."""
    api_key: str | None = None
    """The key that every request must have in its Authorization header. None: no key is needed."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """The values of the Host header that are accepted, without the port. Others are refused (DNS rebinding)."""
    cors_origins: tuple[str, ...] = ()
    """The origins of other web pages that may use the server."""
    request_timeout: float = 600.0
    """Seconds after which an unfinished request ends with an error."""
    body_timeout: float = 10.0
    """Seconds that a client has to send the headers of a request, and again to send its body."""
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 32 << 10
    max_connections: int = 512
    max_prompts: int = 128
    """Largest number of texts that one request may ask for: prompts times choices."""
    log_prompts: bool = False
    """Write prompts into the log."""
