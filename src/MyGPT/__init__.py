"""MyGPT: GPT-2 written from scratch in PyTorch, whole.

Names are loaded at first use (PEP 562), so that `import MyGPT` costs nothing and `mygpt --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from MyGPT.acceleration.lookup import PromptLookup
    from MyGPT.acceleration.step import accelerate
    from MyGPT.config import GPT2_CONFIGS, GPT_CONFIG, GPT_CONFIG_SMALL, GPTConfig, as_config
    from MyGPT.data.instructions import InstructionDataset, collate_instructions
    from MyGPT.data.templates import format_input
    from MyGPT.data.windows import GPTDataset, create_dataloader
    from MyGPT.generation import generate, generate_stream
    from MyGPT.model import GPTModel, KVCache
    from MyGPT.opening import open_model
    from MyGPT.sampling import SamplingConfig
    from MyGPT.tokenizers import (
        BPETokenizer,
        CharTokenizer,
        SimpleTokenizer,
        get_tokenizer,
        load_tokenizer,
    )
    from MyGPT.training.config import TrainConfig
    from MyGPT.training.simple import (
        calc_loss_batch,
        calc_loss_loader,
        evaluate_model,
        generate_and_print_sample,
        train_model_simple,
    )
    from MyGPT.training.trainer import Trainer
    from MyGPT.weights.formats.openai import load_gpt2_params_from_tf_ckpt
    from MyGPT.weights.pretrained import load_weights_into_gpt
    from MyGPT.weights.released import download_and_load_gpt2

__version__ = "0.1.0"

_MODULE_OF = {
    "BPETokenizer": "tokenizers",
    "CharTokenizer": "tokenizers",
    "GPT2_CONFIGS": "config",
    "GPTConfig": "config",
    "GPTDataset": "data.windows",
    "GPTModel": "model",
    "GPT_CONFIG": "config",
    "GPT_CONFIG_SMALL": "config",
    "InstructionDataset": "data.instructions",
    "KVCache": "model",
    "PromptLookup": "acceleration.lookup",
    "SamplingConfig": "sampling",
    "SimpleTokenizer": "tokenizers",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "accelerate": "acceleration.step",
    "as_config": "config",
    "calc_loss_batch": "training.simple",
    "calc_loss_loader": "training.simple",
    "collate_instructions": "data.instructions",
    "create_dataloader": "data.windows",
    "download_and_load_gpt2": "weights.released",
    "evaluate_model": "training.simple",
    "format_input": "data.templates",
    "generate": "generation",
    "generate_and_print_sample": "training.simple",
    "generate_stream": "generation",
    "get_tokenizer": "tokenizers",
    "load_gpt2_params_from_tf_ckpt": "weights.formats.openai",
    "load_tokenizer": "tokenizers",
    "load_weights_into_gpt": "weights.pretrained",
    "open_model": "opening",
    "train_model_simple": "training.simple",
}

__all__ = [  # noqa: RUF022 - in the order of the table above
    "BPETokenizer",
    "CharTokenizer",
    "GPT2_CONFIGS",
    "GPTConfig",
    "GPTDataset",
    "GPTModel",
    "GPT_CONFIG",
    "GPT_CONFIG_SMALL",
    "InstructionDataset",
    "KVCache",
    "PromptLookup",
    "SamplingConfig",
    "SimpleTokenizer",
    "TrainConfig",
    "Trainer",
    "accelerate",
    "as_config",
    "calc_loss_batch",
    "calc_loss_loader",
    "collate_instructions",
    "create_dataloader",
    "download_and_load_gpt2",
    "evaluate_model",
    "format_input",
    "generate",
    "generate_and_print_sample",
    "generate_stream",
    "get_tokenizer",
    "load_gpt2_params_from_tf_ckpt",
    "load_tokenizer",
    "load_weights_into_gpt",
    "open_model",
    "train_model_simple",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'MyGPT' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"MyGPT.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
