"""Evaluate a model on text: perplexity and related figures, each with the protocol by which it is measured."""
