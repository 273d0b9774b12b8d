"""GGUF files: the package gguf writes and reads them as we do, with other values in every type that loses bits."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from conftest import lively_model, same_weights
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, SimpleTokenizer, get_tokenizer, open_model
from MyGPT.tokenizers.added import AddedToken
from MyGPT.weights.formats import gguf as ours
from MyGPT.weights.formats.gguf import read_tokenizer, write_gguf
from MyGPT.weights.layout import gguf_names

TEXT = "the cat sat on the mat, and the dog sat by the cat: it was 12 o'clock. "
CONFIG = GPTConfig(vocab_size=272, context_length=16, emb_dim=64, n_heads=4, n_layers=2, drop_rate=0.1, qkv_bias=True)
IDS = torch.tensor([[3, 14, 200, 260]])


def tokenizer(chat_template: str | None = None) -> BPETokenizer:
    """Return a tokenizer with a gap in its ids, an added word and a second special token."""
    trained = BPETokenizer.train(TEXT, 264, progress=False)
    added = [AddedToken("<|endoftext|>", 263), AddedToken("<|user|>", 266), AddedToken("catnip", 268, special=False)]
    model = trained.to_json()["model"]
    vocab = {token: id_ for token, id_ in model["vocab"].items() if id_ < 263}
    from MyGPT.tokenizers.bpe import from_visible

    settings = {"eos_token": "<|user|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings |= {"chat_template": chat_template} if chat_template else {}
    return from_visible(vocab, model["merges"], added).with_settings(settings)


@pytest.fixture(scope="module")
def words() -> BPETokenizer:
    return tokenizer("{{ bos_token }}{{ messages[0].content }}")


def export(model: GPTModel, path: Path, words: Any, dtype: Any = "f32") -> list[str]:
    return write_gguf(model, path, words, dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_file_opens_as_the_model_that_was_written(
    tied: bool, qkv_bias: bool, words: BPETokenizer, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, tie_weights=tied, qkv_bias=qkv_bias, layer_norm_eps=1e-6)
    model = lively_model(config)
    assert export(model, tmp_path / "model.gguf", words) == []
    opened, read = open_model(tmp_path / "model.gguf", device="cpu")
    assert opened.config == config
    assert same_weights(opened, model)
    assert opened.config.end_ids == (266,)
    assert read.to_json() == words.to_json()
    for name in ("eot_token", "bos_token", "pad_token"):
        assert getattr(read, name) == getattr(words, name)
    assert read.settings["chat_template"] == words.settings["chat_template"]
    text = f"{TEXT}<|endoftext|>a catnip\n\n  <|user|> é 😀"
    assert read.encode(text) == words.encode(text)
    opened.save_pretrained(tmp_path / "model", read)
    again, read_again = open_model(tmp_path / "model", device="cpu")
    assert same_weights(again, model)
    assert (read_again.eot_token, read_again.encode(text)) == (words.eot_token, words.encode(text))


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", None)])
def test_smaller_types_open_with_the_values_that_the_package_gguf_reads(
    dtype: Any, tolerance: float | None, words: BPETokenizer, tmp_path: Path
) -> None:
    model = lively_model(CONFIG)
    export(model, tmp_path / "model.gguf", words, dtype)
    opened = GPTModel.from_pretrained(tmp_path / "model.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights, n_rounded = model.state_dict(), 0
    for name, tensor in opened.state_dict().items():
        stored = theirs.get(gguf_names(weights)[name])
        if stored is None:
            assert name == "lm_head.weight"
            continue
        read = torch.from_numpy(gguf.quants.dequantize(np.array(stored.data), stored.tensor_type))
        assert torch.equal(tensor, read)
        if tolerance is not None:
            torch.testing.assert_close(tensor, weights[name], rtol=tolerance, atol=1e-7)
        n_rounded += not torch.equal(tensor, weights[name])
    assert n_rounded == 1 + 4 * CONFIG.n_layers  # the token embedding and the matrices of each block


def test_rows_that_no_block_fits_are_stored_in_f16_and_a_note_says_so(tmp_path: Path) -> None:
    model = lively_model(dataclasses.replace(CONFIG, emb_dim=24, n_heads=3))
    notes = export(model, tmp_path / "model.gguf", tokenizer(), "q8_0")
    assert notes == ["7 matrices are stored in f16, because their rows are not a multiple of 32 long"]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (types["token_embd.weight"], types["blk.1.ffn_down.weight"]) == ("F16", "Q8_0")
    with torch.no_grad():
        opened = GPTModel.from_pretrained(tmp_path / "model.gguf")
        assert (opened(IDS) - model(IDS)).norm() < 0.02 * model(IDS).norm()


def write_foreign(path: Path, model: GPTModel, kind: gguf.GGMLQuantizationType, **values: Any) -> None:
    """Write a file as other converters do: without our keys, and with the token embedding also as output.weight."""
    writer = gguf.GGUFWriter(path, values.pop("arch", "gpt2"))
    config = model.config
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    for key, value in values.items():
        getattr(writer, f"add_{key}")(value)
    names = gguf_names(model.state_dict())
    for name, tensor in model.state_dict().items():
        is_small = tensor.dim() == 1 or name == "transformer.wpe.weight"
        stored = gguf.GGMLQuantizationType.F32 if is_small else kind
        writer.add_tensor(names[name], gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q5_1"])
def test_a_file_of_another_converter_opens(kind: str, tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    write_foreign(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[kind])
    opened = GPTModel.from_pretrained(tmp_path / "model.gguf")
    assert opened.config == CONFIG
    expected = model.transformer.h[0].mlp.c_fc.weight.detach()
    quantized = gguf.quants.quantize(expected.numpy(), gguf.GGMLQuantizationType[kind])
    read = torch.from_numpy(gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(opened.transformer.h[0].mlp.c_fc.weight, read)


def test_a_type_that_needs_the_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_foreign(tmp_path / "q4.gguf", lively_model(CONFIG), gguf.GGMLQuantizationType.Q4_0)
    write_foreign(tmp_path / "q8.gguf", lively_model(CONFIG), gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    GPTModel.from_pretrained(tmp_path / "q8.gguf")
    with pytest.raises(ValueError, match=r"the type 2 of token_embd.weight needs the package gguf: pip install 'mygpt"):
        GPTModel.from_pretrained(tmp_path / "q4.gguf")
    with pytest.raises(ValueError, match="writing a GGUF file needs the package gguf"):
        export(lively_model(CONFIG), tmp_path / "new.gguf", None)


def test_foreign_architectures_parts_and_tokenizers_are_refused(tmp_path: Path) -> None:
    model, path = lively_model(CONFIG), tmp_path / "model.gguf"
    write_foreign(path, model, gguf.GGMLQuantizationType.F32, arch="llama")
    with pytest.raises(ValueError, match=r"model.gguf contains a model of the architecture 'llama'"):
        GPTModel.from_pretrained(path)
    write_foreign(path, model, gguf.GGMLQuantizationType.F32, tokenizer_model="llama")
    with pytest.raises(ValueError, match=r"model.gguf has a tokenizer of the model 'llama'"):
        open_model(path, device="cpu")
    write_foreign(path, model, gguf.GGMLQuantizationType.F32, tokenizer_model="gpt2", tokenizer_pre="llama-bpe")
    with pytest.raises(ValueError, match="the pre-tokenizer 'llama-bpe'"):
        open_model(path, device="cpu")
    write_foreign(path, model, gguf.GGMLQuantizationType.F32, tokenizer_model="none")
    with pytest.raises(ValueError, match="has no tokenizer"):
        open_model(path, device="cpu")


@pytest.mark.parametrize("cut", [4, 8, 23, 60, 200, 3000, 12_000, -1])
def test_a_truncated_file_is_one_sentence(cut: int, words: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export(lively_model(CONFIG), path, words)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model.gguf( is not a valid GGUF file)?: it"):
        GPTModel.from_pretrained(path)


def test_a_damaged_header_is_read_or_refused(words: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export(lively_model(CONFIG), path, words)
    whole, start = path.read_bytes(), ours._read_header(path).data_start
    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        data = bytearray(whole)
        data[generator.integers(4, start)] = generator.choice([0, 1, 7, 127, 255])
        path.write_bytes(data)
        try:
            open_model(path, device="cpu")
        except (ValueError, UserWarning) as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: CharTokenizer(sorted(set(TEXT))), "no tokenizer like CharTokenizer"),
        (lambda: SimpleTokenizer.from_text(TEXT), "no tokenizer like SimpleTokenizer"),
        (lambda: BPETokenizer.train(TEXT, 258, [], progress=False), "requires a token that ends a text"),
        (lambda: BPETokenizer.train(TEXT, 257, progress=False), "at least one merge"),
        (lambda: get_tokenizer("gpt2"), "50,257 tokens, but the model has only 272"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_express_are_refused(made: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        export(lively_model(CONFIG), tmp_path / "model.gguf", made())
    assert not any(tmp_path.iterdir())


def test_weights_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight contains 1000000, which exceeds the range of f16"):
        export(model, tmp_path / "model.gguf", None, "f16")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight contains numbers that are not finite"):
        export(model, tmp_path / "model.gguf", None)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_a_file_that_differs_from_the_model_is_not_kept(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that changes one weight by a little more than the type's rounding is noticed."""
    write = gguf.GGUFWriter.write_tensor_data

    def wrong(self: Any, data: Any, *rest: Any) -> None:
        changed = np.array(data)
        changed.reshape(-1).view(np.uint8)[2] ^= 4
        write(self, changed, *rest)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", wrong)
    with pytest.raises(ValueError, match="in the file that was written differs from the model"):
        export(lively_model(CONFIG), tmp_path / "model.gguf", None, dtype)
    assert not any(tmp_path.iterdir())


def test_several_ends_and_the_exact_gelu_survive(words: BPETokenizer, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, eos_token_id=(266, 263), activation="gelu")
    notes = export(lively_model(config), tmp_path / "model.gguf", words)
    assert len(notes) == 1 and "approximates GELU" in notes[0]
    opened = GPTModel.from_pretrained(tmp_path / "model.gguf")
    assert (opened.config.end_ids, opened.config.activation) == ((266, 263), "gelu")


@pytest.mark.slow
def test_gpt2s_own_tokenizer_survives(tmp_path: Path, alice: str) -> None:
    """The vocabulary is rounded up, as in nanoGPT; the ids without a token stay without one."""
    config = GPTConfig(vocab_size=50304, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    gpt2 = get_tokenizer("gpt2")
    export(GPTModel(config), tmp_path / "model.gguf", gpt2)
    read = read_tokenizer(tmp_path / "model.gguf")
    assert read is not None
    assert read.n_vocab == gpt2.n_vocab == 50257
    assert read.encode(alice + "<|endoftext|>") == gpt2.encode(alice + "<|endoftext|>")
