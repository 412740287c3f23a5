"""Whole checkpoints: `load` reads one, `convert` and `rewrite` write another."""
