"""The configuration of a model: a frozen dataclass that checks its values when it is created.

The same `GPTConfig` is used in Python, in YAML config files, for command-line options and for `config.json`.
`as_config` converts a plain dict to a `GPTConfig`. The sizes of the released models are from "Language Models are
Unsupervised Multitask Learners" (Radford et al., 2019).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from MyGPT.files import read_json
from MyGPT.messages import OPTION_SYNONYMS, did_you_mean
from MyGPT.notebooks import html_table
from MyGPT.parts import PartsError, record_of, require_parts

# Each field of GPTConfig and its key in Hugging Face's config.json. Hugging Face's three dropout rates are one field
# here, because the released models have equal rates.
_HUGGING_FACE_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "tie_weights": "tie_word_embeddings",
    "layer_norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
    "activation": "activation_function",
    "qkv_bias": "qkv_bias",  # transformers ignores this key; its models always have biases, which are then zero.
}
# The activations of transformers that compute one of the two GELUs (up to rounding), and MyGPT's names of the two.
_GELUS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_new"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
}
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SPECIAL_TOKEN_FIELDS = (*_SPECIAL_IDS, "generation_config")
"""The fields of GPTConfig that describe special tokens and generation, not the model."""
_HUGGING_FACE_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
Activation = Literal["gelu_new", "gelu"]
Init = Literal["gpt2", "local"]
TrainingPrecision = Literal["auto", "fp32", "bf16"]
"""Number formats of matrix products in training; "auto" selects bf16 (bfloat16) where it is faster than fp32 (float32)."""
Precision = Literal[TrainingPrecision, "int8", "int4"]
"""Number formats of the weights in generation; "auto" keeps the format in which the weights are stored."""
_MAX_SIZES = {**dict.fromkeys(("vocab_size", "context_length", "emb_dim", "n_heads"), 2**31 - 1), "n_layers": 10_000}
"""The five required sizes and their largest accepted values. The limits keep a hostile config.json from exhausting memory."""
_MAX_PARAMETERS = 10**15


@dataclass(frozen=True)
class GPTConfig:
    """The sizes and options that define a GPT-2 model. An invalid value raises ValueError."""

    vocab_size: int = 50257
    """Number of token ids; valid ids are 0 to vocab_size - 1."""
    context_length: int = 1024
    """Maximum sequence length in tokens."""
    emb_dim: int = 768
    """Width of the embeddings and hidden states; must be a multiple of n_heads."""
    n_heads: int = 12
    """Number of attention heads per block, each of width emb_dim / n_heads."""
    n_layers: int = 12
    """Number of transformer blocks."""
    drop_rate: float = 0.1
    """Dropout probability in training, at least 0 and below 1."""
    qkv_bias: bool = False
    """Add biases to the query, key and value projections, as in the released GPT-2 models."""
    tie_weights: bool = True
    """Share the token embedding's weights with the output head, as in GPT-2."""
    layer_norm_eps: float = 1e-5
    """Small number that every LayerNorm adds to the variance, to avoid division by zero."""
    init_std: float | None = 0.02
    """Standard deviation of the initial weights. None uses PyTorch's own initialisation, and is allowed only with
    tie_weights=False."""
    activation: Activation = "gelu_new"
    """Activation function of the MLP: gelu_new (tanh approximation of GELU, used by GPT-2) or gelu (exact GELU)."""
    init: Init = "gpt2"
    """Initial weights: gpt2 (random, as in GPT-2) or local (each attention head at first attends to a nearby token).
    config.json does not store this field, because a trained model does not need it."""
    bos_token_id: int | None = field(default=None, compare=False)
    """Id of the token with which a text begins, as config.json gives it. The fields from here on do not change the
    model's computation, so two configs that differ only in them are equal."""
    eos_token_id: int | tuple[int, ...] | None = field(default=None, compare=False)
    """Id of the token that ends a text, or several such ids, as config.json gives them. None uses the tokenizer's
    token."""
    pad_token_id: int | None = field(default=None, compare=False)
    """Id of the token that pads shorter sequences, as config.json gives it."""
    generation_config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Content of generation_config.json, which is written back when the model is saved. Its bos_token_id, eos_token_id
    and pad_token_id, if they are not null, override the fields of the same names, as in transformers."""

    model_type: ClassVar[str] = "gpt2"

    def _repr_html_(self) -> str:
        return html_table("GPTConfig", vars(self))

    def __post_init__(self) -> None:
        for name, largest in _MAX_SIZES.items():
            value = getattr(self, name)
            require_positive(**{name: value})
            if value > largest:
                raise ValueError(f"{name} must be at most {largest}, got {value!r}")
        for name, allowed in (("activation", get_args(Activation)), ("init", get_args(Init))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("qkv_bias", "tie_weights"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not _is_number(self.drop_rate) or not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be a number of at least 0 and below 1, got {self.drop_rate!r}")
        self._check_special_ids()
        for name in ("layer_norm_eps", "init_std"):
            value = getattr(self, name)
            is_unset = name == "init_std" and value is None
            if not is_unset and not (_is_number(value) and 0 < value < 1):
                raise ValueError(f"{name} must be a number between 0 and 1, both excluded, got {value!r}")
        if self.init_std is None and self.tie_weights:
            reason = "torch's default embeddings are 50 times too large for an output head"
            raise ValueError(f"init_std=None needs tie_weights=False: {reason}")
        if self.init == "local" and (self.init_std is None or self.emb_dim % 2):
            given = f"{self.init_std} and {self.emb_dim}"
            raise ValueError(f"init='local' needs an init_std and an even emb_dim, got {given}")
        if self.emb_dim % self.n_heads:
            given, nearest = f"{self.emb_dim} and {self.n_heads}", self.n_heads * (self.emb_dim // self.n_heads + 1)
            raise ValueError(f"emb_dim must be divisible by n_heads, got {given} (try emb_dim={nearest})")
        n = self.emb_dim * (self.vocab_size + self.context_length + 12 * self.n_layers * self.emb_dim)
        if n > _MAX_PARAMETERS:
            raise ValueError(f"these sizes give a model of {n:.0e} parameters, the limit is {_MAX_PARAMETERS:.0e}")

    def _check_special_ids(self) -> None:
        """Raise ValueError for an invalid special id. A list of ids, as JSON gives it, becomes a tuple."""
        end: object = self.eos_token_id
        if isinstance(end, list):
            object.__setattr__(self, "eos_token_id", tuple(end))
        generation: object = self.generation_config
        if not isinstance(generation, Mapping):
            raise ValueError(f"generation_config must map names to values, got {type(generation).__name__}")
        for values in (vars(self), generation):
            for name in _SPECIAL_IDS:
                value, several = values.get(name), name == "eos_token_id"
                ids = value if several and isinstance(value, (list, tuple)) else [value]
                if value is not None and not all(type(id_) is int for id_ in ids):
                    allowed = "null, a whole number" + " or a list of whole numbers" * several
                    raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")

    def special_ids(self, name: str) -> tuple[int, ...]:
        """Return the ids that generation uses for "bos_token_id", "eos_token_id" or "pad_token_id".

        The value in `generation_config` comes first, as in transformers. Ids outside the vocabulary are left out, because
        transformers writes GPT-2's id 50256 into the config.json of smaller models too.
        """
        value = self.generation_config.get(name)
        value = getattr(self, name) if value in (None, [], ()) else value
        ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return tuple(id_ for id_ in ids if 0 <= id_ < self.vocab_size)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at which generation ends a text. Empty if the model's files name none."""
        return self.special_ids("eos_token_id")

    def ending_with(self, id_: int | None) -> GPTConfig:
        """Return this config with one more id at which generation ends, before those that are already there.

        A model that is trained to end its texts with another token then stops at this token. Nothing changes if `id_` is
        None or is already an end id.
        """
        if id_ is None or id_ in self.end_ids:
            return self
        ids = (id_, *self.end_ids) if self.end_ids else id_
        generation = self.generation_config and {**self.generation_config, "eos_token_id": ids}
        return dataclasses.replace(self, eos_token_id=ids, generation_config=generation)

    @property
    def tie_word_embeddings(self) -> bool:
        """The value of `tie_weights` under the name that Hugging Face's PEFT library reads."""
        return self.tie_weights

    def to_dict(self) -> dict[str, Any]:
        """Return this config as a dict with the keys of Hugging Face's `config.json`."""
        named = {theirs: getattr(self, ours) for ours, theirs in _HUGGING_FACE_KEYS.items()}
        dropouts = dict.fromkeys(_HUGGING_FACE_DROPOUTS, self.drop_rate)
        if self.init_std is None:
            del named["initializer_range"]  # transformers requires a number, and trained weights do not depend on it.
        special = {name: getattr(self, name) for name in _SPECIAL_IDS}
        return {"architectures": ["GPT2LMHeadModel"], "model_type": self.model_type, **named, **dropouts, **special}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPTConfig:
        """Return the config for a dict from Hugging Face's `config.json`. An unsupported setting raises ValueError."""
        for key, only in (
            ("model_type", (cls.model_type,)),
            ("activation_function", tuple(_GELUS)),
            ("n_inner", (None, 4 * config.get("n_embd", 768))),
            ("scale_attn_weights", (True,)),
            ("scale_attn_by_inverse_layer_idx", (False,)),
            ("add_cross_attention", (False,)),
        ):
            if config.get(key, only[0]) not in only:
                allowed = " or ".join(map(repr, only))
                raise ValueError(f"config.json has {key}={config[key]!r}, MyGPT supports only {allowed}")
        dropouts = {config[key] for key in _HUGGING_FACE_DROPOUTS if key in config}
        if len(dropouts) > 1:
            rates = sorted(dropouts)
            raise ValueError(f"config.json has different dropout rates {rates}, MyGPT supports only equal rates")
        ours = {name: config[theirs] for name, theirs in _HUGGING_FACE_KEYS.items() if theirs in config}
        if "activation" in ours:
            ours["activation"] = _GELUS[ours["activation"]]
        ours |= {name: config[name] for name in _SPECIAL_IDS if name in config}
        # GPT-2 of transformers always has biases, so they are the default for a config.json.
        return cls(**{"qkv_bias": True, "drop_rate": min(dropouts, default=0.1), **ours})

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str]) -> GPTConfig:
        """Return the config of a released model, such as "gpt2", of a model directory, or of "user/model" on the hub.

        The PEFT library calls this method with the name_or_path of a model.
        """
        name, path = str(name_or_dir), Path(name_or_dir) / "config.json"
        if name.removeprefix("openai-community/") in GPT2_CONFIGS:
            return GPT2_CONFIGS[name.removeprefix("openai-community/")]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.exists():
            from huggingface_hub import hf_hub_download  # PEFT needs this library too

            path = Path(hf_hub_download(name, path.name))
        return read_config_json(path)


