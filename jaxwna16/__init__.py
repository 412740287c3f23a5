"""Packed WNA16 checkpoints (compressed-tensors `pack-quantized`) in JAX and Flax.

`load_checkpoint` reads one, `QuantDense` and `QuantMoE` compute with it, `project` and `gated` with
several dense layers at once, `load_model` and `generate` turn it into text. Linen's layers are
`jaxwna16.linen.QuantDense` and `jaxwna16.linen.QuantMoE`.

Names are imported when they are first used: the command line looks at checkpoints without flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxwna16.version import __version__ as __version__

if TYPE_CHECKING:
    from jaxwna16 import linen as linen
    from jaxwna16.checkpoints.convert import convert_checkpoint as convert_checkpoint
    from jaxwna16.checkpoints.dequantize import dequantize_checkpoint as dequantize_checkpoint
    from jaxwna16.checkpoints.load import Checkpoint as Checkpoint
    from jaxwna16.checkpoints.load import load_checkpoint as load_checkpoint
    from jaxwna16.checkpoints.quantize import quantize_checkpoint as quantize_checkpoint
    from jaxwna16.errors import InputError as InputError
    from jaxwna16.errors import ModelError as ModelError
    from jaxwna16.errors import NanWarning as NanWarning
    from jaxwna16.evaluation.perplexity import measure_perplexity as measure_perplexity
    from jaxwna16.generation.generate import Generation as Generation
    from jaxwna16.generation.generate import generate as generate
    from jaxwna16.generation.load_model import load_model as load_model
    from jaxwna16.generation.text import Tokenizer as Tokenizer
    from jaxwna16.layers.dense import QuantDense as QuantDense
    from jaxwna16.layers.dense import QuantParam as QuantParam
    from jaxwna16.layers.fused import gated as gated
    from jaxwna16.layers.fused import project as project
    from jaxwna16.layers.moe import QuantMoE as QuantMoE
    from jaxwna16.layers.training import merge_params as merge_params
    from jaxwna16.layers.training import split_params as split_params
    from jaxwna16.programs import keep_programs as keep_programs
    from loaders.errors import CheckpointError as CheckpointError
    from loaders.modules.repack import pack as pack
    from loaders.modules.repack import unpack as unpack
    from pallas_kernels import BackendError as BackendError
    from pallas_kernels import QuantSpec as QuantSpec
    from pallas_kernels import SpecError as SpecError
    from pallas_kernels import TableError as TableError
    from pallas_kernels import Wna16Error as Wna16Error
    from pallas_kernels import dequantize as dequantize
    from pallas_kernels import explain as explain
    from pallas_kernels import float_moe as float_moe
    from pallas_kernels import quant_matmul as quant_matmul
    from pallas_kernels import quant_matmul_gated as quant_matmul_gated
    from pallas_kernels import quant_matmul_many as quant_matmul_many
    from pallas_kernels import quant_moe as quant_moe
    from pallas_kernels import quantize as quantize
    from pallas_kernels import route as route

_PLACES = {
    "jaxwna16.checkpoints.load": "Checkpoint load_checkpoint",
    "jaxwna16.checkpoints.convert": "convert_checkpoint",
    "jaxwna16.layers.dense": "QuantDense QuantParam",
    "jaxwna16.errors": "InputError ModelError NanWarning",
    "jaxwna16.evaluation.perplexity": "measure_perplexity",
    "jaxwna16.layers.fused": "gated project",
    "jaxwna16.generation.generate": "Generation generate",
    "jaxwna16.generation.load_model": "load_model",
    "jaxwna16.layers.moe": "QuantMoE",
    "jaxwna16.programs": "keep_programs",
    "jaxwna16.checkpoints.dequantize": "dequantize_checkpoint",
    "jaxwna16.checkpoints.quantize": "quantize_checkpoint",
    "jaxwna16.generation.text": "Tokenizer",
    "jaxwna16.layers.training": "merge_params split_params",
    "loaders.errors": "CheckpointError",
    "loaders.modules.repack": "pack unpack",
    "pallas_kernels": "BackendError QuantSpec SpecError TableError Wna16Error dequantize explain "
    "float_moe quant_matmul quant_matmul_gated quant_matmul_many quant_moe quantize route",
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "linen":
        return importlib.import_module("jaxwna16.linen")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "linen"})
