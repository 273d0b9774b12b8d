"""Special tokens of directories that transformers wrote: they end texts here as there, and are written back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from MyGPT import (
    BPETokenizer,
    CharTokenizer,
    GPTConfig,
    GPTModel,
    SimpleTokenizer,
    TrainConfig,
    generate,
    get_tokenizer,
    load_tokenizer,
    open_model,
)
from MyGPT.acceleration.lookup import PromptLookup
from MyGPT.acceleration.step import accelerate
from MyGPT.cli import main
from MyGPT.config import GPT_CONFIG
from MyGPT.data.instructions import InstructionDataset, encode_prompt
from MyGPT.data.templates import load_template
from MyGPT.finetuning.classification import GPTForClassification
from MyGPT.finetuning.examples import ExampleOptions, Examples
from MyGPT.finetuning.preference import PreferencePairs
from MyGPT.generation import end_ids, stream_text
from MyGPT.sampling import SamplingConfig
from MyGPT.training.texts import LiveSamples

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


def no_beginning(directory: Path, id_of: Any) -> None:
    everywhere(directory, "bos_token", ..., None)


def with_chat_template(directory: Path, id_of: Any) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")


def with_several_chat_templates(directory: Path, id_of: Any) -> None:
    with_chat_template(directory, id_of)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")


def with_older_chat_template(directory: Path, id_of: Any) -> None:
    edit_json(directory / "tokenizer_config.json", chat_template="{{ messages[0].content }}")


def outside(directory: Path, id_of: Any) -> None:
    """transformers writes GPT-2's ids into the config.json of a smaller model."""
    everywhere(directory, "eos_token", "</s>", 50256)


def settings_of_generation(directory: Path, id_of: Any) -> None:
    edit_json(directory / "generation_config.json", temperature=0.7, top_k=40, repetition_penalty=1.2)


