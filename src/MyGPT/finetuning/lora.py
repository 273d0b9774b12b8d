"""LoRA (Hu et al., 2021): each weight W stays frozen, and the product of two thin matrices, added to W, is trained.

LoRALayer, LinearWithLoRA and replace_linear_with_lora show how LoRA works, with the names of appendix E of "Build a
Large Language Model (From Scratch)". `mygpt finetune` uses the other functions, which are based on PEFT and raise an
error where PEFT would silently give wrong results. foreign_adapters.py opens adapters that were saved elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from MyGPT.acceleration.frozen import is_frozen_copy
from MyGPT.config import require_positive
from MyGPT.data.templates import Template
from MyGPT.files import atomic_directory, read_json
from MyGPT.model import GPTModel
from MyGPT.ranks import is_sharded, on_first_rank, whole

if TYPE_CHECKING:
    from peft import PeftModel


class LoRALayer(nn.Module):
    """A layer that maps an input x of shape (..., in_dim) to (alpha / rank) * x @ A @ B, of shape (..., out_dim).

    The matrices A (in_dim, rank) and B (rank, out_dim) are trained. A is initialised with random numbers, as in PEFT. B
    starts at zero, so the output is zero at first. The factor alpha / rank is that of PEFT and of the LoRA paper (Hu et
    al., 2021, section 4.1), so the learning rate need not change with the rank. The printed edition of "Build a Large
    Language Model (From Scratch)" (Raschka, 2024) uses the factor alpha instead: to get its results, pass its alpha
    multiplied by the rank.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        require_positive(rank=rank)
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-1 / math.sqrt(in_dim), 1 / math.sqrt(in_dim)))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha, self.rank = alpha, rank

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha / self.rank * (x @ self.A @ self.B)  # (..., out_dim)


class LinearWithLoRA(nn.Module):
    """A layer that applies a linear layer and a LoRALayer to the same input and returns the sum of their outputs."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Replace every nn.Linear in the model by a LinearWithLoRA with this rank and alpha, in place.

    Call `model.requires_grad_(False)` first, so that only the LoRA matrices are trained.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LinearWithLoRA(module, rank, alpha))


TARGET_MODULES = ("c_attn", "c_proj", "c_fc")
"""The names of the four linear layers of a block (attention and MLP both have a layer called c_proj)."""


@dataclass(frozen=True)
class LoraOptions:
    """The LoRA options of the command line and of config files. Raises ValueError for a value out of range."""

    r: int = 8
    """Rank of the two adapter matrices."""
    alpha: int = 16
    """Scale of the adapter: its output is multiplied by alpha / r."""
    dropout: float = 0.05
    """Dropout probability of the adapter's input in training."""
    targets: list[str] | str = dataclasses.field(default_factory=lambda: list(TARGET_MODULES))
    """Layers that get an adapter: one name, a list such as [c_attn, c_fc], or all-linear."""
    dora: bool = False
    """Use DoRA (Liu et al., 2024): train the length and the direction of each row of a weight matrix separately."""
    rslora: bool = False
    """Multiply the adapter's output by alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023)."""

    def __post_init__(self) -> None:
        sizes: dict[str, Any] = {"lora.r": self.r, "lora.alpha": self.alpha}
        require_positive(**sizes)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and less than 1, got {self.dropout}")
        if not self.targets:
            raise ValueError("lora.targets must name at least one layer, got none")

    def for_peft(self) -> dict[str, Any]:
        """Return the options as a dict of keyword arguments for `add_lora`."""
        is_layer = isinstance(self.targets, str) and self.targets != "all-linear"
        targets = [self.targets] if is_layer else self.targets
        basic = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        return {**basic, "target_modules": targets, "use_dora": self.dora, "use_rslora": self.rslora}


