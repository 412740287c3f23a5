"""Small random Qwen3.5 models of transformers: dense or with experts, alone or beside a tower."""

from __future__ import annotations

import torch
import transformers

TEXT = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
"""Three gated delta nets and one layer of attention. `initializer_range` is moderate, and keys are
not short, since the norm after a delta net divides by the length of its output: where that happens
to be near 0, it magnifies whatever was rounded, in transformers' own two ways of computing it too.
"""
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "patch_size": 4,
}


def make_hybrid(model_type: str, seed: int = 0, **changes):
    """A random float32 transformers model; norms, biases and routers are random too.

    Args:
      model_type: as in config.json.
      seed: of the weights.
      changes: of the text model's configuration.
    """
    text = TEXT | (EXPERTS if "moe" in model_type else {}) | changes
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager"}
    if model_type.endswith("_text"):
        config = transformers.AutoConfig.for_model(model_type, **text)
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
    else:
        tied = {"tie_word_embeddings": text.pop("tie_word_embeddings", False)}
        parts = {"text_config": text, "vision_config": VISION}
        config = transformers.AutoConfig.for_model(model_type, **parts, **tied)
        model = transformers.AutoModelForImageTextToText.from_config(config, **options)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("norm.weight", "dt_bias")):
                # weights of all other norms are added to 1
                center = 1.0 if name.endswith("linear_attn.norm.weight") else 0.0
                tensor.copy_(center + 0.3 * torch.randn(tensor.shape))
            elif name.endswith("mlp.gate.weight"):
                tensor.copy_(0.3 * torch.randn(tensor.shape))
    return model.float().eval()
