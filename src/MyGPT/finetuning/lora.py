"""LoRA (Hu et al., 2021): a weight W stays as it is, and a product of two thin matrices is learned beside it.

PEFT does the work: `get_peft_model(model, LoraConfig(...))` takes a GPTModel. `add_lora`, `open_adapter` and `merge` refuse what
PEFT would do wrong in silence. At the end LoRA is spelled out, by the names of "Build a Large Language Model (From
Scratch)", appendix E: nothing here uses that, it is there to be read. C embedding width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from MyGPT.data.templates import Template
from MyGPT.files import atomic_directory, read_json
from MyGPT.model import GPTModel

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TARGET_MODULES = ("c_attn", "c_proj", "c_fc")
"""The four linear layers of a block; c_proj is the name of two."""


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
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")
        if self.alpha < 1:
            raise ValueError(f"lora.alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be from 0 up to but not including 1, got {self.dropout}")
        if not self.targets:
            raise ValueError("lora.targets must name at least one layer, got none")

    def for_peft(self) -> dict[str, Any]:
        """The arguments of `add_lora`."""
        is_layer = isinstance(self.targets, str) and self.targets != "all-linear"
        return {
            "r": self.r,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "target_modules": [self.targets] if is_layer else self.targets,
            "use_dora": self.dora,
            "use_rslora": self.rslora,
        }


def add_lora(
    model: GPTModel,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    target_modules: str | Iterable[str] = TARGET_MODULES,
    **options: Any,
) -> PeftModel:
    """The model with a fresh adapter, which alone is trained: W x + alpha / r * B A x, at first W x.

    target_modules are ends of layers' names, or one regular expression for whole names, or "all-linear", which leaves out a
    head that is tied. The options are those of PEFT's LoraConfig: use_rslora, use_dora, modules_to_save and so on. A name
    that no layer has is a ValueError, and so are an adapter on tied weights and a model that has one already; the model is
    then as it was. Otherwise it is changed in place, as by PEFT.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    _refuse_adapted(model)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, **options
    )
    # PEFT asks for one name that fits; the others it forgets.
    wanted = [*(targets if isinstance(targets, list) else []), *(config.modules_to_save or [])]
    layers = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown:
        ends = sorted({layer.rpartition(".")[2] for layer in layers if not layer[-1].isdigit()})
        raise ValueError(f"no layer of the model is called {unknown[0]!r}; there are {', '.join(ends)}")
    _refuse_tied(model, config)
    return get_peft_model(model, config)


def open_adapter(model: GPTModel, directory: str | os.PathLike[str]) -> PeftModel:
    """The model with the adapter that a PeftModel's `save_pretrained` wrote, not to be trained, in evaluation mode.

    An adapter of transformers' GPT-2 fits too: only W lies the other way round there, A and B do not. One for a model of
    other sizes is a ValueError, and the model is then as it was. Otherwise it is changed in place, as by PEFT.
    """
    from peft import PeftModel

    _refuse_adapted(model)
    directory = Path(directory)
    config = _read_config(directory)
    try:
        _refuse_tied(model, config)
        _refuse_misfit(model, config, directory)
    except Exception as error:  # on a damaged config PEFT fails in any way; the model itself is not touched yet
        if str(directory) in str(error):
            raise
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the adapter in {directory} does not fit the model: {problem}") from None
    config.fan_in_fan_out = False  # True for transformers' Conv1D; PEFT would say so in a warning, and do the same
    device = str(model.transformer.wte.weight.device)
    return PeftModel.from_pretrained(model, directory, config=config, torch_device=device)


