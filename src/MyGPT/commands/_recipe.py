"""A recipe, the YAML file that holds a command's options or a model's fields, read as something that others may have made."""

from __future__ import annotations

import os
from typing import Any

import yaml

from MyGPT.files import read_text

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
