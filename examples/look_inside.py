"""Look inside a model: which earlier tokens each head attends to, and what each layer would predict.

pip install 'mygpt[plots]'
python examples/look_inside.py                          # downloads GPT-2 124M once, 500 MB
python examples/look_inside.py runs/book                # a model of yours
"""

import sys
from pathlib import Path

import torch

from MyGPT import open_model
from MyGPT.inside import ablate_heads, logit_lens, trace
from MyGPT.inside.plots import plot_attention, save_figure

model, tokenizer = open_model(sys.argv[1] if len(sys.argv) > 1 else "gpt2", device="cpu")
ids = torch.tensor([tokenizer.encode("Alice was not a bit hurt, and Alice")])  # (1, T)
tokens = [tokenizer.decode([id_]) for id_ in ids[0].tolist()]

activations = trace(model, ids)
for layer, weights in enumerate(activations.attention[:, 0]):  # (H, T, T)
    strongest = weights[:, -1].max(0).values.argmax().item()  # of the last token, over all heads
    print(f"layer {layer}: the strongest attention of the last token is to {tokens[strongest]!r}")
for layer, logits in enumerate(logit_lens(model, activations)[:, 0, -1]):  # (V,)
    print(f"after {layer} layers the prediction is {tokenizer.decode([logits.argmax().item()])!r}")

before = activations["logits"][0, -1].log_softmax(-1)
with ablate_heads(model, [(0, 0)]):  # layer 0, head 0
    change = trace(model, ids)["logits"][0, -1].log_softmax(-1) - before
print(f"without head 0 of layer 0 a log-probability changes by up to {change.abs().max().item():.3f}")

Path("runs").mkdir(exist_ok=True)
save_figure(plot_attention(activations["h.0.attn.weights"][0], tokens), "runs/attention.png")
