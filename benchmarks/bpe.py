"""Learning byte-level BPE: MyGPT's trainer in Python beside rustbpe and Hugging Face's tokenizers, both in Rust.

Usage: python benchmarks/bpe.py [--text FILE] [--vocab_size 1024] [--repeat 1] [--rounds 5]
The programs take turns; the table shows medians, the spread, and the ratio to MyGPT.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import rustbpe
import tokenizers

from MyGPT import BPETokenizer
from MyGPT.data.sources import find_files
from MyGPT.tokenizers.bpe import GPT2_PATTERN


def with_mygpt(text: str, vocab_size: int) -> int:
    return BPETokenizer.train(text, vocab_size, special_tokens=(), progress=False).n_vocab


def with_rustbpe(text: str, vocab_size: int) -> int:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([text], vocab_size, pattern=GPT2_PATTERN)
    return len(tokenizer.get_mergeable_ranks())


def with_tokenizers(text: str, vocab_size: int) -> int:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.get_vocab_size()


PROGRAMS: dict[str, Callable[[str, int], int]] = {
    "MyGPT": with_mygpt,
    "rustbpe": with_rustbpe,
    "tokenizers": with_tokenizers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=1, help="how many times the text is put behind itself")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    text = Path(find_files(options.text)[0]).read_text(encoding="utf-8") * options.repeat
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):
        for name, train in PROGRAMS.items():
            start = time.perf_counter()
            size = train(text, options.vocab_size)
            seconds[name].append(time.perf_counter() - start)
            if size != options.vocab_size:
                raise SystemExit(f"{name} learned {size} tokens, not {options.vocab_size}")
    print(f"{len(text.encode()) / 1e6:.1f} MB to {options.vocab_size} tokens, {options.rounds} rounds")
    ours = statistics.median(seconds["MyGPT"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:<12} {median:7.2f} s  ({min(times):.2f} to {max(times):.2f})  MyGPT takes {ours / median:.2f} times that"
        )


if __name__ == "__main__":
    main()
