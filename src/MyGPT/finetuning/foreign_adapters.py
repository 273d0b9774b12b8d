"""Opening LoRA adapters that were saved elsewhere, by PEFT on a `GPTModel` or on transformers' GPT-2.

PEFT does the work. Before it runs, the adapter's config and tensor shapes are checked, because a file from a stranger
could make PEFT run code, hang, or leave the model half changed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from MyGPT.config import GPTConfig
from MyGPT.files import read_json
from MyGPT.finetuning.lora import refuse_adapted, refuse_tied
from MyGPT.model import GPTModel
from MyGPT.weights.layout import HEAD, WTE

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor of an adapter by its name."""


def base_of_adapter(directory: str | os.PathLike[str]) -> str:
    """Return the name or path of the model that an adapter was trained on, as stored in adapter_config.json.

    Raises ValueError if the file does not name a model.
    """
    base = _read_config(Path(directory)).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {directory} does not name the model it was trained on: name it with --model")
    return str(base)


def count_adapter_parameters(directory: str | os.PathLike[str]) -> int:
    """Return the number of parameters of the adapter in a directory."""
    return sum(math.prod(shape) for shape in _tensor_shapes(Path(directory)).values())


def adapted_config(config: GPTConfig, directory: str | os.PathLike[str]) -> GPTConfig:
    """Return the config that a model with this config has with the adapter in a directory: its vocabulary can differ."""
    return dataclasses.replace(config, vocab_size=_vocab_size(_tensor_shapes(Path(directory)), config))


def open_adapter(model: GPTModel, directory: str | os.PathLike[str]) -> PeftModel:
    """Add a saved LoRA adapter to `model`, in place, and return the PEFT model, frozen and in evaluation mode.

    The directory was written by a PeftModel's `save_pretrained`. Adapters for transformers' GPT-2 fit too: transformers
    stores the weights W transposed, but the adapter's matrices A and B have the same shapes as here. If the adapter contains
    the embeddings of a larger or smaller vocabulary, because tokens were added in training, the model gets this vocabulary.

    Raises:
        FileNotFoundError: the directory contains no adapter.
        ValueError: the adapter is damaged or does not fit the model. The model is then unchanged.
    """
    from peft import PeftModel

    refuse_adapted(model)
    directory = Path(directory)
    config, shapes = _read_config(directory), _tensor_shapes(directory)
    vocab_size = _vocab_size(shapes, model.config)
    try:
        refuse_tied(model, config)
        _refuse_misfit(model, config, shapes, vocab_size)
    except Exception as error:  # PEFT raises many types on a damaged config; the model is unchanged so far
        raise ValueError(f"the adapter in {directory} does not fit the model: {_describe(error)}") from None
    config.fan_in_fan_out = False  # True for transformers' Conv1D; PEFT would set it to False with a warning
    device = str(model.transformer.wte.weight.device)
    _resize_vocabulary(model, vocab_size)
    return PeftModel.from_pretrained(model, directory, config=config, torch_device=device)


def _read_config(directory: Path) -> LoraConfig:
    """Return the config of the adapter in a directory.

    Raises ValueError if the config is damaged or sets an option that is not in the list of safe options.
    """
    from peft import LoraConfig

    path = directory / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {directory}: it has no {path.name}")
    try:
        entries = read_json(path)
        if entries.get("peft_type") != "LORA":
            way_out = "open it in Python with PeftModel.from_pretrained(as_transformers(model), directory)"
            raise ValueError(f"its peft_type is {entries.get('peft_type')!r}, but only 'LORA' is supported: {way_out}")
        for field in dataclasses.fields(LoraConfig):
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.name not in _OPTIONS and entries.get(field.name) not in (None, False, default):
                way_out = "merge the adapter with PEFT on transformers' GPT-2, and open the merged model"
                raise ValueError(f"the option {field.name} is not supported: {way_out}")
        config: LoraConfig = LoraConfig.from_pretrained(str(directory))
        _refuse_unsafe_options(config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(f"{path} cannot be opened: {_describe(error)}") from None
    return config


def _describe(error: Exception) -> str:
    """Return the message of an error. The type of the error comes first, except for a ValueError."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


# Some of PEFT's options are dangerous in a file from a stranger: megatron_core imports a module that the file names, and
# layer_replication copies layers as often as the file says. So only these options are accepted. PEFT itself opens the others.
_OPTIONS = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save peft_type peft_version r
    rank_pattern revision runtime_config target_modules task_type use_dora use_rslora""".split()
)


# If PEFT saves a resized embedding, it also saves copies of it under these names, and ignores them when it opens the file.
_REPEATED = re.compile(r"\.(wte|lm_head)\.(modules_to_save|original_module)\.weight$")


