"""Recipes: YAML files with the options of a command, or with the fields of a GPTConfig.

Recipes may come from strangers, so `read_recipe` refuses files that would fill the memory or crash the YAML parser.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import yaml

from MyGPT.commands._run import RunOptions
from MyGPT.commands.train import DEFAULT_TOKENIZER, DEFAULTS, TextOptions
from MyGPT.config import GPTConfig, as_config
from MyGPT.files import read_text
from MyGPT.messages import OPTION_SYNONYMS, did_you_mean
from MyGPT.training.config import TrainConfig

VOCABULARY_SIZES = {"gpt2": 50257, "chars": 100, "words": 10_000}
"""The vocabulary size of each tokenizer: exact for gpt2, and typical for chars and words, which learn it from a text."""
MAX_RECIPE_BYTES = 1 << 20
_MAX_NESTING = 20  # libyaml crashes at a depth of about ten thousand


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the keys and values of a recipe (YAML file of options). A value such as 1e-3 is a number.

    Raises ValueError for a file that is not YAML, has no keys, is nested too deeply, or uses an alias (a few lines of
    aliases can expand to terabytes).
    """
    from jsonargparse import get_loader

    text = read_text(path, MAX_RECIPE_BYTES)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"the alias *{event.anchor} is not allowed: write out the value")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_NESTING:
                raise ValueError(f"it is nested more than {_MAX_NESTING} levels deep")
        recipe = get_loader("yaml")(text)
    # A tag that does not fit its text makes PyYAML raise many types of errors.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not YAML that MyGPT reads as a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe: it has no keys")
    if wrong := [key for key in recipe if not isinstance(key, str)]:
        raise ValueError(f"{path} is not a recipe: the key {wrong[0]!r} is not a string")
    return recipe


def read_plan(path: str | os.PathLike[str]) -> tuple[GPTConfig, TrainConfig | None, dict[str, Any]]:
    """Return the model's config, the training options, and all keys and values of a recipe (YAML file of options).

    The training options are None if the file describes only a model; otherwise, missing options get the defaults of mygpt
    train. The text is not read: if the tokenizer would learn its vocabulary from the text, the vocabulary size is an estimate.
    """
    recipe = read_recipe(path)
    refuse_unknown_keys(path, recipe)
    if "model" in recipe:
        reason = f"does not describe a model: its model is {recipe['model']!r}"
        raise ValueError(f"{path} is a recipe for mygpt finetune, dpo or classify and {reason}")
    is_training = "data" in recipe or "max_steps" in recipe
    try:
        model = {"vocab_size": _vocabulary(recipe, is_training), **(DEFAULTS if is_training else {})}
        config = as_config({**model, **fields_of(GPTConfig, recipe)})
        return config, TrainConfig(**fields_of(TrainConfig, recipe)) if is_training else None, recipe
    except (ValueError, TypeError, OSError) as error:  # OSError: the recipe names a tokenizer that cannot be opened
        raise ValueError(f"{path}: {error}") from None


def refuse_unknown_keys(path: str | os.PathLike[str], recipe: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that is not an option of `mygpt train`, unless the recipe is for another command."""
    if "model" in recipe:  # a recipe for mygpt finetune, dpo or classify
        return
    known = [
        field.name for kind in (GPTConfig, TrainConfig, TextOptions, RunOptions) for field in dataclasses.fields(kind)
    ]
    known.append("with")
    for key in recipe:
        if key not in known:
            raise ValueError(f"{path}: unknown option {key!r}{did_you_mean(key, known, OPTION_SYNONYMS)}")


def _vocabulary(recipe: Mapping[str, Any], is_training: bool) -> int:
    """Return the vocabulary size of the recipe's tokenizer, or an estimate if the tokenizer would learn it from the text.

    If the recipe names no tokenizer, it is chars for a recipe with training options (is_training) and gpt2 otherwise.
    """
    from MyGPT.data.tokens import is_prepared
    from MyGPT.tokenizers import get_tokenizer, load_tokenizer

    data, name = recipe.get("data", "alice"), recipe.get("tokenizer") or (DEFAULT_TOKENIZER if is_training else "gpt2")
    for source in data if isinstance(data, dict) else [data]:  # the sources of a mixture have one tokenizer
        if isinstance(source, str) and is_prepared(source):
            return load_tokenizer(source).n_vocab
    if name == "bpe":
        return int(recipe.get("tokenizer_size", 1024))
    return VOCABULARY_SIZES.get(name) or get_tokenizer(name).n_vocab


def fields_of(kind: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys and values of `recipe` whose keys are names of fields of the dataclass `kind`."""
    return {field.name: recipe[field.name] for field in dataclasses.fields(kind) if field.name in recipe}
