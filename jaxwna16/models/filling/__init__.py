"""From the parts of a checkpoint to a model's leaves; `params` fills them in."""
