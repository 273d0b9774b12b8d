"""lm_eval through the server: the figures of lm_eval's own `hf` model on the same weights, and those of `mygpt evaluate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from api_server import serving
from MyGPT.config import GPTConfig
from MyGPT.evaluation.protocols import measure_last_words, measure_text
from MyGPT.model import GPTModel
from MyGPT.serving import Engine
from MyGPT.serving.models import ServedModel
from MyGPT.tokenizers import BPETokenizer
from places import ALICE

CONTEXT = 128
SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

directory, url, context = sys.argv[1:]
data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": directory + "/texts.jsonl"}}, "test_split": "test"}
last_word = {
    **data, "task": "last_word", "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
whole = {
    **data, "task": "whole", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
beginning = {
    **data, "task": "beginning", "output_type": "generate_until", "doc_to_text": "{{text.split(' ')[:2]|join(' ')}}",
    "doc_to_target": "{{text}}", "generation_kwargs": {"until": [".", ","], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
server = {"model": "book", "base_url": url + "/v1/completions", "tokenizer": directory, "tokenizer_backend": "huggingface",
          "max_length": int(context), "num_concurrent": 4}
figures = {}
for model, arguments in (("local-completions", server), ("hf", {"pretrained": directory, "device": "cpu", "dtype": "float32"})):
    found = lm_eval.simple_evaluate(
        model, arguments, [last_word, whole, beginning], bootstrap_iters=0, batch_size=4,
        task_manager=TaskManager(include_defaults=False),
    )
    texts = [sample["filtered_resps"] for sample in found["samples"]["beginning"]]
    results = {task: {name: value for name, value in of_task.items() if isinstance(value, float)}
               for task, of_task in found["results"].items()}
    figures[model] = {"results": results, "texts": texts}
print(json.dumps(figures))
"""


def memorised(texts: list[str], tokenizer: BPETokenizer) -> GPTModel:
    """Return a model that has learned the beginnings of texts, so that a part of its predictions is correct."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(tokenizer.n_vocab, CONTEXT, emb_dim=32, n_heads=4, n_layers=1, drop_rate=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # The task `whole` predicts a text after the end-of-text token, and the other tasks without it.
    starts = ([tokenizer.eot_token], [])
    rows = [torch.tensor([*start, *tokenizer.encode(text)]) for text in texts for start in starts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    for _ in range(100):
        logits = model(ids[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_lm_eval_finds_the_same_figures_through_the_server(tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in ALICE.split("\n\n")]
    texts = [" ".join(line.split(" ")[:14]) for line in lines if len(line.split(" ")) > 14][:20]
    tokenizer = BPETokenizer.train(ALICE[:20_000], 256 + 1 + 100, progress=False)
    assert max(len(tokenizer.encode(text)) for text in texts) < CONTEXT - 2  # lm_eval divides longer texts differently
    model = memorised(texts[::2], tokenizer)
    model.save_pretrained(tmp_path, tokenizer)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
    with serving(ServedModel("book", Engine(model, tokenizer, slots=4), tokenizer, model)) as url:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), url, str(CONTEXT)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = figures["local-completions"], figures["hf"]
    words, whole = measure_last_words(model, tokenizer, texts), measure_text(model, tokenizer, texts)
    last, rolling = ours["results"]["last_word"], ours["results"]["whole"]
    assert 0 < last["acc,none"] < 1  # a comparison of zeros would show nothing
    # Sums of float32 log-probabilities, each with a rounding of about 1e-6 of its size.
    assert last["perplexity,none"] == pytest.approx(words.word_perplexity, rel=1e-5)
    assert last["perplexity,none"] == pytest.approx(theirs["results"]["last_word"]["perplexity,none"], rel=1e-5)
    assert last["acc,none"] == theirs["results"]["last_word"]["acc,none"] == words.n_correct / len(texts)
    assert rolling["bits_per_byte,none"] == pytest.approx(whole.bits_per_byte, rel=1e-5)
    assert rolling["bits_per_byte,none"] == pytest.approx(theirs["results"]["whole"]["bits_per_byte,none"], rel=1e-5)
    assert ours["texts"] == theirs["texts"] and len(set(map(str, ours["texts"]))) > 5