def read_config_json(path: Path, has_custom_parts: bool = False) -> GPTConfig:
    """Return the config in the `config.json` at `path`, with the content of `generation_config.json` beside it.

    A damaged file or another kind of model raises ValueError. So does a model with custom parts (see parts.py), unless
    `has_custom_parts` is True because the caller has them.
    """
    try:
        content = read_json(path)
        if has_custom_parts:
            content = {**content, "model_type": GPTConfig.model_type}
        elif (record := record_of(content, path)) is not None:
            require_parts(record, path.parent, None)
        config = GPTConfig.from_dict(content)
    except PartsError:
        raise
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not describe a GPT-2 model: {error}") from None
    generation = path.with_name("generation_config.json")
    if not generation.is_file():
        return config
    try:
        return dataclasses.replace(config, generation_config=read_json(generation))
    except ValueError as error:
        raise ValueError(f"{generation} has wrong settings: {error}") from None


def config_beside(path: Path) -> GPTConfig | None:
    """Return the config in the `config.json` beside the file `path`, or None if this directory has no `config.json`."""
    config = path.parent / "config.json"
    return read_config_json(config) if config.is_file() else None


def require_positive(*, optional: bool = False, **values: object) -> None:
    """Raise ValueError unless each keyword value is a whole number of at least 1.

    If `optional` is true, None is also allowed. The names of the keywords appear in the error message.
    """
    for name, value in values.items():
        if (type(value) is not int or value < 1) and not (optional and value is None):
            raise ValueError(f"{name} must be {'None or ' * optional}a whole number of at least 1, got {value!r}")


