"""Write a prompt template as the Jinja `chat_template` with which transformers and other programs format conversations.

The text that the Jinja template renders has the token ids of `encode_question`. MyGPT encodes prompts and answers
separately, as in training, but other programs encode the rendered text as a whole. In a few conversations, a token of the
whole text would reach over such a border; for example GPT-2 has one token for ":!", and no text gives ":" and "!" as two.
With `add_generation_prompt=True`, the Jinja template raises an error for these conversations, because no text has their ids.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from MyGPT.data.templates import Template
from MyGPT.files import atomic_write
from MyGPT.tokenizers import CharTokenizer, SimpleTokenizer
from MyGPT.tokenizers.base import end_of_text
from MyGPT.tokenizers.settings import CHAT_TEMPLATES

_MESSAGES = """\
{%- if tools %}{{- raise_exception("this model cannot call tools: leave out tools") }}{% endif %}
{%- set ns = namespace(talk=[], text="", system="", single=false, tail="", is_answer=false) %}
{%- for message in messages %}
{%- set role = "system" if message["role"] == "developer" else message["role"] %}
{%- if role not in ["system", "user", "assistant"] %}
{{- raise_exception("the role of a message must be system, user or assistant") }}
{%- endif %}
{%- if message["tool_calls"] %}{{- raise_exception("this model cannot call tools") }}{% endif %}
{%- if message["content"] is string %}
{%- set ns.text = message["content"] %}
{%- else %}
{%- set ns.text = "" %}
{%- for item in message["content"] %}
{%- if item["text"] is not string %}{{- raise_exception("this model reads only text") }}{% endif %}
{%- set ns.text = ns.text ~ item["text"] %}
{%- endfor %}
{%- endif %}
{%- set ns.talk = ns.talk + [{"role": role, "content": ns.text}] %}
{%- endfor %}
{%- set is_answered = not add_generation_prompt and messages and ns.talk[-1]["role"] == "assistant" %}
{%- set asked = ns.talk[:-1] if is_answered else ns.talk %}
{%- if asked and asked[-1]["role"] == "user" %}
{%- set ns.single = true %}
{%- for message in asked[:-1] %}
{%- if message["role"] != "system" %}{% set ns.single = false %}{% endif %}
{%- set ns.system = ns.system ~ ("" if loop.first else "\\n\\n") ~ message["content"] %}
{%- endfor %}
{%- endif %}
"""
"""Jinja that checks the messages. It sets `asked`, the messages without a final answer, and `ns.single`, which is true for
one question. `ns.system` is then the text of all system messages before it."""

_BORDERS = """\
{%- macro kind(character) %}
{%- if character.isspace() and character not in "\\x1c\\x1d\\x1e\\x1f" %}space
{%- elif character.isalpha() %}letter
{%- elif character.isnumeric() %}number
{%- elif character.isprintable() %}mark
{%- else %}unknown
{%- endif %}
{%- endmacro %}
{%- macro border(before, after) %}
{%- set at = namespace(special=false, crossed=false) %}
{%- for token in PLAIN %}
{%- if before.endswith(token) or after.startswith(token) %}{% set at.special = true %}{% endif %}
{%- if token|length > 1 and token in before[1 - token|length:] ~ after[:token|length - 1] %}
{%- set at.crossed = true %}
{%- endif %}
{%- endfor %}
{%- for token in FLAGGED %}
{%- if before.endswith(token) or after.startswith(token) %}{% set at.crossed = true %}{% endif %}
{%- endfor %}
{%- if at.crossed or not (at.special or RULE) %}
{{- raise_exception("MyGPT encodes prompts and answers separately, but the last token of " ~ before[-20:]|tojson ~
 " and the first token of " ~ after[:20]|tojson ~ " are one token in the whole text, so that no text has the ids of this " ~
 "conversation: use the chat of MyGPT, or change the answer") }}
{%- endif %}
{%- endmacro %}
{%- macro part(text, is_answer) %}
{%- if text %}
{%- if add_generation_prompt and ns.tail and is_answer != ns.is_answer %}{{- border(ns.tail, text) }}{% endif %}
{%- set ns.is_answer = is_answer %}
{%- set ns.tail = (ns.tail ~ text)[-REACH:] %}
{%- endif %}
{{- text }}
{%- endmacro %}
"""
"""Jinja macros: `part` returns a text, and raises an error if it does not begin a new token, although MyGPT starts one."""

_BYTE_LEVEL = """(
 (kind(before[-1]) == "space" and before[-1] == "\\n" and kind(after[0]) != "space"
  and (before|length == 1 or kind(before[-2]) != "space"))
 or (kind(before[-1]) != "space" and (kind(after[0]) == "space" or (before[-1] != "'"
  and kind(before[-1]) != kind(after[0]) and "unknown" not in [kind(before[-1]), kind(after[0])]))))"""
"""The rule, in Jinja, that a token of GPT-2's pattern ends between two texts. A contraction such as 's may begin with '. A
character that this version of Python does not know may be a letter in the tokenizer's version of Unicode."""
_WORDS = """(kind(before[-1]) == "space" or kind(after[0]) == "space"
 or before[-1] in ",.:;?_!\\"()'" or after[0] in ",.:;?_!\\"()'")"""
