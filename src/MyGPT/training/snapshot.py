"""Snapshots: copies of everything on which the next training step depends, from which a run can resume.

The weights, optimizer state, counters and random states are restored. The recipe (config.yaml), the data and the frozen
weights must be unchanged; another machine only causes a warning.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT.data.sampler import KEYED
from MyGPT.model import GPTModel
from MyGPT.ranks import reshard, whole, world_size
from MyGPT.training.config import TrainConfig
from MyGPT.training.optim import Muon, make_optimizers, trained_parameters
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.weights.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOGS = ("metrics.jsonl", "samples.txt")
"""The files in a run's directory to which each step may append. A resumed run cuts them back to the checkpoint's step."""
_CONTEXT = ("lengths", "recipe", "data", "machine", "random")
_ARCHITECTURE = (
    "vocab_size context_length emb_dim n_heads n_layers qkv_bias tie_weights activation layer_norm_eps"
).split()
_ABSENT = "(absent)"
_WITHOUT_EFFECT = ("parallel", "shard_size", "timeout_minutes", "log_to", "tensorboard")
"""Keys of a recipe that do not change the results of a run."""
_DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}
# The library draws from generators of its own; NumPy's and Python's are saved for users' code, such as their batches.
_numpy_random: Any = np.random


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of a training run between two steps. Training can continue while the copy is written."""

    state: RunState
    weights: dict[str, Tensor]
    """The parameters that require gradients, by name. Of a DTensor, each rank holds its own rows."""
    optimizer: dict[str, Tensor]
    """The optimizer's tensors, with names such as `lm_head.weight/exp_avg`."""
    context: dict[str, dict[str, Any]]
    """JSON values: `lengths` of the logs, `recipe` (config.yaml), hashes of the `data`, `machine`, `random` states."""
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    """The tensors in the files of a checkpoint that several ranks read, by name.

    `weights` and `optimizer` then hold only shapes and dtypes (the device is "meta"), because each rank reads its own
    rows in `restore_snapshot`.
    """


TakeSnapshot = Callable[[], Snapshot]


def take_snapshot(
    model: nn.Module, optimizers: list[Optimizer], state: RunState, context: dict[str, dict[str, Any]]
) -> Snapshot:
    """Copy the state of a run to CPU memory. `context` becomes Snapshot.context, with the random states added.

    If the parameters are DTensors, each rank copies its own rows.
    """
    reshard(model)
    weights = trained_parameters(model)
    states = {parameter: by_key for optimizer in optimizers for parameter, by_key in optimizer.state.items()}
    optimizer = {
        f"{name}/{key}": _copy_to_cpu(tensor)
        for name, parameter in weights.items()
        for key, tensor in states.get(parameter, {}).items()
    }
    copies = {name: _copy_to_cpu(parameter) for name, parameter in weights.items()}
    return Snapshot(replace(state), copies, optimizer, {**context, "random": random_states()})


