"""The command `mygpt`: a table of commands, and the single place that turns errors into messages and exit statuses.

Each command, such as `train`, is the function of the same name in `commands/train.py`, and the function's parameters are
the command's options. A command is imported only when it runs, which keeps `mygpt --help` fast.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from MyGPT.files import FileWarning

COMMANDS = {
    "train": "train a GPT on text files",
    "finetune": "fine-tune a model on instructions, with LoRA or on all weights",
    "generate": "continue a prompt with a trained model",
    "chat": "chat with a model in the terminal",
    "evaluate": "measure loss, perplexity and bits per byte on a text",
    "download": "download a released GPT-2",
    "prepare": "tokenize text files once, for training on large data sets",
    "info": "show the size and cost of a model, checkpoint or recipe",
    "doctor": "check this machine and estimate how long each recipe takes on it",
    "bench": "measure how fast this machine generates text",
    "plot": "plot loss curves, attention, the logit lens, sampling and more",
    "explain": "write an HTML page that shows how a model reads a text",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: sys.argv[1:]) names, and return its exit status.

    The status is 0 for success, 2 for an error that the user can correct, 130 after Ctrl-C and 143 after SIGTERM.
    An error is printed as one line on stderr, unless the environment variable MYGPT_DEBUG is set.
    Then the exception is raised instead.
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
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise ValueError(f"unknown command {name!r}; {hint}")
        with _plain_warnings():
            run_command(name, arguments[1:])
    except KeyboardInterrupt as interrupt:
        print(f"\nmygpt {name}: {interrupt or 'stopped'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal_number", signal.SIGINT)
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("MYGPT_DEBUG"):
            raise
        print(f"mygpt {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of the command `name`, such as "train", and call the command's function.

    If the first argument is a key of `KINDS` in the command's module, such as "attention" for "plot", the function stored
    under that key is called instead.
    """
    from MyGPT.commands._options import call, make_parser, underscored

    module = importlib.import_module(f"MyGPT.commands.{name}")
    command = getattr(module, name)
    kinds = getattr(module, "KINDS", {})
    if arguments and arguments[0] in kinds:
        name, command, arguments = f"{name} {arguments[0]}", kinds[arguments[0]], arguments[1:]
    parser = make_parser(name, command)
    arguments = [underscored(argument, parser) for argument in arguments]
    call(command, parser.parse_args(getattr(module, "EXPAND", list)(arguments)))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each different FileWarning once, as a line on stderr. Other warnings are shown as Python shows them."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def print_note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, FileWarning):
                print(f"note: {' '.join(str(message).split())}", file=sys.stderr)
            else:
                show(message, category, *place, **more)

        warnings.simplefilter("default", FileWarning)
        warnings.showwarning = print_note
        yield


def _overview() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: mygpt COMMAND [options]\n\n{lines}\n\nmygpt COMMAND --help describes a command and its options."
