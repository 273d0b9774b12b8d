"""Build the parser of a command from its function, and call the function with the parsed values.

The parameters of the function are the options of the command; a parameter such as with_ is the option --with, because "with"
is a keyword of Python. A command's module may also define:
    COMMON    names of the options that --help shows; --help-all shows all of them
    DEFAULTS  default values that differ from those of the function and its dataclasses
    HIDDEN    fields of dataclasses that are not options
    NESTED    dataclass parameters whose fields become options with a prefix, such as --lora.r
    OPTIONAL  names of *parameters that need no value
    KINDS     functions that the command's first argument selects, such as mygpt plot attention
    EXPAND    a function that changes the arguments before they are parsed; it also receives the command's name
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
import typing
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Literal

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from MyGPT.commands._help import SHARED_HELP, HelpAllAction, HelpFormatter, show_options, value_name
from MyGPT.commands._recipe import read_recipe
from MyGPT.commands._run import value_of
from MyGPT.messages import OPTION_SYNONYMS, did_you_mean, quote

Command = Callable[..., Any]
_MAY_BE_EMPTY = ("prompt", "sample_prompt", "stop", "system", "text")
"""The options that are texts. An empty text has a meaning, or an error message of its own."""


class CommandParser(ArgumentParser):
    """A command-line parser that reports every error as a ValueError with one plain sentence."""

    example = ""
    recipe: str | os.PathLike[str] | None = None
    given: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        """Raise a ValueError with jsonargparse's error message, rewritten in plain language, and with `ex` as its cause."""
        source = f"options from {self.recipe} and the command line; " if self.recipe else ""
        raise ValueError(f"{self._plain(message)} ({source}see {self.prog} --help)") from ex

    def parse_path(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """Parse a YAML file of options, after `read_recipe` has refused files that could fill the memory or crash the parser."""
        self.recipe = path
        read_recipe(path)
        try:
            return super().parse_path(path, *arguments, **options)
        except ValueError as error:  # jsonargparse opens a text such as "lora: x" as a file, and "\0" cannot be opened
            raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raise ValueError if the arguments contain an unknown option, which includes abbreviated options.

        argparse would first report missing options, even if they are only misspelt.
        """
        self.given = arguments
        before = None
        for argument in arguments:
            option = argument.partition("=")[0]
            if argument == "--":
                return
            if re.fullmatch(r"--?[^\W\d][\w.-]*\+?", option) and option not in self._option_string_actions:
                action = self._option_string_actions.get(before or "")
                if action is not None and action.nargs is None:  # the previous option takes this argument as its value
                    way_out = f"if {argument} is this value, write {before}={quote(argument).removeprefix('./')}"
                    self.error(f"{before} needs a value; {way_out}")
                self.error(self._unknown(option))
            before = argument

    def _plain(self, message: str) -> str:
        """Return jsonargparse's error message as one line that names options and values as the user typed them.

        For example, an unknown option gives "unknown option --temprature; did you mean --temperature?".
        """
        message = " ".join(message.split())
        if found := re.fullmatch("the following arguments are required: (.*)", message):
            options = self._option_string_actions
            names = [f"--{n}" if f"--{n}" in options else n.upper() for n in found[1].split(", ")]
            return f"missing {' and '.join(names)}; for example: {self.example}"
        if found := re.fullmatch("unrecognized arguments: (.*)", message):
            argument = found[1].split()[0]
            # Probably the shell has replaced a pattern by the names of the files.
            way_out = "; put a pattern such as 'texts/*.txt' in quotation marks" if os.path.isfile(argument) else ""
            return f"unexpected argument {argument!r}{way_out}"
        if found := re.fullmatch("Option '(.*)' is not accepted", message):
            return self._unknown(f"--{found[1]}")
        if found := re.fullmatch("argument (--.*): expected one argument", message):
            return f"{found[1].partition('/')[0]} needs a value"  # --model/--model+ for a list
        if message.startswith('Parser key "config": ') and not self.recipe:
            path = value_of(self.given, "config") or ""
            reason = "it is a directory" if path and os.path.isdir(path) else "there is no such file"
            return f"--config {quote(path)}: {reason}"
        if found := re.match('Parser key "(.*?)".*?:', message):
            action = next((action for action in self._actions if action.dest == found[1]), None)
            value = re.search("(?:Got|Given) value:(?: (.*))?$", message)
            if action is not None and hasattr(action, "_typehint") and value:
                typed = value_of(self.given, found[1])  # 1e400 is shown as the user typed it, not as inf
                return _refusal(action, value[1] or "" if typed is None else typed)
            if f'Parser key "{found[1]}": Unable to load config' in message:
                example = next((a.option_strings[0] for a in self._actions if a.dest.startswith(f"{found[1]}.")), "")
                way_out = f"single options are set with names such as {example}"
                return f"--{found[1]} must be a YAML file of options, got {value_of(self.given, found[1])!r}; {way_out}"
        return message.replace('Parser key "', 'option "')

    def _unknown(self, option: str) -> str:
        """Return the error message for an unknown option. The message suggests the existing option with the most similar name."""
        names = [name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")]
        names = [name for name in names if not name.endswith("+")]
        return f"unknown option {option}{did_you_mean(option.strip('-'), names, OPTION_SYNONYMS, prefix='--')}"


def make_parser(name: str, command: Command) -> CommandParser:
    """Return the parser for the command `mygpt name`, whose options are the parameters of the function `command`.

    If the type of a parameter is a dataclass, each field of the dataclass becomes an option. A `*names: str` parameter
    takes one or more values without an option's name. The function's docstring is the help text; `SHARED_HELP` describes
    the options that the docstring does not describe.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = sys.modules[command.__module__]
    settings = ("COMMON", "NESTED", "HIDDEN", "OPTIONAL")
    common, nested, hidden, optional = (getattr(module, setting, ()) for setting in settings)
    description = inspect.cleandoc(command.__doc__ or "").split("\n\nArgs:")[0]
    described = {entry.arg_name: entry.description for entry in docstring_parser.parse(command.__doc__ or "").params}
    parameters = inspect.signature(command).parameters.values()
    listed = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    groups = _dataclasses_of(command)
    parser = CommandParser(
        prog=f"mygpt {name}", description=description, formatter_class=HelpFormatter, add_help=False, allow_abbrev=False
    )
    example = re.search(r"^ +(mygpt .*)", description, re.M)
    parser.example = example[1] if example else f"{parser.prog} --help"
    for parameter in listed:
        parser.add_argument(
            parameter, nargs="*" if parameter in optional else "+", type=str, help=described.get(parameter)
        )
    keywords = {parameter.name for parameter in parameters if parameter.name.endswith("_")}
    parser.add_function_arguments(command, as_group=False, skip={*listed, *groups, *keywords})
    for parameter, kind in groups.items():
        of_kind = {field.name for field in dataclasses.fields(kind) if field.name.endswith("_")}
        parser.add_class_arguments(kind, parameter if parameter in nested else None, skip={*hidden, *of_kind})
        keywords |= of_kind
    for keyword in sorted(keywords):  # the type and the default are those of --with, the only option of this kind
        parser.add_argument(f"--{_option_name(keyword)}", type=str | None, default=None, help=described.get(keyword))
    parser.add_argument(
        "--config", action="config", help="Read options from a YAML file; options after --config override the file."
    )
    which = "the most used" if common else "all"
    parser.add_argument("-h", "--help", action="help", help=f"Show {which} options and exit.")
    parser.add_argument("--help-all", action=HelpAllAction, help="Show all options and exit." if common else SUPPRESS)
    names = {action.dest for action in parser._actions}
    parser.set_defaults({name: value for name, value in getattr(module, "DEFAULTS", {}).items() if name in names})
    for action in parser._actions:
        action.help = action.help or SHARED_HELP.get(action.dest)
        if getattr(action, "_typehint", None) is bool:  # --overwrite alone means true
            action.nargs, action.const = "?", True
        if action.dest in nested:
            action.help = f"Read the options of {action.dest} from a YAML file."
        if action.dest == "print_config":
            action.help = "Print all options as YAML and exit."
    required = [f"--{a.dest} {value_name(a)}" for a in parser._actions if a.required and a.option_strings]
    values = [f"[{name.upper()}...]" if name in optional else f"{name.upper()}..." for name in listed]
    parser.usage = " ".join([parser.prog, *values, *required, "[options]"])
    show_options(parser, common)
    return parser


def texts_first(arguments: Sequence[str], parser: CommandParser) -> list[str]:
    """Move the arguments that belong to no option to the front, and write flags as --flag=true, if the command has both.

    argparse accepts these arguments only in one place, and would read the one after a flag, such as --live, as its value.
    """
    if all(action.option_strings for action in parser._actions):
        return list(arguments)
    texts, options, left = list[str](), list[str](), list(reversed(arguments))
    while left:
        argument = left.pop()
        action: Any = parser._option_string_actions.get(argument)
        if argument == "--":  # only texts follow
            return [*options, argument, *texts, *reversed(left)]
        if action is None and not argument.startswith("--"):
            texts.append(argument)
        elif getattr(action, "_typehint", None) is bool:
            is_given = left and left[-1].lower() in ("true", "false")
            options.append(f"{argument}={left.pop() if is_given else 'true'}")
        else:
            options.append(argument)
            if action is not None and action.nargs is None:
                options += [left.pop()] if left else []
    return [*texts, *options]


def join_repeated(arguments: Sequence[str], parser: CommandParser) -> list[str]:
    """Join the values of a list option that is given several times into one list.

    argparse would keep only the last value. The list replaces the last of the options. Values that are lists are joined too.
    """
    joined: list[list[str]] = []
    """One list per argument. For a list option: its name and all of its values."""
    left = iter(arguments)
    for argument in left:
        option, equals, text = argument.partition("=")
        value = None
        if f"{option}+" in parser._option_string_actions:  # jsonargparse has --data+ for the list option --data
            value = text if equals else next(left, None)
        if value is not None:
            before = next((one for one in joined if one[0] == option and len(one) > 1), [option])
            joined = [*(one for one in joined if one is not before), [*before, value]]
        else:
            joined.append([argument])
        if argument == "--":  # only texts follow
            joined += [[text] for text in left]
    return [f"{one}={_listed(values)}" if values else one for one, *values in joined]


def _listed(values: Sequence[str]) -> str:
    """Return a single value unchanged, and several values of a list option as one list."""
    if len(values) == 1:
        return values[0]
    texts: list[str] = []
    for value in values:
        try:
            several: Any = yaml.safe_load(value) if value.startswith("[") else [value]
        except (yaml.YAMLError, RecursionError):  # a text such as "["
            several = [value]
        texts += several if isinstance(several, list) and all(isinstance(text, str) for text in several) else [value]
    return yaml.safe_dump(texts, default_flow_style=True, default_style='"', width=math.inf).strip()


def underscored(argument: str, parser: CommandParser) -> str:
    """Replace hyphens in the name of an option by underscores: --max-steps becomes --max_steps. Keep other arguments."""
    option, equals, value = argument.partition("=")
    name = "--" + option[2:].replace("-", "_")
    return f"{name}{equals}{value}" if option.startswith("--") and name in parser._option_string_actions else argument


def call(command: Command, options: Any) -> int | None:
    """Call the function `command` with the parsed options, after building its dataclass arguments from their fields.

    Return its exit status, or None for a command that has only the status 0.
    """
    positional, keywords = build_arguments(command, options)
    status: int | None = command(*positional, **keywords)
    return status


def build_arguments(command: Command, options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments with which `call` calls `command`.

    Raises ValueError if a value is not allowed, unless only `command` itself can know this.
    """
    values = {name: value for name, value in options.as_dict().items() if name != "config"}
    groups = _dataclasses_of(command)
    positional: list[Any] = []
    keywords = {}
    _refuse_empty(command, values)
    _refuse_null({name: value for name, value in values.items() if name not in groups}, typing.get_type_hints(command))
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional = values[name] or []
        elif name not in groups:
            keywords[name] = values[_option_name(name)]
        else:
            given = values.get(name, values)  # a nested parameter, such as lora, has its fields in a mapping of its own
            if not isinstance(given, dict):
                raise ValueError(f"{name} must be a mapping of options to values, got {given!r}")
            options_of = {field.name: _option_name(field.name) for field in dataclasses.fields(groups[name])}
            fields = {field: given[option] for field, option in options_of.items() if option in given}
            _refuse_null(fields, typing.get_type_hints(groups[name]), f"{name}." if name in values else "")
            keywords[name] = groups[name](**fields)
    return positional, keywords


def _option_name(parameter: str) -> str:
    """Return the name of the option of a parameter or field: with_ becomes with."""
    return parameter.removesuffix("_")


def _refuse_null(values: dict[str, Any], kinds: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError if a value is None although its type in `kinds` does not allow None. jsonargparse accepts null."""
    for name, value in values.items():
        if value is None and name in kinds and NoneType not in typing.get_args(kinds[name]):
            *most, last = _allowed(kinds[name], "", has_null=False)
            allowed = f"{', '.join(most)} or {last}" if most else last
            raise ValueError(f"--{prefix}{name} must be {allowed}, got null")


def _refuse_empty(command: Command, values: dict[str, Any]) -> None:
    """Raise ValueError if a name or a path is empty, as after --out "$DIRECTORY" when the shell's variable is not set."""
    for name, value in values.items():
        if name not in _MAY_BE_EMPTY and (value == "" or (isinstance(value, list) and "" in value)):
            is_listed = inspect.signature(command).parameters.get(name) is not None and isinstance(value, list)
            raise ValueError(f"{name.upper() if is_listed else f'--{name}'} is empty: give a value, or leave it out")


def _dataclasses_of(command: Command) -> dict[str, Any]:
    """Return a dict from the name of each parameter whose type is a dataclass to this dataclass."""
    hints = typing.get_type_hints(command)
    return {name: kind for name, kind in hints.items() if name != "return" and dataclasses.is_dataclass(kind)}


def _refusal(action: Any, value: str) -> str:
    """Return the error message for a `value` that the option of `action` does not accept."""
    kind = action._typehint
    # Without a value, an option whose default is null need not be given at all.
    *most, last = _allowed(kind, value, has_null=action.default is not None)
    allowed = f"{', '.join(most)} or {last}" if most else last
    return f"--{action.dest} must be {allowed}, got {value!r}{did_you_mean(value, _choices(kind)) if value else ''}"


def _choices(kind: Any) -> list[str]:
    """Return the values of all Literal types in the type `kind`."""
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [choice for member in typing.get_args(kind) for choice in _choices(member)]


def _allowed(kind: Any, value: str, has_null: bool) -> list[str]:
    """Return which values an option of the type `kind` accepts, for the error message about `value`.

    The type float | None gives ["a number", "null"], or ["a number"] if `has_null` is False. A Literal type gives its
    values.
    """
    if typing.get_origin(kind) is Literal:
        return _choices(kind)
    if typing.get_origin(kind) is list:
        text = value.strip("[]'\" ") or "text"
        return [f"a list of texts such as {quote(json.dumps([text], ensure_ascii=False))}"]
    if typing.get_origin(kind) is dict:
        return ["a mapping of texts to numbers such as '{web: 0.8, code: 0.2}'"]
    names = {int: ["a whole number"], float: ["a number"], str: ["a text"], bool: ["true", "false"]}
    if kind is NoneType:
        return ["null"] if has_null else []
    return names.get(kind) or [word for member in typing.get_args(kind) for word in _allowed(member, value, has_null)]
