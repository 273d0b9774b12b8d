"""Snapshots: copies of everything on which the next training step depends, from which a run can resume.

The weights, optimizer state, counters and random states are restored. The recipe (config.yaml), the data and the frozen
weights must be unchanged; another machine only causes a warning.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT.training.optim import trained_parameters
from MyGPT.training.state import RunState

_ABSENT = "(absent)"
# The library draws from generators of its own; NumPy's and Python's are saved for users' code, such as their batches.
_numpy_random: Any = np.random


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of a training run between two steps. Training can continue while the copy is written."""

    state: RunState
    weights: dict[str, Tensor]
    """The parameters that require gradients, by name."""
    optimizer: dict[str, Tensor]
    """The optimizer's tensors, with names such as `lm_head.weight/exp_avg`."""
    context: dict[str, dict[str, Any]]
    """JSON values: `lengths` of the logs, `recipe` (config.yaml), hashes of the `data`, `machine`, `random` states."""


TakeSnapshot = Callable[[], Snapshot]


def take_snapshot(
    model: nn.Module, optimizers: list[Optimizer], state: RunState, context: dict[str, dict[str, Any]]
) -> Snapshot:
    """Copy the state of a run to CPU memory. `context` becomes Snapshot.context, with the random states added."""
    weights = trained_parameters(model)
    states = {parameter: by_key for optimizer in optimizers for parameter, by_key in optimizer.state.items()}
    optimizer = {
        f"{name}/{key}": _copy_to_cpu(tensor)
        for name, parameter in weights.items()
        for key, tensor in states.get(parameter, {}).items()
    }
    copies = {name: _copy_to_cpu(parameter) for name, parameter in weights.items()}
    return Snapshot(replace(state), copies, optimizer, {**context, "random": random_states()})


def restore_snapshot(snapshot: Snapshot, model: nn.Module, optimizers: list[Optimizer]) -> RunState:
    """Load a snapshot into the model, its optimizers and the random generators, and return a copy of its RunState.

    Raises ValueError if the parameters of the model that require gradients have other names than those in the snapshot.
    """
    weights = trained_parameters(model)
    if weights.keys() != snapshot.weights.keys():
        raise ValueError(f"the checkpoint of step {snapshot.state.step} trains other parameters than this run")
    with torch.no_grad():
        for name, tensor in snapshot.weights.items():
            weights[name].copy_(tensor)
    by_parameter: dict[Tensor, dict[str, Tensor]] = {}
    for path, tensor in snapshot.optimizer.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(weights[name], {})[key] = tensor
    for optimizer in optimizers:
        content = optimizer.state_dict()  # torch numbers the parameters across all groups.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        content["state"] = {i: by_parameter[it] for i, it in enumerate(trained) if it in by_parameter}
        optimizer.load_state_dict(content)
    restore_random_states(snapshot.context["random"])
    return replace(snapshot.state)


def seed_everything(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch."""
    random.seed(seed)
    _numpy_random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators of Python, NumPy and torch as JSON values."""
    version, integers, gauss = random.getstate()
    kind, keys, *rest = _numpy_random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(integers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # A run on the CPU must not occupy the GPUs.
        states["cuda"] = [_hex(state) for state in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        states["mps"] = _hex(torch.mps.get_rng_state())
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that `random_states` returned. States of devices that this machine lacks are ignored."""
    version, integers, gauss = states["python"]
    random.setstate((version, tuple(integers), gauss))
    kind, keys, *rest = states["numpy"]
    _numpy_random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(state), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(states["mps"]))


def identify(model: nn.Module, train: Any, val: Any, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return {"data": hashes of the data and frozen weights, "machine": torch version, device and thread count}.

    Hashes of the training and validation batches come from the method `fingerprint()` of `train` and `val`. Without
    this method, changed batches go unnoticed when a run is resumed.
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
    """Raise ValueError if the recipe or the data have changed, and return a warning for each change of the machine.

    Args:
        snapshot: the state from which the run is to be resumed.
        context: the current values of what Snapshot.context stores: `recipe` (config.yaml), `data` and `machine`.
        allowed: names of the recipe keys that may differ. It may also contain "data" (the data may differ) and "model" (the
            weights that are not trained may differ).
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


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
