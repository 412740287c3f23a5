"""Language models as Flax NNX modules."""
