"""How good a model is: `perplexity`, `comparison`, and `lm_eval` for the harness."""
