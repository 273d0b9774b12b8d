"""Compare the speed of generation with a random GPT-2: MyGPT, transformers, CTranslate2, llama.cpp and OpenVINO.

Usage: python benchmarks/decode.py [--size 124M] [--rounds 5] [--tokens 24] [--directory DIR] [--out DIR]

Each installed program runs in its own process and opens the model once. The programs are measured in turn, so a slow
minute of the machine affects all of them. The time per token is the time of 1 + n tokens minus the time of one token,
which is mostly the prompt. Memory is the peak resident memory minus the memory of the imported libraries. Converted
models are kept in --directory.

llama.cpp needs llama-cpp-python and gguf. OpenVINO needs openvino-genai. Its models are converted once by optimum-cli,
which requires an older transformers than MyGPT does: install optimum-intel[openvino] in another environment, named by
--optimum.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measurements import Results, parse, rounds
from memory import Peak
from tables import show

from MyGPT import GPT2_CONFIGS, GPTModel, get_tokenizer
from MyGPT.commands.bench import Run, open_mygpt, open_transformers, read_bandwidth, seconds_per_token

PROGRAMS = {
    "MyGPT plain": "fp32",
    "MyGPT eager": "fp32",
    "MyGPT fp32": "fp32",
    "MyGPT bf16": "bf16",
    "MyGPT int8": "int8",
    "MyGPT int4": "int4",
    "transformers fp32": "fp32",
    "transformers bf16": "bf16",
    "CTranslate2 fp32": "fp32",
    "CTranslate2 int8": "int8",
    "llama.cpp f32": "fp32",
    "llama.cpp bf16": "bf16",
    "llama.cpp q8_0": "int8",
    "llama.cpp q4_0": "int4",
    "OpenVINO fp32": "fp32",
    "OpenVINO fp16": "bf16",
    "OpenVINO int8": "int8",
}
PACKAGES = ("transformers", "ctranslate2", "llama-cpp-python", "openvino-genai")
PROMPT, LONG = 16, 1024
MEASURES = {"decode 1": "one sequence", "decode 8": "eight sequences", "prefill 1": f"prompt of {LONG:,} tokens"}
"""The measure in the results for each question that a program is asked."""
TARGETS = (
    ("MyGPT fp32", "llama.cpp f32", "one sequence", 1.0),
    ("MyGPT fp32", "transformers fp32", "one sequence", 2.2),
    ("MyGPT bf16", "llama.cpp bf16", "one sequence", 1.0),
    ("MyGPT int8", "llama.cpp q8_0", "one sequence", None),
    ("MyGPT int8", "OpenVINO int8", "one sequence", 1.2),
    ("MyGPT int4", "MyGPT int8", "one sequence", 1.35),
    ("MyGPT int4", "llama.cpp q4_0", "one sequence", 1.3),
    ("MyGPT eager", "transformers fp32", "one sequence", 1.5),
    ("MyGPT fp32", "CTranslate2 fp32", "eight sequences", 2.0),
    ("MyGPT fp32", "OpenVINO fp32", "eight sequences", 1.0),
    ("MyGPT int8", "CTranslate2 int8", "eight sequences", 2.0),
    ("MyGPT fp32", "transformers fp32", f"prompt of {LONG:,} tokens", 2.2),
    ("MyGPT int8", "transformers fp32", f"prompt of {LONG:,} tokens", 2.2),
    ("MyGPT fp32", "OpenVINO fp32", f"prompt of {LONG:,} tokens", 0.9),
    ("MyGPT int8", "OpenVINO int8", f"prompt of {LONG:,} tokens", 0.9),
)
"""Two programs, a measure, and the smallest ratio of their speeds that we want."""


def open_program(name: str, directory: Path) -> Run:
    program, kind = name.split()
    model = str(directory / "model")
    if program == "MyGPT":
        return open_mygpt(GPTModel.from_pretrained(model) if kind == "plain" else model, kind)
    if program == "transformers":
        return open_transformers(model, {"fp32": "float32", "bf16": "bfloat16"}[kind])
    if program == "CTranslate2":
        return open_ctranslate2(directory, kind)
    if program == "OpenVINO":
        return open_openvino(directory, kind)
    return open_llama_cpp(directory, kind)


def open_ctranslate2(directory: Path, kind: str) -> Run:
    import ctranslate2

    converted = str(directory / "ctranslate2")  # in float32; CTranslate2 quantizes to int8 when it opens the files
    if not Path(converted).exists():
        ctranslate2.converters.TransformersConverter(str(directory / "model")).convert(converted)
    threads = torch.get_num_threads()
    generator = ctranslate2.Generator(
        converted, compute_type="float32" if kind == "fp32" else "int8_float32", intra_threads=threads
    )
    words = json.loads((directory / "model/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    word_of = {id_: word for word, id_ in words.items()}

    def run(ids: torch.Tensor, n: int) -> Any:
        prompts = [[word_of.get(id_, "a") for id_ in row] for row in ids.tolist()]
        results = generator.generate_batch(
            prompts,
            max_length=n,
            min_length=n,
            end_token=[],
            include_prompt_in_result=False,
            max_batch_size=len(prompts),
        )
        assert all(len(result.sequences_ids[0]) == n for result in results)
        return results

    return run


def write_gguf(model: GPTModel, path: Path, kind: str, tokenizer: Path | None = None) -> None:
    """Write the model as a GGUF file for llama.cpp. Without a `tokenizer.json`, llama.cpp accepts ids only."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    narrow = {"f32": kinds.F32, "bf16": kinds.BF16, "q8_0": kinds.Q8_0}[kind]
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(4 * config.emb_dim)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        bpe = content["model"]
        ids = bpe["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
        tokens = sorted(ids, key=ids.__getitem__)
        end = tokens.index("<|endoftext|>")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        kinds_of_tokens = [gguf.TokenType.NORMAL] * len(tokens)
        kinds_of_tokens[end] = gguf.TokenType.CONTROL
        writer.add_token_types(kinds_of_tokens)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
        writer.add_add_bos_token(False)
    names = {
        "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
        "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if module.startswith("transformer.h."):
            layer, inner = module.removeprefix("transformer.h.").split(".", 1)
            theirs = f"blk.{layer}.{names[inner]}.{last}"
        else:
            theirs = f"{names[module]}.{last}"
        is_narrow = parameter.dim() == 2 and "wpe" not in name
        wanted = narrow if is_narrow else kinds.F32
        writer.add_tensor(theirs, gguf.quants.quantize(parameter.detach().numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, path: Path, kind: str) -> None:
    """Quantize a GGUF file in float32 with llama.cpp's own code to q4_0, q4_K_S or q4_K_M. It keeps the head in six bits."""
    import ctypes

    import llama_cpp as llama

    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if llama.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {kind}")


def open_llama_cpp(directory: Path, kind: str) -> Run:
    import ctypes

    import llama_cpp as llama
    import numpy as np

    path = directory / f"llama-{kind}.gguf"
    written = path.with_name("llama-f32.gguf") if kind.startswith("q4") else path
    if not written.exists():
        write_gguf(GPTModel.from_pretrained(directory / "model"), written, "f32" if written != path else kind)
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if not path.exists():
        quantize_gguf(written, path, kind)
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 8 * LONG, LONG, LONG, 8
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = llama.llama_init_from_model(model, options)
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(8 * LONG, 0, 1)
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def forward(rows: list[list[int]], past: int) -> list[int]:
        batch.n_tokens = 0
        for row, ids in enumerate(rows):
            for i, id_ in enumerate(ids):
                j = batch.n_tokens
                batch.token[j], batch.pos[j], batch.n_seq_id[j], batch.seq_id[j][0] = id_, past + i, 1, row
                batch.logits[j] = i == len(ids) - 1
                batch.n_tokens += 1
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        last = np.cumsum([len(ids) for ids in rows]) - 1
        logits = [llama.llama_get_logits_ith(context, int(i)) for i in last]
        return [int(np.ctypeslib.as_array(row, (n_vocab,)).argmax()) for row in logits]

    def run(ids: torch.Tensor, n: int, _keep: Any = quiet) -> list[list[int]]:
        llama.llama_memory_clear(memory, True)
        new = [forward(ids.tolist(), 0)]
        for i in range(n - 1):
            new.append(forward([[id_] for id_ in new[-1]], ids.shape[1] + i))
        return new

    return run


def open_openvino(directory: Path, kind: str) -> Run:
    import openvino
    import openvino_genai as genai

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if kind == "fp32" else {}
    converted = directory / f"openvino-{kind}"
    if not converted.exists():
        raise RuntimeError(f"{converted} is missing: optimum-cli makes it, see --optimum")
    pipeline = genai.LLMPipeline(str(converted), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads(), **exact)

    def run(ids: torch.Tensor, n: int) -> Any:
        options = genai.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
        mask = openvino.Tensor(torch.ones_like(ids).numpy())
        result = pipeline.generate(genai.TokenizedInputs(openvino.Tensor(ids.numpy()), mask), options)
        assert all(len(tokens) == n for tokens in result.tokens)
        return result

    return run


def export_openvino(program: str, directory: Path) -> None:
    """Convert the model for OpenVINO in its three precisions."""
    for kind in ("fp32", "fp16", "int8"):
        converted = directory / f"openvino-{kind}"
        if not converted.exists():
            command = [program, "export", "openvino", "--model", str(directory / "model"), str(converted)]
            command += ["--task", "text-generation-with-past", "--weight-format", kind]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode:
                error = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"OpenVINO {kind} is left out: optimum-cli failed with {error}", file=sys.stderr)


def serve(name: str, directory: Path, n: int) -> None:
    """Open a program, then answer each line on standard input with one measurement: a batch size, or the long prompt."""
    with Peak() as peak:
        run = open_program(name, directory)
        generator = torch.Generator().manual_seed(1)
        short = torch.randint(0, 50257, (8, PROMPT), generator=generator)
        long = torch.randint(0, 50257, (1, LONG), generator=generator)
        print(json.dumps("open"), flush=True)
        for line in sys.stdin:
            if line.strip() == "bandwidth":
                print(json.dumps(read_bandwidth()), flush=True)
                continue
            kind, batch_size = line.split()
            if kind == "decode":
                seconds = seconds_per_token(run, short[: int(batch_size)], n)
            else:
                start = time.perf_counter()
                run(long, 1)
                seconds = time.perf_counter() - start
            print(json.dumps([seconds, peak.n_bytes]), flush=True)


class Child:
    """A process that measures a program. It writes one line of JSON when it is ready, and one for each line that it reads."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None and self.process.stderr is not None
        while line := self.process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
        errors = self.process.stderr.read().strip().splitlines() or ["no message"]
        raise RuntimeError(errors[-1])

    def ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return self.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--directory", type=Path, default=Path("bench-models"))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--optimum", help="the path of optimum-cli, which converts the models for OpenVINO")
    parser.add_argument("--convert_only", action="store_true", help="convert the models and measure nothing")
    parser.add_argument("--program", help=argparse.SUPPRESS)  # in a process of its own
    options = parse(parser, rounds=5)
    if options.program:
        serve(options.program, options.directory, options.tokens)
        return
    if not (options.directory / "model").exists():
        torch.manual_seed(1)
        GPTModel(GPT2_CONFIGS[options.size]).save_pretrained(options.directory / "model", get_tokenizer("gpt2"))
    if options.optimum:
        export_openvino(options.optimum, options.directory)
    children = {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in options.programs:
        try:
            command = ["--program", name, "--directory", str(options.directory), "--tokens", str(options.tokens)]
            children[name] = Child([sys.executable, __file__, *command], environment)
        except RuntimeError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not options.convert_only:
        show(measure(children, options))
    for child in children.values():
        child.process.terminate()


def measure(children: dict[str, Child], options: argparse.Namespace) -> Results:
    """Measure every program in every round, and save the results after each round."""
    with torch.device("meta"):
        model = GPTModel(GPT2_CONFIGS[options.size])
    n_read = model.num_parameters(exclude_embeddings=True) + model.transformer.wte.weight.numel()
    settings = {"size": options.size, "tokens": options.tokens, "weights_per_token": n_read}
    results = Results(f"decode_{options.size}", settings, PACKAGES)
    for name, other, measure, target in TARGETS:
        results.compare(name, other, measure, target)
    for turn in rounds(options, warm_up=True):
        for question, measure in MEASURES.items():
            for name, child in children.items():
                seconds, peak = child.ask(question)
                if turn:
                    n = {"decode 1": 1, "decode 8": 8, "prefill 1": LONG}[question]
                    results.add(name, measure, "tokens/s", n / seconds, precision=PROGRAMS[name])
                    results.add(name, "memory", "bytes").values = [peak]  # the peak so far
            if turn:
                bandwidth = next(iter(children.values())).ask("bandwidth")
                results.add("memory", "bandwidth", "bytes/s", bandwidth)
        results.save(options.out)
    return results


if __name__ == "__main__":
    main()
