"""Text for people: safe to print on a terminal, errors in one line, suggestions for misspelt names, quoted paths.

Names in files, texts of models and values of options may come from strangers. A terminal obeys the control characters in
them: it moves the cursor, changes its title, or hides text. `printable` replaces such characters by escapes.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

MAX_QUOTED = 200
"""The number of characters of a quoted value that an error message shows."""
MAX_MESSAGE = 2000
"""The number of characters of an error message that are shown."""

# C0 and C1 control characters, the marks and overrides of the writing direction, line separators, and lone surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
_CURSOR_UP = "\x1b[A"
_QUOTED = re.compile(rf"(?<!\w)(['\"])((?:\\.|(?!\1)[^\\]){{{MAX_QUOTED}}})(?:\\.|(?!\1)[^\\])+\1(?!\w)", re.DOTALL)

OPTION_SYNONYMS = {
    "model": "model_name model_name_or_path model_path checkpoint ckpt ckpt_path init_from pretrained load",
    "data": "dataset data_path data_dir train_file train_data input input_file file corpus",
    "prompt": "start text input_text question",
    "text": "prompt",
    "out": "out_dir output output_dir output_file save_dir save_path run_dir o",
    "tokenizer": "tokenizer_name encoding tok",
    "tokenizer_size": "vocab_size vocab n_vocab",
    "val_fraction": "val_split validation_split val_size test_size",
    "max_steps": "max_iters iters iterations steps num_steps train_steps n_steps epochs epoch num_train_epochs",
    "epochs": "epoch num_epochs n_epochs num_train_epochs max_steps max_iters steps",
    "batch_size": "batch bs batchsize per_device_train_batch_size train_batch_size",
    "micro_batch_size": "gradient_accumulation_steps grad_accum micro_batch accumulation_steps",
    "learning_rate": "lr eta max_lr step_size",
    "min_learning_rate": "min_lr",
    "muon_learning_rate": "muon_lr",
    "warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio",
    "schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type decay_lr",
    "weight_decay": "wd",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "grad_clip": "max_grad_norm clip clip_grad grad_norm gradient_clip_val",
    "optimizer": "optim",
    "context_length": "ctx n_ctx context block_size seq_len seq_length max_seq_len max_seq_length n_positions window",
    "emb_dim": "n_embd n_embed d_model hidden_size embed_dim embedding_dim embedding_size dim width",
    "n_heads": "n_head num_heads heads num_attention_heads",
    "n_layers": "n_layer num_layers layers num_hidden_layers depth",
    "drop_rate": "dropout drop dropout_rate attn_pdrop embd_pdrop resid_pdrop",
    "qkv_bias": "bias attn_bias",
    "tie_weights": "tie_word_embeddings tied weight_tying",
    "layer_norm_eps": "layer_norm_epsilon eps",
    "init_std": "initializer_range",
    "activation": "activation_function act hidden_act",
    "vocab_size": "n_vocab vocab",
    "eval_every": "eval_interval eval_steps eval_freq",
    "eval_windows": "eval_iters eval_iter",
    "sample_every": "sample_interval",
    "log_every": "log_interval logging_steps",
    "checkpoint_every": "save_every save_steps save_interval checkpoint_interval",
    "keep_last": "save_total_limit",
    "early_stop": "patience early_stopping",
    "resume": "resume_from resume_from_checkpoint continue",
    "overwrite": "force overwrite_output_dir f",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing",
    "device": "gpu cuda",
    "precision": "dtype quantize quantization torch_dtype",
    "frozen_dtype": "dtype",
    "seed": "random_seed manual_seed",
    "max_new_tokens": "max_tokens max_length n_tokens num_tokens tokens length n_predict max_new",
    "n_samples": "num_samples num_return_sequences n samples",
    "temperature": "temp t",
    "top_k": "topk k",
    "top_p": "topp p nucleus",
    "repetition_penalty": "rep_penalty repeat_penalty rep_pen",
    "stop": "stop_sequence stop_sequences stop_strings stop_token eos",
    "system": "system_prompt sys",
    "template": "prompt_template chat_template format",
    "max_length": "max_seq_length max_seq_len block_size context_length",
    "lora.r": "r rank lora_r lora_rank",
    "lora.alpha": "alpha lora_alpha",
    "lora.dropout": "dropout lora_dropout drop_rate",
    "lora.targets": "target_modules targets lora_target_modules",
    "lora.dora": "dora use_dora",
    "lora.rslora": "rslora use_rslora",
    "workers": "num_workers num_proc n_workers jobs j",
    "text_key": "key text_field text_column",
    "size": "model_size",
    "host": "address bind ip listen",
    "port": "p",
    "api_key": "key token auth password",
    "slots": "n_parallel parallel np max_num_seqs max_batch_size batch_size",
    "request_timeout": "timeout",
    "allowed_hosts": "allow_hosts trusted_hosts",
    "cors_origins": "cors allowed_origins allow_origins",
    "threads": "n_threads num_threads",
    "rounds": "repeats n_rounds",
}
"""For each option, the names of similar options in other programs, such as nanoGPT and transformers."""
MODEL_SYNONYMS = {
    "gpt2": "gpt small gpt2-small gpt2-124m 117M",
    "gpt2-medium": "medium gpt2-355m 345M",
    "gpt2-large": "large gpt2-774m 762M",
    "gpt2-xl": "xl gpt2-1558m 1.5B gpt2-1.5b 1542M",
}
"""For each released model, other names that are in use."""


class FileWarning(UserWarning):
    """A warning about a file that can be used, although its contents do not agree with each other.

    A command of `mygpt` prints such a warning as one plain line on stderr. In Python, the module `warnings` shows it.
    """


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each different FileWarning once, as a line on stderr, during the `with` block. Python shows other warnings."""
    with warnings.catch_warnings():
        show, printed = warnings.showwarning, set[str]()

        def print_note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, FileWarning):
                if str(message) not in printed:
                    print(f"note: {printable(' '.join(str(message).split()), keep='')}", file=sys.stderr)
                printed.add(str(message))
            else:
                show(message, category, *place, **more)

        warnings.simplefilter("default", FileWarning)
        warnings.showwarning = print_note
        yield


