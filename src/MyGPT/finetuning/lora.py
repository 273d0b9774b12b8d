"""LoRA (Hu et al., 2021): a weight W stays frozen, and the product of two thin matrices is trained beside it.

The first part is LoRA written out to be read, with the names of "Build a Large Language Model (From Scratch)",
appendix E; the rest does not use it. The second part uses PEFT: `add_lora` and `merge` refuse what PEFT would silently
do wrong. Opening an adapter that was saved elsewhere is in foreign_adapters.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from MyGPT.config import require_positive
from MyGPT.data.templates import Template
from MyGPT.files import atomic_directory
from MyGPT.model import GPTModel

if TYPE_CHECKING:
    from peft import PeftModel


class LoRALayer(nn.Module):
    """The trainable product (alpha / rank) x A B, with A (in_dim, rank) and B (rank, out_dim).

    B starts at zero, so the layer adds nothing at first. A is initialised as in PEFT. The factor alpha / rank follows the
    paper (section 4.1) and PEFT, so the learning rate need not change with the rank. The book multiplies by alpha: pass
    alpha * rank to get its results.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        require_positive(rank=rank)
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-1 / math.sqrt(in_dim), 1 / math.sqrt(in_dim)))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A @ self.B)  # (..., out_dim)


class LinearWithLoRA(nn.Module):
    """The sum of a linear layer and a LoRALayer with the same input."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Replace every nn.Linear by a LinearWithLoRA, in place. Freeze the model first: `model.requires_grad_(False)`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LinearWithLoRA(module, rank, alpha))


TARGET_MODULES = ("c_attn", "c_proj", "c_fc")
"""The linear layers of a block; two of the four are called c_proj."""


@dataclass(frozen=True)
class LoraOptions:
    """Options of LoRA on the command line. Raises ValueError for a value out of range."""

    r: int = 8
    """Rank of the two adapter matrices."""
    alpha: int = 16
    """Scale of the adapter: its output is multiplied by alpha / r."""
    dropout: float = 0.05
    """Dropout probability of the adapter's input in training."""
    targets: list[str] | str = dataclasses.field(default_factory=lambda: list(TARGET_MODULES))
    """Layers that get an adapter: one name, a list such as [c_attn, c_fc], or all-linear."""
    dora: bool = False
    """Train the length and the direction of each weight row separately (DoRA, Liu et al., 2024)."""
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
        """Return the options as keyword arguments of `add_lora`."""
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
    """Return a PEFT model with a new, trainable adapter on `model`, whose own weights are frozen.

    An adapted layer computes W x + alpha / r * B A dropout(x), where A and B have the rank r. B starts at zero, so the
    output is unchanged at first. The model is changed in place, as PEFT does. If a name fits no layer, a target is a
    tied weight, or the model already has an adapter, ValueError is raised, and the model is unchanged.

    Args:
        target_modules: the last parts of layer names, one regular expression for whole names, or "all-linear", which
            excludes a tied output head.
        options: other options of PEFT's LoraConfig, such as use_rslora, use_dora and modules_to_save.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    refuse_adapted(model)
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
    return get_peft_model(model, config)


def merge(peft_model: PeftModel) -> GPTModel:
    """Add the active adapters to the weights and return the adapted model, without PEFT's layers and fully trainable.

    If the adapter has its own output head or token embedding (modules_to_save), the two are no longer tied, and the
    model's config is updated.
    """
    model = peft_model.get_base_model()
    if not isinstance(model, GPTModel):
        raise ValueError(f"merge needs a PeftModel on a GPTModel, got one on {type(model).__name__}")
    for config in peft_model.peft_config.values():
        refuse_tied(model, config)
    tuner: Any = peft_model.base_model
    tuner.merge_and_unload(safe_merge=True)
    if model.config.tie_weights and model.lm_head.weight is not model.transformer.wte.weight:
        model.config = dataclasses.replace(model.config, tie_weights=False)
    return model.requires_grad_(True)


class KeptAdapter:
    """The adapter of a run's best model, stored in `adapter/` with the template and the name of the base model."""

    def __init__(self, peft_model: PeftModel, base: str, template: Template) -> None:
        self.peft_model = peft_model
        self.template = template
        peft_model.peft_config["default"].base_model_name_or_path = base

    def place(self, run_dir: Path) -> Path:
        return run_dir / "adapter"

    def save(self, run_dir: Path) -> Path:
        with atomic_directory(self.place(run_dir)) as temporary:
            # By default PEFT asks the hub for the base model's vocabulary size, to decide whether to save embeddings.
            self.peft_model.save_pretrained(str(temporary), save_embedding_layers=False)
            self.template.save(temporary)
        return self.place(run_dir)

    def restore(self, run_dir: Path) -> None:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(self.peft_model, load_peft_weights(str(self.place(run_dir)), device="cpu"))


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model has an adapter. PEFT would only warn and wrap the adapted layers a second time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already has an adapter: merge it, or use its add_adapter or load_adapter")


def refuse_tied(model: GPTModel, config: Any) -> None:
    """Raise ValueError if the adapter targets a tied weight: merging would change its other use too (PEFT issue 2018)."""
    from peft.tuners.tuners_utils import check_target_module_exists

    tied = ("lm_head", "transformer.wte") if model.config.tie_weights else ()
    for name in tied:
        if check_target_module_exists(config, name):
            raise ValueError(
                f"target_modules={config.target_modules!r} includes {name}, but {' and '.join(tied)} share one weight: "
                f"leave it out, or train a copy with modules_to_save=[{name.rpartition('.')[2]!r}]"
            )
