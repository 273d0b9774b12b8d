"""Test what transformers does with a saved tokenizer and chat template, against our own encode, decode and prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import lively_model
from MyGPT import (
    BPETokenizer,
    CharTokenizer,
    GPTConfig,
    SimpleTokenizer,
    get_tokenizer,
    load_tokenizer,
    open_model,
)
from MyGPT.data.chat_template import chat_template
from MyGPT.data.instructions import InstructionDataset, collate_instructions, encode_question
from MyGPT.data.templates import ALPACA, BOOK, Template
from MyGPT.tokenizers import Tokenizer
from MyGPT.tokenizers.added import AddedToken
from MyGPT.training.run import WholeModel

PIRATE = Template(
    without_input="Captain {output}: {instruction}\nPirate:",
    with_input='Captain "日本" \\ {instruction} ({input})\nPirate:',
    response=" {output} Arr!",
    system="[{content}]\n",
    user="Captain: {content}\n",
    assistant="Pirate:\n{content}~",
    turn_end="\n",
)
MARKED = Template(
    without_input="{instruction}",
    with_input="{input}{instruction}",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{content}",
    turn_end="<|im_end|>\n",
    asks="messages",
)
TEMPLATES = {"alpaca": ALPACA, "book": BOOK, "pirate": PIRATE, "marked": MARKED}
TEMPLATES |= {f"{name} as {asks}": dataclasses.replace(TEMPLATES[name], asks=asks)  # type: ignore[arg-type]
              for name in ("alpaca", "book", "pirate") for asks in ("messages", "prompt")}  # fmt: skip

TURNS = [("user", "Hi there"), ("assistant", "Hello 日本 🙂"), ("user", "And 2 + 2?\n\nQuick!"), ("assistant", "4.")]
TALK = [{"role": role, "content": content} for role, content in TURNS]
SYSTEM = {"role": "system", "content": "Be brief <|endoftext|>."}
TEXTS = st.lists(st.sampled_from([*"ab1 '\n:.#~\x1c\u3000é日²🙂", "'s", "<|endoftext|>", "<|endof", "text|>"]),
                 max_size=6).map("".join)  # fmt: skip


def specials() -> BPETokenizer:
    """A byte-level BPE whose end of text is <|im_end|>, with a token that removes the white space after it."""
    plain = BPETokenizer.train("Hi there, the assistant of the user. " * 9, 290, progress=False)
    vocab = {bytes(token): id_ for token, id_ in plain._vocab.items()}
    added = [AddedToken("<|im_start|>", 290), AddedToken("<|im_end|>", 291), AddedToken("<x>", 292, rstrip=True)]
    tokenizer = BPETokenizer(vocab, plain.merges, plain.special_tokens, added_tokens=added)
    return tokenizer.with_settings({"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module", params=["gpt2", "specials", "words"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and the one that transformers opens from its directory."""
    words = SimpleTokenizer.from_text("Hi there: ### Instruction Response Below is an instruction that describes")
    ours = {"gpt2": get_tokenizer, "specials": specials, "words": lambda: words}[request.param]()
    directory = tmp_path_factory.mktemp(request.param)
    ours.save(directory)
    return ours, transformers.AutoTokenizer.from_pretrained(directory)


def ids_of(theirs: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """Return the ids of apply_chat_template."""
    ids: list[int] = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_of_a_conversation_are_those_of_our_prompt(both: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = both
    theirs.chat_template = chat_template(TEMPLATES[name], ours)
    for talk in (
        TALK[:1],
        [SYSTEM, TALK[0]],
        [SYSTEM, SYSTEM, TALK[2]],
        TALK[:3],
        [SYSTEM, *TALK[:3]],
        [*TALK, TALK[0]],
    ):
        expected = encode_question(TEMPLATES[name].conversation(talk), ours, TEMPLATES[name])
        assert ids_of(theirs, talk, add_generation_prompt=True) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=3, max_size=3), st.sampled_from([*TEMPLATES]), st.booleans())
