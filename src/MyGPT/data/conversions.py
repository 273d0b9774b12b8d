"""Convert the records of other projects to the forms that MyGPT trains on. The guide "Data" lists all forms.

- OpenAI's `messages`, with the role `developer`, lists of text parts and `weight`, become plain `messages`.
- ShareGPT's `conversations` with `from` and `value` become `messages`.
- TRL's conversational `prompt` and `completion` become `messages`. Earlier answers in the prompt do not count in the loss.
- OpenAI's `input`, `preferred_output` and `non_preferred_output` become `prompt`, `chosen` and `rejected`.

A record that needs tools, or parts other than text, raises ValueError: MyGPT's models read and write only text. This module
needs neither torch nor a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant")
"""The values of `role` in the messages of a conversation."""
_SYNONYMS = {"developer": "system"}
"""Maps OpenAI's other names of roles to ours."""
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Maps the allowed values of `from` in ShareGPT's conversations to roles."""
_TOOL_ROLES = ("tool", "function", "function_call", "observation")
_TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
_REFUSAL = "MyGPT's models cannot call tools: remove the record, or its tools"


def converted(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a record in a form of OpenAI or TRL with the keys that MyGPT reads. Any other record is returned unchanged.

    Raises ValueError, with a message that starts with `where`, if the record needs tools or has half of a form.
    """
    _refuse_tools(record, where)
    if any(key in record for key in ("preferred_output", "non_preferred_output")):
        return _openai_preference(record, where)
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and "chosen" not in record:
        if not isinstance(completion, (list, Mapping)) and not is_missing(completion):
            raise ValueError(
                f"{where}: 'completion' must be a list of messages, as 'prompt' is, got {short(completion)}"
            )
        context = [{**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in prompt]
        answer = [completion] if isinstance(completion, Mapping) else completion or []
        others = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
        return {**others, "messages": [*context, *answer]}
    return record


def _openai_preference(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a pair in OpenAI's format for DPO with the keys prompt, chosen and rejected."""
    prompt = record.get("input")
    if not isinstance(prompt, Mapping) or not isinstance(prompt.get("messages"), list):
        raise ValueError(f"{where}: 'input' must be an object with a list of 'messages', got {short(prompt)}")
    _refuse_tools(prompt, where)
    for key in ("preferred_output", "non_preferred_output"):
        if not isinstance(record.get(key), list):
            raise ValueError(f"{where}: {key!r} must be a list of messages, got {short(record.get(key))}")
    return {
        "prompt": prompt["messages"],
        "chosen": record["preferred_output"],
        "rejected": record["non_preferred_output"],
    }


def converted_message(message: Any, key: str, place: str) -> dict[str, Any]:
    """Return a message with `role` and `content`, and with `weight` 0 if it is an answer that the model must not learn.

    Args:
        message: a dict with `role` and `content`, or under the key "conversations", also with `from` and `value`.
        key: the key of the record that has the list of messages: "messages" or "conversations".
        place: the name of the message, with which error messages start.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"{place}: a message must be a JSON object, got {short(message)}")
    is_sharegpt = key == "conversations" and "role" not in message
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    roles = _SHAREGPT_ROLES if is_sharegpt else {**dict(zip(ROLES, ROLES, strict=True)), **_SYNONYMS}
    role = message.get(role_key)
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise ValueError(f"{place}: the {role_key} is {role!r}, but {_REFUSAL}")
    _refuse_tools(message, place)
    for name in (role_key, content_key):
        if name not in message:
            raise ValueError(f"{place}: the key {name!r} is missing, the record has {short(list(message))}")
    if isinstance(role, str) and role not in roles:
        known = [name for name in roles if name not in _SYNONYMS]
        raise ValueError(f"{place}: {role_key!r} must be one of {', '.join(known)}, got {role!r}")
    result = {"role": roles[role] if isinstance(role, str) else role, "content": message[content_key]}
    if isinstance(result["content"], list):
        result["content"] = _joined(result["content"], f"{place}: {content_key!r}")
    weight = message.get("weight")
    if is_missing(weight) or result["role"] != "assistant":
        return result
    if weight not in (0, 1):
        raise ValueError(f"{place}: 'weight' must be 0 or 1, got {short(weight)}")
    return result if weight else {**result, "weight": 0}


def _joined(parts: list[Any], place: str) -> str:
    """Return the text of a list of parts such as {"type": "text", "text": "Hello"}."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{place} may have only parts of the type text, because the models read only text, got {short(part)}"
            )
    return "".join(part["text"] for part in parts)


def _refuse_tools(record: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a record or message has a key for tools with a value."""
    for key in _TOOL_KEYS:
        value = record.get(key)
        # In Arrow files, an object that is missing may have all its keys, with the value null.
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        if not all(map(is_missing, items)):
            raise ValueError(f"{where}: the record has {key!r}, but {_REFUSAL}")


def is_missing(value: object) -> bool:
    """Return True if a value of a record means that there is none: null, or NaN or NA, as pandas writes them."""
    # NaN differs from itself, and a comparison with pandas.NA is neither true nor false.
    return value is None or (isinstance(value, float) and value != value) or repr(value) == "<NA>"


def short(value: object) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
