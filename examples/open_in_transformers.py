"""Save a model and open the same directory in transformers, with equal logits.

pip install transformers
python examples/open_in_transformers.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from MyGPT import GPTModel, generate, get_tokenizer

torch.manual_seed(0)
tokenizer = get_tokenizer("gpt2")
sizes = {"context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2, "qkv_bias": True}
model = GPTModel({"vocab_size": tokenizer.n_vocab, **sizes}).eval()
model.save_pretrained("runs/to_transformers", tokenizer)  # config.json, model.safetensors, tokenizer.json

theirs = AutoModelForCausalLM.from_pretrained("runs/to_transformers").eval()
their_tokenizer = AutoTokenizer.from_pretrained("runs/to_transformers")
text = "Down the rabbit hole"
ids = torch.tensor([tokenizer.encode(text)])  # (1, T)
assert their_tokenizer(text)["input_ids"] == ids[0].tolist()
with torch.no_grad():
    difference = (model(ids) - theirs(ids).logits).abs().max().item()
print(f"largest difference of the logits: {difference:.1e}")
assert difference < 1e-4  # float32 rounding

ours = generate(model, ids, max_new_tokens=10)
greedy = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
print(f"the same greedy continuation: {torch.equal(ours, greedy)}")
