"""The kinds of faults that loading a checkpoint tells apart, by number, and how each one reads.

Every fault of the loader is of one of these kinds; `tests/loaders/test_faults.py` shows each, and
fuzzing counts them.
"""

from __future__ import annotations

import re

from loaders.errors import Fault

TITLES = {
    1: "a shard whose name or link leaves the folder, or that is no file",
    2: "index and files disagree, or a file is missing",
    3: "a header or JSON file that is cut off, too long, no JSON, or has a key twice",
    4: "offsets that are negative, reversed, overlapping, with holes, or past the end",
    5: "a shape that is negative or overflows",
    6: "a dtype that the role does not allow",
    7: "tensors of a module that contradict each other",
    8: "values of 3, 5, 6 or 7 bits that could lie in two ways",
    9: "zero points missing although asymmetric, there although symmetric, or of no certain value",
    10: "weight_g_idx out of range, of unequal groups, or against config.json",
    11: "scales that are NaN, infinite or zero; zero points out of range",
    12: "padding bits that are set (a warning)",
    13: "quantization that config.json describes and nothing here can read",
    14: "experts missing, or not alike",
    15: "a file that ends early or changes while it is read",
    16: "a converted copy of another source, or a damaged one",
    17: "larger than the memory at hand",
    18: "code in a checkpoint, which is never run",
    19: "tensors of the model that are missing or unexpected",
}
# the first pattern that is found in "file: tensor: what" tells the kind
_PATTERNS = (
    (18, r"is a pickle, which can run code|never run"),
    (16, r"^jaxwna16|jaxwna16\.json (says|does not)|converted checkpoint|not those that were"),
    (1, r"must be a plain file name|a link that leaves|cannot be opened|this is not a file"),
    (15, r"the file ended after|cannot be read|changed (after|while)"),
    (2, r"the file is missing|the index says|the index does not name|but not in the index"),
    (2, r"weight_map|not a folder"),
    (3, r"the header claims|not valid JSON|expected a JSON object|the header entry lacks"),
    (3, r"has [0-9,]+ bytes, expected|not UTF-8"),
    (4, r"data_offsets .* are not|overlaps the|leaves a hole|ends at byte|belong to no tensor"),
    (4, r"takes \d+ bytes, data_offsets"),
    (5, r"shape .* is not a list of sizes|too large for any array|the name is longer"),
    (8, r"packed in another way up to"),
    (9, r"(weight_zero_point(\[\d+\])?|qzeros): the tensor is"),
    (9, r"all zero points are stored as|tools read zero points"),
    (10, r"are in no group of|input features, expected|act-order|(weight_|\.)g_idx: the tensor is"),
    (10, r"in another group than their order"),
    (11, r"scales are zero or not finite|zero points are outside of"),
    (17, r"its arrays take|there is no memory for"),
    (14, r"experts? (are|is) missing|is missing in experts|at least one expert|experts of config"),
    (14, r"contradict each other: |the same place among|gate and up|in each expert"),
    (14, r"must have the same shape"),
    (14, r"packed together or one after|the path of the experts' stack"),
    (14, r"(expected|more than) \d+ experts"),
    (13, r"says that it is not converted"),
    (13, r"only packed integers are read"),
    (13, r"no target of config_groups matches|is a tensor of "),
    (13, r"^config\.json: .*(quantization|compression)_config"),
    (6, r"unknown dtype|expected a float weight"),
    (7, r"the tensor is (missing|not expected)|the path of others|is also there as"),
    (7, r"no whole number of|do not fill whole words"),
    (7, r"must divide in_features|needs in_features|group_size must"),
)
_TENSOR = re.compile(r"expected (?P<dtypes>.+) \[.*\]( of .*)?, found (?P<found>\w+) \[.*\]")


def find_kind(fault: Fault) -> int:
    """The number of a fault's kind.

    Raises:
      AssertionError: if it is of none.
    """
    text = ": ".join((fault.file, fault.tensor, fault.what))
    for kind, pattern in _PATTERNS:
        if re.search(pattern, text, re.DOTALL):
            return kind
    match = _TENSOR.search(fault.what)
    assert match is not None, f"a fault of no kind: {fault}"
    return 7 if match["found"] in match["dtypes"].split(" or ") else 6
