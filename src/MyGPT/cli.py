"""The command `mygpt`: a table of commands, and the single place that turns errors into messages and exit statuses.

Each command, such as `train`, is the function of the same name in `commands/train.py`, and the function's parameters are
the command's options. A command is imported only when it runs, which keeps `mygpt --help` fast.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterable, Sequence

from MyGPT.messages import did_you_mean, error_message, plain_warnings, printable, safe_streams

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

_SYNONYMS = {
    "train": "pretrain fit",
    "finetune": "tune sft lora ft",
    "generate": "sample gen complete predict run inference",
    "chat": "talk ask",
    "evaluate": "eval perplexity test",
    "download": "pull get fetch",
    "prepare": "tokenize preprocess encode",
    "info": "show describe inspect summary size",
    "doctor": "check env diagnose",
    "bench": "benchmark speed",
    "plot": "draw figure graph",
    "explain": "visualize trace",
}
"""For each command, other names under which users look for it."""
_KIND_SYNONYMS = {
    "attention": "attn heads heatmap",
    "lens": "logit_lens logits",
    "sampling": "probabilities probs distribution temperature",
    "neighbours": "neighbors nearest embeddings similarity",
    "schedule": "lr learning_rate lr_schedule",
    "tokens": "tokenize tokenizer",
}
"""For each kind of picture of `mygpt plot`, other names under which users look for it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: sys.argv[1:]) names, and return its exit status.

    The status is 0 for success, 2 for an error that the user can correct, 130 after Ctrl-C and 143 after SIGTERM.
    An error is printed as one line on stderr, unless the environment variable MYGPT_DEBUG is set.
    Then the exception is raised instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with safe_streams():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    """Run a command, and return its exit status. See `main`."""
    name = arguments[0] if arguments else "--help"
    try:
        if name in ("-h", "--help"):
            print(_overview())
        elif name == "--version":
            from MyGPT import __version__

            print(f"mygpt {__version__}")
        elif name in COMMANDS:
            with plain_warnings():
                run_command(name, arguments[1:])
        else:
            hint = did_you_mean(name, COMMANDS, _SYNONYMS) or f"; the commands are {', '.join(COMMANDS)}"
            raise ValueError(f"unknown command {name!r}{hint}")
    except KeyboardInterrupt as interrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # The terminal has printed ^C, perhaps after an unfinished line.
        _report(name, str(interrupt) or "interrupted")
        return 128 + getattr(interrupt, "signal_number", signal.SIGINT)
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("MYGPT_DEBUG"):
            raise
        _report(name, error_message(error))
        return 2
    return 0


def _report(command: str, message: str) -> None:
    """Print a message of a command as one line on stderr."""
    program = f"mygpt {command}" if command in COMMANDS else "mygpt"
    print(f"{program}: {printable(message, keep='')}", file=sys.stderr)


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
    elif arguments and kinds:
        _refuse_misspelt_kind(name, arguments[0], kinds)
    parser = make_parser(name, command)
    arguments = [underscored(argument, parser) for argument in arguments]
    parser.refuse_unknown(arguments)
    call(command, parser.parse_args(getattr(module, "EXPAND", list)(arguments)))


def _refuse_misspelt_kind(command: str, argument: str, kinds: Iterable[str]) -> None:
    """Raise ValueError if the first argument of a command is not a path, but resembles the name of one of its kinds."""
    hint = did_you_mean(argument, kinds, _KIND_SYNONYMS, prefix=f"mygpt {command} ")
    if hint and not argument.startswith("-") and not os.path.exists(argument):
        raise ValueError(f"there is no run {argument!r}{hint}")


def _overview() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: mygpt COMMAND [options]\n\n{lines}\n\nmygpt COMMAND --help describes a command and its options."
