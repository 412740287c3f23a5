"""Layers of packed weights: `dense`, `moe` and `fused` for NNX, `linen` for Linen."""
