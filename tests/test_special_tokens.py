"""Special tokens of directories that transformers wrote: they end texts here as there, and are written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from MyGPT import (
    BPETokenizer,
    GPTModel,
    generate,
    load_tokenizer,
    open_model,
)
from MyGPT.acceleration.lookup import PromptLookup
from MyGPT.acceleration.step import accelerate
from MyGPT.generation import end_ids

TEXT = "the cat sat by the fire. and the dog sat by the cat. " * 5
BASE = BPETokenizer.train(TEXT, 300, progress=False)
N = 8  # new tokens


def edit_json(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; ... removes a key. A missing file is created."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def make_directory(directory: Path, change: Callable[[Path, Any], None], says: str = "<|im_end|>") -> Any:
    """Write a model directory with transformers. The model says the token `says` after any text. Return the tokenizer.

    `change` edits the files afterwards, as other programs would have written them.
    """
    BASE.save(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    more = ["<|im_start|>", "<|im_end|>", "</s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more, "pad_token": "[PAD]"})
    tokenizer.add_tokens(["myword"])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, pad_token_id=tokenizer.pad_token_id)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[tokenizer.convert_tokens_to_ids(says)] * 500)
    model.save_pretrained(directory)
    change(directory, tokenizer.convert_tokens_to_ids)
    return tokenizer


def everywhere(directory: Path, name: str, value: Any, ids: Any) -> None:
    edit_json(directory / "config.json", **{f"{name}_id": ids})
    edit_json(directory / "generation_config.json", **{f"{name}_id": ids})
    edit_json(directory / "tokenizer_config.json", **{name: value})


def as_object(directory: Path, id_of: Any) -> None:
    """Name the tokens by objects, as older versions of transformers do."""
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    everywhere(directory, "eos_token", {**flags, "content": "</s>"}, id_of("</s>"))


def in_special_tokens_map(directory: Path, id_of: Any) -> None:
    everywhere(directory, "eos_token", ..., id_of("</s>"))
    edit_json(directory / "special_tokens_map.json", eos_token="</s>")


def without_tokenizer_config(directory: Path, id_of: Any) -> None:
    (directory / "tokenizer_config.json").unlink()


def only_in_generation_config(directory: Path, id_of: Any) -> None:
    edit_json(directory / "config.json", eos_token_id=...)


def only_in_config(directory: Path, id_of: Any) -> None:
    (directory / "generation_config.json").unlink()


def several(directory: Path, id_of: Any) -> None:
    everywhere(directory, "eos_token", "<|im_end|>", [id_of("<|endoftext|>"), id_of("<|im_end|>")])


def contradicting(directory: Path, id_of: Any) -> None:
    """transformers obeys generation_config.json."""
    edit_json(directory / "config.json", eos_token_id=id_of("<|endoftext|>"))
    edit_json(directory / "generation_config.json", eos_token_id=[id_of("</s>"), id_of("<|im_end|>")])


def another_end(directory: Path, id_of: Any) -> None:
    """transformers does not stop at the config's id if generation_config.json names another."""
    edit_json(directory / "generation_config.json", eos_token_id=id_of("</s>"))


def no_end(directory: Path, id_of: Any) -> None:
    everywhere(directory, "eos_token", None, None)


def outside(directory: Path, id_of: Any) -> None:
    """transformers writes GPT-2's ids into the config.json of a smaller model."""
    everywhere(directory, "eos_token", "</s>", 50256)


def settings_of_generation(directory: Path, id_of: Any) -> None:
    edit_json(directory / "generation_config.json", temperature=0.7, top_k=40, repetition_penalty=1.2)


def padded_with_the_end(directory: Path, id_of: Any) -> None:
    everywhere(directory, "pad_token", "<|im_end|>", id_of("<|im_end|>"))


