"""mygpt prepare"""

from __future__ import annotations

import os


def prepare(
    *files: str,
    out: str,
    tokenizer: str = "gpt2",
    tokenizer_size: int = 1024,
    text_key: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn text files into a memory-mapped token file, for texts too long to tokenize anew for every run.

    The directory gets tokens.bin, tokens.json (counts, SHA-256) and the tokenizer; mygpt train --data takes it.
    Example: mygpt prepare 'texts/*.txt' more.jsonl.gz --out data/mine --tokenizer gpt2

    Args:
        files: text files, .jsonl files with a text a line, either also as .gz, patterns, names of built-in texts
        out: the directory to write
        tokenizer: gpt2, chars, words, bpe (the last three learned from the text), or a directory with a tokenizer
        tokenizer_size: number of tokens that bpe learns
        text_key: key of the text in a .jsonl record
        workers: processes; default one a core
        overwrite: replace the data set that is in the directory
    """
    from MyGPT.data.prepare import prepare as prepare_files
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.tokenizers import make_tokenizer

    paths = find_files(files)
    coder = make_tokenizer(tokenizer, read_documents(paths, text_key), tokenizer_size)
    if workers is None:
        workers = os.cpu_count() or 1
    described = prepare_files(paths, out, coder, text_key, workers, overwrite)
    print(
        f"{described['n_documents']:,} documents, {described['n_characters']:,} characters, "
        f"{described['n_tokens']:,} tokens ({described['dtype']}) in {out}"
    )
