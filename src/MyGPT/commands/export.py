"""`mygpt export`: write a model in a format of other programs."""

from __future__ import annotations

import os
import sys
from typing import Literal


def export(
    *model: str,
    format: Literal["gguf", "onnx"],
    out: str,
    adapter: str | None = None,
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32",
    without_tokenizer: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model for llama.cpp and Ollama (GGUF), or for ONNX runtimes.

    The file is read again and compared with the model before the command reports success. An adapter is merged into its
    model. transformers needs no export: it opens the directory of a model.

    Examples:
        mygpt export runs/book --format gguf --out book.gguf
        mygpt export gpt2 --format gguf --dtype q8_0 --out gpt2.gguf

    Args:
        model: Name or path of the model.
        format: File format: gguf is one file with weights and tokenizer, onnx a graph with a KV cache.
        out: File to write.
        dtype: Type of the weights: f32 is exact, f16 and bf16 need half the memory, and q8_0 a quarter. bf16 and q8_0 need
            gguf.
        without_tokenizer: Leave the tokenizer out of a GGUF file, for programs that pass token ids.
        overwrite: Replace an existing file.
    """
    from MyGPT.commands._model import report_tokenizer
    from MyGPT.data.chat_template import chat_template
    from MyGPT.files import check_output_file, reading
    from MyGPT.opening import find_model_files, open_model
    from MyGPT.weights.formats.gguf import write_gguf

    if len(model) != 1:
        raise ValueError(f"mygpt export writes one model, got {len(model)}: {', '.join(model)}")
    if format == "onnx" and dtype not in ("f32", "f16"):
        raise ValueError(f"--dtype {dtype} needs --format gguf; onnx has f32 and f16")
    check_output_file(out)
    if os.path.exists(out) and not overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or give --overwrite true")
    tokenizer = None
    if format == "onnx" or without_tokenizer:
        with reading(model[0]):
            gpt = find_model_files(model[0], adapter).model()
    else:
        gpt, tokenizer = open_model(model[0], "cpu", adapter)
        report_tokenizer(tokenizer)
        template = find_model_files(model[0], adapter).template()
        if template is not None:
            # The Jinja of our own directories uses more than llama.cpp's implementation knows.
            text = chat_template(template, tokenizer, exact=False)
            tokenizer = tokenizer.with_settings({**tokenizer.settings, "chat_template": text})
    notes: list[str] = []
    if format == "onnx" and (dtype == "f32" or dtype == "f16"):
        from MyGPT.ecosystem.onnx import write_onnx

        write_onnx(gpt, out, dtype)
    else:
        notes = write_gguf(gpt, out, tokenizer, dtype)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(out)
