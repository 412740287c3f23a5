"""How files call what the definition has."""

NAMES = {
    r"(?<=\.)block_sparse_moe\.router(?:\.layer)?(?=\.|$)": "mlp.gate",
    r"(?<=\.)block_sparse_moe(?=\.w13|\.w2)": "mlp.experts",
    r"(?<=\.)block_sparse_moe(?=\.)": "mlp",
}
"""Granite's routers and experts, then Mixtral's, in published files."""
