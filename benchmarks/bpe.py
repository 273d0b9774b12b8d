"""Compare byte-level BPE training: MyGPT's trainer in Python, rustbpe and Hugging Face's tokenizers, both in Rust.

Usage: python benchmarks/bpe.py [--text FILE] [--vocab_size 1024] [--repeat 1] [--rounds 5] [--naive] [--out DIR]

The programs run in turn. The script writes bpe.json to --out, or bpe_x20.json for a text that is repeated 20 times.
--repeat feeds the text several times in a row, as an iterator. --naive also times the textbook algorithm, which recounts
every pair of the whole text for each merge, and checks that both learn the same merges. It runs once, with 512 tokens,
and takes some minutes for 1 MB.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, repeat
from pathlib import Path

import regex
import rustbpe
from measurements import Results, parse, rounds
from tables import show

import tokenizers
from MyGPT import BPETokenizer
from MyGPT.data.sources import find_files
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
    parser.add_argument(
        "--naive", action="store_true", help=f"also time the textbook algorithm, with {NAIVE_SIZE} tokens"
    )
    options = parse(parser, rounds=5)
    text = Path(find_files(options.text)[0]).read_text(encoding="utf-8")
    megabytes = len(text.encode()) / 1e6
    settings = {"megabytes": options.repeat * megabytes, "vocab_size": options.vocab_size}
    name = "bpe" if options.repeat == 1 else f"bpe_x{options.repeat}"
    results = Results(name, settings, ["rustbpe", "tokenizers"])
    for other in ("rustbpe", "tokenizers"):
        results.compare("MyGPT", other, "learning")
    for _ in rounds(options):
        for program, train in PROGRAMS.items():
            start = time.perf_counter()
            size = train(text, options.repeat, options.vocab_size)
            results.add(program, "learning", "s", time.perf_counter() - start)
            if size != options.vocab_size:
                raise SystemExit(f"{program} learned {size} tokens, not {options.vocab_size}")
        results.save(options.out)
    if options.naive:
        for program, once in compare_naive(text).items():
            results.add(program, f"learning {NAIVE_SIZE} tokens from {megabytes:.1f} MB", "s", once)
        results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
