"""mygpt download"""

from __future__ import annotations


def download(*models: str, out: str | None = None, base_url: str | None = None) -> None:
    """Get a released GPT-2, so that it is there when there is no network.

    gpt2, gpt2-medium, gpt2-large, gpt2-xl (or 124M, 355M, 774M, 1558M) are OpenAI's own files, openai-community/gpt2 and the
    like, or hf://user/model, come from the Hugging Face hub. A download that broke off goes on where it ended, and what is
    whole is not fetched again. Example: mygpt download gpt2

    Args:
        models: what to download
        out: the directory to put them in; default the cache, where --model gpt2 finds them
        base_url: a server with OpenAI's files, as URL/124M/hparams.json; also MYGPT_GPT2_URL in the environment
    """
    from MyGPT.weights.pretrained import download_model

    for name in models:
        print(download_model(name, out, base_url))
