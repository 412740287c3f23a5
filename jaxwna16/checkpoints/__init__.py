"""Whole checkpoints: `load` reads one, `convert`, `quantize` and `dequantize` write another."""