"""The rule, in Jinja, that a word or punctuation mark of SimpleTokenizer ends between two texts."""


def chat_template(template: Template, tokenizer: Any, exact: bool = True) -> str:
    """Return a prompt template in Jinja, as the `chat_template` of transformers.

    With `add_generation_prompt=True`, it renders the prompt for the next answer of a conversation, as `encode_question` and
    `Template.conversation` do. Otherwise it renders training text: the conversation, with the end-of-text token after its
    last answer. There, an answer may begin within a token, as in all programs that encode whole texts. Answers are marked
    with `{% generation %}`, so TRL can compute the loss on answers only.

    Args:
        template: the prompt template.
        tokenizer: the model's tokenizer, which decides where tokens end; a tokenizer of MyGPT.
        exact: True raises an error for prompts whose ids no text has, see above. False renders them, and uses only
            the Jinja that smaller implementations know, such as that of llama.cpp: no checks, and no `{% generation %}`.
    """
    template = template.for_tokenizer(tokenizer)
    end = end_of_text(tokenizer)
    end_text = "" if end is None else tokenizer.decode([end])
    body = _MESSAGES + (
        _checks(tokenizer) if exact else "{%- macro part(text, is_answer) %}{{- text }}{% endmacro %}\n"
    )
    body += _question(template, end_text) + _conversation(template, end_text)
    return body if exact else re.sub(r"\{%-? (?:end)?generation %\}", "", body)


def save_chat_template(directory: str | os.PathLike[str], template: Template, tokenizer: Any) -> None:
    """Write `chat_template.jinja`, which transformers reads, to the directory of a model and its tokenizer."""
    with atomic_write(Path(directory) / CHAT_TEMPLATES[0]) as file:
        file.write(chat_template(template, tokenizer))


def _checks(tokenizer: Any) -> str:
    """Return the macros that check the borders between prompts and answers, for the rules of a tokenizer."""
    tokens = [token for token in tokenizer.added_tokens if token.content]
    flagged = {token.content for token in tokens if token.single_word or token.lstrip or token.rstrip}
    plain = sorted(token.content for token in tokens)
    rule = _BYTE_LEVEL
    if isinstance(tokenizer, CharTokenizer):
        rule = "true"
    elif isinstance(tokenizer, SimpleTokenizer):
        rule = _WORDS
    values = {
        "PLAIN": f"[{', '.join(map(_text, plain))}]",
        "FLAGGED": f"[{', '.join(map(_text, sorted(flagged)))}]",
        "REACH": str(max([20, *(len(token) for token in plain)])),
        "RULE": rule,
    }
    return re.sub(r"\b(PLAIN|FLAGGED|REACH|RULE)\b", lambda match: values[match[1]], _BORDERS)