def _refuse_unsafe_options(config: LoraConfig) -> None:
    """Raise ValueError if an option's value could make PEFT load other files, raise an unclear error or never finish."""
    init = config.init_lora_weights
    if not isinstance(init, bool) and not re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_\d\d?)?", str(init)):
        allowed = "true, false, gaussian, orthogonal, olora, pissa or pissa_niter_16"
        raise ValueError(f"init_lora_weights must be {allowed}, got {init!r}")
    if type(config.lora_alpha) not in (int, float) or not 0 < config.lora_alpha < math.inf:
        raise ValueError(f"lora_alpha must be a number above 0, got {config.lora_alpha!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, name) or {}, dict):
            raise ValueError(f"{name} must be an object, got {getattr(config, name)!r}")
    expressions: list[Any] = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        named = getattr(config, name) or []
        if not isinstance(named, (str, list, set)):
            raise ValueError(f"{name} must be a text or a list of texts, got {named!r}")
        expressions += [named] if isinstance(named, str) else named
    for expression in expressions:
        # Nested repeats and many alternatives can make Python's regular expressions run practically forever.
        n_repeats, n_groups = len(re.findall(r"[*+?{]+", str(expression))), str(expression).count("(")
        if n_repeats > 4 or n_groups > 4 or re.search(r"\)[*+?{]", str(expression)):
            allowed = "at most 4 repeats, 4 groups and no repeated group"
            raise ValueError(f"the regular expression {expression!r} could run forever: {allowed}")


def _vocab_size(found: Shapes, config: GPTConfig) -> int:
    """Return the vocabulary size of an adapter that contains both the token embedding and the output head.

    For other adapters, return that of the model's config. `found` maps the adapter's tensor names to shapes.
    """
    embedding, head = (found.get(f"base_model.model.{name}", ()) for name in (WTE, HEAD))
    return embedding[0] if embedding == head and len(embedding) == 2 else config.vocab_size


def _resize_vocabulary(model: GPTModel, vocab_size: int) -> None:
    """Give the token embedding and the output head `vocab_size` rows. New rows are zero until the adapter sets them."""
    if vocab_size == model.config.vocab_size:
        return
    embedding, head = model.transformer.wte, model.lm_head
    embedding.weight = nn.Parameter(embedding.weight.new_zeros(vocab_size, model.config.emb_dim))
    head.weight = embedding.weight if model.config.tie_weights else nn.Parameter(torch.zeros_like(embedding.weight))
    embedding.num_embeddings = head.out_features = vocab_size
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)


def _refuse_misfit(model: GPTModel, config: LoraConfig, found: Shapes, vocab_size: int) -> None:
    """Raise ValueError if the adapter does not fit the model after its vocabulary is resized to `vocab_size` tokens.

    `found` maps the adapter's tensor names to shapes.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    config = copy.deepcopy(config)
    matrices = [name for name in found if re.search(r"\.c_(attn|proj|fc)\.weight$", name)]
    if config.fan_in_fan_out and matrices:
        raise ValueError(
            f"it contains complete matrices of transformers' GPT-2, such as {matrices[0]}, which are transposed: "
            "merge the adapter in transformers, and open the merged model"
        )
    config.fan_in_fan_out = config.init_lora_weights = False
    with torch.device("meta"):  # so that a huge rank needs no memory
        resized = _on_meta_device(model)
        _resize_vocabulary(resized, vocab_size)
        adapted = PeftModel(resized, config)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = {**adapted.state_dict(), **expected}  # PEFT may also have saved an embedding
    problems = [f"it lacks {name}" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in known:
            problems += [] if _REPEATED.search(name) else [f"the model has no {name}"]
        elif shape != known[name].shape:
            problems.append(f"{name} is {shape}, but the model needs {tuple(known[name].shape)}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0].replace("base_model.model.", "") + more)


def _tensor_shapes(directory: Path) -> Shapes:
    """Return the names and shapes of the tensors of the adapter in a directory."""
    from peft.utils import load_peft_weights

    files = ("adapter_model.safetensors", "adapter_model.bin")  # without one of them PEFT would ask the hub
    if not any((directory / name).is_file() for name in files):
        raise FileNotFoundError(f"no adapter at {directory}: it has neither {' nor '.join(files)}")
    try:
        return {name: tuple(weight.shape) for name, weight in load_peft_weights(str(directory), device="cpu").items()}
    except OSError:
        raise
    except Exception as error:  # safetensors, pickle and torch raise many types
        raise ValueError(f"the weights in {directory} are damaged: {error}") from None


def _on_meta_device(model: GPTModel) -> GPTModel:
    """Return a copy of the model on torch's meta device, where tensors have shapes but no values."""
    bare = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta")) for weight in model.parameters()}
    return copy.deepcopy(model, bare)
