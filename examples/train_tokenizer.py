"""Train a byte-level BPE tokenizer on a text and compare it with GPT-2's.

    python examples/train_tokenizer.py

A tokenizer trained on the text itself needs fewer tokens than another of the same size would. It encodes any other text too.
"""

from importlib.resources import files

from MyGPT import BPETokenizer, get_tokenizer, load_tokenizer

text = files("MyGPT").joinpath("assets/alice.txt").read_text(encoding="utf-8")
n_bytes = len(text.encode("utf-8"))

trained = BPETokenizer.train(text, vocab_size=1024, special_tokens=["<|endoftext|>"])
for name, tokenizer in {"GPT-2's tokenizer": get_tokenizer("gpt2"), "the trained one": trained}.items():
    n_tokens = len(tokenizer.encode(text))
    print(f"{name}: {tokenizer.n_vocab:,} tokens in the vocabulary, {n_bytes / n_tokens:.2f} bytes per token")

sentence = "The Cheshire Cat vanished quite slowly. Déjà vu! 🐱"
ids = trained.encode(sentence)
print([trained.decode([id_]) for id_ in ids])
assert trained.decode(ids) == sentence  # bytes are tokens too, so nothing is ever lost

trained.save("runs/alice_tokenizer")  # tokenizer.json, which transformers opens too
assert load_tokenizer("runs/alice_tokenizer").encode(sentence) == ids
