"""Compare encoding: MyGPT, tiktoken and Hugging Face's tokenizers, and files on all cores.

    python benchmarks/encoding.py --text FILE [--repeat 20] [--rounds 5] [--tokenizer gpt2] [--out DIR]

MyGPT uses gigatoken if it is installed and the text has at least two million characters; MYGPT_GIGATOKEN=0 switches it off.
The first round, in which gigatoken fills its cache, is counted like the others, but loading gigatoken is not.

The programs run in turn, each on one thread. All programs must give the same ids. `mygpt prepare` is measured with one
process and with one process per core. Its time includes the start of the workers and the writing of the tokenizer's
files, but not the imports.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from measurements import Results, parse, rounds
from tables import show

import tokenizers
from MyGPT import get_tokenizer
from MyGPT.data.prepare import prepare
from MyGPT.data.sources import find_files
from MyGPT.data.tokens import open_tokens
from MyGPT.tokenizers.bpe import GPT2_PATTERN
from MyGPT.tokenizers.codec import gigatoken_version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--repeat", type=int, default=1, help="how many times the text is used in a row")
    parser.add_argument(
        "--tokenizer", default="gpt2", help="gpt2, or the directory of a byte-level BPE trained by MyGPT"
    )
    options = parse(parser, rounds=5)
    text = Path(find_files(options.text)[0]).read_text(encoding="utf-8") * options.repeat
    ours = get_tokenizer(options.tokenizer)
    ours.encode("a " * 1_100_000)  # loads gigatoken
    ranks = {ours.decode_tokens_bytes([id_])[0]: id_ for id_ in range(ours.n_vocab - 1)}
    tiktokens = tiktoken.Encoding("peer", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "text.txt").write_text(text, encoding="utf-8")
        ours.save(place)
        theirs = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
        n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

        def file_to_file(workers: int) -> Any:
            prepare([place / "text.txt"], place / "ids", ours, workers=workers, overwrite=True, progress=False)
            return open_tokens(place / "ids")[0][:-1]  # without the end-of-text token

        programs: dict[str, Callable[[], Any]] = {
            "MyGPT": lambda: ours.encode(text),
            "MyGPT, encode_to_array": lambda: ours.encode_to_array([text], [False]),
            "tiktoken": lambda: tiktokens.encode_ordinary(text),
            "tokenizers": lambda: theirs.encode(text).ids,
        }
        for workers in sorted({1, n_cores}):
            name = f"MyGPT, file to file, {workers} process{'es' if workers > 1 else ''}"
            programs[name] = partial(file_to_file, workers)
        expected = np.array(programs["tiktoken"]())
        megabytes = len(text.encode()) / 1e6
        settings = {"megabytes": megabytes, "tokens": len(expected), "gigatoken": gigatoken_version() or "not used"}
        results = Results("encoding", settings, ["tiktoken", "tokenizers", "gigatoken"])
        for other in ("tiktoken", "tokenizers"):
            results.compare("MyGPT", other, "encoding")
        for _ in rounds(options):
            for name, encode in programs.items():
                start = time.perf_counter()
                ids = encode()
                results.add(name, "encoding", "MB/s", megabytes / (time.perf_counter() - start))
                if not np.array_equal(np.asarray(ids), expected):
                    raise SystemExit(f"{name} gives different ids")
            results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
