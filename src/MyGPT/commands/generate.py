"""`mygpt generate`: continue a prompt."""

from __future__ import annotations

import contextlib

from MyGPT.commands._model import check_generation, make_fast, report_tokenizer, start_build
from MyGPT.config import Precision, require_positive
from MyGPT.files import reading
from MyGPT.generation import stream_text
from MyGPT.messages import read_standard_input
from MyGPT.opening import open_lazily
from MyGPT.sampling import SamplingConfig
from MyGPT.serving import Engine

DEFAULTS = {"temperature": 0.8, "top_k": 50}
COMMON = "model adapter prompt max_new_tokens n_samples stop temperature top_k top_p device precision seed".split()

MAX_SLOTS = 16
"""Largest number of texts that are generated at the same time."""


def generate(
    model: str,
    sampling: SamplingConfig,
    adapter: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 200,
    n_samples: int = 1,
    stop: str | list[str] | None = None,
    slide: bool = False,
    seed: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    lookup: bool = False,
    with_: str | None = None,
) -> None:
    """Continue a prompt with a trained model, and print the text as it is generated.

    Examples:
        mygpt generate --model runs/book --prompt "The wizard" --temperature 0.7
        mygpt generate --model gpt2 --prompt - < prompt.txt

    Args:
        prompt: The text to continue; - reads it from standard input. Default: start from the model's beginning-of-text
            token, <|endoftext|> in GPT-2, or from the first token of a vocabulary that has no such token.
        max_new_tokens: Maximum number of tokens to generate.
        n_samples: Number of texts to generate.
        stop: Text at which the generation stops. Repeat the option for several texts.
        slide: Allow a prompt longer than the model's context; the model sees only its end.
    """
    require_positive(n_samples=n_samples)
    stop = [stop] if isinstance(stop, str) else stop
    check_generation(max_new_tokens, seed, stop)
    text = read_standard_input() if prompt == "-" else prompt or ""
    if prompt is not None and not text:
        raise ValueError("the prompt is empty; it must have at least one token")
    build = start_build(device, precision) if with_ is None else None  # custom parts do not use the kernel
    with reading(model):
        opened, config, tokenizer = open_lazily(model, device, adapter, with_)
        report_tokenizer(tokenizer)
        ids = [tokenizer.bos_token or 0] if prompt is None else tokenizer.encode(text)
        if not ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        context = config.context_length
        if len(ids) > context and not slide:
            way_out = f"shorten the prompt, or use --slide to show the model only the last {context} tokens"
            raise ValueError(f"the prompt has {len(ids)} tokens, but the model's context is {context}: {way_out}")
        fast = make_fast(opened, precision, lookup, build)
    del opened  # on a CPU, `fast` has its own copy of the weights
    seeds = [None if seed is None else seed + i for i in range(n_samples)]
    with contextlib.ExitStack() as stack:
        if n_samples == 1 or lookup:  # lookup guesses the tokens of one text
            texts = [stream_text(fast, tokenizer, ids, max_new_tokens, sampling, stop or (), one) for one in seeds]
        else:
            engine = stack.enter_context(Engine(fast, tokenizer, slots=min(n_samples, MAX_SLOTS), max_queue=n_samples))
            texts = [engine.stream_text(ids, max_new_tokens, sampling, stop or (), one, slide=True) for one in seeds]
        for i, pieces in enumerate(texts):
            print("\n---\n" if i else "", text, sep="", end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
