"""Two training loops on purpose: simple.py to be read, trainer.py to be trusted."""