def ordinary(directory: Path, id_of: Any) -> None:
    """Name an ordinary token of the vocabulary, which tokenizer.json does not list as a special token."""
    everywhere(directory, "eos_token", ".", id_of("."))


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
    (no_end, "<|endoftext|>"),
    (no_beginning, "<|im_end|>"),
    (with_chat_template, "<|im_end|>"),
    (with_several_chat_templates, "<|im_end|>"),
    (with_older_chat_template, "<|im_end|>"),
    (outside, "<|im_start|>"),
    (settings_of_generation, "<|im_end|>"),
    (padded_with_the_end, "<|im_end|>"),
    (ordinary, "."),
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
    text = tokenizer("a cat...<|im_end|> myword</s> xmyword[PAD].")["input_ids"]
    return {
        "named": named,
        "all special": sorted(tokenizer.all_special_tokens),
        "added": {id_: (str(it), it.special, it.normalized) for id_, it in tokenizer.added_tokens_decoder.items()},
        "ids": text,
        "text": tokenizer.decode(text, skip_special_tokens=True),
        "chat template": tokenizer.chat_template,
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
    text = "a cat...<|im_end|> myword</s> xmyword[PAD]."
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
    model.save_pretrained(tmp_path / "foreign", tokenizer)
    for saved in ("together", "apart", "foreign"):
        found = transformers_view(tmp_path / saved)
        if change is without_tokenizer_config:  # transformers finds no names there; MyGPT writes those that it uses
            assert found["named"]["eos_token"] == "<|im_end|>"
            found |= {key: expected[key] for key in ("named", "all special")}
        if change is only_in_generation_config:  # transformers replaces a missing id by GPT-2's
            assert found["config"][1] in (found["generation"]["eos_token_id"], None)
            found["config"] = expected["config"]
        assert found == expected
    assert not (tmp_path / "foreign/special_tokens_map.json").exists()  # tokenizer_config.json holds its content


@pytest.mark.parametrize("command", ["finetune", "dpo"])
def test_training_needs_an_end_that_the_directory_does_not_deny(command: str, tmp_path: Path, capsys: Any) -> None:
    make_directory(tmp_path / "foreign", no_end)
    keys = ("prompt", "completion") if command == "finetune" else ("prompt", "chosen", "rejected")
    (tmp_path / "data.jsonl").write_text(json.dumps({key: f"the {key}" for key in keys}))
    where = [
        "--model",
        str(tmp_path / "foreign"),
        "--data",
        str(tmp_path / "data.jsonl"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([command, *where]) == 2
    printed = capsys.readouterr()
    assert printed.out == f"tokenizer: tokenizer.json in {tmp_path / 'foreign'}\n"
    assert 'tokenizer_config.json has "eos_token": null; name a token there, such as <|endoftext|>' in printed.err


def test_a_saved_tokenizer_replaces_the_settings_of_an_older_one(tmp_path: Path) -> None:
    BASE.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "."}')
    (tmp_path / "added_tokens.json").write_text('{"extra": 300}')
    BASE.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose texts end with <|im_end|>, which its model says after anything."""
    directory = tmp_path_factory.mktemp("foreign")
    make_directory(directory, lambda directory, id_of: None)
    return directory


def test_commands_stop_at_the_directorys_end(chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["generate", "--model", str(chatty), "--prompt", "the cat", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "the cat\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert main(["chat", "--model", str(chatty), "--device", "cpu", "--max_new_tokens", "8"]) == 0
    assert "im_end" not in capsys.readouterr().out


def test_texts_begin_with_the_directorys_beginning(tmp_path: Path, capsys: Any) -> None:
    """`mygpt generate` without a prompt begins with bos_token, not with the token that ends texts."""
    id_of: Any = None

    def change(directory: Path, ids: Any) -> None:
        nonlocal id_of
        id_of = ids
        everywhere(directory, "bos_token", "<|im_start|>", ids("<|im_start|>"))

    make_directory(tmp_path, change)
    model, tokenizer = open_model(tmp_path, "cpu")
    assert (tokenizer.bos_token, tokenizer.eot_token) == (id_of("<|im_start|>"), id_of("<|im_end|>"))
    config = model.config
    assert (config.special_ids("bos_token_id"), config.end_ids) == ((id_of("<|im_start|>"),), (id_of("<|im_end|>"),))


def test_live_samples_stop_at_the_directorys_end(chatty: Path) -> None:
    model, tokenizer = open_model(chatty, "cpu")
    config = TrainConfig(sample_every=1, sample_tokens=N, sample_to_end=True)
    assert LiveSamples(model, tokenizer, [tokenizer.encode("the cat")], config).text(1) == "the cat"


def test_fine_tuning_teaches_the_directorys_end(chatty: Path, tmp_path: Path) -> None:
    _, tokenizer = open_model(chatty, "cpu")
    end, pad = tokenizer.id_of("<|im_end|>"), tokenizer.id_of("[PAD]")
    records = [{"instruction": "cat", "output": "the cat"}] * 8
    (tmp_path / "records.json").write_text(json.dumps(records))
    for rows in ("padded", "packed"):
        examples = Examples(ExampleOptions(str(tmp_path / "records.json"), rows=rows), tokenizer, 300)
        _, targets = examples.sampler(2, 0).batch(0)[:2]
        assert [row[row >= 0][-1].item() for row in targets] == [end] * len(targets)
    pairs = PreferencePairs([{"prompt": "the", "chosen": " cat", "rejected": " dog"}], tokenizer, 64)
    assert [answer[-1] for answer in pairs.pairs[0][1:]] == [end, end]
    messages = [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "and the"},
        {"role": "assistant", "content": "dog"},
    ]
    example = InstructionDataset([{"messages": messages}], tokenizer, load_template("alpaca"))[0]
    assert tokenizer.decode(example).count("cat<|im_end|>") == 1
    assert tokenizer.decode(example).count("<|endoftext|>") == 0
    assert end in encode_prompt({"messages": messages[:3]}, tokenizer, load_template("alpaca"))
    # A classifier's sequences are padded with the directory's pad_token.
    GPTForClassification(GPTModel.from_pretrained(chatty), ["a", "b"]).save_pretrained(
        tmp_path / "classifier", tokenizer
    )
    assert json.loads((tmp_path / "classifier/config.json").read_text())["pad_token_id"] == pad


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--merge"], ["--full"]], ids=["adapter", "merged", "full"])
def test_a_fine_tuned_model_stops_where_it_was_taught_to(options: list[str], chatty: Path, tmp_path: Path) -> None:
    records = [{"prompt": "the", "completion": " cat sat"}] * 12
    (tmp_path / "records.json").write_text(json.dumps(records))
    arguments = (
        f"--model {chatty} --data {tmp_path / 'records.json'} --out {tmp_path / 'run'} --epochs 1 --sample_every 0"
    )
    assert main(["finetune", *arguments.split(), "--warmup_steps", "0", "--device", "cpu", *options]) == 0
    model, tokenizer = open_model(tmp_path / "run", "cpu")
    assert end_ids(model, tokenizer) == [tokenizer.id_of("<|im_end|>")]
    if options:
        found, expected = transformers_view(tmp_path / "run/model"), transformers_view(chatty)
        assert "### Instruction:" in found.pop("chat template")
        expected["greedy"] = found["greedy"]
        assert found == {key: value for key, value in expected.items() if key != "chat template"}


def test_an_adapter_of_a_contradicting_directory_ends_where_it_was_trained_to_end(tmp_path: Path) -> None:
    """The tokenizer's token ends the examples, so generation must stop there, too, as transformers' Trainer arranges."""
    make_directory(tmp_path, another_end)
    _, tokenizer = open_model(tmp_path, "cpu")
    config = GPTModel.from_pretrained(tmp_path).config
    taught = config.ending_with(tokenizer.eot_token)
    assert taught.end_ids == (tokenizer.id_of("<|im_end|>"), tokenizer.id_of("</s>"))
    assert taught.ending_with(tokenizer.eot_token) is taught


ENDS: Any = [[5], [5, 9], (9, 5), range(5, 7), torch.tensor([5, 9]), torch.tensor(5), 5]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("eos_id", ENDS, ids=str)
def test_each_row_ends_at_its_own_end(eos_id: Any, use_cache: bool, tiny_model64: GPTModel) -> None:
    """Each row is cut at its first end and filled with the first of the ids, as transformers does without a pad id."""
    prompts = torch.tensor([[3, 1], [7, 7], [40, 2], [11, 60], [5, 5]])
    free = generate(tiny_model64, prompts, 12, temperature=1.0, top_k=4, seed=3, use_cache=use_cache)[:, 2:].tolist()
    ends = [
        int(id_)
        for id_ in (eos_id if isinstance(eos_id, (list, tuple, range)) else torch.as_tensor(eos_id).reshape(-1))
    ]
    rows = []
    for row in free:
        n = next((i for i, id_ in enumerate(row) if id_ in ends), len(row))
        rows.append(row[: n + 1] + [ends[0]] * (len(row) - n - 1))
    longest = max(next((i for i, id_ in enumerate(row) if id_ in ends), len(row)) for row in rows)
    found = generate(tiny_model64, prompts, 12, temperature=1.0, top_k=4, seed=3, use_cache=use_cache, eos_id=eos_id)
    assert found[:, 2:].tolist() == [row[:longest] for row in rows]


@pytest.mark.parametrize(
    "eos_id", [[], True, [True], -1, [3, -1], [3, 2**63], 1.5, [1.5], "5", "", ["5"], [[5]], [None]], ids=repr
)
def test_what_is_no_id_is_refused(eos_id: Any, tiny_model: GPTModel) -> None:
    with pytest.raises(ValueError, match="eos_id must be a token id of at least 0, or a sequence of such ids, got"):
        generate(tiny_model, torch.tensor([[1]]), 2, eos_id=eos_id)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "config.json",
            {"eos_token_id": "5"},
            "config.json.*eos_token_id must be null, a whole number or a list of whole",
        ),
        ("config.json", {"eos_token_id": [1.5]}, "config.json.*eos_token_id must be"),
        ("config.json", {"pad_token_id": [1]}, "config.json.*pad_token_id must be null, a whole number, got"),
        ("generation_config.json", {"eos_token_id": True}, "generation_config.json.*eos_token_id must be"),
        ("generation_config.json", {"bos_token_id": {}}, "generation_config.json.*bos_token_id must be"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token in tokenizer_config.json must be a string"),
        ("tokenizer_config.json", {"pad_token": {"content": 1}}, "pad_token in tokenizer_config.json must be a string"),
    ],
)
def test_wrong_types_are_refused_with_the_file(file: str, values: Any, message: str, tmp_path: Path) -> None:
    make_directory(tmp_path, lambda directory, id_of: edit_json(directory / file, **values))
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path, "cpu")


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_damaged_settings_are_refused_with_the_file(file: str, content: str, tmp_path: Path) -> None:
    make_directory(tmp_path, lambda directory, id_of: (directory / file).write_text(content))
    with pytest.raises(ValueError, match=file):
        open_model(tmp_path, "cpu")


@pytest.mark.parametrize("own", [CharTokenizer.from_text(TEXT), SimpleTokenizer.from_text(TEXT), BASE])
def test_tokens_that_transformers_adds_to_our_tokenizers_are_kept(own: Any, tmp_path: Path) -> None:
    own.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"eos_token": "</s>", "pad_token": "[PAD]"})
    theirs.add_tokens(["myword", "sat</"])
    theirs.save_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    opened.save(tmp_path / "again")
    for tokenizer in (opened, load_tokenizer(tmp_path / "again")):
        assert (tokenizer.eot_token, tokenizer.pad_token) == (theirs.eos_token_id, theirs.pad_token_id)
        assert tokenizer.n_vocab == len(theirs)
        for text in ("the cat</s>", "myword the</s>[PAD]", "the cat sat</s>", "sat</", "</s>[PAD]"):
            ids = theirs(text)["input_ids"]
            assert tokenizer.encode(text) == ids
            if not isinstance(own, SimpleTokenizer):  # it writes punctuation without a space before it
                assert tokenizer.decode(ids) == theirs.decode(ids)
                expected = theirs.decode(ids, skip_special_tokens=True)
                assert tokenizer.decode(ids, skip_special_tokens=True) == expected


FLAGS = [
    {},
    {"single_word": True},
    {"lstrip": True},
    {"rstrip": True},
    {"lstrip": True, "rstrip": True, "special": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_added_tokens_are_found_as_tokenizers_finds_them(flags: dict[str, bool], tmp_path: Path) -> None:
    from tokenizers import AddedToken as TheirToken

    BASE.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens([TheirToken("fire", **flags), TheirToken("<|x|>", special=True), TheirToken("sat<|", **flags)])
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    texts = (
        "fire",
        " fire ",
        "the fire  burns",
        "firefire",
        "fires fire_ fire",
        "\n fire\t\u3000fire \x1cfire",
        "sat<|x|> fire.",
    )
    for text in texts:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    again = AutoTokenizer.from_pretrained((ours.save(tmp_path / "again"), tmp_path / "again")[1])
    assert repr(again.added_tokens_decoder) == repr(theirs.added_tokens_decoder)


def test_special_tokens_are_no_part_of_a_models_size() -> None:
    sizes = {**GPT_CONFIG, "emb_dim": 24, "n_heads": 3, "n_layers": 1}
    assert len(GPT_CONFIG) == 7
    plain, named = GPTConfig(**sizes), GPTConfig(**sizes, eos_token_id=[3, 5], generation_config={"top_k": 5})
    assert plain == named and hash(plain) == hash(named)
    assert named.eos_token_id == (3, 5) and plain.end_ids == ()


def test_gpt2s_tokenizer_ends_texts_with_its_own_token() -> None:
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.eot_token, tokenizer.bos_token, tokenizer.pad_token) == (50256, 50256, None)
    assert tokenizer.ending_with([11]).eot_token == 11 and tokenizer.eot_token == 50256


def test_a_stream_stops_at_any_of_several_ends(tiny_model64: GPTModel) -> None:
    characters = CharTokenizer([chr(ord("0") + i) for i in range(67)])
    greedy = generate(tiny_model64, torch.tensor([[3, 1]]), 12)[0, 2:].tolist()
    tiny_model64.config = GPTConfig(**{**vars(tiny_model64.config), "eos_token_id": [66, greedy[6]]})
    n = greedy.index(greedy[6])
    texts = list(stream_text(tiny_model64, characters, [3, 1], 12, SamplingConfig()))
    assert "".join(texts) == characters.decode(greedy[:n])
