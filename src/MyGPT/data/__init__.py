"""From text to batches: token files, windows, samplers."""
