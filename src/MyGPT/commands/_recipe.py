"""A recipe, the YAML file that holds a command's options or a model's fields: read as something that others may have made, and
what model and training it describes, without touching the data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import yaml

from MyGPT.commands.train import DEFAULTS
from MyGPT.config import GPTConfig, as_config
from MyGPT.files import read_text
from MyGPT.training.config import TrainConfig

GPT2_VOCABULARY = 50257
# What a text's own letters and words usually come to; only the text itself tells.
USUAL_VOCABULARY = {"chars": 100, "words": 10_000}

MAX_RECIPE_BYTES = 1 << 20
_MAX_NESTING = 20  # libyaml's reader crashes at some ten thousand


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and plain values of a recipe, numbers as jsonargparse has them (1e-3 is one).

    Not YAML, no keys, nested deeper than any recipe is, or an alias (a few lines of them stand for terabytes): a ValueError
    that names the file.
    """
    from jsonargparse import get_loader

    text = read_text(path, MAX_RECIPE_BYTES)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has the alias *{event.anchor}: write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_NESTING:
                raise ValueError(f"nested more than {_MAX_NESTING} deep")
        recipe = get_loader("yaml")(text)
    # A tag may ask for what its text is not, on which PyYAML fails in many ways.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not YAML for a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is no recipe: it holds no keys")
    for key in recipe:
        if not isinstance(key, str):
            raise ValueError(f"{path} is no recipe: the key {key!r} is not a text")
    return recipe


def read_plan(path: str | os.PathLike[str]) -> tuple[GPTConfig, TrainConfig | None, dict[str, Any]]:
    """The model, the training (None if the file describes a model only), and all that a recipe says.

    What is not said is the command's default. The vocabulary of a text that has not been read is a usual one.
    """
    recipe = read_recipe(path)
    if "model" in recipe:
        raise ValueError(
            f"{path} is for mygpt finetune: it tunes the model {recipe['model']!r}, which has its own size"
        )
    is_training = "data" in recipe or "max_steps" in recipe
    try:
        model = {"vocab_size": _vocabulary(recipe, is_training), **(DEFAULTS if is_training else {})}
        config = as_config({**model, **fields_of(GPTConfig, recipe)})
        return config, TrainConfig(**fields_of(TrainConfig, recipe)) if is_training else None, recipe
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _vocabulary(recipe: Mapping[str, Any], is_training: bool) -> int:
    from MyGPT.data.tokens import is_prepared
    from MyGPT.tokenizers import load_tokenizer

    data, name = recipe.get("data", "alice"), recipe.get("tokenizer", "chars" if is_training else "gpt2")
    if isinstance(data, str) and is_prepared(data):
        return load_tokenizer(data).n_vocab
    if name == "bpe":
        return int(recipe.get("tokenizer_size", 1024))
    return GPT2_VOCABULARY if name == "gpt2" else USUAL_VOCABULARY.get(name) or load_tokenizer(name).n_vocab


def fields_of(kind: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values in a recipe whose keys are fields of the dataclass `kind`."""
    return {field.name: recipe[field.name] for field in dataclasses.fields(kind) if field.name in recipe}
