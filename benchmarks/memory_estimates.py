"""How close `mygpt info`'s estimates of memory come to what a process really takes.

Each case trains three steps, or generates to the full context, in a process of its own; measured is how far its resident memory
rose. `python benchmarks/memory_estimates.py`; one case: `… --case gpt2_small`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from memory import Peak

from MyGPT import GPT2_CONFIGS, GPT_CONFIG_SMALL, GPTConfig, GPTModel, TrainConfig, Trainer, generate
from MyGPT.memory import generation_bytes, training_memory

TINY = GPTConfig(vocab_size=65, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
CHARACTERS = GPTConfig(vocab_size=65, context_length=256, emb_dim=384, n_heads=6, n_layers=6, drop_rate=0.0)
SMALL = GPTConfig(**{**GPT_CONFIG_SMALL, "drop_rate": 0.0})
SMALL_DROPOUT = GPTConfig(**GPT_CONFIG_SMALL)
GPT2 = GPTConfig(drop_rate=0.0)
# The model, sequences a step, and options of TrainConfig.
TRAINING = {
    "characters, 32 sequences": (CHARACTERS, 32, {}),
    "characters, 32 sequences, bf16": (CHARACTERS, 32, {"precision": "bf16"}),
    "30M, 8 sequences": (SMALL, 8, {}),
    "30M, 8 sequences, bf16": (SMALL, 8, {"precision": "bf16"}),
    "30M, 8 sequences, dropout": (SMALL_DROPOUT, 8, {}),
    "30M, 8 sequences, Muon": (SMALL, 8, {"optimizer": "muon"}),
    "30M, 16 sequences, 4 at a time": (SMALL, 16, {"micro_batch_size": 4}),
    "30M, 32 sequences, checkpointing": (SMALL, 32, {"gradient_checkpointing": True}),
    "124M, 1 sequence": (GPT2, 1, {}),
    "124M, 1 sequence, bf16": (GPT2, 1, {"precision": "bf16"}),
}
GENERATION = {
    "generate, 30M": (SMALL, torch.float32),
    "generate, 124M": (GPT2_CONFIGS["124M"], torch.float32),
    "generate, 124M, bf16": (GPT2_CONFIGS["124M"], torch.bfloat16),
}


def measure(case: str) -> tuple[int, int]:
    """Bytes that were estimated, and that were measured."""
    torch.manual_seed(0)
    train(TINY, TrainConfig(batch_size=1))  # what torch loads at first use is no model's
    if case in GENERATION:
        config, dtype = GENERATION[case]
        with Peak() as peak:
            with torch.device("meta"):
                model = GPTModel(config)
            model = model.to(dtype).to_empty(device="cpu").eval()
            for parameter in model.parameters():
                parameter.data.normal_(std=0.02)
            generate(model, torch.zeros(1, config.context_length - 2, dtype=torch.int64), 2)
        return generation_bytes(config, dtype.itemsize), peak.n_bytes
    config, batch_size, options = TRAINING[case]
    options = {"precision": "fp32", **options}
    with Peak() as peak:
        train(config, TrainConfig(batch_size=batch_size, **options))
    micro = options.get("micro_batch_size", batch_size)
    estimate = training_memory(
        config,
        micro,
        bf16=options["precision"] == "bf16",
        optimizer=options.get("optimizer", "adamw"),
        gradient_checkpointing=options.get("gradient_checkpointing", False),
        accumulates=micro < batch_size,
    )
    return estimate.peak, peak.n_bytes


def train(config: GPTConfig, training: TrainConfig) -> None:
    """Three steps on random ids."""
    ids = torch.randint(config.vocab_size, (10_000,)).numpy()
    trainer = Trainer(GPTModel(config), training, ids, progress=False)
    trainer.setup()
    for _ in range(3):
        trainer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*TRAINING, *GENERATION])
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(measure(case)))
        return
    print(f"{'':<34} {'estimated':>10} {'measured':>10} {'ratio':>6}")
    for case in [*TRAINING, *GENERATION]:
        done = subprocess.run([sys.executable, __file__, "--case", case], capture_output=True, text=True, check=True)
        estimated, measured = json.loads(done.stdout)
        print(f"{case:<34} {estimated / 1e6:>7,.0f} MB {measured / 1e6:>7,.0f} MB {estimated / measured:>6.2f}")


if __name__ == "__main__":
    main()