CHANGES: list[Any] = [
    (lambda directory, id_of: None, "<|im_end|>"),
    (as_object, "</s>"),
    (in_special_tokens_map, "</s>"),
    (without_tokenizer_config, "<|im_end|>"),
    (only_in_generation_config, "<|im_end|>"),
    (only_in_config, "<|im_end|>"),
    (several, "<|im_end|>"),
    (several, "<|endoftext|>"),
    (contradicting, "<|im_end|>"),
    (another_end, "<|im_end|>"),
    (no_end, "<|im_end|>"),
    (outside, "<|im_start|>"),
    (settings_of_generation, "<|im_end|>"),
    (padded_with_the_end, "<|im_end|>"),
]
NAMES = [f"{change.__name__}-{says}" for change, says in CHANGES]
each_directory = pytest.mark.parametrize(("change", "says"), CHANGES, ids=NAMES)


def transformers_view(directory: Path) -> dict[str, Any]:
    """Return what transformers knows of the special tokens of a directory, and its greedy text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer("the cat", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=N, do_sample=False, repetition_penalty=1.0)[0].tolist()
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_k", "repetition_penalty")
    generation = {key: getattr(model.generation_config, key) for key in kept}
    named = {role: getattr(tokenizer, role) for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    text = tokenizer("a cat<|im_end|> myword</s> xmyword[PAD]")["input_ids"]
    return {
        "named": named,
        "all special": sorted(tokenizer.all_special_tokens),
        "added": {id_: (str(it), it.special, it.normalized) for id_, it in tokenizer.added_tokens_decoder.items()},
        "ids": text,
        "text": tokenizer.decode(text, skip_special_tokens=True),
        "config": [getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")],
        "generation": generation,
        "greedy": ids,
    }


@each_directory
def test_texts_end_where_transformers_ends_them(change: Any, says: str, tmp_path: Path) -> None:
    make_directory(tmp_path, change, says)
    expected = transformers_view(tmp_path)
    model, tokenizer = open_model(tmp_path, "cpu")
    prompt = torch.tensor([tokenizer.encode("the cat")])
    ends = end_ids(model, tokenizer)
    for model_ in (model, accelerate(model, compiled=False), PromptLookup(model)):
        ids = generate(model_, prompt, N, eos_id=ends or None)[0].tolist()
        assert ids == [id_ for id_ in expected["greedy"] if id_ not in ends]
    text = "a cat<|im_end|> myword</s> xmyword[PAD]"
    assert tokenizer.encode(text) == expected["ids"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == expected["text"]


@each_directory
def test_saved_directories_name_the_same_special_tokens(change: Any, says: str, tmp_path: Path) -> None:
    make_directory(tmp_path / "foreign", change, says)
    expected = transformers_view(tmp_path / "foreign")
    model, tokenizer = open_model(tmp_path / "foreign", "cpu")
    model.save_pretrained(tmp_path / "together", tokenizer)
    GPTModel.from_pretrained(tmp_path / "foreign").save_pretrained(tmp_path / "apart")
    load_tokenizer(tmp_path / "foreign").save(tmp_path / "apart")
    for saved in ("together", "apart"):
        found = transformers_view(tmp_path / saved)
        if change is without_tokenizer_config:  # transformers finds no names there; MyGPT writes those that it uses
            assert found["named"]["eos_token"] == "<|im_end|>"
            found |= {key: expected[key] for key in ("named", "all special")}
        if change is only_in_generation_config:  # transformers replaces a missing id by GPT-2's
            assert found["config"][1] in (found["generation"]["eos_token_id"], None)
            found["config"] = expected["config"]
        if change is no_end and saved == "together":  # MyGPT ends texts with <|endoftext|>, and says so
            ends = [AutoTokenizer.from_pretrained(tmp_path / saved).convert_tokens_to_ids("<|endoftext|>")]
            assert [found["config"][1]] == [found["generation"]["eos_token_id"]] == ends
            found |= {key: expected[key] for key in ("config", "generation")}
        assert found == expected