@example(["Hi ", "", ""], "book", False)
@example(["<x>", " a", "b"], "pirate", True)
@example(["a", "|>", "<|endoftext"], "alpaca as prompt", True)
def test_the_ids_are_ours_or_an_error_says_that_no_text_has_them(
    both: tuple[Tokenizer, Any], texts: list[str], name: str, is_talk: bool
) -> None:
    """Random texts contain special tokens, halves of them, and white space of all kinds at the borders."""
    ours, theirs = both
    theirs.chat_template = chat_template(TEMPLATES[name], ours)
    roles = ("user", "assistant", "user") if is_talk else ("system", "system", "user")
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    expected = encode_question(TEMPLATES[name].conversation(talk), ours, TEMPLATES[name])
    try:
        assert ids_of(theirs, talk, add_generation_prompt=True) == expected
    except jinja2.TemplateError as error:
        assert "no text has the ids" in str(error)


@pytest.mark.parametrize("answer", ["Hello", "日本語", "1.", "\n- a", " spaced", "<|endoftext|>"])
def test_usual_answers_cause_no_error(both: tuple[Tokenizer, Any], answer: str) -> None:
    ours, theirs = both
    if isinstance(ours, SimpleTokenizer) and answer.startswith("<|endof"):
        pytest.skip("an answer of the word tokenizer's end token alone is unusual")
    theirs.chat_template = chat_template(ALPACA, ours)
    ids_of(theirs, [TALK[0], {"role": "assistant", "content": answer}, TALK[2]], add_generation_prompt=True)


def test_an_answer_whose_first_token_would_join_the_prompt_is_refused(both: tuple[Tokenizer, Any]) -> None:
    """GPT-2 has a token ":!", but the prompt ends with ":", and the model began its answer with "!"."""
    ours, theirs = both
    theirs.chat_template = chat_template(ALPACA, ours)
    talk = [TALK[0], {"role": "assistant", "content": "..."}, TALK[2]]
    if isinstance(ours, SimpleTokenizer):  # Each punctuation mark is a token.
        ids_of(theirs, talk, add_generation_prompt=True)
        return
    with pytest.raises(jinja2.TemplateError, match="no text has the ids"):
        ids_of(theirs, talk, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_text_has_the_inputs_targets_and_answers_of_our_examples(
    both: tuple[Tokenizer, Any], name: str
) -> None:
    """TRL trains on such text with assistant_only_loss=True, which needs the mask."""
    ours, theirs = both
    if isinstance(ours, SimpleTokenizer):
        pytest.skip("transformers cannot mark answers that begin with white space, which this tokenizer drops")
    template, answer = TEMPLATES[name], TALK[1]["content"]
    theirs.chat_template = chat_template(template, ours)
    records: list[Any] = [template.question(TALK[0]["content"]), {"messages": TALK}]
    records[0] |= {"output": answer} if template.asks == "instruction" else {"completion": answer}
    if template.asks == "messages":
        records[0] = {"messages": TALK[:2]}
    for record, talk in zip(records, (TALK[:2], TALK), strict=True):
        item = InstructionDataset([record], ours, template)[0]
        _, targets = collate_instructions([item], ours.eot_token, mask_prompt=True)
        found = theirs.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
        )
        assert found["input_ids"] == [*item, ours.eot_token]
        assert [
            id_ if counts else -100 for id_, counts in zip(found["input_ids"], found["assistant_masks"], strict=True)
        ][1:] == targets[0].tolist()


def test_the_template_for_other_programs_has_no_checks(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    theirs.chat_template = chat_template(ALPACA, ours, exact=False)
    assert "generation %" not in theirs.chat_template and "isalpha" not in theirs.chat_template
    talk = [TALK[0], {"role": "assistant", "content": "!"}, TALK[2]]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == ALPACA.for_tokenizer(ours).prompt(ALPACA.conversation(talk))


@pytest.mark.parametrize(
    "message, error",
    [
        ({"role": "tool", "content": "4"}, "the role of a message"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}, "cannot call tools"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "reads only text"),
    ],
)
def test_what_the_model_cannot_read_is_refused(both: tuple[Tokenizer, Any], message: Any, error: str) -> None:
    ours, theirs = both
    theirs.chat_template = chat_template(ALPACA, ours)
    with pytest.raises(jinja2.TemplateError, match=error):
        ids_of(theirs, [message, TALK[0]], add_generation_prompt=True)
    with pytest.raises(jinja2.TemplateError, match="leave out tools"):
        ids_of(theirs, TALK[:1], tools=[{"type": "function", "function": {"name": "add"}}])


