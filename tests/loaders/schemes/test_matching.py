"""Targets and ignore: any of them, on any names, match what they match in compressed-tensors."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loaders.schemes.module_names import name_classes
from loaders.schemes.quantization_config import parse_quantization
from tests.skeletons import apply_config, build_skeleton

PARTS = ["model", "layers", "0", "1", "10", "mlp", "q_proj", "embed_tokens", "Linear", "re:x"]
CLASSES = ["Linear", "Embedding", "Module", "linear", "Norm", "re:", "", ".*proj"]
PIECES = [
    *(".*", ".", "model", "layers", "[0-9]+", "1", "(q|k)_proj", "mlp", "$", "^", r"\.", "embed"),
    *("(?!.*mlp)", "re:", "q_proj$", ".*proj"),
]

names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
patterns = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
regexes = patterns.map(lambda text: f"re:{text}")


@st.composite
def cases(draw):
    """Modules, targets of up to four groups, and what is ignored."""
    modules = draw(st.lists(names, min_size=1, max_size=8, unique=True))
    modules = [m for m in modules if not any(o.startswith(f"{m}.") for o in modules)]
    targets = st.one_of(regexes, st.sampled_from([*modules, *CLASSES]), names)
    groups = draw(st.lists(st.lists(targets, min_size=1, max_size=3), min_size=1, max_size=4))
    return modules, groups, draw(st.lists(targets, max_size=2))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(cases())
@example((["re:x", "y"], [["re:"]], ["re:x"]))
@example((["re:x", "y"], [["re:.*"], ["re:x", "y"]], []))
@example((["a.re:x"], [["re:.*"], ["a.re:x"]], []))
@example((["z.re:x"], [["re:.*"], ["z.re:x"]], []))
@example((["Linear", "a"], [["Linear"], ["re:Lin"]], []))
def test_scheme_is_the_one_that_compressed_tensors_applies(case):
    pytest.importorskip("compressed_tensors")
    modules, groups, ignore = case
    kinds = {kind: [m for m in modules if name_classes(m)[0] == kind] for kind in CLASSES[:2]}
    config = {
        "config_groups": {
            # the size of a group tells which it is
            f"group_{i}": {"targets": names, "weights": {"num_bits": 4, "group_size": 2 ** (i + 1)}}
            for i, names in enumerate(groups)
        },
        "format": "pack-quantized",
        "ignore": ignore,
    }
    expected = apply_config(build_skeleton(kinds), config)
    parsed, faults = parse_quantization({"quantization_config": config})
    assert not faults
    for module in modules:
        scheme = parsed.find_scheme(module)
        size = expected[module].weights.group_size if module in expected else None
        assert (scheme and scheme.group_size) == size, module