def printable(text: str, keep: str = "\n\t") -> str:
    """Return `text` with control characters, except those in `keep`, replaced by escapes such as \\x1b.

    Control characters are those of ASCII (0 to 31, 127), those from 128 to 159, line separators, marks that change the
    writing direction, and lone surrogates.
    """
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def error_message(error: BaseException) -> str:
    """Return the message of an exception as one printable line, in which long quoted values are shortened.

    The message of an OSError becomes "the path: the reason".
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror and text.startswith("[Errno"):
        paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes))]
        text = ": ".join([" -> ".join(paths), error.strerror] if paths else [error.strerror])
    text = _QUOTED.sub(r"\1\2…\1", " ".join(text.split()))
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"
    return printable(text, keep="")


def did_you_mean(name: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None, prefix: str = "") -> str:
    """Return "; did you mean X?" with the known name, or the few known names, most similar to `name`.

    The result is an empty string if no known name is similar. `synonyms` maps known names to other names for the same
    thing, separated by spaces. `prefix`, such as "--", is written before each suggestion.
    """
    near = [prefix + one for one in _nearest(name, list(known), synonyms or {})]
    return f"; did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}?" if near else ""


def near_path(path: str | os.PathLike[str]) -> str:
    """Return did_you_mean's suggestion of a file or directory beside `path`, or an empty string if `path` exists."""
    if os.path.lexists(path):
        return ""
    parent, name = os.path.split(os.path.normpath(path))
    try:
        names = [entry for entry in os.listdir(parent or os.curdir) if not entry.startswith(".")]
    except (OSError, ValueError):  # the parent does not exist either
        return ""
    return did_you_mean(name, names, prefix=os.path.join(parent, ""))


def quote(argument: str | os.PathLike[str]) -> str:
    """Return an argument, such as a path, quoted for the shell, so that a command that contains it can be copied.

    A path that starts with a hyphen is written as ./-path, because a command would read it as an option.
    """
    text = os.fspath(argument)
    text = f".{os.sep}{text}" if text.startswith("-") else text
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Make sys.stdout and sys.stderr accept every text, and escape control characters if they are terminals.

    A character that the encoding of stdout lacks is printed as a question mark, and on stderr as an escape. If a stream is
    not a terminal, control characters are written unchanged.
    """
    with ExitStack() as redirected:
        for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        if sys.stdout is not None and sys.stdout.isatty():
            redirected.enter_context(redirect_stdout(cast(TextIO, _EscapingStream(sys.stdout, keep_bars=False))))
        if sys.stderr is not None and sys.stderr.isatty():
            redirected.enter_context(redirect_stderr(cast(TextIO, _EscapingStream(sys.stderr, keep_bars=True))))
        yield


def print_styled(text: str) -> None:
    """Print a text with colours to stdout. Its control characters are not escaped, so `text` must be safe."""
    print(text, file=getattr(sys.stdout, "unescaped", sys.stdout))


def read_standard_input() -> str:
    """Return the whole text of sys.stdin, with \\n line ends.

    The text is decoded as UTF-8, like every file that MyGPT reads. If it is not UTF-8, the encoding of the terminal is used.
    Raises ValueError if the text has neither encoding.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # a program has replaced sys.stdin by a stream of text
        return sys.stdin.read()
    data = buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            text = data.decode(sys.stdin.encoding)
        except (UnicodeDecodeError, LookupError):
            where = f"byte {error.start} is 0x{data[error.start]:02x}"
            raise ValueError(f"standard input is not UTF-8 text: {where}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _EscapingStream:
    """A text stream that writes `printable` text to another stream, `unescaped`, and otherwise behaves like this stream.

    With keep_bars=True, carriage returns and the cursor movements between progress bars stay unchanged.
    """

    def __init__(self, unescaped: Any, keep_bars: bool) -> None:
        self.unescaped, self._keep_bars = unescaped, keep_bars

    def write(self, text: str) -> int:
        if not self._keep_bars:
            self.unescaped.write(printable(text))
        elif text.replace(_CURSOR_UP, "").strip():
            self.unescaped.write(printable(text, keep="\n\t\r"))
        else:
            self.unescaped.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name).lower()


def _nearest(name: str, known: list[str], synonyms: Mapping[str, str]) -> list[str]:
    """Return the names in `known` that are most similar to `name`: usually one, at most three, or none."""
    asked = _plain(name)
    spellings: dict[str, list[str]] = {}  # the known names that each spelling may mean
    for one in known:
        spellings.setdefault(_plain(one), []).insert(0, one)
        for synonym in synonyms.get(one, "").split():
            spellings.setdefault(_plain(synonym), []).append(one)
    if asked in spellings:
        return spellings[asked][:1]
    begun = [one for one in known if len(asked) > 1 and _plain(one).startswith(asked)]
    if 0 < len(begun) <= 3:
        return begun
    cutoff = 0.65 if len(asked) <= 4 else 0.7  # exchanging two of three letters gives 0.67
    if similar := difflib.get_close_matches(asked, spellings, 1, cutoff):
        return spellings[similar[0]][:1]
    contained = [one for one in known if len(asked) > 2 and asked in _plain(one)]
    return contained if len(contained) <= 3 else []
