"""Formulas that all backends share: activations of experts, norms of the stream."""
