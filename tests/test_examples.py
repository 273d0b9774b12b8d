"""Every script of examples/ runs offline as a user would run it, and stays short. Job files name options that exist."""

from __future__ import annotations

import configparser
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from MyGPT import GPTModel, get_tokenizer
from MyGPT.cli import main
from MyGPT.commands.serve import serve
from MyGPT.serving.models import Settings
from places import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What each script prints or writes if it did its work.
PRINTED = {
    "look_inside": "without head 0 of layer 0",
    "lora_finetuning": "step 40: loss",
    "open_in_transformers": "the same greedy continuation: True",
    "sampling_options": "--- top_p 0.9",
    "train_from_scratch": "Alice was ",
    "train_tokenizer": "bytes per token",
}
TAKES_A_MODEL = ("look_inside", "sampling_options")


def test_the_examples_are_the_ones_listed_here() -> None:
    assert [path.stem for path in EXAMPLES] == list(PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_shorter_than_forty_lines_and_runs(
    path: Path, in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    arguments = []
    if path.stem in TAKES_A_MODEL:  # without an argument they download GPT-2
        tokenizer = get_tokenizer("gpt2")
        sizes = {"context_length": 48, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "qkv_bias": True}
        GPTModel({"vocab_size": tokenizer.n_vocab, **sizes}).save_pretrained("model", tokenizer)
        arguments = ["model"]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    names = runpy.run_path(str(path), run_name="__main__")
    assert PRINTED[path.stem] in capsys.readouterr().out
    if path.stem == "lora_finetuning":
        with torch.no_grad():
            logits = GPTModel.from_pretrained("runs/spelling").eval()(names["inputs"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), names["targets"].flatten()).item()
        assert loss < 2.5  # the saved model is the tuned one; the loss of a uniform guess is log(512) = 6.2


def options_of_train(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Return the options of `mygpt train` in the arguments of torchrun, as the command's own parser reads them."""
    arguments = command[command.index("train") + 1 :]
    with pytest.raises(SystemExit, match="0"):
        main(["train", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_slurm_script_is_valid_and_its_options_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples/slurm_train.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    monkeypatch.chdir(ROOT)
    [command] = re.findall(r"^TRAIN=\((.*)\)$", path.read_text(encoding="utf-8"), re.M)
    assert options_of_train(shlex.split(command), capsys)["resume"] == "auto"


def test_the_kubernetes_job_is_one_that_the_operator_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    """The operator requires a container named pytorch and a name of lower-case letters, digits and hyphens."""
    job = yaml.safe_load((ROOT / "examples/kubernetes_pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    [(kind, replicas)] = job["spec"]["pytorchReplicaSpecs"].items()
    pod = replicas["template"]["spec"]
    [container] = pod["containers"]
    assert kind == "Worker" and container["name"] == "pytorch" and container["image"]
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= replicas["replicas"] <= elastic["maxReplicas"]
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    arguments = [argument for argument in container["args"] if not argument.startswith("--config")]
    assert options_of_train(arguments, capsys)["resume"] == "auto"


def options_of_serve(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Return the options of `mygpt serve`, as the command's own parser reads them."""
    with pytest.raises(SystemExit, match="0"):
        main(["serve", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_the_service_has_options_that_exist_and_enough_time_to_drain(capsys: pytest.CaptureFixture[str]) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(ROOT / "examples/mygpt.service", encoding="utf-8")
    service = unit["Service"]
    program, command, *arguments = shlex.split(service["ExecStart"])
    options = options_of_serve(arguments, capsys)
    assert (Path(program).name, command, options["host"]) == ("mygpt", "serve", "127.0.0.1")
    assert float(service["TimeoutStopSec"]) > options["drain_timeout"]
    assert service["Environment"] == f"MYGPT_CACHE=/var/cache/{service['CacheDirectory']}"


def test_the_image_copies_files_that_exist_and_starts_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples/Containerfile").read_text(encoding="utf-8")
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in copied.split())
    (entry,), (rest,) = (re.findall(rf"^{name} (.*)$", text, re.M) for name in ("ENTRYPOINT", "CMD"))
    program, command, *arguments = [*json.loads(entry), *json.loads(rest)]
    assert (program, command) == ("mygpt", "serve")
    assert options_of_serve(arguments, capsys)["host"] == "0.0.0.0"


def test_the_proxy_sends_tokens_at_once_and_has_the_limits_of_the_server() -> None:
    text = (ROOT / "examples/nginx.conf").read_text(encoding="utf-8")
    values = dict(re.findall(r"^ *(\w+) ([^;]+);", text, re.M))
    assert values["proxy_buffering"] == "off"
    assert "proxy_set_header Host $host;" in text
    assert int(values["client_max_body_size"].removesuffix("m")) << 20 == Settings().max_body_bytes
    longest = inspect.signature(serve).parameters["request_timeout"].default
    assert int(values["proxy_read_timeout"].removesuffix("s")) > longest