def read_context(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return Snapshot.context from the values in state.json, after checking their types. Other keys are ignored.

    Raises:
        IncompatibleCheckpointError: a key is missing.
        ValueError: a value has the wrong type.
    """
    if missing := [name for name in _CONTEXT if name not in values]:
        raise IncompatibleCheckpointError(f"it lacks {', '.join(missing)}, so another version of MyGPT wrote it")
    for name in _CONTEXT:
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} must be a JSON object, got {values[name]!r:.80}")
    for name, length in values["lengths"].items():
        if name not in LOGS or type(length) is not int or not 0 <= length < 2**63:
            allowed = f"the sizes of {' and '.join(LOGS)} in bytes"
            raise ValueError(f"lengths must contain only {allowed}, got {name!r:.80}: {length!r:.80}")
    try:
        _restore(values["random"], random.Random(), _numpy_random.RandomState(), torch.Generator())
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
        raise ValueError(f"random must hold the states of the random generators: {error!s:.200}") from None
    return {name: values[name] for name in _CONTEXT}


def check_fit(model: nn.Module, config: TrainConfig, snapshot: Snapshot) -> None:
    """Raise ValueError unless the tensors of the snapshot fit the trained parameters of `model` and their optimizers."""
    parameters, state = trained_parameters(model), snapshot.state
    if names := sorted(parameters.keys() ^ snapshot.weights.keys()):
        where = "only this run" if names[0] in parameters else "only the checkpoint"
        raise ValueError(f"it trains other parameters than this run: {where} has {names[0]}")
    found: dict[str, set[str]] = {name: set() for name in parameters}
    expected = {name: (tensor, parameters[name].shape) for name, tensor in snapshot.weights.items()}
    for path, tensor in snapshot.optimizer.items():
        name, _, key = path.rpartition("/")
        if name not in found:
            raise ValueError(f"the optimizer state {path} belongs to no trained parameter")
        found[name].add(key)
        expected[path] = tensor, torch.Size() if key == "step" else parameters[name].shape
        if key == "step" and tensor.shape == () and not 1 <= float(tensor) <= state.step:
            raise ValueError(f"{path} must be from 1 to the step {state.step}, got {float(tensor)}")
    for path, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{path} has the shape {tuple(tensor.shape)}, this run needs {tuple(shape)}")
    if state.step > state.n_skipped and not snapshot.optimizer:
        raise ValueError(f"it has no optimizer state after {state.step} steps")
    names_of = {parameter: name for name, parameter in parameters.items()}
    for optimizer in make_optimizers(model, config):
        keys = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        for name in (names_of[parameter] for group in optimizer.param_groups for parameter in group["params"]):
            if found[name] not in (set(), keys):  # A parameter that never had a gradient has no state.
                required = f"this run needs {', '.join(sorted(keys))}"
                raise ValueError(f"the optimizer state of {name} is {', '.join(sorted(found[name]))}; {required}")


def restore_snapshot(
    snapshot: Snapshot, model: nn.Module, optimizers: list[Optimizer], group: ProcessGroup | None = None
) -> RunState:
    """Load a snapshot into the model, its optimizers and the random generators, and return a copy of its RunState.

    The snapshot must have passed `check_fit`. If several ranks have read it, all ranks must call this function with the
    `group` that they gave to `read_newest`. Each rank then reads the rows of its own parameters and optimizer states.
    """
    reshard(model)
    weights: dict[str, Tensor] = {name: it.detach() for name, it in trained_parameters(model).items()}
    optimizer = snapshot.optimizer
    if group is None:
        for name, tensor in snapshot.weights.items():
            weights[name].copy_(tensor)
    else:
        from MyGPT.training.shards import load_shards, on_all_ranks

        optimizer = {
            path: tensor.clone() if tensor.shape == () else torch.empty_like(weights[path.rpartition("/")[0]])
            for path, tensor in snapshot.optimizer.items()
        }
        targets = weights | {path: tensor for path, tensor in optimizer.items() if tensor.shape != ()}
        on_all_ranks(group, lambda: load_shards(targets, snapshot.stored))
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, tensor in optimizer.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    names = {parameter: name for name, parameter in trained_parameters(model).items()}
    for one in optimizers:
        content = one.state_dict()  # torch numbers the parameters across all groups.
        trained = [names[parameter] for group in one.param_groups for parameter in group["params"]]
        content["state"] = {i: by_name[name] for i, name in enumerate(trained) if name in by_name}
        one.load_state_dict(content)
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
    _restore(states, random, _numpy_random, torch.default_generator)
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(state), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(states["mps"]))


def _restore(states: Mapping[str, Any], python: Any, numpy: Any, generator: torch.Generator) -> None:
    """Set Python's, NumPy's and torch's random generator to the states that `random_states` returned.

    A damaged state raises ValueError, TypeError, LookupError, OverflowError or RuntimeError.
    """
    version, integers, gauss = states["python"]
    if not isinstance(gauss, (float, NoneType)):
        raise TypeError(f"python's last value must be a number or null, got {gauss!r}")
    python.setstate((version, tuple(integers), gauss))
    kind, keys, position, has_gauss, cached_gaussian = states["numpy"]
    if type(position) is not int or not 0 <= position <= 624:  # NumPy would read memory outside of its state.
        raise ValueError(f"numpy's position must be from 0 to 624, got {position!r}")
    numpy.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached_gaussian))
    generator.set_state(_from_hex(states["torch"]))
    for text in (*states.get("cuda", ()), *([states["mps"]] if "mps" in states else [])):
        _from_hex(text)


def identify(model: GPTModel, train: Any, val: Any, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return {"data": hashes of the data and the model, "machine": torch version, device, threads and ranks}.

    If the frozen weights are DTensors, all ranks must call this function.

    The model is identified by its frozen weights or, if it has none, by its architecture. Hashes of the training and
    validation batches come from the method `fingerprint()` of `train` and `val`. Without this method, changed batches
    go unnoticed when a run is resumed.
    """
    parts = {"training_data": train, "validation_data": val}
    data = {name: part.fingerprint() for name, part in parts.items() if hasattr(part, "fingerprint")}
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if frozen:
        digest = hashlib.sha256()
        for name, parameter in sorted(frozen.items()):
            digest.update(name.encode())
            digest.update(whole(parameter).detach().cpu().flatten().view(torch.uint8).numpy().data)
        data["frozen_weights"] = digest.hexdigest()
    else:
        architecture = {name: getattr(model.config, name) for name in _ARCHITECTURE}
        data["architecture"] = hashlib.sha256(repr(architecture).encode()).hexdigest()
    own = getattr(model, "parts", None)  # a classifier has none
    if own is not None:
        data["custom_parts"] = own.sha256 or ", ".join(own.used)
    # The last digits of the results depend on the machine.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = {"torch": str(torch.__version__), "device": name, "threads": torch.get_num_threads()}
    machine["ranks"] = world_size()
    return {"data": data, "machine": machine}


def check_unchanged(snapshot: Snapshot, context: Mapping[str, Mapping[str, Any]], allowed: Sequence[str]) -> list[str]:
    """Refuse a run whose recipe or data have changed, and return a warning for each change of the machine.

    Files are compared by their content: a path in the recipe may change if the data or the model behind it are the same.

    Args:
        snapshot: the state from which the run is to be resumed.
        context: the current values of what Snapshot.context stores: `recipe` (config.yaml), `data` and `machine`.
        allowed: names of the recipe keys that may differ. It may also contain "data_content" (the training and
            validation data may differ) and "model_content" (the weights that are not trained may differ).

    Raises IncompatibleCheckpointError if a value has changed that may not differ.
    """
    before, now = snapshot.context["recipe"], context["recipe"]
    saved, current = snapshot.context["data"], context["data"]
    keys = {"training_data": "data_content", "validation_data": "data_content", "frozen_weights": "model_content"}
    changed = {name: keys[name] for name in keys if name in current and saved.get(name) != current[name]}
    if saved.get("custom_parts") != current.get("custom_parts"):
        changed["custom_parts"] = "with"
    same_data = "training_data" in current and ("data_content" in allowed or "data_content" not in changed.values())
    same_model = (
        "frozen_weights" in current and ("model_content" in allowed or "frozen_weights" not in changed)
    ) or saved.get("architecture", _ABSENT) == current.get("architecture")
    # A tokenizer or template may also be given by a name such as "bpe", which is not a path that can move.
    moved = {"data": same_data, "model": same_model, "with": "custom_parts" not in changed} | {
        key: same_data and Path(str(now.get(key))).exists() for key in ("tokenizer", "template")
    }
    values = {  # An earlier version did not know every option. Its runs behaved as the defaults do.
        key: (before.get(key, _DEFAULTS.get(key, _ABSENT)), now.get(key, _ABSENT)) for key in {**before, **now}
    }
    free = {*allowed, *_WITHOUT_EFFECT, *(key for key, has_moved in moved.items() if has_moved)}
    differences = [
        f"{key} was {was!r:.80} and is {is_now!r:.80}"
        for key, (was, is_now) in values.items()
        if was != is_now and key not in free
    ]
    differences += [
        f"{key}: the {name.replace('_', ' ')} {_kind_of_change(saved.get(name), current.get(name))}"
        for name, key in changed.items()
        if key not in allowed
    ]
    if differences:
        raise IncompatibleCheckpointError(
            f"the run cannot be resumed from step {snapshot.state.step}: {'; '.join(differences)} "
            "(--allow_changed KEY resumes it with the changed value, with different results)"
        )
    machine = {"ranks": 1, **snapshot.context["machine"]}  # Earlier versions had only one rank.
    return [
        f"{key} was {machine.get(key)!s:.80} and is {value}: the results may differ in the last digits"
        for key, value in context["machine"].items()
        if machine.get(key) != value
    ]


def _kind_of_change(before: object, now: object) -> str:
    """Return the end of an error message about data whose fingerprint has changed."""
    if now == f"{before}{KEYED}":
        return (
            "are the same, but this version of MyGPT shuffles so many windows in another order than the run began with"
        )
    return "differ from those the run began with"


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)  # ValueError for an empty text
