"""What lies between the products of a model: the residual stream, attention, the delta rule."""
