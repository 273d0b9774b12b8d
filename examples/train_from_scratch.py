"""Train a tiny GPT on "Alice's Adventures in Wonderland", character by character, and let it write.

    python examples/train_from_scratch.py

The loss of a model that knows nothing is log(vocabulary size), about 4.3 here. More epochs write better text.
"""

from importlib.resources import files

import torch

from MyGPT import CharTokenizer, GPTModel, create_dataloader, generate, train_model_simple

torch.manual_seed(0)
text = files("MyGPT").joinpath("assets/alice.txt").read_text(encoding="utf-8")
split = int(0.9 * len(text))
tokenizer = CharTokenizer.from_text(text)
train_loader = create_dataloader(text[:split], batch_size=16, max_length=64, tokenizer=tokenizer, seed=0)
val_loader = create_dataloader(text[split:], batch_size=16, max_length=64, tokenizer=tokenizer, shuffle=False)

sizes = {"context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0, "init_std": 0.05}
model = GPTModel({"vocab_size": tokenizer.n_vocab, **sizes})
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
train_losses, val_losses, _ = train_model_simple(
    model, train_loader, val_loader, optimizer, "cpu", num_epochs=1, eval_freq=40
)
print(f"{model.num_parameters():,} parameters, {len(train_loader)} steps")
print(f"validation loss {val_losses[0]:.2f} at the first step, {val_losses[-1]:.2f} at the last evaluation")

prompt = torch.tensor([tokenizer.encode("Alice was ")])
ids = generate(model, prompt, max_new_tokens=200, temperature=0.8, seed=1)
print(tokenizer.decode(ids[0].tolist()))
