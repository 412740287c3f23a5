"""`quantization_config` of AutoAWQ, AutoGPTQ and GPTQModel -> which scheme each module has.

One scheme holds for all packed modules, except those with rules in `dynamic` of GPTQModel or
`extra_config` of AutoRound (`loaders.schemes.awq_gptq.rules`). A field that changes the meaning of
the numbers and cannot be read is a fault.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from loaders.errors import Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.schemes.awq_gptq.kept_names import KeptNames, is_plain
from loaders.schemes.awq_gptq.rules import DYNAMIC, EXTRA, Rule, check_pattern, parse_rules
from loaders.schemes.awq_gptq.schemes import (
    DEQUANTIZE,
    SPELLINGS,
    TransposedScheme,
    expect,
    make_scheme,
)
from loaders.schemes.config_groups import FILE, MEND
from loaders.schemes.packings import AWQ, GPTQ
from loaders.schemes.patterns.patterns import (
    Budget,
    Pattern,
    check_distinct,
    compile_pattern,
    make_budget,
)

_FORMATS = {AWQ: ("gemm",), GPTQ: ("gptq", "gptq_v2")}
_ROTATED = "rotations between layers are part of the model"
# field -> values that mean nothing special (null and false do not either), and what others mean
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "act_bits": ((16, 32), "quantized activations are not supported"),
    "activation": ((), "quantized activations are not supported"),
    "adapter": ((), "an adapter would have to be added to the weights"),
    "data_type": (("int",), "only weights that are integers are read"),
    "is_marlin_format": ((), "weights in the order of Marlin's kernel are not read"),
    "pack_dtype": (("int32", "torch.int32"), "only words of 32 bits are read"),
    "packing_format": (("auto_round:auto_gptq", "auto_round:auto_awq"), "it is not read"),
    "rotation": ((), _ROTATED),
    "rotation_config": ((), _ROTATED),
    "spinquant_config": ((), _ROTATED),
    "static_attention_dtype": ((), "quantized attention is not supported"),
    "static_kv_dtype": ((), "a quantized key-value cache changes results"),
    "super_bits": ((), "quantized scales are not supported"),
}
# what says how a file came about, or how other tools compute with it
_UNREAD = {
    *("act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "amp"),
    *(
        "autoround_version",
        "awq_gemm_checkpoint",
        "backend",
        "batch_size",
        "block_name_to_quantize",
    ),
    *("cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset"),
    *("disable_exllama", "do_fuse", "enable_minmax_tuning"),
    *("enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "failsafe"),
    *("fallback", "fuse_max_seq_len", "gradient_accumulate_steps", "hessian", "iters"),
    *("low_gpu_mem_usage", "lr", "max_input_length", "meta", "method", "minmax_lr"),
    *("mock_quantization", "model_file_base_name", "model_free", "model_name_or_path"),
    *("model_seqlen", "quant_block_list", "super_group_size", "supported_types"),
    *("static_attention_granularity", "static_kv_granularity"),
    *("module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_fuse"),
    *("mse", "nsamples", "pad_token_id", "parallel_packing", "provider", "quant_method"),
    *("scale_dtype", "seqlen", "static_groups", "to_quant_block_names", "tokenizer"),
    *("true_sequential", "uri", "use_cuda_fp16", "use_exllama", "v2", "v2_alpha"),
}
_READ = {
    *("checkpoint_format", "desc_act", "format", "lm_head", "modules_to_not_convert", "sym"),
    *("version", "zero_point", DYNAMIC, EXTRA),
    *(name for names in SPELLINGS.values() for name in names),
}
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


@dataclasses.dataclass(frozen=True)
class AwqGptqConfig:
    """What config.json says of the weights; the counterpart of `QuantizationConfig`.

    Attributes:
      method: what `quant_method` says.
      scheme: of modules without a rule; None where it cannot be read.
      rules: what is said of some modules alone; a path counts before a pattern, and of several
        patterns the first that matches (`extra_config`, then `dynamic`).
      kept: names and patterns of modules that stay plain (`modules_to_not_convert`).
      head: whether `lm_head` is quantized.
      remarks: what is odd, but no fault.
    """

    method: str
    scheme: TransposedScheme | None = None
    rules: tuple[Rule, ...] = ()
    kept: tuple[str, ...] = ()
    head: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def pattern_count(self) -> int:
        """How many patterns each name is matched with at most."""
        return self._kept_names.kinds + len(self._kept_patterns) + len(self._rule_patterns)

    @property
    def version(self) -> str:
        """Of compressed-tensors: none."""
        return ""

    def find_scheme(self, module: str) -> TransposedScheme | None:
        """The scheme of a module, None where the config says that it stays plain."""
        if self._is_kept(module):
            return None
        if module in self._rule_paths:
            return self._rule_paths[module]
        if module.rpartition(".")[2] == "lm_head" and not self.head:
            return None
        for rule, pattern in self._rule_patterns:
            if pattern.match(module):
                return rule.scheme
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

    def match_ignored(self, modules: Collection[str]) -> dict[str, list[str]]:
        """Each entry of `modules_to_not_convert` and the modules that it keeps plain."""
        found: dict[str, list[str]] = {name: [] for name in self.kept}
        for module in modules:
            for name in (*self._kept_names.find(module), *self._list_kept_patterns(module)):
                found[name].append(module)
        return found

    def describe_unused(self, modules: Collection[str]) -> list[str]:
        """Warnings about patterns that match no module, and about names in one for a field."""
        unused = [
            f"{FILE}: pattern {rule.name!r} of {rule.field} matches no module"
            for rule, pattern in self._rule_patterns
            if not any(map(pattern.match, modules))
        ]
        absent = _list_absent(self._rule_paths, modules)
        # as AutoAWQ has it, also a name that is any part of a path means a module
        paths = "\n".join(modules)
        kept = [
            name
            for name, found in self.match_ignored(modules).items()
            if not found and name not in paths
        ]
        return unused + _count_unmet(EXTRA, absent) + _count_unmet("modules_to_not_convert", kept)

    def _is_kept(self, module: str) -> bool:
        """As `should_convert_module` of transformers: up to a dot, as a pattern, or the end."""
        return bool(self._kept_names.find(module)) or any(self._list_kept_patterns(module))

    def _list_kept_patterns(self, module: str) -> Iterator[str]:
        for name, pattern in self._kept_patterns.items():
            if module.endswith(name) or pattern.match(module):
                yield name

    @functools.cached_property
    def _kept_names(self) -> KeptNames:
        return KeptNames(filter(is_plain, self.kept))

    @functools.cached_property
    def _kept_patterns(self) -> dict[str, Pattern]:
        names = [name for name in self.kept if not is_plain(name)]
        return {name: compile_pattern(f"(?:{name}){_BOUNDARY}", self._budget) for name in names}

    @functools.cached_property
    def _rule_patterns(self) -> list[tuple[Rule, Pattern]]:
        rules = [rule for rule in self.rules if not rule.is_path]
        return [(rule, rule.compile(self._budget)) for rule in rules]

    @functools.cached_property
    def _budget(self) -> Budget:
        return make_budget()

    @functools.cached_property
    def _rule_paths(self) -> dict[str, TransposedScheme | None]:
        return {rule.name: rule.scheme for rule in self.rules if rule.is_path}


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
        faults.append(expect("true or false", raw, "lm_head", field))
    scheme, wrong = make_scheme(raw, field, method)
    rules, wrong_rules = parse_rules(raw, field, method, _UNREAD)
    kept, wrong_names = _parse_names(raw, field)
    unknown = sorted(raw.keys() - _READ - _UNREAD - _REFUSED.keys())
    remarks = [f"{FILE}: {field}: unknown, and not used: {', '.join(unknown)}"]
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


def _parse_names(raw: Mapping[str, Any], field: str) -> tuple[tuple[str, ...], list[Fault]]:
    names, where = raw.get("modules_to_not_convert") or [], f"{field}.modules_to_not_convert"
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return (), [Fault(f"expected names, found {names!r}", FILE, where, MEND)]
    patterns = dict.fromkeys(name for name in names if not is_plain(name))
    faults = check_distinct(patterns, where)
    faults = faults or [fault for name in patterns for fault in _check_name(name, where)]
    return () if faults else tuple(dict.fromkeys(names)), faults


def _check_name(name: str, where: str) -> list[Fault]:
    return check_pattern(name, f"(?:{name}){_BOUNDARY}", where)


def _count_unmet(field: str, names: list[str]) -> list[str]:
    """The warning about names that match no module, if there are any."""
    if not names:
        return []
    count = f"{len(names)} entries" if len(names) > 1 else "1 entry"
    return [
        f"{FILE}: {count} of {field} match no module: "
        f"{', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''}"
    ]


def _list_absent(paths: Iterable[str], modules: Collection[str]) -> list[str]:
    """Those that are the path of no module, nor of what contains modules."""
    absent = [path for path in paths if path not in modules]
    if not absent:
        return []
    parents = {name[: dot.start()] for name in modules for dot in re.finditer(r"\.", name)}
    return [path for path in absent if path not in parents]
