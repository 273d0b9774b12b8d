"""Read the special tokens that the files of a model's directory name, apart from the tokenizer's vocabulary.

`tokenizer_config.json` and, in older directories, `special_tokens_map.json` name the tokens. `generation_config.json` and
`config.json` contain ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from MyGPT.files import read_json, read_text
from MyGPT.tokenizers.added import AddedToken, added_token

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a tokenizer_config.json can name."""
CHAT_TEMPLATES = ("chat_template.jinja", "additional_chat_templates")
"""The file in which transformers keeps the template of a conversation, and the directory with further templates."""


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a directory's tokenizer_config.json, and of special_tokens_map.json in older directories.

    The text of chat_template.jinja is added under the key chat_template, where older versions of transformers keep it. The
    result is empty if all files are missing. A damaged file raises ValueError.
    """
    settings = read_object(Path(directory, "tokenizer_config.json")) | _read_chat_templates(Path(directory))
    if "added_tokens_decoder" in settings:  # transformers then ignores the older file
        return settings

    def name_of(value: Any) -> Any:
        """Return the text of a token that is described by an object, which tokenizer_config.json cannot contain."""
        if isinstance(value, list):
            return [name_of(item) for item in value]
        return value["content"] if isinstance(value, dict) and "content" in value else value

    older = read_object(Path(directory, "special_tokens_map.json"))
    return settings | {key: name_of(value) for key, value in older.items()}


def _read_chat_templates(directory: Path) -> dict[str, Any]:
    """Return a dict with the key chat_template if a directory has chat_template.jinja or several templates, else no key."""
    first, others = (directory / name for name in CHAT_TEMPLATES)
    files = {"default": first, **{path.stem: path for path in sorted(others.glob("*.jinja"))}}
    templates = {name: read_text(path) for name, path in files.items() if path.is_file()}
    if [*templates] == ["default"]:
        return {"chat_template": templates["default"]}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return {"chat_template": listed} if listed else {}


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dict if there is no file. Raises ValueError for any other content."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def read_end_ids(directory: str | os.PathLike[str]) -> list[int]:
    """Return the ids that end a text according to generation_config.json or else config.json in a directory.

    The result is empty if the two files are missing or do not name such an id.
    """
    for name in ("generation_config.json", "config.json"):
        content = read_json(Path(directory, name)) if Path(directory, name).is_file() else None
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        if ids := [id_ for id_ in (value if isinstance(value, list) else [value]) if type(id_) is int]:
            return ids
    return []


def token_name(settings: Mapping[str, Any], role: str) -> str | None:
    """Return the token that the settings name for a role such as "eos_token", or None. A wrong type raises ValueError."""
    value = settings.get(role)
    name = value.get("content") if isinstance(value, Mapping) else value
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{role} in tokenizer_config.json must be a string, got {value!r:.80}")
    return name


def named_tokens(settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Yield the special tokens that the settings name, in the order in which transformers adds them.

    The ids are not known, so they are -1.
    """
    others = [name for name, value in settings.items() if name.endswith("_token") and name not in ROLES]
    for role in ROLES:
        token_name(settings, role)  # raises ValueError for a wrong type
    for name in (*ROLES, *(other for other in others if isinstance(settings[other], (str, Mapping)))):
        yield from _special(settings.get(name))
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    for value in extra.values() if isinstance(extra, Mapping) else extra:
        yield from _special(value)


def _special(value: Any) -> Iterator[AddedToken]:
    """Yield the special token that a string or an object in the settings describes; nothing for null.

    Any other value raises ValueError.
    """
    entry = {"content": value} if isinstance(value, str) else value
    if entry is not None:
        if not isinstance(entry, Mapping):
            raise ValueError(f"a special token in tokenizer_config.json must be a string, got {value!r:.80}")
        yield added_token({**entry, "special": True, "normalized": False}, -1)
