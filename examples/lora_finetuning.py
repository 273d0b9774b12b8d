"""Teach a small model an instruction with LoRA, on records like Alpaca's.

    pip install 'mygpt[finetune]'
    python examples/lora_finetuning.py

The base model has random weights, so that the example needs no download: only the falling loss is of interest. With
`MyGPT.open_model("gpt2")` and more records the same lines tune GPT-2.
"""

from importlib.resources import files

import torch
import torch.nn.functional as F

from MyGPT import BPETokenizer, GPTModel, InstructionDataset, collate_instructions
from MyGPT.finetuning.lora import add_lora, merge

torch.manual_seed(0)
text = files("MyGPT").joinpath("assets/alice.txt").read_text(encoding="utf-8")
tokenizer = BPETokenizer.train(text, vocab_size=512, special_tokens=["<|endoftext|>"])
words = "cat dog owl fox bee ant elk hen cow pig bat rat".split()
records = [{"instruction": "Spell the word.", "input": word, "output": " ".join(word)} for word in words]
dataset = InstructionDataset(records, tokenizer)
# Both are (B, T). Prompts and padding are -100 in the targets, which the loss ignores.
inputs, targets = collate_instructions(list(dataset), pad_token_id=tokenizer.eot_token, mask_prompt=True)

sizes = {"context_length": 128, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "init_std": 0.1}
tuned = add_lora(GPTModel({"vocab_size": tokenizer.n_vocab, **sizes}), r=8, alpha=16)  # the base is frozen
optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
for step in range(41):
    loss = F.cross_entropy(tuned(input_ids=inputs).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
merge(tuned).save_pretrained("runs/spelling", tokenizer)  # an ordinary model directory
