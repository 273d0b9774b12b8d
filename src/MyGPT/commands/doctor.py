"""`mygpt doctor`: what works on this machine, how fast it is, and how long each recipe takes."""

from __future__ import annotations

from pathlib import Path


def doctor(recipes: str = "configs", device: str = "auto") -> None:
    """Check this machine: what is installed, what works, how fast it is, and how long each recipe takes.

    The report ends with a remedy for everything that is missing. The check takes about half a minute, in which it compiles a
    small function and runs a few training steps.

    Example:
        mygpt doctor --recipes configs

    Args:
        recipes: A YAML file, or a directory of YAML files.
    """
    from MyGPT.commands._findings import examine
    from MyGPT.devices import pick_device

    fixes = []
    for finding in examine(pick_device(device), Path(recipes)):
        print(f"{finding.label:<16}{finding.text}", flush=True)
        if finding.fix:
            fixes.append(f"  {finding.label.strip()}: {finding.fix}")
    print("\n".join(["\nTo do:", *fixes]) if fixes else "\nNothing is missing.")
