"""The help pages: the headings, the options under each heading, and the description of each option.

`--help` shows the options that the command's module lists in `COMMON`; `--help-all` shows all options.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter

GROUPS = {
    "Kind of page": "live replay features",
    "Model": "model adapter with context_length emb_dim n_heads n_layers drop_rate qkv_bias tie_weights layer_norm_eps init_std "
    "activation init",
    "LoRA": "full merge frozen_dtype train_only lora lora.r lora.alpha lora.dropout lora.targets lora.dora lora.rslora",
    "Data": "data val_data test_data text file text_column label_column tokenizer tokenizer_size val_fraction max_length rows "
    "balance train_fraction test_fraction split_seed",
    "Sparse autoencoder": "layer n_features k",
    "Prompt": "prompt template mask_prompt system memory slide",
    "Training": "max_steps epochs beta label_smoothing batch_size micro_batch_size order early_stop max_skipped_steps",
    "Optimizer": "optimizer learning_rate min_learning_rate warmup_steps schedule decay_fraction weight_decay grad_clip beta1 "
    "beta2 muon_learning_rate muon_momentum",
    "Evaluation and samples": "eval_every eval_windows sample_every sample_tokens sample_temperature sample_prompt "
    "sample_to_end",
    "Sampling": "max_new_tokens n_samples stop temperature top_k top_p min_p repetition_penalty",
    "Server": "host port api_key slots max_queue request_timeout drain_timeout allowed_hosts cors_origins log_prompts",
    "Output": "out overwrite resume allow_changed log_every log_to tensorboard checkpoint_every checkpoint_minutes keep_last "
    "keep_best keep_every",
    "Execution": "device nproc parallel shard_size max_restarts timeout_minutes precision compile gradient_checkpointing "
    "lookup seed deterministic",
    "Configuration": "config print_config help help_all",
}
"""The headings of a long help page, and the options under each heading, in the order in which they are shown."""

SHARED_HELP = {
    "model": "A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.",
    "adapter": "The directory of a LoRA adapter, or a run of mygpt finetune.",
    "with": "Python file with custom parts of the model, which is run; a model that was trained with --with needs it.",
    "device": "Where to compute: auto, cpu, cuda or mps.",
    "precision": "Precision of the weights: auto keeps the stored one; bf16, int8 and int4 are each faster and less exact.",
    "lookup": "Guess tokens from earlier repetitions in the text. Faster on repetitive text, with the same result.",
    "seed": "Seed that makes the generated text repeatable.",
    "tokenizer_size": "Number of tokens that bpe learns.",
    "out": "The picture to write: a .png, .svg or .pdf file.",
}
"""The descriptions of options that several commands share, by the option's name."""

MAX_UNGROUPED = 10
"""A help page with at most this many options has the single heading "Options". A longer one has the headings in GROUPS."""


class HelpFormatter(DefaultHelpFormatter):
    """A formatter that describes options briefly: `--max_steps INT  Number of optimizer steps. (default: 2000)`."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **options})

    def format_help(self) -> str:
        """Return the help page. Non-breaking spaces, which keep "(default: 8)" on one line, are replaced by plain spaces."""
        return super().format_help().replace("\u00a0", " ")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Return the description with paragraphs broken into lines of `width` characters. Examples stay unchanged."""
        fill = super()._fill_text
        return "\n\n".join(p if p.startswith("Example") else fill(p, width, indent) for p in text.split("\n\n"))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]  # --data+ appends to a list
        return f"{', '.join(names)} {value_name(action)}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        """Return the option's description, followed by its default value unless that is null, false or empty."""
        text, default = action.help or "", action.default
        if action.required:
            return f"{text} (required)" if action.option_strings else text
        if default is None or default is False or default in (argparse.SUPPRESS, ""):
            return text
        plain = f"[{', '.join(default)}]" if isinstance(default, list) else str(default).replace("True", "true")
        return f"{text} (default:\u00a0{plain})"


class HelpAllAction(argparse._HelpAction):
    """The action of the option --help-all, which prints the descriptions of all options and exits."""

    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        show_options(parser)
        parser.print_help()
        parser.exit()


def show_options(parser: ArgumentParser, common: Sequence[str] = ()) -> None:
    """Make the parser's help page show the options named in `common`, or all options if `common` is empty."""
    actions = {action.dest: action for action in parser._actions}
    configuration = GROUPS["Configuration"].split()
    own = [name for name in actions if name not in configuration]
    own.sort(key=lambda name: not actions[name].required)  # required options come first
    groups = {title: names.split() for title, names in GROUPS.items()}
    if common:
        groups = {"Most used options": list(common), "Configuration": configuration}
    elif len(own) <= MAX_UNGROUPED:
        groups = {"Options": own, "Configuration": configuration}
    else:
        listed = {name for names in groups.values() for name in names}
        groups["Other"] = [name for name in own if name not in listed]
    parser.epilog = f"{parser.prog} --help-all shows all {len(own)} options." if common else None
    parser._action_groups = []
    for title, names in groups.items():
        parser.add_argument_group(title)._group_actions = [actions[name] for name in names if name in actions]


def value_name(action: argparse.Action) -> str:
    """Return the placeholder for an option's value on a help page: INT, FLOAT, the choices, or a word of the option's name."""
    if action.nargs == 0 or action.dest == "print_config":
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    kind: Any = getattr(action, "_typehint", None)
    kind = kind if typing.get_origin(kind) is Literal else next(iter(typing.get_args(kind)), kind)
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    if kind is bool:
        return "" if action.default is False else "{true,false}"
    name = {int: "INT", float: "FLOAT"}.get(kind) or action.dest.replace("_", ".").rpartition(".")[2].upper()
    return name if action.option_strings else f"{name}..."
