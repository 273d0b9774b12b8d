"""Two training loops: simple.py is short and easy to read, trainer.py is for real runs, which it can resume."""
