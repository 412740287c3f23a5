"""`quantization_config` of AutoAWQ, AutoGPTQ and GPTQModel -> which scheme each module has.

One scheme holds for all modules that the files hold packed, but for those that `dynamic` of
GPTQModel has rules for. Fields are called as by transformers, or as by the tools themselves
("w_bit"). Whatever changes what the numbers mean, and cannot be read, is a fault.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from loaders.config_groups import FILE, MEND, Scheme
from loaders.encoding import (
    AWQ,
    GPTQ,
    LESS_ONE,
    LESS_ONE_BORROWED,
    MIDDLE,
    MIDDLE_LESS_ONE,
)
from loaders.errors import Fault
from loaders.patterns import compile_pattern
from loaders.presets import parse_version
from loaders.safetensors_file import TensorInfo

DEQUANTIZE = "load it with the tool that wrote it, save it dequantized and `jaxwna16 quantize` that"
_BITS = {AWQ: (4,), GPTQ: (2, 3, 4, 8)}
_SPELLINGS = {"bits": ("bits", "w_bit", "wbits"), "group_size": ("group_size", "q_group_size")}
_FORMATS = {AWQ: ("gemm",), GPTQ: ("gptq", "gptq_v2")}
# before, GPTQModel took 1 from the wrong bits of 3-bit zero points (ModelCloud/GPTQModel#2763)
_FIRST_SOUND_3_BITS = (7, 0)
# field -> values that mean nothing special (null and false do not either), and what others mean
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "act_bits": ((16, 32), "quantized activations are not supported"),
    "activation": ((), "quantized activations are not supported"),
    "adapter": ((), "an adapter would have to be added to the weights"),
    "data_type": (("int",), "only weights that are integers are read"),
    "extra_config": (({},), "schemes of single modules are read from `dynamic` alone"),
    "is_marlin_format": ((), "weights in the order of Marlin's kernel are not read"),
    "pack_dtype": (("int32", "torch.int32"), "only words of 32 bits are read"),
    "packing_format": (("auto_round:auto_gptq", "auto_round:auto_awq"), "it is not read"),
    "rotation": ((), "rotations between layers are part of the model"),
    "super_bits": ((), "quantized scales are not supported"),
}
_RULE_FIELDS = ("bits", "group_size", "sym", "desc_act")
# what says how a file came about, or how other tools compute with it
_UNREAD = {
    *("act_group_aware", "amp", "autoround_version", "awq_gemm_checkpoint", "backend"),
    *("batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment"),
    *("damp_percent", "dataset", "disable_exllama", "do_fuse", "enable_minmax_tuning"),
    *("enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "failsafe"),
    *("fallback", "fuse_max_seq_len", "gradient_accumulate_steps", "hessian", "iters"),
    *("low_gpu_mem_usage", "lr", "max_input_length", "meta", "method", "minmax_lr"),
    *("mock_quantization", "model_file_base_name", "model_name_or_path", "model_seqlen"),
    *("module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_fuse"),
    *("mse", "nsamples", "pad_token_id", "parallel_packing", "provider", "quant_method"),
    *("scale_dtype", "seqlen", "static_groups", "to_quant_block_names", "tokenizer"),
    *("true_sequential", "uri", "use_cuda_fp16", "use_exllama", "v2", "v2_alpha"),
}
_READ = {
    *("checkpoint_format", "desc_act", "dynamic", "format", "lm_head", "modules_to_not_convert"),
    *("sym", "version", "zero_point"),
    *(name for names in _SPELLINGS.values() for name in names),
}
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


@dataclasses.dataclass(frozen=True)
class TransposedScheme(Scheme):
    """The scheme of modules in the layout of AutoAWQ or GPTQ.

    Attributes:
      words: "awq" or "gptq".
      zero_points: how they are stored, in the terms of `loaders.encoding.Encoding`.
    """

    words: str = GPTQ
    zero_points: str = LESS_ONE


@dataclasses.dataclass(frozen=True)
class AwqGptqConfig:
    """What config.json says of the weights; the counterpart of `QuantizationConfig`.

    Attributes:
      method: "awq" or "gptq".
      scheme: of modules without a rule; None where it cannot be read.
      rules: patterns and the schemes of the modules that they match from the start, None where
        these stay plain; the first that matches counts (`dynamic`).
      kept: names and patterns of modules that stay plain (`modules_to_not_convert`).
      head: whether `lm_head` is quantized.
      remarks: what is odd, but no fault.
    """

    method: str
    scheme: TransposedScheme | None = None
    rules: tuple[tuple[str, TransposedScheme | None], ...] = ()
    kept: tuple[str, ...] = ()
    head: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """Of compressed-tensors: none."""
        return ""

    def find_scheme(self, module: str) -> TransposedScheme | None:
        """The scheme of a module, None where the config says that it stays plain."""
        if module.rpartition(".")[2] == "lm_head" and not self.head:
            return None
        if self._is_kept(module):
            return None
        for pattern, scheme in self._rule_patterns:
            if pattern.match(module):
                return scheme
        return self.scheme

    def refuses(self, module: str) -> bool:
        """Never: what cannot be read is said of the whole config."""
        return False

    def check_groups(
        self, modules: Mapping[str, Mapping[str, TensorInfo]]
    ) -> tuple[list[Fault], list[str]]:
        """No faults, and as warnings the remarks."""
        if any("weight_packed" in found for found in modules.values()):
            return [], [*self.remarks]
        unmet = f"{FILE}: quant_method is {self.method}, but no module is packed"
        return [], [*self.remarks, unmet]

    def describe_unused(self, modules: Collection[str]) -> list[str]:
        """Warnings about patterns that match no module; of `modules_to_not_convert` in one."""
        unused = [
            f"{FILE}: pattern {name!r} of dynamic matches no module"
            for (name, _), (pattern, _) in zip(self.rules, self._rule_patterns, strict=True)
            if not any(map(pattern.match, modules))
        ]
        kept = [name for name in self.kept if not _matches_any(name, modules)]
        if kept:
            count = f"{len(kept)} entries" if len(kept) > 1 else "1 entry"
            unused.append(
                f"{FILE}: {count} of modules_to_not_convert match no module: "
                f"{', '.join(map(repr, kept[:3]))}{', …' if len(kept) > 3 else ''}"
            )
        return unused

    def _is_kept(self, module: str) -> bool:
        """As `should_convert_module` of transformers: up to a dot, as a pattern, or the end."""
        return module.endswith(self.kept) or any(p.match(module) for p in self._kept_patterns)

    @functools.cached_property
    def _kept_patterns(self) -> list[re.Pattern[str]]:
        # plain names, which there may be hundreds of, are one pattern
        names = [name for name in self.kept if re.fullmatch(r"[\w.-]+", name)]
        others = [name for name in self.kept if name not in names]
        joint = ["|".join(names)] if names else []
        return [compile_pattern(f"(?:{name}){_BOUNDARY}") for name in [*joint, *others]]

    @functools.cached_property
    def _rule_patterns(self) -> list[tuple[re.Pattern[str], TransposedScheme | None]]:
        return [(compile_pattern(pattern), scheme) for pattern, scheme in self.rules]


def parse_awq(raw: dict[str, Any], field: str) -> tuple[AwqGptqConfig, list[Fault]]:
    """Read the config of AutoAWQ, or of AWQ by GPTQModel.

    Args:
      raw: the `quantization_config`.
      field: where it stands in config.json.

    Returns:
      What it says, and the faults of its fields.
    """
    faults = _check_format(raw, field, AWQ, ("version", "checkpoint_format", "format"))
    if raw.get("backend") == "llm-awq":
        what = "expected the layout of AutoAWQ, found that of llm-awq"
        faults.append(Fault(what, FILE, f"{field}.backend", DEQUANTIZE))
    return _parse(raw, field, AWQ, faults)


def parse_gptq(raw: dict[str, Any], field: str) -> tuple[AwqGptqConfig, list[Fault]]:
    """Read the config of AutoGPTQ, GPTQModel or optimum; arguments and result as `parse_awq`."""
    faults = _check_format(raw, field, GPTQ, ("checkpoint_format", "format"))
    return _parse(raw, field, GPTQ, faults)


def _parse(
    raw: dict[str, Any], field: str, method: str, faults: list[Fault]
) -> tuple[AwqGptqConfig, list[Fault]]:
    faults += [
        Fault(f"{what}, found {raw[name]!r}", FILE, f"{field}.{name}", DEQUANTIZE)
        for name, (values, what) in _REFUSED.items()
        if raw.get(name) and raw[name] not in values
    ]
    if raw.get("lm_head") not in (None, False, True):
        faults.append(_expect("true or false", raw, "lm_head", field))
    scheme, wrong = _make_scheme(raw, field, method)
    rules, wrong_rules = _parse_rules(raw, field, method)
    kept, wrong_names = _parse_names(raw, field)
    unknown = sorted(raw.keys() - _READ - _UNREAD - _REFUSED.keys())
    remarks = [f"{FILE}: {field}: not known, and not looked at: {', '.join(unknown)}"]
    config = AwqGptqConfig(
        method,
        scheme,
        rules,
        kept,
        raw.get("lm_head") is True,
        tuple(remarks if unknown else []),
    )
    return config, [*faults, *wrong, *wrong_rules, *wrong_names]


def _check_format(
    raw: Mapping[str, Any], field: str, method: str, names: tuple[str, ...]
) -> list[Fault]:
    """Other orders of the integers, and fields that contradict each other."""
    said = {name: str(raw[name]).lower() for name in names if raw.get(name) is not None}
    formats = _FORMATS[method]
    faults = [
        Fault(
            f"expected {' or '.join(map(repr, formats))}, found {raw[name]!r}",
            FILE,
            f"{field}.{name}",
            DEQUANTIZE,
        )
        for name, value in said.items()
        if value not in formats
    ]
    if not faults and len(set(said.values())) > 1:
        first, *others = said
        what = f"{raw[first]!r} contradicts {others[0]} = {raw[others[0]]!r}"
        faults = [Fault(what, FILE, f"{field}.{first}", "remove the one that is wrong")]
    return faults


def _make_scheme(
    raw: Mapping[str, Any], field: str, method: str
) -> tuple[TransposedScheme | None, list[Fault]]:
    bits, size = (_find(raw, _SPELLINGS[name]) for name in ("bits", "group_size"))
    faults = [
        _expect("true or false", raw, name, field)
        for name in ("sym", "desc_act", "zero_point")
        if raw.get(name) is not None and not isinstance(raw[name], bool)
    ]
    if type(bits) is not int or bits not in _BITS[method]:
        expected = " or ".join(map(str, _BITS[method]))
        what = f"expected {expected} of {method}, found {bits!r}"
        faults.append(Fault(what, FILE, f"{field}.bits", DEQUANTIZE))
    if type(size) is not int or (size != -1 and size <= 0):
        what = f"expected a size above 0 or -1, found {size!r}"
        faults.append(Fault(what, FILE, f"{field}.group_size", MEND))
    if faults:
        return None, faults
    if method == AWQ:
        # without `zero_point`, GPTQModel says the same by `sym`
        symmetric = raw.get("zero_point") is False or (
            raw.get("zero_point") is None and raw.get("sym") is True
        )
        zero_points = MIDDLE if symmetric else "words"
        return TransposedScheme(bits, size, symmetric, words=AWQ, zero_points=zero_points), []
    # a config that does not say so may mean either; what the tensors hold is right in any case
    symmetric, reordered = raw.get("sym") is True, raw.get("desc_act") is not False
    zero_points, faults = _find_zero_points(raw, field, bits, symmetric)
    return TransposedScheme(bits, size, symmetric, reordered, GPTQ, zero_points), faults


def _find_zero_points(
    raw: Mapping[str, Any], field: str, bits: int, symmetric: bool
) -> tuple[str, list[Fault]]:
    """How GPTQ's are stored, and the fault of those that nobody can read."""
    stated = _find(raw, ("checkpoint_format", "format")) or "gptq"
    if str(stated).lower() == "gptq_v2":
        return MIDDLE if symmetric else "words", []
    if symmetric:
        return MIDDLE_LESS_ONE, []
    writer = _find_writer(raw)
    if writer is None:
        return LESS_ONE, []
    if 32 % bits and writer < _FIRST_SOUND_3_BITS:
        what = f"asymmetric {bits}-bit weights in format 'gptq', which GPTQModel before 7.0 garbles"
        way_out = "quantize it again, in format gptq_v2"
        return LESS_ONE_BORROWED, [Fault(what, FILE, f"{field}.bits", way_out)]
    return LESS_ONE_BORROWED, []


