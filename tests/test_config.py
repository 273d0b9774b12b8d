"""Tests of GPTConfig: its limits, its conversion from a dict, and Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import GPT2Config

from MyGPT import GPT2_CONFIGS, GPT_CONFIG, GPT_CONFIG_SMALL, GPTConfig, as_config

SEVEN = ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias"]


def test_the_ready_made_dicts_have_the_books_seven_keys() -> None:
    assert list(GPT_CONFIG) == list(GPT_CONFIG_SMALL) == SEVEN
    assert as_config(GPT_CONFIG) == GPTConfig()
    small = as_config(GPT_CONFIG_SMALL)
    assert (small.context_length, small.emb_dim, small.n_heads, small.n_layers) == (256, 384, 6, 6)


def test_the_released_configs_have_two_names_each() -> None:
    for size, name in (("124M", "gpt2"), ("355M", "gpt2-medium"), ("774M", "gpt2-large"), ("1558M", "gpt2-xl")):
        assert GPT2_CONFIGS[size] == GPT2_CONFIGS[name]
        assert GPT2_CONFIGS[size].qkv_bias


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in SEVEN[:5] for value in (0, -1, 2.0, True, "8", None)],
        *[("drop_rate", value) for value in (-0.1, 1, float("nan"), "0", None, True)],
        *[("qkv_bias", value) for value in (0, "yes", None)],
        ("tie_weights", 1),
        ("layer_norm_eps", 0.0),
        ("init_std", -1.0),
        ("init_std", None),  # allowed only with tie_weights=False
        ("init", "zeros"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        as_config({**GPT_CONFIG, field: value})
    assert str(value) in str(caught.value)


def test_an_error_for_an_indivisible_emb_dim_suggests_a_divisible_one() -> None:
    with pytest.raises(ValueError, match=r"divisible by n_heads, got 100 and 12 \(try emb_dim=108\)"):
        GPTConfig(emb_dim=100)


def test_local_initial_weights_need_init_std_and_an_even_emb_dim() -> None:
    with pytest.raises(ValueError, match="init='local' needs an init_std and an even emb_dim, got None and 768"):
        GPTConfig(init="local", init_std=None, tie_weights=False)
    with pytest.raises(ValueError, match=r"got 0.02 and 9$"):
        GPTConfig(init="local", emb_dim=9, n_heads=3)


def test_config_json_does_not_store_the_kind_of_initial_weights() -> None:
    assert GPTConfig.from_dict(GPTConfig(init="local").to_dict()) == GPTConfig()


def test_unknown_and_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'n_head' \(value 12\).*n_heads"):
        as_config({**GPT_CONFIG, "n_head": 12})
    with pytest.raises(ValueError, match="lacks emb_dim, n_layers"):
        as_config({key: GPT_CONFIG[key] for key in SEVEN if key not in ("emb_dim", "n_layers")})
    with pytest.raises(ValueError, match="GPTConfig or a dict, got list"):
        as_config([1])  # type: ignore[arg-type]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().emb_dim = 3  # type: ignore[misc]


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_transformers_reads_our_config_and_we_read_its(qkv_bias: bool, tie_weights: bool) -> None:
    ours = GPTConfig(100, 32, 48, 4, 3, 0.2, qkv_bias, tie_weights, 1e-6, 0.03)
    theirs = GPT2Config(**ours.to_dict())
    assert (theirs.n_positions, theirs.n_embd, theirs.n_head, theirs.n_layer) == (32, 48, 4, 3)
    assert theirs.attn_pdrop == theirs.resid_pdrop == theirs.embd_pdrop == 0.2
    assert (theirs.layer_norm_epsilon, theirs.initializer_range) == (1e-6, 0.03)
    assert theirs.tie_word_embeddings == tie_weights == ours.tie_word_embeddings
    assert GPTConfig.from_dict(ours.to_dict()) == ours
    assert GPTConfig.from_dict(theirs.to_dict()) == ours


def test_the_default_config_of_transformers_is_gpt2() -> None:
    assert GPTConfig.from_dict(GPT2Config().to_dict()) == GPT2_CONFIGS["124M"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("n_inner", 17),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("attn_pdrop", 0.5),
        ("n_embd", "wide"),
    ],
)
def test_unsupported_settings_of_config_json_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError):
        GPTConfig.from_dict({**GPT2Config().to_dict(), key: value})
