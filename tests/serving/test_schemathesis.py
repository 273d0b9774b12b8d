"""Requests that the OpenAPI description allows, and requests that it forbids, made by schemathesis with a fixed seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_server import serving
from conftest import lively_model
from MyGPT.config import GPTConfig
from MyGPT.data.templates import Template
from MyGPT.serving import Engine
from MyGPT.serving.models import ServedModel, Settings
from MyGPT.tokenizers import BPETokenizer
from places import ALICE

BPE = BPETokenizer.train(ALICE[:5000], 256 + 1 + 20, progress=False)
TALK = Template("Q: {instruction}\nA:", "Q: {instruction} ({input})\nA:")


def narrow(schema: Any) -> None:
    """Limit whole numbers without limits to token ids of the model."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer" and not any("imum" in key for key in schema):
            schema |= {"minimum": 0, "maximum": BPE.n_vocab - 1}
        for inner in schema.values():
            narrow(inner)
    elif isinstance(schema, list):
        for inner in schema:
            narrow(inner)


@pytest.mark.slow
def test_no_request_breaks_the_server_and_every_answer_is_as_described(tmp_path: Path) -> None:
    """The description names no model and no vocabulary, so most requests would end at an unknown model or token.

    The check that is left out wants every request that the description allows to succeed. No description can say that a
    prompt must fit into the context, or that best_of must be at least n.
    """
    config = GPTConfig(
        vocab_size=BPE.n_vocab, context_length=48, emb_dim=12, n_heads=3, n_layers=1, drop_rate=0.0, tie_weights=False
    )
    gpt = lively_model(config)
    with serving(
        ServedModel("tiny", Engine(gpt, BPE, slots=4), BPE, gpt, TALK), settings=Settings(max_prompts=4)
    ) as url:
        description = httpx.get(f"{url}/openapi.json").json()
        for name, schema in description["components"]["schemas"].items():
            if name.endswith("Request"):
                narrow(schema)
                is_required = "model" in schema.get("required", ())
                schema["properties"]["model"] = {"enum": ["tiny"] if is_required else ["tiny", None]}
        (tmp_path / "openapi.json").write_text(json.dumps(description))
        options = (
            "--seed 1 --max-examples 30 --phases fuzzing --no-color --no-shrink "
            "--exclude-checks positive_data_acceptance"
        )
        command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url, *options.split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "6 selected / 6 total" in result.stdout
