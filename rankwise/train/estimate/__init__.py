"""Time and memory of a training run, before it starts."""
