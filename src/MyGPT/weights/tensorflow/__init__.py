"""TensorFlow checkpoints, read with numpy and without TensorFlow."""
