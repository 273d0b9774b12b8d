"""Checks before a run is resumed: same recipe, same data, same frozen weights; a different machine gives a warning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import nn

from MyGPT.training.checkpoint import Snapshot

_ABSENT = "(absent)"


def plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe as it reads back from YAML: tuples become lists, for example."""
    return yaml.safe_load(yaml.safe_dump(dict(recipe)))


def identify(model: nn.Module, train: Any, val: Any, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return what must not change when a run is resumed: hashes of its `data`, and a description of its `machine`.

    Args:
        model: the model that is trained. Its frozen weights count as data.
        train: the training batches. Without a method `fingerprint()`, changed data goes unnoticed.
        val: the validation batches, or None.
        device: where the model is trained.
    """
    parts = {"training_data": train, "validation_data": val}
    data = {name: part.fingerprint() for name, part in parts.items() if hasattr(part, "fingerprint")}
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if frozen:
        digest = hashlib.sha256()
        for name, parameter in sorted(frozen.items()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
        data["frozen_weights"] = digest.hexdigest()
    # The last digits of the results depend on the machine.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = {"torch": str(torch.__version__), "device": name, "threads": torch.get_num_threads()}
    return {"data": data, "machine": machine}


def check_unchanged(snapshot: Snapshot, context: Mapping[str, Mapping[str, Any]], allowed: Sequence[str]) -> list[str]:
    """Return one warning for each property of the machine that differs from the checkpoint's.

    Args:
        snapshot: the checkpoint from which the run is resumed.
        context: the `recipe`, `data` and `machine` of the run as it is now, in the form of `Snapshot.context`.
        allowed: recipe keys that may differ; "data" and "model" allow other data and other frozen weights.

    Raises:
        ValueError: the recipe, the data or the frozen weights differ. The message lists all differences.
    """
    before, now = snapshot.context["recipe"], context["recipe"]
    differences = [
        f"{key} was {before.get(key, _ABSENT)!r} and is {now.get(key, _ABSENT)!r}"
        for key in {**before, **now}
        if before.get(key, _ABSENT) != now.get(key, _ABSENT) and key not in allowed
    ]
    for name, fingerprint in context["data"].items():
        key = "model" if name == "frozen_weights" else "data"
        if snapshot.context["data"].get(name) != fingerprint and key not in allowed:
            differences.append(f"{key}: the {name.replace('_', ' ')} differ from those the run began with")
    if differences:
        raise ValueError(
            f"the run cannot be resumed from step {snapshot.state.step}: {'; '.join(differences)} "
            "(--allow_changed KEY resumes it with the changed value, with different results)"
        )
    machine = snapshot.context["machine"]
    return [
        f"{key} was {machine.get(key)} and is {value}: the results may differ in the last digits"
        for key, value in context["machine"].items()
        if machine.get(key) != value
    ]
