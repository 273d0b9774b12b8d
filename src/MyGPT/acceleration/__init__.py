"""Speed beside the model, not inside it: the same answers from weights laid out for this processor."""