def require_index(name: str, value: object, count: int) -> None:
    """Raise a ValueError, with `name` in its message, unless the value is an integer from 0 to count - 1."""
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{name} must be a whole number from 0 to {count - 1}, got {value!r}")


def check_seed(seed: int | None) -> None:
    """Raise ValueError if torch's random generators do not accept the seed. None means no seed."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from -2**63 to 2**64 - 1, got {seed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_config(config: GPTConfig | Mapping[str, Any]) -> GPTConfig:
    """Return a GPTConfig unchanged, or create one from a dict of its fields.

    The dict must contain vocab_size, context_length, emb_dim, n_heads and n_layers. A missing or unknown key, or an
    invalid value, raises ValueError.
    """
    if isinstance(config, GPTConfig):
        return config
    if not isinstance(config, Mapping):
        raise ValueError(f"a model config must be a GPTConfig or a dict, got {type(config).__name__}")
    fields = [field.name for field in dataclasses.fields(GPTConfig)]
    for key, value in config.items():
        if key not in fields:
            known, hint = ", ".join(fields), did_you_mean(str(key), fields, OPTION_SYNONYMS)
            raise ValueError(
                f"unknown key {key!r} (value {value!r}) in the model config; the known keys are {known}{hint}"
            )
    missing = [key for key in _MAX_SIZES if key not in config]
    if missing:
        raise ValueError(f"the model config lacks {', '.join(missing)}; the required keys are {', '.join(_MAX_SIZES)}")
    return GPTConfig(**config)


GPT_CONFIG: dict[str, Any] = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
"""The sizes of GPT-2 124M: a dict with the seven keys that Raschka's book
"Build a Large Language Model (From Scratch)" uses."""
GPT_CONFIG_SMALL: dict[str, Any] = {**GPT_CONFIG, "context_length": 256, "emb_dim": 384, "n_heads": 6, "n_layers": 6}
"""The sizes of a model with 30 million parameters and a context of 256 tokens, small enough to train on a laptop."""

_RELEASED = {
    "124M": ("gpt2", 768, 12, 12),
    "355M": ("gpt2-medium", 1024, 16, 24),
    "774M": ("gpt2-large", 1280, 20, 36),
    "1558M": ("gpt2-xl", 1600, 25, 48),
}
GPT2_CONFIGS: dict[str, GPTConfig] = {
    name: GPTConfig(emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers, qkv_bias=True)
    for size, (alias, emb_dim, n_heads, n_layers) in _RELEASED.items()
    for name in (size, alias)
}
"""The configs of the released models, by size ("124M" to "1558M") and by Hugging Face name ("gpt2" to "gpt2-xl")."""
