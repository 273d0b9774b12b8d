"""The command `mygpt`: a table of commands, and the single place that turns errors into messages and exit statuses.

Each command, such as `train`, is the function of the same name in `commands/train.py`, and the function's parameters are
the command's options. A command is imported only when it runs, which keeps `mygpt --help` fast.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterable, Sequence

# This module imports very little, because an import takes time, in which the user may press Ctrl-C.
SIGINT, SIGPIPE = 2, 13
"""The numbers of the signals on every system that has them; Windows has no SIGPIPE."""

COMMANDS = {
    "train": "train a GPT on text files",
    "finetune": "fine-tune a model on instructions, with LoRA or on all weights",
    "dpo": "train a model to prefer chosen answers to rejected ones (DPO)",
    "classify": "train a text classifier, or classify texts with it",
    "generate": "continue a prompt with a trained model",
    "chat": "chat with a model in the terminal",
    "serve": "serve models over HTTP with OpenAI's API, and a page for the browser",
    "evaluate": "measure loss, perplexity and bits per byte on a text",
    "download": "download a released GPT-2",
    "pack": "store the weights in the form that generation reads, so that it starts faster",
    "prepare": "tokenize text files once, for training on large data sets",
    "export": "write a model for llama.cpp (GGUF) or ONNX runtimes",
    "runs": "list training runs, or compare two of them",
    "sweep": "train with several settings and seeds, and compare the losses",
    "info": "show the size and cost of a model, checkpoint or recipe",
    "doctor": "check this machine and estimate how long each recipe takes on it",
    "bench": "measure how fast this machine generates text",
    "plot": "plot loss curves, attention, the logit lens, sampling and more",
    "explain": "write an HTML page that shows how a model reads a text",
    "check": "test solutions of the exercises, and explain the first difference",
}

_WITH_RANKS = ("train", "finetune", "dpo", "classify", "evaluate", "doctor")
"""The commands whose work several ranks share. Under torchrun, rank 0 alone runs the other commands."""

_SYNONYMS = {
    "train": "pretrain fit",
    "finetune": "tune sft lora ft",
    "dpo": "preference preferences align rlhf ipo orpo",
    "classify": "classifier classification label sentiment cls",
    "generate": "sample gen complete predict run inference",
    "chat": "talk ask",
    "serve": "server api http openai web playground deploy",
    "evaluate": "eval perplexity test",
    "download": "pull get fetch",
    "pack": "quantize quantise quant cache optimize",
    "prepare": "tokenize preprocess encode",
    "export": "convert gguf onnx save ollama llama.cpp",
    "runs": "ls list history experiments compare diff",
    "sweep": "grid search hyperparameters tune_hyperparameters ablation",
    "info": "show describe inspect summary size",
    "doctor": "env diagnose",
    "bench": "benchmark speed",
    "plot": "draw figure graph",
    "explain": "visualize trace",
    "check": "exercise exercises grade mark solutions learn autograde",
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

    The status is 0 for success, 2 for an error that the user can correct, 130 after Ctrl-C and 143 after SIGTERM. `mygpt check`
    returns 1 if a solution is wrong or missing. If the program that reads our output has ended, such as `head`, the status
    is 141, as after SIGPIPE. After SIGHUP it is 129. An error is printed as one line on stderr, unless the environment
    variable MYGPT_DEBUG is set. Then the exception is raised instead.
    """
    status = 0
    try:
        try:
            status = _main(arguments)
        finally:  # also after --help, which raises SystemExit
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:  # before or after the command itself
        _report("", "interrupted", begins_line=True)
        status = 128 + SIGINT
    except BrokenPipeError:
        _discard_output()
        status = status or 128 + SIGPIPE
    except OSError as error:  # stdout is a file on a full disk
        _discard_output()
        if status == 0:
            from MyGPT.messages import error_message

            _report("", f"the output could not be written: {error_message(error)}")
        status = status or 2
    return status


def _main(arguments: Sequence[str] | None) -> int:
    """Run a command as `main` does. Output that is still buffered at the end is left to the caller."""
    from MyGPT.messages import safe_streams

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with safe_streams(), contextlib.ExitStack() as streams:
        if _rank():
            nowhere = streams.enter_context(open(os.devnull, "w"))
            streams.enter_context(contextlib.redirect_stdout(nowhere))
            streams.enter_context(contextlib.redirect_stderr(nowhere))
        return _run(arguments)


