"""What mutations put in the place of names, numbers and fields: wrong, odd, or another one."""

from __future__ import annotations

from typing import Any

from loaders.files.folder import CONFIG, INDEX

HUGE, DEEP, VERY_DEEP = "@huge@", "@deep@", "@very deep@"
"""Marks of texts that `tests.fuzz.json_edits.dump` writes in their place."""
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 63, 64, 65, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 10**4000, HUGE, 0.0, 1.5, 64.0, 1e308, float("nan"), float("inf"), DEEP, VERY_DEEP),
    *("", "0", "64", "Linear", "re:(", "re:.*", "\0", "\ud800", "é", "x" * 1000, "../x", "a\nb"),
    *([], [1], [[]], [None], {}, {"a": 1}, {"": {}}, [2**40, 2**40], ["re:.*"], {"\ud800": 1}),
)
BOUNDARIES = (0, 1, 2, 7, 8, 9, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**63, 2**64 - 1)
SIZES = (0, 1, 2, 3, 8, 9, 16, 32, 64, 96, 2**16, 2**31, 2**40, 2**62, -1, 2**63, 2**64)
CODES = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "U32", "F32", "I64", "F64", "F8_E4M3")
OUTSIDE = ("../outside/model.safetensors", "../outside/config.json", "..", ".", "/dev/zero")
NAMES = (
    *("../outside/model.safetensors", "/etc/hostname", "sub/model.safetensors", "..", "", "\0"),
    *("model.safetensors\0", "x" * 400 + ".safetensors", "a\\model.safetensors", CONFIG, INDEX),
    *("gone.safetensors", ".safetensors", "MODEL.SAFETENSORS", "\ud800.safetensors", "code.py"),
    *("./model.safetensors", "model.safetensors/", "~/model.safetensors", "file:model.safetensors"),
)
FIELDS: dict[str, tuple] = {
    "num_bits": (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 4.0, "4", True, None),
    "group_size": (1, 3, 8, 16, 32, 48, 64, 96, 128, 0, -1, -2, 32.0, "32", None, 10**30),
    "symmetric": (True, False, None, 0, "false"),
    "strategy": ("group", "channel", "tensor", "block", "token", "tensor_group", None, "Group"),
    "type": ("int", "float", None, "INT", 4),
    "dynamic": (True, False, None, "local"),
    "actorder": ("group", "weight", "static", "dynamic", True, False, None, 3),
    "block_structure": ([1, 1], [128, 128], None),
    "zp_dtype": ("torch.int8", None),
    "observer": ("minmax", None, 1),
    "unheard_of": (1, None),
}
TOP: dict[str, tuple] = {
    "quant_method": ("gptq", "awq", "compressed_tensors", None, "", "bitsandbytes", "jaxwna16"),
    "format": ("int-quantized", "dense", "mixed-precision", None, "nvfp4-pack-quantized", ""),
    "version": ("0.9.2", "0.9.3", "0.17.0", "0.18.0", "0.20.0", "", "x", None, 17, "9" * 5000),
    "ignore": ([], ["Linear"], ["re:.*"], ["re:.*q_proj"], ["re:("], ["re:(((a+)+)+)+$"], "x"),
    "kv_cache_scheme": (None, {}, {"num_bits": 8}),
    "sparsity_config": (None, {}, {"format": "dense"}, {"format": "sparse-24"}),
    "transform_config": (None, {}, {"config_groups": {}}, {"config_groups": {"u": {}}}),
    "quantization_status": (None, "frozen", "initialized", 3),
    "config_groups": ({}, [], None, {"W4A16": ["Linear"]}, {"W8A16": ["Linear"]}, {"g": None}),
}
TARGETS = (
    *([], ["Linear"], ["linear"], ["Embedding"], ["re:.*"], ["re:.*_proj$"], ["re:["], ["re:"]),
    *(["model.layers.0.q_proj"], ["re:(a|a)*$", "Linear"], ["re:" + "(" * 2000], [""], "Linear"),
    *(["re:model.*", "re:.*q_proj"], ["re:a{99999999999999999999}"], ["re:[[a]"], [None]),
)
TRANSPOSED: dict[str, tuple] = {
    "bits": (2, 3, 4, 8, 5, 16, 4.0, "4", None, 10**30),
    "group_size": (16, 32, 64, 128, -1, 0, -2, None, "32", 10**30),
    "sym": (True, False, None, 1),
    "zero_point": (True, False, None, 0),
    "desc_act": (True, False, None, "yes"),
    "checkpoint_format": ("gptq", "gptq_v2", "marlin", None, 3),
    "version": ("gemm", "GEMM", "gemv", "marlin", None, 2),
    "lm_head": (True, False, None),
    "modules_to_not_convert": ([], None, ["q_proj"], ["norm"], ["re:("], ["("], ["(.*.*)*x"], "x"),
    "dynamic": ({}, None, {"-:.*": {}}, {".*q_proj": {"bits": 8}}, {"(": {}}, {"+:.*": {"sym": 1}}),
    "w_bit": (4, 8, None),
    "q_group_size": (32, 64),
    "meta": ({"quantizer": ["gptqmodel:1.0"]}, None, {"static_groups": True}, []),
    "unheard_of": (1, None),
}
