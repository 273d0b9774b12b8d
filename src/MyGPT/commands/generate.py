"""`mygpt generate`: continue a prompt."""

from __future__ import annotations

import sys

from MyGPT.config import Precision
from MyGPT.sampling import SamplingConfig

DEFAULTS = {"temperature": 0.8, "top_k": 50}
COMMON = (
    *("model", "adapter", "prompt", "max_new_tokens", "n_samples", "stop", "temperature", "top_k", "top_p"),
    *("device", "precision", "seed"),
)


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
    """Continue a prompt with a trained model, and print the text as it is generated.

    Examples:
        mygpt generate --model runs/book --prompt "The wizard" --temperature 0.7
        mygpt generate --model gpt2 --prompt - < prompt.txt

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.
        adapter: The directory of a LoRA adapter, or a run of mygpt finetune.
        prompt: The text to continue; - reads it from standard input. Without it, the model starts from <|endoftext|>, or
            from the first token of its vocabulary.
        max_new_tokens: Maximum number of tokens to generate.
        n_samples: Number of texts to generate.
        stop: Texts that end the generation, as '["first", "second"]'.
        slide: Allow a prompt longer than the model's context; the model sees only its end.
        seed: Seed that makes the text repeatable.
        device: Where to compute: auto, cpu, cuda or mps.
        precision: Precision of the weights: auto keeps the stored one; bf16 and int8 are faster and less exact.
        lookup: Guess tokens from earlier repetitions in the text. Faster on repetitive text, with the same result.
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
        raise ValueError("the prompt is empty; it must have at least one token")
    context = gpt.config.context_length
    if len(ids) > context and not slide:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but the model's context is {context}: shorten the prompt, or use --slide "
            f"to show the model only the last {context} tokens"
        )
    fast = make_fast(gpt, precision, lookup, build)
    del gpt  # on a CPU, `fast` has its own copy of the weights
    for i in range(n_samples):
        if i:
            print("\n---")
        print(text, end="", flush=True)
        for piece in stream_text(
            fast, tokenizer, ids, max_new_tokens, sampling, stop or (), None if seed is None else seed + i
        ):
            print(piece, end="", flush=True)
        print()
