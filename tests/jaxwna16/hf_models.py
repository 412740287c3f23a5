"""Small random transformers models, and the same model as ours."""

from __future__ import annotations

import jax.numpy as jnp
import torch
import transformers
from flax import nnx

from jaxwna16.models.config import ModelConfig
from jaxwna16.models.llama import Llama
from jaxwna16.models.params import load_params

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_reference(model_type: str, seed: int = 0, **changes):
    """A random float32 transformers model; biases and norms are random too."""
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if "norm" in name else 0.0
                parameter.copy_(center + 0.3 * torch.randn(parameter.shape))
    return model.float().eval()


def nest_params(state_dict) -> dict:
    """A params tree of NumPy arrays from a torch state_dict."""
    tree: dict = {}
    for name, tensor in state_dict.items():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = tensor.detach().numpy()
    return tree


def convert(reference, dtype=jnp.float32) -> Llama:
    """Our model with the weights of a transformers model."""
    config = ModelConfig.from_dict(reference.config.to_dict())
    abstract = nnx.eval_shape(lambda: Llama(config, dtype=dtype))
    return load_params(abstract, nest_params(reference.state_dict()))
