"""Make a Mixture-of-Experts checkpoint of a dense one: real weights, for trying things out.

    python examples/make_moe.py SRC DST [--experts 4] [--top-k 2] [--noise 0] [--layers N]

SRC is the folder of a Llama model (`examples/fetch_smollm2.py` makes one), DST becomes one of a
Mixtral. Every expert is the dense FFN with its neurons in another order, which changes nothing:
whatever the random routers choose, logits are those of the dense model. With noise the experts
differ, and a wrong choice shows. It is no trained mixture, and no better than the dense model.

Memory: the experts of one layer.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def make_moe(
    source: Path,
    destination: Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    noise: float = 0.0,
    layers: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the checkpoint and return its folder.

    Args:
      source: folder of a Llama model without biases in its MLPs, with one model.safetensors.
      destination: the folder to make; it must not exist.
      experts: how many each layer gets.
      top_k: how many of them each token uses.
      noise: standard deviation of what is added to the experts' weights, relative to theirs.
      layers: keep only so many, the first ones; None keeps all.
      seed: of the neurons' order, the routers and the noise.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = config["num_hidden_layers"] if layers is None else layers
    destination.mkdir()
    weight_map: dict[str, str] = {}
    size = 0
    with safe_open(source / "model.safetensors", "numpy") as file:
        for layer in (None, *range(kept)):  # None: what is outside of layers
            names = [name for name in file.keys() if find_layer(name) == layer]
            tensors = {name: file.get_tensor(name) for name in names}
            if layer is not None:
                add_experts(tensors, layer, experts, noise, np.random.default_rng((seed, layer)))
            shard = f"model-{len(set(weight_map.values())) + 1:05}-of-{kept + 1:05}.safetensors"
            save_file(tensors, destination / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard)
            size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(destination / "model.safetensors.index.json", index)
    fill_defaults(config)
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= {"num_local_experts": experts, "num_experts_per_tok": top_k}
    write_json(destination / "config.json", config | {"num_hidden_layers": kept})
    for path in source.iterdir():  # the tokenizer, the licence
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, destination / path.name)
    return destination


def fill_defaults(config: dict) -> None:
    """State keys that a Llama's config.json may leave out, but whose default differs in Mixtral."""
    defaults = {"rms_norm_eps": 1e-6, "num_key_value_heads": config["num_attention_heads"]}
    if "rope_theta" not in (config.get("rope_parameters") or {}):
        defaults["rope_theta"] = 1e4
    for name, value in defaults.items():
        if config.get(name) is None:
            config[name] = value


def find_layer(name: str) -> int | None:
    """The layer that a tensor belongs to, if any."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") else None


def add_experts(
    tensors: dict[str, np.ndarray],
    layer: int,
    experts: int,
    noise: float,
    rng: np.random.Generator,
) -> None:
    """Put a router and experts into the place of a layer's FFN."""
    path = f"model.layers.{layer}"
    block = f"{path}.block_sparse_moe"
    ffn = {new: tensors.pop(f"{path}.mlp.{old}.weight") for old, new in _EXPERT_NAMES.items()}
    inner, hidden = ffn["w1"].shape
    router = rng.normal(size=(experts, hidden)) / math.sqrt(hidden)
    tensors[f"{block}.gate.weight"] = router.astype(ffn["w1"].dtype)
    for expert in range(experts):
        order = rng.permutation(inner)
        for name, weight in ffn.items():
            weight = weight[:, order] if name == "w2" else weight[order]
            if noise:
                added = rng.normal(size=weight.shape) * (noise * float(weight.std()))
                weight = weight + added.astype(weight.dtype)
            tensors[f"{block}.experts.{expert}.{name}.weight"] = np.ascontiguousarray(weight)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line; prints the folder."""
    parser = argparse.ArgumentParser(description="Make a Mixtral of a dense Llama checkpoint.")
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("destination", type=Path, metavar="DST")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    print(make_moe(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
