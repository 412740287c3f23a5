"""Reading which layers of a model see only a window of the tokens before."""

from __future__ import annotations

from jaxwna16.models.config.config_reader import ConfigReader

_FULL, _SLIDING = "full_attention", "sliding_attention"
_NEVER = ("llama", "glm4_moe")
_ALL_LAYERS = ("mistral", "mixtral", "qwen3_moe")


def read_windows(reader: ConfigReader, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Sliding windows per layer, None for none, by the rules of transformers' configurations."""
    full = (None,) * layers
    if model_type in _NEVER:
        return full
    window = _read_window(reader, model_type)
    types = reader.config.get("layer_types")
    if model_type in _ALL_LAYERS:
        if types is not None:
            reader.refuse("layer_types", types, f"none in a {model_type} model")
        return (window,) * layers
    last = reader.config.get("max_window_layers", 62 if model_type == "dots1" else 28)
    if not isinstance(last, int):
        reader.refuse("max_window_layers", last, "an integer")
        last = 0
    if types is None and window is None:
        return full
    if types is None:
        types = [_choose_type(model_type, i, last) for i in range(layers)]
    known = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
    if not known or len(types) != layers:
        reader.refuse("layer_types", types, f"{layers} entries, each {_FULL} or {_SLIDING}")
        return full
    if _SLIDING in types and window is None:
        switch = "" if model_type == "dots1" else ", or use_sliding_window is off"
        reader.refuse("layer_types", types, f"full_attention: there is no sliding_window{switch}")
    return tuple(window if kind == _SLIDING else None for kind in types)


def _read_window(reader: ConfigReader, model_type: str) -> int | None:
    """How many tokens a sliding layer sees; None if there is no such layer."""
    # absent is the default, null is off
    on = "sliding_window" in reader.config or "sliding_window" not in reader.given
    if model_type.startswith("qwen"):
        on = reader.flag("use_sliding_window") and on
    elif model_type == "mixtral":
        on = "sliding_window" in reader.config
    return reader.count("sliding_window", 4096) if on else None


def _choose_type(model_type: str, layer: int, last: int) -> str:
    """The type of a layer of a model with windows whose config does not list types."""
    sliding = layer % 2 == 0 and layer < last if model_type == "qwen2_moe" else layer >= last
    return _SLIDING if sliding else _FULL
