"""`mygpt doctor`: what works on this machine, how fast it is, and how long each recipe takes."""

from __future__ import annotations

from pathlib import Path


def doctor(recipes: str = "configs", device: str = "auto") -> None:
    """Check this machine: what is installed, what works, how fast it is, and how long each recipe takes.

    A recipe is a YAML file of training options. The report ends with a solution for each problem. The check compiles a small
    function and runs a few training steps, which takes about half a minute. Under torchrun, it also shows the ranks
    (processes), measures how fast they communicate, and estimates the time that they need for a recipe together.

    Examples:
        mygpt doctor --recipes configs
        torchrun --nproc-per-node 2 -m MyGPT doctor --recipes configs/quickstart.yaml

    Args:
        recipes: A recipe, or a directory of recipes.
    """
    from MyGPT import ranks
    from MyGPT.commands._findings import examine
    from MyGPT.devices import pick_device

    ranks.join()
    fixes = []
    for finding in examine(pick_device(device), Path(recipes)):
        print(f"{finding.label:<16}{finding.text}", flush=True)
        if finding.fix:
            fixes.append(f"  {finding.label.strip()}: {finding.fix}")
    print("\n".join(["\nTo do:", *fixes]) if fixes else "\nNothing is missing.")
