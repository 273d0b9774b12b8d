"""Compare byte-level BPE training: MyGPT's trainer in Python, rustbpe and Hugging Face's tokenizers, both in Rust.

Usage: python benchmarks/bpe.py [--text FILE] [--vocab_size 1024] [--repeat 1] [--rounds 5] [--naive] [--out bpe.json]

The programs run in turn. The table shows the median, the spread and the ratio to MyGPT. --repeat feeds the text several
times in a row, as an iterator. --naive also times the textbook algorithm, which recounts every pair of the whole text
for each merge, and checks that both learn the same merges. It runs once, with 512 tokens, and takes some minutes for 1
MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, repeat
from pathlib import Path

import regex
import rustbpe
from decode import processor

import tokenizers
from MyGPT import BPETokenizer
from MyGPT.data.sources import find_files
from MyGPT.files import atomic_write
from MyGPT.tokenizers.bpe import GPT2_PATTERN

NAIVE_SIZE = 512


def with_mygpt(text: str, times: int, vocab_size: int) -> int:
    return BPETokenizer.train(repeat(text, times), vocab_size, special_tokens=(), progress=False).n_vocab


def with_rustbpe(text: str, times: int, vocab_size: int) -> int:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(repeat(text, times), vocab_size, pattern=GPT2_PATTERN)
    return len(tokenizer.get_mergeable_ranks())


def with_tokenizers(text: str, times: int, vocab_size: int) -> int:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(repeat(text, times), trainer)
    return tokenizer.get_vocab_size()


def naive_merges(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    """Return the merges of the textbook algorithm, which recounts all pairs of the text for each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    chunks = [list(chunk.encode()) for chunk in regex.findall(GPT2_PATTERN, text)]
    merges = []
    while len(tokens) < vocab_size:
        counts = Counter(pair for chunk in chunks for pair in pairwise(chunk))
        first, second = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        chunks = [merged(chunk, first, second, len(tokens)) for chunk in chunks]
        merges.append((tokens[first], tokens[second]))
        tokens.append(tokens[first] + tokens[second])
    return merges


def merged(chunk: list[int], first: int, second: int, new: int) -> list[int]:
    ids, i = [], 0
    while i < len(chunk):
        is_pair = chunk[i] == first and i + 1 < len(chunk) and chunk[i + 1] == second
        ids.append(new if is_pair else chunk[i])
        i += 2 if is_pair else 1
    return ids


def compare_naive(text: str) -> dict[str, float]:
    """Return the seconds that MyGPT and the naive trainer take for one run."""
    start = time.perf_counter()
    ours = BPETokenizer.train(text, NAIVE_SIZE, special_tokens=(), progress=False)
    middle = time.perf_counter()
    theirs = naive_merges(text, NAIVE_SIZE)
    seconds = {"MyGPT": middle - start, "naive": time.perf_counter() - middle}
    if theirs != ours.merges:
        raise SystemExit("the naive trainer learned different merges")
    return seconds


PROGRAMS: dict[str, Callable[[str, int, int], int]] = {
    "MyGPT": with_mygpt,
    "rustbpe": with_rustbpe,
    "tokenizers": with_tokenizers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=1, help="how many times the text is used in a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--naive", action="store_true", help=f"also time the textbook algorithm, with {NAIVE_SIZE} tokens"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the measured seconds")
    options = parser.parse_args()
    text = Path(find_files(options.text)[0]).read_text(encoding="utf-8")
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):
        for name, train in PROGRAMS.items():
            start = time.perf_counter()
            size = train(text, options.repeat, options.vocab_size)
            seconds[name].append(time.perf_counter() - start)
            if size != options.vocab_size:
                raise SystemExit(f"{name} learned {size} tokens, not {options.vocab_size}")
    megabytes = len(text.encode()) / 1e6
    print(f"{options.repeat * megabytes:.1f} MB to {options.vocab_size} tokens, {options.rounds} rounds")
    ours = statistics.median(seconds["MyGPT"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:<12} {median:7.2f} s  ({min(times):.2f} to {max(times):.2f})  MyGPT takes {ours / median:.2f} times that"
        )
    naive = compare_naive(text) if options.naive else {}
    if naive:
        print(f"{megabytes:.1f} MB to {NAIVE_SIZE} tokens, once")
    for name, once in naive.items():
        print(f"{name:<12} {once:7.2f} s  MyGPT takes {naive['MyGPT'] / once:.3f} times that")
    if options.out is not None:
        result = {"processor": processor(), "megabytes": options.repeat * megabytes, "vocab_size": options.vocab_size,
                  "seconds": seconds, "naive_megabytes": megabytes, "naive_vocab_size": NAIVE_SIZE, "naive": naive}  # fmt: skip
        with atomic_write(options.out) as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
