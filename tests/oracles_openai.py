"""A small checkpoint that TensorFlow wrote, and the logits that OpenAI's model code computed from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from MyGPT import load_gpt2_params_from_tf_ckpt
from MyGPT.weights.formats.openai import read_settings
from places import FIXTURES

OPENAI = FIXTURES / "openai_gpt2_tf"


def openai_params() -> dict[str, Any]:
    return load_gpt2_params_from_tf_ckpt(OPENAI / "model.ckpt", read_settings(OPENAI))


def openai_logits() -> tuple[Tensor, Tensor]:
    reference = np.load(OPENAI / "reference.npz")
    return torch.from_numpy(reference["ids"]).long(), torch.from_numpy(reference["logits"])
