"""Which weights `quantize` leaves as they are, and how config.json says so to every tool.

By default these are small weights that decide much (heads, routers, gates of shared experts and of
delta nets), and parts beside the language model that not every tool can pack, or that are not
loaded: towers, projectors, layers that predict several tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxwna16.errors import InputError, ModelError
from jaxwna16.models.config.language_config import MAX_LAYERS
from jaxwna16.models.families import parse_config
from jaxwna16.models.filling.skipped import BESIDE
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.experts import name_separately
from loaders.schemes.module_names import name_classes
from loaders.schemes.patterns.patterns import compile_pattern
from loaders.schemes.subconfigs import are_tied, find_subconfigs

HEAD = "lm_head"
# names of towers and projectors of models that `load_model` does not know
_OTHERS_BESIDE = (
    *("connector", "multimodal_projector", "mlp1", "resampler", "perceiver", "aligner"),
    *("image_encoder", "vision_proj", "vision_projection", "visual_projection", "text_projection"),
    *("vision_projector", "visual_projector", "image_projector", "patch_merger", "vpm", "apm"),
)
DEFAULT_IGNORE = (
    HEAD,
    r"re:.*\.lm_head$",
    r"re:(.*\.)?(embed_out|score|classifier)$",
    r"re:(.*\.)?(gate|router|shared_experts?_gate)(\..*)?$",
    r"re:(.*\.)?linear_attn\.in_proj_(a|b|ba)$",
    *(
        rf"re:(.*\.)?{name}\..*"
        for name in [*(name for names in BESIDE.values() for name in names), *_OTHERS_BESIDE]
    ),
)


def list_default(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`DEFAULT_IGNORE`, and the layers past the last that config.json says there may be."""
    first, count = _count_layers(config)
    if count <= 0:
        return DEFAULT_IGNORE
    layers = "|".join(str(first + i) for i in range(count))
    return (*DEFAULT_IGNORE, rf"re:(.*\.)?layers\.({layers})\..*")


def find_left_alone(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    *,
    ignore: Iterable[str],
    ignore_only: Iterable[str] | None,
) -> tuple[set[str], list[str]]:
    """Find what is not to be quantized.

    Args:
      tensors: all of the checkpoint; experts under the names that they have where separate.
      config: config.json.
      ignore: entries beside the default ones.
      ignore_only: entries in place of them, or None.

    Returns:
      The names of such tensors; and the entries that name any, in order.

    Raises:
      InputError: if both are given, or listing the entries that are no patterns or name nothing.
    """
    ignore = _list_entries("ignore", ignore)
    default = list_default(config)
    if ignore_only is not None:
        if ignore:
            raise InputError("ignore adds to the default, ignore_only replaces it: give one")
        ignore, default = _list_entries("ignore_only", ignore_only), ()
    paths = {name: {name_module(name), name_module(i.name)} for name, i in tensors.items()}
    left, naming, reasons = set(), [], []
    for entry in dict.fromkeys([*default, *ignore]):
        try:
            matches = _compile(entry)
        except ValueError as error:
            reasons.append(f"{entry!r} {error}")
            continue
        named = {name for name, held in paths.items() if any(map(matches, held))}
        left |= named
        naming += [entry] if named else []
        # the head may be tied, and so without a tensor
        if not named and entry in ignore and entry not in DEFAULT_IGNORE and not matches(HEAD):
            reasons.append(f"{entry!r} names no module: give its whole path, or re: and a pattern")
    if reasons:
        raise InputError("ignore: not all of it can be followed", reasons)
    embeddings = {n for n in tensors if _is_embedding(name_module(n), config)}
    return left | embeddings, naming


def list_ignored(entries: Iterable[str], kept: Iterable[str]) -> list[str]:
    """What `ignore` of quantization_config must say.

    A pattern that allows anything before a name, as all default ones do, works in every tool, so it
    stands for what it matches. All other weights are listed by their paths, too: tools with other
    names for a part of the model translate paths, but not patterns.

    Args:
      entries: those that name modules.
      kept: paths of the linear weights that are not quantized.
    """
    entries = list(entries)
    found = [_compile(entry) for entry in entries if entry.startswith(("re:.*", r"re:(.*\.)?"))]
    paths = [path for path in kept if not any(matches(path) for matches in found)]
    listed = [*entries, *(path for path in paths if "Embedding" not in name_classes(path))]
    return list(dict.fromkeys(listed))


def name_module(tensor: str) -> str:
    """The path that config.json would name; of a stacked tensor's expert that of the tensor."""
    if name_separately(tensor) != [tensor]:
        return tensor.partition("[")[0]
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _count_layers(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many layers a model has, and how many may stand behind them."""
    try:
        model = parse_config(config)
        return model.num_hidden_layers, model.prediction_layers
    except ModelError:
        pass
    for part in (config, *find_subconfigs(config).values()):
        if "num_nextn_predict_layers" in part:
            first, count = part.get("num_hidden_layers"), part["num_nextn_predict_layers"]
            if isinstance(first, int) and isinstance(count, int) and first <= MAX_LAYERS:
                return first, min(count, MAX_LAYERS)
    return 0, 0


def _list_entries(name: str, entries: Iterable[str]) -> list[str]:
    if isinstance(entries, str):
        raise InputError(f"{name}: expected a list of modules, got the text {entries!r}")
    return list(entries)


def _compile(entry: str) -> Callable[[str], Any]:
    """A test for the paths that an entry of `ignore` names.

    Raises:
      ValueError: if its pattern is not a regular expression.
    """
    if not entry.startswith("re:"):
        return entry.__eq__
    return compile_pattern(entry.removeprefix("re:")).match


def _is_embedding(path: str, config: Mapping[str, Any]) -> bool:
    """Whether its rows are looked up, even if it is also the head, which multiplies."""
    return are_tied(config) is True if path == HEAD else "Embedding" in name_classes(path)
