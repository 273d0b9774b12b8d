"""Speed beside the model, not inside it: the same answers from weights laid out for this processor."""

from MyGPT.acceleration.lookup import PromptLookup
from MyGPT.acceleration.step import FastModel, accelerate

__all__ = ["FastModel", "PromptLookup", "accelerate"]
