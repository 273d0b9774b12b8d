"""Compare a LoRA training step on a random GPT-2 124M: MyGPT and transformers, both through PEFT.

Usage: python benchmarks/lora.py [--batch_size 4] [--length 256] [--steps 4] [--rounds 3] [--precision fp32 bf16] [--busy]
       [--out DIR]

Both use the same weights, adapters and batches, AdamW, no dropout and eager mode. Each program runs in its own process,
in turn. The first step of each warms up. The losses are compared step by step. Memory is the peak minus the memory of
the imported libraries. In float32, MyGPT is also measured with frozen weights in int8 and bf16. --busy is for a machine that
runs other work: it uses one thread and measures CPU time instead of wall time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

from measurements import Results, in_a_process, parse, rounds
from memory import Peak
from tables import show

TARGETS = ["c_attn", "c_proj", "c_fc"]
FROZEN: Any = {"MyGPT": "fp32", "MyGPT, frozen int8": "int8", "MyGPT, frozen bf16": "bf16"}
"""The dtypes of the frozen weights of MyGPT's variants."""


def measure(
    program: str, directory: str, batch_size: int, length: int, steps: int, precision: str, busy: bool
) -> dict[str, Any]:
    """Return the losses, the seconds of each step and the peak bytes of a program in this process."""
    import torch

    clock = time.perf_counter
    if busy:
        torch.set_num_threads(1)
        clock = time.process_time
    if program == "transformers":
        from peft import LoraConfig, TaskType, get_peft_model
        from transformers import GPT2LMHeadModel
    else:
        import peft  # noqa: F401  the memory of imported libraries is not counted

        from MyGPT import GPTModel
        from MyGPT.acceleration.frozen import compiled_kernel, freeze
        from MyGPT.acceleration.linear import fast_linear
        from MyGPT.finetuning.lora import add_lora

        compiled_kernel()
    with Peak() as whole:
        is_theirs = program == "transformers"
        model: Any
        if is_theirs:
            lora = LoraConfig(
                task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS,
                fan_in_fan_out=True,
            )  # fmt: skip
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32), lora)
        else:
            base = GPTModel.from_pretrained(directory, dtype=torch.float32)
            for module in base.modules():
                if hasattr(module, "drop_rate"):
                    module.drop_rate = 0.0
            del module  # the old output head, which would keep the file of the weights mapped
            freeze(base, FROZEN[program])
            model = add_lora(base, dropout=0.0)
            del base
        model.train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # both programs get the same A; B starts at zero
            for name, parameter in sorted(model.named_parameters()):
                if "lora_A" in name:
                    parameter.uniform_(-0.03, 0.03, generator=generator)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        batches = torch.randint(0, 50257, (steps + 1, batch_size, length + 1), generator=generator)
        losses, seconds = [], []
        for batch in batches:
            start = clock()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                if is_theirs:
                    loss = model(input_ids=batch, labels=batch).loss
                else:
                    with fast_linear():
                        total, count = model.token_loss(batch[:, :-1], batch[:, 1:])
                    loss = total / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seconds.append(clock() - start)
    return {"losses": losses, "seconds": seconds[1:], "bytes": whole.n_bytes}


def write_model(directory: str) -> None:
    import torch

    from MyGPT import GPT2_CONFIGS, GPTModel

    torch.manual_seed(1)
    import dataclasses

    GPTModel(dataclasses.replace(GPT2_CONFIGS["124M"], drop_rate=0.0)).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--busy", action="store_true", help="use one thread and measure CPU time")
    options = parse(parser, measure, rounds=3)
    settings = {"size": "124M", "batch_size": options.batch_size, "length": options.length, "busy": options.busy}
    results = Results("lora", settings, ["transformers", "peft"])
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory)
        for precision in options.precision:
            compare(directory, precision, options, results)
    show(results)


def compare(directory: str, precision: str, options: argparse.Namespace, results: Results) -> None:
    programs = (*(FROZEN if precision == "fp32" else ["MyGPT"]), "transformers")
    for program in programs[:-1]:
        results.compare(program, "transformers", f"step, {precision}", target=0.7)
        results.compare(program, "transformers", f"memory, {precision}", target=0.45)
    for _ in rounds(options, share=1 / len(options.precision)):
        for program in programs:
            run = in_a_process(
                measure, program=program, directory=directory, batch_size=options.batch_size, length=options.length,
                steps=options.steps, precision=precision, busy=options.busy,
            )  # fmt: skip
            results.add(program, f"step, {precision}", "s", *run["seconds"])
            results.add(program, f"memory, {precision}", "bytes", run["bytes"])
            if results.get(program, f"losses, {precision}") is None:
                results.add(program, f"losses, {precision}", "nats", *run["losses"])
            print(f"{program}: {statistics.median(run['seconds']):.2f} s per step", file=sys.stderr)
        results.save(options.out)


if __name__ == "__main__":
    main()
