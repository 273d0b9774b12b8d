"""`mygpt download`: fetch a released GPT-2."""

from __future__ import annotations


def download(*models: str, out: str | None = None, base_url: str | None = None) -> None:
    """Download a released GPT-2, which can then be used without a network.

    gpt2, gpt2-medium, gpt2-large and gpt2-xl (or 124M, 355M, 774M and 1558M) are OpenAI's original files. Names such as
    openai-community/gpt2 or hf://user/model come from the Hugging Face hub. An interrupted download resumes, and complete
    files are not downloaded again.

    Examples:
        mygpt download gpt2
        mygpt download 124M 355M --out models

    Args:
        models: Names of the models.
        out: Directory for the files. Default: the cache directory, where --model gpt2 finds them.
        base_url: URL of a server that has OpenAI's files as URL/124M/hparams.json and so on. Default: the environment
            variable MYGPT_GPT2_URL, or OpenAI's server if it is not set.
    """
    from MyGPT.files import check_output_directory
    from MyGPT.weights.pretrained import check_name, download_model

    for name in models:
        check_name(name)
    if out is not None:
        check_output_directory(out)
    for name in models:
        print(download_model(name, out, base_url))
