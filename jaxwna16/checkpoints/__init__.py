"""Whole checkpoints: `load` reads one, `convert` and `quantize` write another."""
