"""How files call what the definition has."""

from __future__ import annotations

from jaxwna16.models.config.fused import Fused
from jaxwna16.models.llama.config import LlamaConfig
from jaxwna16.models.llama.relatives import RELATIVES

NAMES = {
    # of models that were saved without their head: Qwen3-Embedding, as a `Qwen3Model`
    r"^(?=(embed_tokens|layers|norm)\.)": "model.",
    # Granite's routers and experts, in published files
    r"(?<=\.)block_sparse_moe\.router(?:\.layer)?(?=\.|$)": "mlp.gate",
    r"(?<=\.)block_sparse_moe(?=\.w13|\.w2)": "mlp.experts",
    # Mixtral's and MiniMax-M2's, in published files
    r"(?<=\.)block_sparse_moe(?=\.)": "mlp",
    # beside the router in MiniMax-M2
    r"(?<=\.mlp\.)(?=e_score_correction_bias$)": "gate.",
    # of ERNIE 4.5, in files and in transformers
    r"(?<=\.mlp\.)(gate\.)?moe_statics(?=\.)": "gate",
    # of Hunyuan
    r"(?<=\.mlp\.gate)\.wg(?=\.|$)": "",
    r"(?<=\.self_attn\.)query_layernorm(?=\.|$)": "q_norm",
    r"(?<=\.self_attn\.)key_layernorm(?=\.|$)": "k_norm",
}


def list_fused(config: LlamaConfig) -> tuple[Fused, ...]:
    """What a relative's files have as one module, see `Fused`."""
    return tuple(fuse(config) for fuse in RELATIVES[config.model_type].fused)
