"""How files call what the definition has."""

NAMES = {
    # of models that were saved without their head: Qwen3-Embedding, as a `Qwen3Model`
    r"^(?=(embed_tokens|layers|norm)\.)": "model.",
    # Mixtral's and MiniMax-M2's, in published files
    r"(?<=\.)block_sparse_moe(?=\.)": "mlp",
    # beside the router in MiniMax-M2
    r"(?<=\.mlp\.)(?=e_score_correction_bias$)": "gate.",
}
