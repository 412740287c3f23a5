"""How files call what the definition has."""

NAMES = {
    # Mixtral's and MiniMax-M2's, in published files
    r"(?<=\.)block_sparse_moe(?=\.)": "mlp",
    # beside the router in MiniMax-M2
    r"(?<=\.mlp\.)(?=e_score_correction_bias$)": "gate.",
}
