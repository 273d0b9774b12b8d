"""The functions of gpt_download.py from Raschka's book: download OpenAI's GPT-2 files and read them without TensorFlow."""

from MyGPT import download_and_load_gpt2, load_gpt2_params_from_tf_ckpt

__all__ = ["download_and_load_gpt2", "load_gpt2_params_from_tf_ckpt"]
