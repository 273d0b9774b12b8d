"""GPT-2 weights on disk: their names, layouts and file formats. No module here imports GPTModel."""