def add_lora(
    model: GPTModel,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    target_modules: str | Iterable[str] = TARGET_MODULES,
    **options: Any,
) -> PeftModel:
    """Freeze `model`, add a new trainable LoRA adapter to it in place, and return the PEFT model.

    A linear layer with the weights W then computes W x + alpha / r * B A dropout(x), where A has r rows and B has r
    columns. B starts at zero, so the model's output is unchanged at first. PEFT's layers compute this in fewer operations than
    usual, with the same results up to rounding (see fused_lora.py).

    Args:
        model: the model; it is changed in place.
        r: the rank of the adapter's matrices.
        alpha: the scale of the adapter.
        dropout: the dropout probability of the adapter's input during training.
        target_modules: the layers that are adapted: a list of the last parts of their names; one text, a regular
            expression for complete names; or "all-linear", all linear layers except the output head.
        options: other options of PEFT's LoraConfig, such as use_rslora, use_dora and modules_to_save.

    Raises:
        ValueError: a name fits no layer, a target is a tied weight, or the model already has an adapter. The model is
            then unchanged.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    from MyGPT.finetuning.fused_lora import fuse

    refuse_adapted(model)
    if target_modules == "all-linear":
        target_modules = TARGET_MODULES  # PEFT would include the output head, except in a model of transformers
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, **options
    )
    # PEFT silently ignores unknown names if at least one name is known.
    wanted = [*(targets if isinstance(targets, list) else []), *(config.modules_to_save or [])]
    layers = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown:
        ends = sorted({layer.rpartition(".")[2] for layer in layers if not layer[-1].isdigit()})
        raise ValueError(f"the model has no layer called {unknown[0]!r}; the layers are {', '.join(ends)}")
    refuse_tied(model, config)
    adapted = get_peft_model(model, config)
    fuse(adapted)
    return adapted


def merge(peft_model: PeftModel) -> GPTModel:
    """Add the active adapters to the model's weights in place, remove PEFT's layers and return the trainable GPTModel.

    If the adapter contains its own output head or token embedding (PEFT's option modules_to_save), these two layers no
    longer share one weight, so tie_weights becomes False in the model's config.
    """
    model = peft_model.get_base_model()
    if not isinstance(model, GPTModel):
        raise ValueError(f"merge needs a PeftModel on a GPTModel, got one on {type(model).__name__}")
    if is_frozen_copy(model):
        way_out = "save the adapter, and open it with open_model(name_or_path, adapter=directory)"
        raise ValueError(f"the adapter cannot be merged into weights that were rounded to bf16 or int8: {way_out}")
    for config in peft_model.peft_config.values():
        refuse_tied(model, config)
    tuner: Any = peft_model.base_model
    tuner.merge_and_unload(safe_merge=True)
    if model.config.tie_weights and model.lm_head.weight is not model.transformer.wte.weight:
        model.config = dataclasses.replace(model.config, tie_weights=False)
    model.name_or_path = None  # no file contains the merged model
    return model.requires_grad_(True)


class KeptAdapter:
    """Saves the LoRA adapter of a training run's best model in the subdirectory `adapter` of the run's directory.

    The prompt template and `base`, the name of the base model, are saved with the adapter.
    """

    def __init__(self, peft_model: PeftModel, base: str, template: Template) -> None:
        self.peft_model = peft_model
        self.template = template
        peft_model.peft_config["default"].base_model_name_or_path = base

    def place(self, run_dir: Path) -> Path:
        return run_dir / "adapter"

    def save(self, run_dir: Path) -> Path:
        """Write the adapter and return its directory. All ranks must call this method if the adapter is sharded."""
        self.save_to(self.place(run_dir))
        return self.place(run_dir)

    def save_to(self, directory: Path) -> None:
        """Write the adapter as `directory`. All ranks must call this method if the adapter is sharded."""
        trained = {name for name, parameter in self.peft_model.named_parameters() if parameter.requires_grad}
        tensors = {name: tensor for name, tensor in self.peft_model.state_dict().items() if name in trained}
        if not any(map(is_sharded, tensors.values())):
            self._write(directory, None)
            return
        gathered = {name: whole(tensor) for name, tensor in tensors.items()}
        on_first_rank(lambda: self._write(directory, gathered))

    def _write(self, directory: Path, tensors: dict[str, Tensor] | None) -> None:
        """Write the adapter, with `tensors` under the names of peft_model.state_dict() if they are given."""
        from safetensors import SafetensorError

        with atomic_directory(directory) as temporary:
            try:
                # By default PEFT asks the hub for the base model's vocabulary size, to decide about saving embeddings.
                self.peft_model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=tensors)
            except SafetensorError as error:  # safetensors reports a full disk this way
                raise OSError(f"cannot write {directory}: {error}") from error
            _sort_config(temporary / "adapter_config.json")
            self.template.save(temporary)

    def restore(self, run_dir: Path) -> None:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(self.peft_model, load_peft_weights(str(self.place(run_dir)), device="cpu"))


def _sort_config(path: Path) -> None:
    """Sort the keys and the lists of names in an adapter_config.json, so that equal adapters have equal files.

    PEFT holds lists such as target_modules as sets, whose order differs from process to process.
    """

    def ordered(value: Any) -> Any:
        return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value

    config = {key: ordered(value) for key, value in read_json(path).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model already has an adapter, because PEFT would only warn and adapt its layers twice."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already has an adapter: merge it, or use its add_adapter or load_adapter")


def refuse_tied(model: GPTModel, config: Any) -> None:
    """Raise ValueError if the adapter would adapt the output head or token embedding while they share one weight.

    Merging such an adapter into one of the two layers would change the other layer too (PEFT issue 2018).
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    tied = ("lm_head", "transformer.wte") if model.config.tie_weights else ()
    for name in tied:
        if check_target_module_exists(config, name):
            raise ValueError(
                f"target_modules={config.target_modules!r} includes {name}, but {' and '.join(tied)} share one weight: "
                f"leave it out, or train a copy with modules_to_save=[{name.rpartition('.')[2]!r}]"
            )