def _question(template: Template, end: str) -> str:
    """Return the Jinja for a single question, as `Template.question` turns it into a record."""
    question = 'asked[-1]["content"]'
    if template.asks == "messages":
        system = _join(_pieces(template.system, content="ns.system"))
        user = _join(_pieces(template.user, content=question))
        prompt = f"{{%- if ns.system %}}{{{{- part({system}, false) }}}}{{% endif %}}\n{{{{- part({user}, false) }}}}\n"
        before, after = template.assistant.split("{content}")
        return "{%- if ns.single %}\n" + prompt + _answer(before, "", after, end) + "{%- else %}\n"
    if template.asks == "prompt":
        prompt = f'{{{{- part((ns.system ~ "\\n\\n" if ns.system else "") ~ {question}, false) }}}}\n'
        return "{%- if ns.single %}\n" + prompt + _answer("", "", "", end) + "{%- else %}\n"
    with_input = _join(_pieces(template.with_input, instruction=question, input="ns.system"))
    without = _join(_pieces(template.without_input, instruction=question, input='""'))
    prompt = f"{{{{- part({with_input} if ns.system else {without}, false) }}}}\n"
    begun, _, after = template.response.partition("{output}")
    return "{%- if ns.single %}\n" + prompt + _answer("", begun, after, end) + "{%- else %}\n"


def _conversation(template: Template, end: str) -> str:
    """Return the Jinja for a conversation of several turns, as `Template.parts` writes it."""
    before, after = template.assistant.split("{content}")
    turn_end, stripped = _text(template.turn_end), _text(template.turn_end.rstrip())
    content = 'message["content"]'
    user, system = (_join(_pieces(text, content=content)) for text in (template.user, template.system))
    text = _join([content, *([_text(after)] if after else [])])
    ended = f'"" if ({text}).rstrip().endswith({stripped}) else {turn_end}' if template.turn_end.rstrip() else turn_end
    lines = [
        "{%- for message in asked %}",
        '{%- if message["role"] == "assistant" %}',
        f"{{{{- part({_text(before)}, false) }}}}",
        f"{{%- generation %}}{{{{- part({text} ~ ({ended}), true) }}}}{{% endgeneration %}}",
        '{%- elif message["role"] == "user" %}',
        f"{{{{- part({user}, false) }}}}",
        "{%- else %}",
        f"{{{{- part({system}, false) }}}}",
        "{%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(lines) + "\n" + _answer(before, "", after, end) + "{%- endif %}\n"


def _answer(before: str, begun: str, after: str, end: str) -> str:
    """Return the Jinja for the last answer, or for the beginning of the answer that is asked for.

    `before` is the end of the prompt. `begun` and `after` are the texts that the template puts around the answer, and `end`
    is the end-of-text token.
    """
    answer = _join([*([_text(begun)] if begun else []), 'ns.talk[-1]["content"]', *([_text(after)] if after else [])])
    ended = f"({answer}).rstrip() if ({answer}).rstrip().endswith({_text(end)}) else {answer} ~ {_text(end)}"
    prompt = f"{{{{- part({_text(before)}, false) }}}}" if before else ""
    start = f"{{{{- part({_text(begun)}, true) }}}}" if begun else ""
    lines = [
        "{%- if is_answered %}",
        f"{prompt}{{%- generation %}}{{{{- part({ended if end else answer}, true) }}}}{{% endgeneration %}}",
        "{%- elif add_generation_prompt %}",
        prompt + start,
        "{%- endif %}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _pieces(text: str, **values: str) -> list[str]:
    """Return Jinja expressions whose joined values are `text`, with the expressions `values` in place of placeholders."""
    parts = re.split(rf"\{{({'|'.join(values)})\}}", text)
    return [values[part] if i % 2 else _text(part) for i, part in enumerate(parts) if part]


def _join(expressions: list[str]) -> str:
    """Return the Jinja expression that joins the values of these expressions, which are texts."""
    return f"({' ~ '.join(expressions)})" if expressions else '""'


def _text(text: str) -> str:
    """Return a text as a Jinja expression. Only ASCII characters are escaped, because Jinja knows no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
