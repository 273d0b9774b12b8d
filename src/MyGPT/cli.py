"""The command `mygpt`: a table of commands, each a function whose signature is its options, and one place for errors.

Nothing heavy is imported until a command runs, so that `mygpt --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS = {
    "train": "train a GPT on a text",
    "finetune": "tune a model on instructions: LoRA, or all of its weights",
    "generate": "continue a prompt with a trained model",
    "chat": "talk with a model in the terminal",
    "evaluate": "measure loss, perplexity and bits per byte on a text",
    "download": "get a released GPT-2",
    "prepare": "turn text files into a token file for long training",
    "info": "explain a model, a checkpoint or a configuration",
    "doctor": "check this machine, and how long each recipe would take on it",
    "bench": "measure how fast this machine generates",
    "plot": "draw the loss curves of runs, attention, the logit lens, sampling and more",
    "explain": "write a page on how a model reads a text: tokens, attention, logit lens",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 2 for an error that a user can cause, 130 for Ctrl-C, 143 for SIGTERM.

    An error is one line on stderr; MYGPT_DEBUG=1 shows where it came from.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from MyGPT import __version__

        print(f"mygpt {__version__}")
        return 0
    name = arguments[0]
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
        run_command(name, arguments[1:])
    except KeyboardInterrupt as interrupt:
        print(f"\nmygpt {name}: {interrupt or 'stopped'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal_number", signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("MYGPT_DEBUG"):
            raise
        print(f"mygpt {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Parses the options and calls the command's function, or the one that its first word names in the module's `KINDS`."""
    module = importlib.import_module(f"MyGPT.commands.{name}")
    command = getattr(module, name)
    kinds = getattr(module, "KINDS", {})
    if arguments and arguments[0] in kinds:
        name, command, arguments = f"{name} {arguments[0]}", kinds[arguments[0]], arguments[1:]
    parser = make_parser(name, command)
    arguments = [_underscored(argument, parser) for argument in arguments]
    call(command, parser.parse_args(getattr(module, "EXPAND", list)(arguments)))


def make_parser(name: str, command: Callable[..., Any]) -> Any:
    """A parser whose options are the function's parameters; a parameter that is a dataclass gives an option for each field.

    Those fields stand beside the parameters, or for a parameter in the module's `NESTED` behind its name: --lora.r.
    A `*names: str` parameter takes one or more values without an option's name. Defaults can be set by the function's
    module in `DEFAULTS`, fields left out in `HIDDEN`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    from MyGPT.commands._recipe import read_recipe

    class Parser(ArgumentParser):
        recipe: str | os.PathLike[str] | None = None

        def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
            source = f"options from {self.recipe} and the command line; " if self.recipe else ""
            raise ValueError(f"{_plain(message)} ({source}see mygpt {name} --help)") from ex

        def parse_path(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
            self.recipe = path
            read_recipe(path)  # what is harmful is refused before jsonargparse reads it
            return super().parse_path(path, *arguments, **options)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = sys.modules[command.__module__]
    listed = [p.name for p in inspect.signature(command).parameters.values() if p.kind is p.VAR_POSITIONAL]
    parser = Parser(
        prog=f"mygpt {name}",
        usage=" ".join(["%(prog)s", *(f"{parameter} [{parameter} ...]" for parameter in listed), "[options]"]),
        description=inspect.cleandoc(command.__doc__ or "").split("\n\nArgs:")[0],
    )
    parser.add_argument("--config", action="config", help="a YAML file with options; those after it win")
    for parameter in listed:
        parser.add_argument(parameter, nargs="+", type=str, help=_help_of(command, parameter))
    described = _dataclasses_of(command)
    parser.add_function_arguments(command, as_group=False, skip={*listed, *described})
    nested = getattr(module, "NESTED", ())
    for parameter, kind in described.items():
        parser.add_class_arguments(
            kind, parameter if parameter in nested else None, skip=set(getattr(module, "HIDDEN", ()))
        )
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --overwrite alone means true
            action.nargs, action.const = "?", True
    parser.set_defaults(getattr(module, "DEFAULTS", {}))
    return parser


def _underscored(argument: str, parser: Any) -> str:
    """An option written with hyphens, --max-steps, as it is called; anything else, such as a prompt, as it is."""
    option, equals, value = argument.partition("=")
    named = "--" + option[2:].replace("-", "_")
    return f"{named}{equals}{value}" if option.startswith("--") and named in parser._option_string_actions else argument


def call(command: Callable[..., Any], options: Any) -> None:
    """Calls the function with the parsed options, dataclasses built from their fields."""
    values = {name: value for name, value in options.as_dict().items() if name != "config"}
    keywords = {}
    for parameter, kind in _dataclasses_of(command).items():
        if parameter in values:  # behind its name
            if not isinstance(values[parameter], dict):  # lora: null
                raise ValueError(f"{parameter} must be options with their values, got {values[parameter]!r}")
            keywords[parameter] = kind(**values[parameter])
            continue
        fields = [field.name for field in dataclasses.fields(kind) if field.name in values]
        keywords[parameter] = kind(**{field: values[field] for field in fields})
    positional: list[Any] = []
    for name, described in inspect.signature(command).parameters.items():
        if described.kind is described.VAR_POSITIONAL:
            positional = values[name]
        elif name not in keywords:
            keywords[name] = values[name]
    command(*positional, **keywords)


def _dataclasses_of(command: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(command)
    return {name: kind for name, kind in hints.items() if name != "return" and dataclasses.is_dataclass(kind)}


def _help_of(command: Callable[..., Any], parameter: str) -> str:
    import docstring_parser

    parsed = docstring_parser.parse(command.__doc__ or "")
    return next((p.description or "" for p in parsed.params if p.arg_name.lstrip("*") == parameter), "")


def _plain(message: str) -> str:
    """jsonargparse's message in one line, without the parser's own vocabulary."""
    for theirs, plain in (
        ("<class '", ""),
        ("'>", ""),
        ("typing.", ""),
        ("Expected a Literal", "Expected one of "),
        ("Expected a int", "Expected an int"),
    ):
        message = message.replace(theirs, plain)
    return " ".join(message.replace('Parser key "', 'option "').split())


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: mygpt COMMAND [options]", "", *lines, "", "mygpt COMMAND --help tells a command's options."]
    )