def test_developers_are_systems_and_parts_of_a_text_are_joined_as_in_mygpt_serve(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    theirs.chat_template = chat_template(ALPACA, ours)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    new: Any = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    old = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    assert ids_of(theirs, new, add_generation_prompt=True) == ids_of(theirs, old, add_generation_prompt=True)


def test_a_pipeline_continues_our_prompt(tmp_path: Path) -> None:
    tokenizer = specials()
    model = lively_model(GPTConfig(vocab_size=293, context_length=160, emb_dim=16, n_heads=2, n_layers=1))
    place = WholeModel(model, tokenizer, MARKED).save(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(place), return_tensors=True)
    assert pipe.tokenizer.model_max_length == 160
    [found] = pipe([TALK[:3]], max_new_tokens=6, do_sample=False)
    expected = encode_question(MARKED.conversation(TALK[:3]), tokenizer, MARKED)
    assert found[0]["generated_token_ids"][: len(expected)] == expected
    # transformers writes the directory anew; ours opens it again.
    pipe.save_pretrained(tmp_path / "again")
    _, again = open_model(tmp_path / "again", "cpu")
    assert again.encode("Hi <|im_end|>") == tokenizer.encode("Hi <|im_end|>")
    assert (again.eot_token, again.pad_token) == (tokenizer.eot_token,) * 2
    again.save(tmp_path / "third")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "third")
    assert ids_of(theirs, TALK[:3], add_generation_prompt=True) == expected


def test_gpt2s_directory_gives_the_official_ids_and_can_pad(tmp_path: Path) -> None:
    get_tokenizer("gpt2").save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 50257 and theirs.padding_side == "right"
    padded = theirs(["Hello world", "<|endoftext|>"], padding=True)
    assert padded["input_ids"] == [[15496, 995], [50256, 50256]] and padded["attention_mask"] == [[1, 1], [1, 0]]
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.unk_token_id == theirs.pad_token_id == 50256


WORDS = st.lists(
    st.sampled_from(["a", "b", "cat", "日本", "é", *" \t\n\r\x0b\x1c\x85\xa0\u2003", *",.:;?_!\"()'-", "--", "<|unk|>",
                     "<|endoftext|>"]), max_size=12).map("".join)  # fmt: skip
VOCABULARIES = {
    "learned": SimpleTokenizer.from_text("a b cat, 日本 (é) -- it's!"),
    "without unknown": SimpleTokenizer({"a": 0, "b": 1, "cat": 2, ",": 3, "--": 4}),
    "without end": SimpleTokenizer({"a": 0, "b": 1, ",": 2, "<|unk|>": 3}),
    "odd tokens": SimpleTokenizer({"a": 0, "\uffff": 1, "\uffff\uffffb": 2, " ": 3, "##a": 4, "b\x1c": 5, ".": 6}),
    "characters": CharTokenizer("ab \n\r,.é日🙂\x1c"),
    "characters with an end": CharTokenizer("ab \n\r,.é日🙂\x1c", [AddedToken("<|endoftext|>", 11)]),
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def simple(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    directory = tmp_path_factory.mktemp("simple")
    VOCABULARIES[request.param].save(directory)
    return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


@settings(max_examples=30, deadline=None)
@given(WORDS, st.lists(st.integers(0, 20), max_size=12))
def test_words_and_characters_have_the_same_ids_and_texts_in_transformers(
    simple: tuple[Tokenizer, Any], text: str, ids: list[int]
) -> None:
    """An unknown word or character without an unknown token is an error in both."""
    ours, theirs = simple
    try:
        expected = ours.encode(text)
    except ValueError:
        with pytest.raises(Exception, match="UNK"):
            theirs(text)
        expected = []
    else:
        assert theirs(text)["input_ids"] == expected
    for some in (expected, [id_ for id_ in ids if id_ < ours.n_vocab]):
        for skip in (False, True):
            assert theirs.decode(some, skip_special_tokens=skip) == ours.decode(some, skip_special_tokens=skip)


def test_the_vocabulary_has_the_same_size_and_special_tokens(simple: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = simple
    assert len(theirs) == ours.n_vocab
    assert theirs.unk_token_id == (ours.id_of("<|unk|>") if isinstance(ours, SimpleTokenizer) else None)
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eot_token
    theirs.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.to_json()["model"] == ours.to_json()["model"] and again.eot_token == ours.eot_token
    assert again.decode(range(ours.n_vocab)) == ours.decode(range(ours.n_vocab))
