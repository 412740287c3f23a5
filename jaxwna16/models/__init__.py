"""Language models as Flax NNX modules; `families` is the table of them."""