def _rank() -> int:
    """Return the number of this process among those that torchrun has started, from 0, and 0 without torchrun."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if _n_ranks() > 1 and rank.isdecimal() else 0


def _n_ranks() -> int:
    """Return the number of processes that torchrun has started together with this one, which is 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def _run(arguments: list[str]) -> int:
    """Run a command, and return its exit status. See `main`."""
    from MyGPT.messages import did_you_mean, error_message, plain_warnings

    name = arguments[0] if arguments else "--help"
    try:
        if name in ("-h", "--help"):
            print(_overview())
        elif name == "--version":
            from MyGPT import __version__

            print(f"mygpt {__version__}")
        elif name in COMMANDS:
            with plain_warnings():
                return run_command(name, arguments[1:])
        else:
            hint = did_you_mean(name, COMMANDS, _SYNONYMS) or f"; the commands are {', '.join(COMMANDS)}"
            raise ValueError(f"unknown command {name!r}{hint}")
    except KeyboardInterrupt as interrupt:
        _report(name, str(interrupt) or "interrupted", begins_line=True)
        return 128 + getattr(interrupt, "signal_number", SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        message = error_message(error) if isinstance(error, (ValueError, OSError, FloatingPointError)) else ""
        if isinstance(error, (MemoryError, RuntimeError)) or getattr(error, "errno", None) == errno.ENOMEM:
            from MyGPT.commands._memory import memory_advice

            message = memory_advice(name, error) or ""
        own = sys.modules.get("MyGPT.parts")
        if own is not None and not (message and isinstance(error, (MemoryError, RuntimeError, own.PartsError))):
            message = own.describe_error(error) or message
        if os.environ.get("MYGPT_DEBUG") or not message:  # any other error is a mistake in the program
            raise
        _report(name, message)
        return 2
    return 0


def _report(command: str, message: str, begins_line: bool = False) -> None:
    """Print a message of a command as one line on stderr, unless the terminal or the reader of stderr is gone.

    With begins_line=True, the line is preceded by a line end on a terminal, which has printed ^C, perhaps after a part of
    a line.
    """
    from MyGPT.messages import printable

    if _n_ranks() > 1:
        from MyGPT.ranks import is_first_to_say

        if not is_first_to_say(message):
            return
        message = f"rank {_rank()}: {message}" if _rank() else message
    program = f"mygpt {command}" if command in COMMANDS else "mygpt"
    stream = sys.__stderr__ if _rank() else sys.stderr
    start = "\n" if begins_line and stream is not None and stream.isatty() else ""
    try:
        print(f"{start}{program}: {printable(message, keep='')}", file=stream, flush=True)
    except OSError:
        _discard_output()


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Parse the arguments of the command `name`, such as "train", call the command's function, and return the exit status.

    If the first argument is a key of `KINDS` in the command's module, such as "attention" for "plot", the function stored
    under that key is called instead.
    """
    from MyGPT.commands._options import call, join_repeated, make_parser, texts_first, underscored

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
    expand = getattr(module, "EXPAND", None)
    given = join_repeated(texts_first(arguments, parser), parser)
    options = parser.parse_args(expand(given, name) if expand else given)
    if options.get("nproc", 1) > 1 and "WORLD_SIZE" not in os.environ:
        from MyGPT.commands._ranks import launch

        return launch([name, *arguments], options.nproc, options.get("max_restarts", 0))
    status = 0
    with contextlib.ExitStack() as contexts:
        if _n_ranks() > 1:
            from MyGPT.ranks import naming_missing_ranks

            contexts.enter_context(naming_missing_ranks())
        if name in _WITH_RANKS or not _rank():
            status = call(command, options) or 0
    if "MyGPT.ranks" in sys.modules:
        sys.modules["MyGPT.ranks"].leave()
    return status


def _discard_output() -> None:
    """Send the rest of stdout, and of stderr if it is broken too, to nowhere.

    Without this, Python would print an error and change the exit status when it flushes the streams at its end.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # ValueError: no file, or a closed one
            try:
                stream.flush()
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _refuse_misspelt_kind(command: str, argument: str, kinds: Iterable[str]) -> None:
    """Raise ValueError if the first argument of a command is not a path, but resembles the name of one of its kinds."""
    from MyGPT.messages import did_you_mean

    hint = did_you_mean(argument, kinds, _KIND_SYNONYMS, prefix=f"mygpt {command} ")
    if hint and not argument.startswith("-") and not os.path.exists(argument):
        raise ValueError(f"there is no run {argument!r}{hint}")


def _overview() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"usage: mygpt COMMAND [options]\n\n{lines}\n\nmygpt COMMAND --help describes a command and its options."
