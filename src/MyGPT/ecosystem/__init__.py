"""Adapters through which the tools of other projects use a GPTModel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from MyGPT.model import GPTModel

if TYPE_CHECKING:
    from MyGPT.ecosystem.transformers import GPTForCausalLM


def as_transformers(model: GPTModel) -> GPTForCausalLM:
    """Return `model` as a model of the transformers library. Both share all layers, so training one trains the other.

    The result can be given to `transformers.Trainer`, TRL's trainers, `pipeline` and PEFT. It generates text with
    `generate`, and `save_pretrained` writes the same directory as `GPTModel.save_pretrained`.

    Raises:
        ModuleNotFoundError: the transformers library is not installed.
        ValueError: the model has custom parts.
    """
    try:
        from MyGPT.ecosystem.transformers import GPTForCausalLM
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "as_transformers needs the transformers library: pip install transformers", name="transformers"
        ) from None
    return GPTForCausalLM(model)
