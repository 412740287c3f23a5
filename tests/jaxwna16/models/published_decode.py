"""The decode step of published models, compiled for a GPU that need not be there.

    python -m tests.jaxwna16.models.published_decode FOLDER ...

prints one object: FOLDER -> the names of its kernels. For the path that the compiler needs see
`tests.gpu_aot`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.filling.fit import plan_model
from loaders.plan import survey_folder

SLOTS = 4096


def decode(model: CausalLM, token: jax.Array, start: jax.Array, cache: Any) -> tuple:
    """Logits [1, V] after one more token int32 [1, 1], and the cache with it."""
    hidden, cache = model.hidden(token, start, jnp.ones_like(start), cache)
    return model.logits(hidden[:, 0]), cache


def describe_decode(folder: str | Path) -> tuple:
    """The arguments of `decode` for a checkpoint, as shapes: bfloat16, on the GPU's kernels."""
    survey = survey_folder(folder, headers_only=True)
    assert not survey.faults, survey.faults[:3]
    model = plan_model(survey.plan, dtype="bfloat16", backend="triton")
    cache = jax.eval_shape(lambda: model.make_cache(1, SLOTS))
    token, start = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (1,)))
    return model, token, start, cache


if __name__ == "__main__":
    from tests import gpu_aot

    print(
        json.dumps(
            {
                folder: [
                    kernel.name
                    for kernel in gpu_aot.compile(decode, *describe_decode(folder), arch="sm_90a")
                ]
                for folder in sys.argv[1:]
            }
        )
    )
