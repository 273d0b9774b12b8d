"""Continue a prompt with GPT-2, or another model directory, under different sampling options.

python examples/sampling_options.py                     # downloads GPT-2 124M once, 500 MB
python examples/sampling_options.py runs/book           # a model of yours
"""

import sys

import torch

from MyGPT import accelerate, generate, open_model

model, tokenizer = open_model(sys.argv[1] if len(sys.argv) > 1 else "gpt2", device="cpu")
fast = accelerate(model)  # a copy with the same logits up to rounding, which generates faster on a CPU
prompt = torch.tensor([tokenizer.encode("The wizard entered the room")])  # (1, T)

ways = {
    "greedy: always the most likely token": {},
    "temperature 0.7: sharper probabilities": {"temperature": 0.7},
    "temperature 1.2: flatter probabilities": {"temperature": 1.2},
    "top_k 20: the 20 most likely tokens": {"temperature": 1.0, "top_k": 20},
    "top_p 0.9: the fewest tokens with 90 % of the probability": {"temperature": 1.0, "top_p": 0.9},
    "repetition penalty: less of what has appeared": {"temperature": 0.7, "repetition_penalty": 1.2},
}
for name, options in ways.items():
    ids = generate(fast, prompt, max_new_tokens=30, seed=1, **options)
    print(f"--- {name}\n{tokenizer.decode(ids[0].tolist())}")