def _find_writer(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The version of GPTQModel, (0, 0) if it does not say; None where another tool wrote it."""
    meta = raw.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    for tool in tools if isinstance(tools, list) else [tools]:
        name, _, version = str(tool).partition(":")
        if name.lower() == "gptqmodel":
            return parse_version(version) or (0, 0)
    return None


def _parse_rules(
    raw: Mapping[str, Any], field: str, method: str
) -> tuple[tuple[tuple[str, TransposedScheme | None], ...], list[Fault]]:
    """`dynamic`: {"-:pattern": {}, "+:pattern": {"bits": 8}, "pattern": {...}}."""
    rules, faults = raw.get("dynamic") or {}, []
    where = f"{field}.dynamic"
    if not isinstance(rules, dict):
        return (), [Fault(f"expected an object, found {rules!r}", FILE, where, MEND)]
    parsed: list[tuple[str, TransposedScheme | None]] = []
    for name, changes in rules.items():
        pattern = name[2:] if name.startswith(("-:", "+:")) else name
        wrong = _check_pattern(pattern, where)
        scheme = None
        if not isinstance(changes, dict):
            what = f"{name!r}: expected an object, found {changes!r}"
            wrong.append(Fault(what, FILE, where, MEND))
        elif not name.startswith("-:"):
            known = {*_RULE_FIELDS, *_UNREAD}
            wrong += [
                Fault(f"{name!r}: {key} is not known", FILE, where, DEQUANTIZE)
                for key, value in changes.items()
                if key not in known and value is not None
            ]
            chosen = {key: changes[key] for key in _RULE_FIELDS if key in changes}
            scheme, unread = _make_scheme(_override(raw, chosen), where, method)
            wrong += unread
        faults += wrong
        if not wrong:
            parsed.append((pattern, scheme))
    return tuple(parsed), faults


def _override(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config with those of a rule in place of its own, however these are spelt."""
    spelt = {n for name in changes for n in _SPELLINGS.get(name, (name,))}
    spelt |= {"zero_point"} if "sym" in changes else set()
    return {name: value for name, value in raw.items() if name not in spelt} | dict(changes)


def _parse_names(raw: Mapping[str, Any], field: str) -> tuple[tuple[str, ...], list[Fault]]:
    names, where = raw.get("modules_to_not_convert") or [], f"{field}.modules_to_not_convert"
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return (), [Fault(f"expected names, found {names!r}", FILE, where, MEND)]
    faults = [fault for name in names for fault in _check_pattern(name, where)]
    return () if faults else tuple(dict.fromkeys(names)), faults


def _check_pattern(pattern: str, where: str) -> list[Fault]:
    try:
        compile_pattern(pattern)
        compile_pattern(f"(?:{pattern}){_BOUNDARY}")
    except ValueError as error:
        return [Fault(f"{pattern!r} {error}", FILE, where, MEND)]
    return []


def _matches_any(name: str, modules: Iterable[str]) -> bool:
    """Also as AutoAWQ has it: in any place."""
    pattern = compile_pattern(f"(?:{name}){_BOUNDARY}")
    return any(name in module or pattern.match(module) for module in modules)


def _find(raw: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def _expect(expected: str, raw: Mapping[str, Any], name: str, field: str) -> Fault:
    return Fault(f"expected {expected}, found {raw[name]!r}", FILE, f"{field}.{name}", MEND)
