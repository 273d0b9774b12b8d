"""Faster generation and training with the same model: packed weights, a C++ kernel, CUDA graphs, prompt lookup."""
