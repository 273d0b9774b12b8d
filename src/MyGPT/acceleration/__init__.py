"""Speed beside the model, not inside it."""
