"""Weights as they lie on disk: names, layouts, directories. Knows configs and tensors, not the model."""
