"""How good a model is, each number with the way in which it was measured."""
