"""mygpt generate"""

from __future__ import annotations

import sys

from MyGPT.config import Precision
from MyGPT.sampling import SamplingConfig

DEFAULTS = {"temperature": 0.8, "top_k": 50}


def generate(
    model: str,
    sampling: SamplingConfig,
    adapter: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 200,
    n_samples: int = 1,
    stop: list[str] | None = None,
    slide: bool = False,
    seed: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    lookup: bool = False,
) -> None:
    """Continue a prompt with a trained model, printing as it goes.

    Example: mygpt generate --model runs/book --prompt "The wizard" --temperature 0.7

    Args:
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        adapter: an adapter's directory, or a run of mygpt finetune
        prompt: the text to continue, - to read it from standard input; without one the model begins on its own, after
            <|endoftext|> or the first token of its vocabulary
        max_new_tokens: most tokens to add
        n_samples: how many continuations
        stop: texts at which to stop, as '["first", "second"]'
        slide: allow a prompt longer than the model's context, of which it sees the end only
        seed: makes the sample repeatable
        device: auto, cpu, cuda or mps
        precision: of the weights; auto is that in which they are stored, bf16 and int8 are faster and less exact
        lookup: guess from what stood after the same words before; faster where a text repeats itself, never another text
    """
    from MyGPT.commands._model import make_fast, start_build

    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    build = start_build(device)
    from MyGPT.generation import stream_text  # after the build has started, because this imports torch
    from MyGPT.opening import open_model

    gpt, tokenizer = open_model(model, device, adapter)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    ids = [tokenizer.eot_token or 0] if prompt is None else tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    context = gpt.config.context_length
    if len(ids) > context and not slide:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the model's context is {context}: shorten it, or let the model see its "
            f"last {context} tokens only with --slide true"
        )
    fast = make_fast(gpt, precision, lookup, build)
    del gpt  # on a processor the fast one has weights of its own
    for i in range(n_samples):
        if i:
            print("\n---")
        print(text, end="", flush=True)
        for piece in stream_text(
            fast, tokenizer, ids, max_new_tokens, sampling, stop or (), None if seed is None else seed + i
        ):
            print(piece, end="", flush=True)
        print()