def merge(peft_model: PeftModel) -> GPTModel:
    """The model with its active adapters added to the weights, an ordinary one again: no PEFT in it, every weight trainable.

    It is the very model that was adapted. If the adapter brought a head or a token embedding of its own (modules_to_save),
    the two are no longer tied, and config says so.
    """
    model = peft_model.get_base_model()
    if not isinstance(model, GPTModel):
        raise ValueError(f"merge is for a PeftModel on a GPTModel, got one on {type(model).__name__}")
    for config in peft_model.peft_config.values():
        _refuse_tied(model, config)
    tuner: Any = peft_model.base_model
    tuner.merge_and_unload(safe_merge=True)
    if model.config.tie_weights and model.lm_head.weight is not model.transformer.wte.weight:
        model.config = dataclasses.replace(model.config, tie_weights=False)
    return model.requires_grad_(True)


class KeptAdapter:
    """Keeps the adapter of a run's best model in `adapter/`, with the template and the name of the model it is for."""

    def __init__(self, peft_model: PeftModel, base: str, template: Template) -> None:
        self.peft_model = peft_model
        self.template = template
        peft_model.peft_config["default"].base_model_name_or_path = base

    def place(self, run_dir: Path) -> Path:
        return run_dir / "adapter"

    def save(self, run_dir: Path) -> Path:
        with atomic_directory(self.place(run_dir)) as temporary:
            # The adapted layers are known; PEFT would otherwise look at the base model on the hub for its vocabulary.
            self.peft_model.save_pretrained(str(temporary), save_embedding_layers=False)
            self.template.save(temporary)
        return self.place(run_dir)

    def restore(self, run_dir: Path) -> None:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(self.peft_model, load_peft_weights(str(self.place(run_dir)), device="cpu"))

    def merge(self) -> GPTModel:
        """The ordinary model with the adapter in its weights."""
        return merge(self.peft_model)


def base_of_adapter(directory: str | os.PathLike[str]) -> str:
    """The name or path of the model that an adapter was trained on, as it says itself."""
    base = _read_config(Path(directory)).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {directory} does not say for which model it is: name it with --model")
    return str(base)


