"""MyGPT: GPT-2 written from scratch in PyTorch, from tokenizers and training to generation.

The imports under `TYPE_CHECKING` are the only list of public names. Type checkers and editors read them as imports.
At run time, this module parses its own source for these imports and loads each name at its first use (PEP 562).
Therefore `import MyGPT` does not import torch. To add a public name, add an import to the list.
"""

from __future__ import annotations

import ast
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # "import X as X" marks X as public for type checkers.
    from MyGPT.acceleration.lookup import PromptLookup as PromptLookup
    from MyGPT.acceleration.step import accelerate as accelerate
    from MyGPT.cache import KVCache as KVCache
    from MyGPT.config import GPT2_CONFIGS as GPT2_CONFIGS
    from MyGPT.config import GPT_CONFIG as GPT_CONFIG
    from MyGPT.config import GPT_CONFIG_SMALL as GPT_CONFIG_SMALL
    from MyGPT.config import GPTConfig as GPTConfig
    from MyGPT.config import as_config as as_config
    from MyGPT.data.instructions import InstructionDataset as InstructionDataset
    from MyGPT.data.instructions import collate_instructions as collate_instructions
    from MyGPT.data.templates import format_input as format_input
    from MyGPT.data.windows import GPTDataset as GPTDataset
    from MyGPT.data.windows import create_dataloader as create_dataloader
    from MyGPT.ecosystem import as_transformers as as_transformers
    from MyGPT.generation import generate as generate
    from MyGPT.generation import generate_stream as generate_stream
    from MyGPT.model import GPTModel as GPTModel
    from MyGPT.opening import open_model as open_model
    from MyGPT.sampling import SamplingConfig as SamplingConfig
    from MyGPT.serving.engine import Engine as Engine
    from MyGPT.tokenizers import BPETokenizer as BPETokenizer
    from MyGPT.tokenizers import CharTokenizer as CharTokenizer
    from MyGPT.tokenizers import SimpleTokenizer as SimpleTokenizer
    from MyGPT.tokenizers import get_tokenizer as get_tokenizer
    from MyGPT.tokenizers import load_tokenizer as load_tokenizer
    from MyGPT.training.config import TrainConfig as TrainConfig
    from MyGPT.training.simple import calc_loss_batch as calc_loss_batch
    from MyGPT.training.simple import calc_loss_loader as calc_loss_loader
    from MyGPT.training.simple import evaluate_model as evaluate_model
    from MyGPT.training.simple import generate_and_print_sample as generate_and_print_sample
    from MyGPT.training.simple import train_model_simple as train_model_simple
    from MyGPT.training.trainer import Trainer as Trainer
    from MyGPT.weights.formats.openai import load_gpt2_params_from_tf_ckpt as load_gpt2_params_from_tf_ckpt
    from MyGPT.weights.pretrained import load_weights_into_gpt as load_weights_into_gpt
    from MyGPT.weights.released import download_and_load_gpt2 as download_and_load_gpt2
else:
    _MODULE_OF = {
        node.names[0].name: node.module
        for node in ast.walk(ast.parse(__spec__.loader.get_source(__name__)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("MyGPT.")
    }
    __all__ = sorted(_MODULE_OF)

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'MyGPT' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value  # Python calls __getattr__ only for names that the module lacks.
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
