"""`mygpt export` with GGUF: what it accepts, refuses and prints. The content of the files is tested in tests/weights."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import lively_model, same_weights
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, generate, open_model
from MyGPT.cli import main
from MyGPT.data.chat_template import chat_template
from MyGPT.data.instructions import encode_question
from MyGPT.data.templates import ALPACA
from MyGPT.tokenizers import load_tokenizer

TALK = "User: hello\nAssistant: the cat sat by the fire\nUser: is it?\nAssistant: it is\n" * 20
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = BPETokenizer.train(TALK, 300, progress=False)
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=64, emb_dim=32, n_heads=2, n_layers=2)
    directory = tmp_path_factory.mktemp("talker")
    lively_model(config).save_pretrained(directory, tokenizer.with_settings({"chat_template": TEMPLATE}))
    return directory


def export(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    status = main(["export", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_file_replaces_nothing_unless_it_is_asked_to(talker: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "talker.gguf"
    assert export(capsys, talker, "--format", "gguf", "--out", out) == (0, f"{out}\n", "")
    model, tokenizer = open_model(out, device="cpu")
    assert same_weights(model, GPTModel.from_pretrained(talker))
    assert tokenizer.settings["chat_template"] == TEMPLATE
    written = out.read_bytes()
    status, _, message = export(capsys, talker, "--format", "gguf", "--out", out, "--dtype", "f16")
    assert (status, out.read_bytes()) == (2, written)
    assert message == f"mygpt export: {out} exists: choose another --out, or give --overwrite true\n"
    assert export(capsys, talker, "--format", "gguf", "--out", out, "--dtype", "f16", "--overwrite")[0] == 0
    assert len(out.read_bytes()) < len(written)
    prompt = ["--prompt", "User:", "--max_new_tokens", "8", "--temperature", "0"]
    assert main(["generate", "--model", str(out), *prompt]) == 0
    assert capsys.readouterr().out.startswith("User:")
    assert main(["info", str(out)]) == 0
    assert "a GGUF file" in capsys.readouterr().out


def test_a_model_whose_tokenizer_llama_cpp_lacks_is_exported_without_it(tmp_path: Path, capsys: Any) -> None:
    tokenizer = CharTokenizer(sorted(set(TALK)))
    config = GPTConfig(vocab_size=tokenizer.n_vocab, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    GPTModel(config).save_pretrained(tmp_path / "model", tokenizer)
    out = tmp_path / "model.gguf"
    status, _, message = export(capsys, tmp_path / "model", "--format", "gguf", "--out", out)
    assert (status, message.count("\n"), out.exists()) == (2, 1, False)
    assert "no tokenizer like CharTokenizer, only byte-level BPE: leave the tokenizer out with --without_tok" in message
    assert export(capsys, tmp_path / "model", "--format", "gguf", "--out", out, "--without_tokenizer")[0] == 0
    assert same_weights(GPTModel.from_pretrained(out), GPTModel.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onnx", "--out", "a.onnx", "--dtype", "q8_0"], "--dtype q8_0 needs --format gguf"),
        (["another", "--format", "gguf", "--out", "a.gguf"], "writes one model, got 2"),
        (["--format", "gguf", "--out", "missing/a.gguf"], "there is no directory missing"),
        (["--format", "ggml", "--out", "a.gguf"], "--format must be gguf or onnx, got 'ggml'"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_opened(
    arguments: list[str], words: str, in_tmp_path: Path, capsys: Any
) -> None:
    status, _, message = export(capsys, "no-such-model", *arguments)
    assert status == 2
    assert words in message


@pytest.fixture(scope="module")
def instructed(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the model with the prompt template of fine-tuning."""
    directory = tmp_path_factory.mktemp("instructed") / "model"
    shutil.copytree(talker, directory)
    ALPACA.save(directory)
    return directory


def test_the_prompt_template_becomes_a_chat_template_for_llama_cpp(
    instructed: Path, tmp_path: Path, capsys: Any
) -> None:
    assert export(capsys, instructed, "--format", "gguf", "--out", tmp_path / "a.gguf")[0] == 0
    tokenizer = open_model(tmp_path / "a.gguf", device="cpu")[1]
    assert tokenizer.settings["chat_template"] == chat_template(ALPACA, tokenizer, exact=False)


@pytest.fixture(scope="module")
def llama(instructed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start llama.cpp's server with the exported model, and yield its address. Its cache is float32 too."""
    program = shutil.which("llama-server")
    if program is None:
        pytest.skip("llama-server of llama.cpp is not on the PATH")
    path = tmp_path_factory.mktemp("llama") / "talker.gguf"
    assert main(["export", str(instructed), "--format", "gguf", "--out", str(path)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "-c 64 -t 1 --no-warmup -ctk f32 -ctv f32 -fa off --jinja".split()
    command = [program, "-m", str(path), "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield from _when_ready(server, f"http://127.0.0.1:{port}")
        finally:
            server.terminate()


def _when_ready(server: subprocess.Popen[bytes], address: str) -> Iterator[str]:
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/health").close()
        except OSError:
            time.sleep(0.05)
        else:
            yield address
            return
    pytest.fail("llama-server did not start")


def ask(address: str, **data: Any) -> Any:
    route = data.pop("route")
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/{route}", json.dumps(data).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_llama_cpp_continues_with_the_same_tokens(talker: Path, llama: str) -> None:
    """Greedy tokens are equal although llama.cpp looks GELU up in a table of float16: the logits differ by 1e-3."""
    model, tokenizer = open_model(talker, device="cpu")
    for prompt in ("User: hello", "the  cat é 😀", "<|endoftext|>Assistant: it's 12", "\n\n is\t"):
        ids = tokenizer.encode(prompt)
        assert ask(llama, route="tokenize", content=prompt, parse_special=True)["tokens"] == ids
        options = {"n_predict": 24, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        theirs = ask(llama, route="completion", prompt=ids, **options)["tokens"]
        ours = generate(model, torch.tensor([ids]), 24, eos_id=tokenizer.eot_token)[0, len(ids) :].tolist()
        assert theirs == ours[: len(theirs)]
        assert len(theirs) == len(ours) - (ours[-1] == tokenizer.eot_token)


@pytest.mark.slow
def test_llama_cpp_applies_the_chat_template(instructed: Path, llama: str) -> None:
    tokenizer = load_tokenizer(instructed)
    talks = [
        [{"role": "user", "content": "Name a colour."}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        [
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "And a bird?"},
        ],
    ]
    for messages in talks:
        prompt = ask(llama, route="apply-template", messages=messages)["prompt"]
        assert prompt == tokenizer.decode(encode_question(ALPACA.conversation(messages), tokenizer, ALPACA))