def _refuse_adapted(model: nn.Module) -> None:
    """PEFT warns, and makes two adapters with one name and one wrapper around the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has an adapter already; merge that, or use its add_adapter or load_adapter")


def _refuse_tied(model: GPTModel, config: Any) -> None:
    """An adapter on one side of a tied weight works until it is merged, which changes the other side (PEFT's issue 2018)."""
    from peft.tuners.tuners_utils import check_target_module_exists

    tied = ("lm_head", "transformer.wte") if model.config.tie_weights else ()
    for name in tied:
        if check_target_module_exists(config, name):
            raise ValueError(
                f"target_modules={config.target_modules!r} includes {name}, whose weight the model has for "
                f"{' and '.join(tied)} at once; leave it out, or train a copy: modules_to_save=[{name.rpartition('.')[2]!r}]"
            )


def _read_config(directory: Path) -> LoraConfig:
    from peft import LoraConfig

    path = directory / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {directory}: it has no {path.name}")
    try:
        described = read_json(path)
        if described.get("peft_type") != "LORA":
            raise ValueError(f"it is of the kind {described.get('peft_type')!r}, only 'LORA' can be opened")
        for field in dataclasses.fields(LoraConfig):
            value = described.get(field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.name not in _OPTIONS and value not in (None, False, default):
                raise ValueError(f"the option {field.name} is none of {', '.join(sorted(_OPTIONS))}")
        config: LoraConfig = LoraConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} does not describe an adapter that can be opened: {problem}") from None
    harm = _harm_in(config)
    if harm:
        raise ValueError(f"{path} is not opened: {harm}")
    return config


# Of PEFT's many options some import, and so run, the module that a file names (megatron_core), copy layers as often as it says
# (layer_replication), or never end on what it says: only those are opened that are known. PEFT itself opens the others.
_OPTIONS = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save peft_type peft_version r
    rank_pattern revision runtime_config target_modules task_type use_dora use_rslora""".split()
)


def _harm_in(config: LoraConfig) -> str | None:
    """What PEFT would do at the word of a file that nobody has looked at, and should not."""
    init = config.init_lora_weights
    if not isinstance(init, bool) and not re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_\d\d?)?", str(init)):
        return f"init_lora_weights is {init!r}, it may be true, false, gaussian, orthogonal, olora, pissa or pissa_niter_16"
    if type(config.lora_alpha) not in (int, float) or not 0 < config.lora_alpha < math.inf:
        return f"lora_alpha must be a number above 0, got {config.lora_alpha!r}"
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, name) or {}, dict):
            return f"{name} must be an object, got {getattr(config, name)!r}"
    expressions: list[Any] = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        named = getattr(config, name) or []
        if not isinstance(named, (str, list, set)):
            return f"{name} must be a text or a list of texts, got {named!r}"
        expressions += [named] if isinstance(named, str) else named
    for expression in expressions:
        # Repeats within repeats, or many choices, keep Python's matching busy for ever.
        quantifiers, groups = re.findall(r"[*+?{]+", str(expression)), str(expression).count("(")
        if len(quantifiers) > 4 or groups > 4 or re.search(r"\)[*+?{]", str(expression)):
            return f"the regular expression {expression!r} may take for ever: at most 4 repeats, 4 groups, no repeated group"
    return None


def _refuse_misfit(model: GPTModel, config: LoraConfig, directory: Path) -> None:
    """Compares names and shapes with those of the same adapter on the model's skeleton, before PEFT changes anything."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    found = _shapes_in(directory)
    config = copy.deepcopy(config)
    kernels = [name for name in found if re.search(r"\.c_(attn|proj|fc)\.weight$", name)]
    if config.fan_in_fan_out and kernels:
        raise ValueError(
            f"the adapter in {directory} holds whole kernels of transformers' GPT-2, such as {kernels[0]}, which lie the other "
            "way round: merge it there, and open the model"
        )
    config.fan_in_fan_out = config.init_lora_weights = False
    with torch.device("meta"):  # of any rank, without its memory
        adapted = PeftModel(_skeleton(model), config)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = {**adapted.state_dict(), **expected}  # PEFT may have saved an embedding with the adapter
    problems = [f"it lacks {name}" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in known:
            problems.append(f"the model has no {name}")
        elif shape != known[name].shape:
            problems.append(f"{name} is {shape}, the model needs {tuple(known[name].shape)}")
    if problems:
        first = problems[0].replace("base_model.model.", "")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"the adapter in {directory} is for another model: {first}{more}")


def _shapes_in(directory: Path) -> dict[str, tuple[int, ...]]:
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    files = ("adapter_model.safetensors", "adapter_model.bin")  # without either PEFT would ask the hub
    if not any((directory / name).is_file() for name in files):
        raise FileNotFoundError(f"no adapter at {directory}: it has neither {' nor '.join(files)}")
    try:
        weights = load_peft_weights(str(directory), device="cpu")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"the weights in {directory} are damaged: {error}") from None
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _skeleton(model: GPTModel) -> GPTModel:
    """The same layers with weights that have a shape and no memory."""
    bare = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in model.parameters()}
    return copy.deepcopy(model, bare)


class LoRALayer(nn.Module):
    """(alpha / rank) x A B with A (in_dim, rank) and B (rank, out_dim); B starts at zero, so at first it adds nothing.

    alpha / rank as in the paper (section 4.1) and in PEFT: the learning rate need not change with the rank. The book
    multiplies by alpha alone: for its results give alpha * rank. A starts as PEFT's does.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-1 / math.sqrt(in_dim), 1 / math.sqrt(in_dim)))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A @ self.B)  # (..., out_dim)


class LinearWithLoRA(nn.Module):
    """A linear layer and a LoRALayer side by side."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Puts a LinearWithLoRA in the place of every nn.Linear. Freezing the rest, `model.requires_grad_(False)`, comes before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LinearWithLoRA(module, rank, alpha))
