"""GPT-2 weights on disk: their names, layouts and file formats. Nothing here depends on the model."""
