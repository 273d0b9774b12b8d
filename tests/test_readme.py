"""Run every code block of the README, in order, in one directory, as a reader would."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch

from bundle_writer import stored, write_bundle
from MyGPT import GPT2_CONFIGS
from MyGPT.cli import main
from MyGPT.weights.layout import openai_shapes
from places import ROOT
from serve_process import ServeProcess
from texts import OPENAI_FILES

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
# Training commands are shortened to a few steps; all other commands run unchanged.
SHORT = "--max_steps 3 --warmup_steps 1 --eval_every 2 --eval_windows 4 --sample_every 2 --sample_tokens 5".split()
SHORTER = {
    "train": SHORT,
    "finetune": ["--epochs", "0.5"],
    "--features": "--data start.txt --n_features 16 --k 2".split(),
}


def write_random_gpt2(directory: Path) -> None:
    """Write files like OpenAI's for the 124M model: the same tensors and sizes, with random weights."""
    directory.mkdir(parents=True)
    config = GPT2_CONFIGS["124M"]
    tensors = {
        name: stored(torch.rand(shape).sub_(0.5).mul_(0.04).numpy()) for name, shape in openai_shapes(config).items()
    }
    write_bundle(directory / "model.ckpt", tensors)
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    sizes = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    (directory / "hparams.json").write_text(json.dumps(sizes))
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(OPENAI_FILES / name, directory)


@pytest.mark.slow
def test_every_block_runs(
    in_tmp_path: Path, alice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in ("configs", "exercises"):
        shutil.copytree(ROOT / directory, directory)
    Path("book.txt").write_text(alice, encoding="utf-8")
    Path("start.txt").write_text(alice[:20000], encoding="utf-8")
    records = [
        {"instruction": f"Spell {word}.", "output": " ".join(word)} for word in alice.split()[:60] if word.isalpha()
    ]
    Path("records.json").write_text(json.dumps(records))
    write_random_gpt2(Path("gpt2/124M"))  # files that exist are not downloaded
    monkeypatch.setattr("sys.stdin", io.StringIO("Spell cat.\n"))
    names: dict[str, object] = {"__name__": "readme"}
    languages = set()
    for language, code in BLOCKS:
        languages.add(language)
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                # test_doctor.py tests mygpt doctor, which takes half a minute.
                if words[:2] == ["mygpt", "serve"]:
                    with ServeProcess.of_command(words[1:], Path("serve.log")) as server:
                        with urllib.request.urlopen(server.url) as page:
                            assert "<title>MyGPT" in page.read().decode()
                        assert server.stop() in (0, 1)  # 1 on Windows, where processes end without a signal
                elif words == ["make", "demo"]:  # test_replay.py tests its other commands
                    assert main(["train", "--config", "configs/quickstart.yaml", "--out", "runs/demo", *SHORT]) == 0
                elif words[:1] == ["mygpt"] and words[1] not in ("doctor", "--help"):
                    short = next((SHORTER[word] for word in words if word in SHORTER), [])
                    status = int(words[1] == "check")  # the exercises are not solved
                    assert main([*words[1:], *short]) == status, (line, capsys.readouterr().err)
                else:
                    assert not words or words[0] in ("make", ".", "pip", "jupyter", "mygpt"), f"not run: {line}"
    assert languages == {"python", "bash"}
