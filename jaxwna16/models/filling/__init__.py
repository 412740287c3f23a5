"""From a plan to a model's leaves: `fit` makes the model, `params` fills it."""
