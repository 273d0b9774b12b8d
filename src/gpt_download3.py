"""The book's module of the same name: loads GPT-2's weights from OpenAI's files, without TensorFlow."""

from MyGPT import download_and_load_gpt2, load_gpt2_params_from_tf_ckpt

__all__ = ["download_and_load_gpt2", "load_gpt2_params_from_tf_ckpt"]
