"""A YAML file as `mygpt train` would take it: the model and how it is trained, without touching the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from MyGPT.commands.train import DEFAULTS
from MyGPT.config import GPTConfig, as_config
from MyGPT.training.config import TrainConfig

GPT2_VOCABULARY = 50257
# What a text's own letters and words usually come to; only the text itself tells.
USUAL_VOCABULARY = {"chars": 100, "words": 10_000}


def read_recipe(path: str) -> tuple[GPTConfig, TrainConfig | None, dict[str, Any]]:
    """The model, the training (None if the file describes a model only), and all that the file says.

    What is not said is the command's default. The vocabulary of a text that has not been read is a usual one.
    """
    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it holds no keys")
    if "model" in recipe:
        raise ValueError(
            f"{path} is for mygpt finetune: it tunes the model {recipe['model']!r}, which has its own size"
        )
    is_training = "data" in recipe or "max_steps" in recipe
    model = {"vocab_size": _vocabulary(recipe, is_training), **(DEFAULTS if is_training else {})}
    config = as_config({**model, **_fields(GPTConfig, recipe)})
    return config, TrainConfig(**_fields(TrainConfig, recipe)) if is_training else None, recipe


def _vocabulary(recipe: Mapping[str, Any], is_training: bool) -> int:
    from MyGPT.data.tokens import is_prepared
    from MyGPT.tokenizers import load_tokenizer

    data, name = recipe.get("data", "alice"), recipe.get("tokenizer", "chars" if is_training else "gpt2")
    if isinstance(data, str) and is_prepared(data):
        return load_tokenizer(data).n_vocab
    if name == "bpe":
        return int(recipe.get("tokenizer_size", 1024))
    return GPT2_VOCABULARY if name == "gpt2" else USUAL_VOCABULARY.get(name) or load_tokenizer(name).n_vocab


def _fields(kind: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values for a dataclass's fields. YAML reads 6e-4, without a point, as a text."""
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in recipe:
            value = recipe[field.name]
            values[field.name] = float(value) if field.type == "float" and isinstance(value, str) else value
    return values
