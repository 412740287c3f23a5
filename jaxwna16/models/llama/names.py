"""How files call what the definition has."""

NAMES = {r"(?<=\.)block_sparse_moe(?=\.)": "mlp"}
"""Mixtral's, in published files."""
