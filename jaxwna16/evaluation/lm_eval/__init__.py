"""The model of lm-evaluation-harness; `model` is the way in, and registers it there."""
