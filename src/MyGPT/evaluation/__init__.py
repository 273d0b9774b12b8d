"""Evaluate a model on text: perplexity, bits per byte and last-word accuracy, with the protocols of the GPT-2 paper."""
