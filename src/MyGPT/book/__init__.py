"""The functions and classes of "Build a Large Language Model (From Scratch)" (Raschka, 2024).

`from MyGPT.book import *` replaces the book's `previous_chapters.py` and `gpt_download.py` (chapters 2 to 7, appendices
D and E). Names, argument order, defaults and return values are the same as in the book;
docs/coming_from_the_book.md lists the exceptions. The layers have the book's names and structure, so a seed gives the same
weights as in the book, a `model.pth` file that the book's code saved can be loaded, and the book's code can read or replace
`trf_blocks[-1]`, `att.W_query.weight` and `out_head`. The attention kernel, the KV cache, the loss and the decoding loop are
MyGPT's own.
"""

from MyGPT.book.attention import (
    CausalAttention,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    SelfAttention_v1,
    SelfAttention_v2,
)
from MyGPT.book.classification import (
    SpamDataset,
    calc_accuracy_loader,
    classify_review,
    create_balanced_dataset,
    download_and_unzip_spam_data,
    random_split,
    train_classifier_simple,
)
from MyGPT.book.figures import plot_losses, plot_values
from MyGPT.book.gpt import GELU, FeedForward, GPTModel, LayerNorm, TransformerBlock
from MyGPT.book.lora import LinearWithLoRA, LoRALayer, replace_linear_with_lora
from MyGPT.book.pretrained import assign, load_weights_into_gpt
from MyGPT.book.pretraining import calc_loss_loader, train_model
from MyGPT.book.texts import (
    GPTDatasetV1,
    InstructionDataset,
    SimpleTokenizerV1,
    SimpleTokenizerV2,
    create_dataloader_v1,
    custom_collate_fn,
    format_input,
    generate_text_simple,
    text_to_token_ids,
    token_ids_to_text,
)
from MyGPT.generation import generate
from MyGPT.training.simple import calc_loss_batch, evaluate_model, generate_and_print_sample, train_model_simple
from MyGPT.weights.formats.openai import load_gpt2_params_from_tf_ckpt
from MyGPT.weights.released import download_and_load_gpt2

__all__ = [
    "GELU", "CausalAttention", "FeedForward", "GPTDatasetV1", "GPTModel", "InstructionDataset", "LayerNorm",
    "LinearWithLoRA", "LoRALayer", "MultiHeadAttention", "MultiHeadAttentionWrapper", "SelfAttention_v1",
    "SelfAttention_v2", "SimpleTokenizerV1", "SimpleTokenizerV2", "SpamDataset", "TransformerBlock", "assign",
    "calc_accuracy_loader", "calc_loss_batch", "calc_loss_loader", "classify_review", "create_balanced_dataset",
    "create_dataloader_v1", "custom_collate_fn", "download_and_load_gpt2", "download_and_unzip_spam_data",
    "evaluate_model", "format_input", "generate", "generate_and_print_sample", "generate_text_simple",
    "load_gpt2_params_from_tf_ckpt", "load_weights_into_gpt", "plot_losses", "plot_values", "random_split",
    "replace_linear_with_lora", "text_to_token_ids", "token_ids_to_text", "train_classifier_simple", "train_model",
    "train_model_simple",
]  # fmt: skip
