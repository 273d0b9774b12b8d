"""Teach a small model an instruction with LoRA, on records like Alpaca's.

    pip install 'mygpt[finetune]'
    python examples/lora_finetuning.py

The base model has random weights, so that the example needs no download: only the falling loss is of interest. With
`GPTModel.from_pretrained("gpt2")` and more records the same lines tune GPT-2.
"""

import torch

from MyGPT import GPTModel, InstructionDataset, collate_instructions, get_tokenizer
from MyGPT.finetuning.lora import add_lora, merge

torch.manual_seed(0)
words = "cat dog owl fox bee ant elk hen cow pig bat rat".split()
records = [{"instruction": "Spell the word.", "input": word, "output": " ".join(word)} for word in words]
tokenizer = get_tokenizer("gpt2")
dataset = InstructionDataset(records, tokenizer)
inputs, targets = collate_instructions([dataset[i] for i in range(len(dataset))], mask_prompt=True)
# Both are (B, T). Prompts and padding are -100 in the targets, which the loss ignores.

model = GPTModel({"context_length": 128, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 50257})
tuned = add_lora(model, r=8, alpha=16, dropout=0.0)
tuned.print_trainable_parameters()
optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
for step in range(30):
    logits = tuned(input_ids=inputs)  # (B, T, V)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 29:
        print(f"step {step}: loss {loss.item():.3f}")

merge(tuned).save_pretrained("runs/spelling", tokenizer)  # an ordinary model directory
