"""`jaxwna16 verify --oracle`: compressed-tensors itself says what a checkpoint's weights are."""

from __future__ import annotations

import importlib

import compressed_tensors
import ml_dtypes
import numpy as np
import pytest

from jaxwna16.cli import oracle
from jaxwna16.cli.oracle import find_differences
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_experts, make_tensors, prefix_names, write_folder
from tests.golden import VERSIONS, write_golden
from tests.jaxwna16.cli.checkpoints import edit_tensors

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "m.experts"
ORACLE = compressed_tensors.__version__
# of golden files: modules, and how many of them compressed-tensors 0.20 cannot read as they are
COUNTS = {"0.8.1": (6, 4), "0.9.3": (5, 3), "0.17.0": (10, 9), "0.18.0": (8, 0)}


def verify(call, folder) -> tuple[dict, list[dict]]:
    """The oracle's result, and the faults."""
    report = call("verify", folder, "--oracle", "--json").report
    return report["oracle"], report.get("error", {"faults": []})["faults"]


def test_a_good_checkpoint_is_what_compressed_tensors_says(call, packed_folder):
    outcome = call("verify", packed_folder, "--oracle")
    assert outcome.code == 0
    expected = f"oracle: 14 of 14 modules equal compressed-tensors {ORACLE} bit for bit\n"
    assert expected in outcome.out


def test_without_it_there_is_no_oracle(call, packed_folder):
    assert call("verify", packed_folder, "--json").report["oracle"] is None


@pytest.mark.parametrize("version", VERSIONS)
def test_what_old_versions_wrote_is_compared_through_a_conversion(call, tmp_path, version):
    found, faults = verify(call, write_golden(tmp_path / "c", version))
    modules, converted = COUNTS[version]
    assert faults == []
    assert found == {
        "version": ORACLE,
        "equal": modules,
        "different": 0,
        "converted": converted,
        "not_comparable": [],
    }


def _draw_words(*shape: int, seed: int = 0, bits: int = 0xFFFFFFFF) -> np.ndarray:
    words = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32) & np.uint32(bits)
    return words.view(np.int32)


def _describe_gptq(bits: int, **fields) -> dict:
    about = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False}
    return {"quantization_config": about | {"sym": False, "checkpoint_format": "gptq"} | fields}


AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (AWQ, 4),
        (_describe_gptq(4), 4),
        (_describe_gptq(8, desc_act=True), 8),
        (_describe_gptq(3, checkpoint_format="gptq_v2"), 3),
    ],
    ids=["awq", "gptq", "gptq, act-order", "gptq, 3 bits"],
)
def test_autoawq_and_gptq_are_compared_through_a_conversion(call, tmp_path, config, bits):
    k, n, groups = 128, 64, 4
    is_awq = config is AWQ
    tensors = {
        "qweight": _draw_words(*(k, n // 8) if is_awq else (k * bits // 32, n)),
        "qzeros": _draw_words(groups, n * bits // 32, seed=1, bits=0x77777777),
        "scales": np.random.default_rng(0).uniform(0.01, 0.1, (groups, n)).astype(np.float16),
    }
    if not is_awq:
        order = np.random.default_rng(1).permutation(k) if bits == 8 else np.arange(k)
        tensors["g_idx"] = (order // 32).astype(np.int32)
    folder = write_folder(tmp_path / "c", config, [prefix_names("m.q_proj", tensors)])
    found, faults = verify(call, folder)
    assert faults == []
    assert (found["equal"], found["converted"], found["not_comparable"]) == (1, 1, [])


def test_zero_points_of_few_features_which_compressed_tensors_trips_over(call, tmp_path):
    spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=96, out_features=7)
    tensors = prefix_names("m", make_tensors(spec))
    found, faults = verify(call, write_folder(tmp_path / "c", make_config(spec), [tensors]))
    assert (faults, found["equal"], found["converted"]) == ([], 1, 1)


def _write_experts(folder, stacked: bool):
    """Three experts; gate and up share a tile of the tile layout."""
    first = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=64, out_features=40)
    second = QuantSpec(bits=4, group_size=40, symmetric=False, in_features=40, out_features=64)
    names = ("gate_proj", "up_proj", "down_proj")
    tensors = make_experts(EXPERTS, first, second, names=names, experts=3)
    if stacked:
        roles = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        tensors = {
            f"{EXPERTS}.{name}.{role}": np.stack(
                [tensors[f"{EXPERTS}.{expert}.{name}.{role}"] for expert in range(3)]
            )
            for name in names
            for role in roles
        }
    targets = [["re:.*(gate|up)_proj"], ["re:.*down_proj"]]
    return write_folder(folder, make_config(first, second, targets=targets), [tensors])


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_compared_in_their_rows_of_the_stack(call, tmp_path, stacked):
    found, faults = verify(call, _write_experts(tmp_path / "c", stacked))
    assert faults == []
    assert (found["equal"], found["not_comparable"]) == (9, [])


def test_a_zero_point_that_we_read_wrongly_is_found(call, packed_folder, monkeypatch):
    pack = oracle.pack

    def pack_wrongly(tensors, spec, encoding):
        leaves = pack(tensors, spec, encoding)
        if spec.out_features == 96:
            leaves["zero_point"] = leaves["zero_point"].at[1, 5].add(1)
        return leaves

    monkeypatch.setattr(oracle, "pack", pack_wrongly)
    found, faults = verify(call, packed_folder)
    assert (found["equal"], found["different"]) == (10, 4)
    assert {fault["tensor"].rpartition(".")[2] for fault in faults} == {"gate_proj", "up_proj"}
    assert f"32 of 6144 weights differ from compressed-tensors {ORACLE}" in faults[0]["what"]
    assert "the first at [5, 32]: " in faults[0]["what"]
    outcome = call("verify", packed_folder, "--oracle")
    assert outcome.code == 1
    assert "oracle: 10 of 14 modules equal" in outcome.out
    assert "mlp.gate_proj: 32 of 6144 weights" in outcome.err


def test_an_expert_in_the_wrong_rows_is_found(call, tmp_path, monkeypatch):
    """As if up stood where gate stands: both of each expert differ, down does not."""
    pack_expert = oracle.pack_expert

    def pack_wrongly(stack, words, spec, expert, row, encoding):
        return pack_expert(stack, words, spec, expert, 0, encoding)

    monkeypatch.setattr(oracle, "pack_expert", pack_wrongly)
    found, faults = verify(call, _write_experts(tmp_path / "c", stacked=False))
    assert (found["equal"], found["different"]) == (3, 6)
    assert {fault["tensor"].rpartition(".")[2] for fault in faults} == {"gate_proj", "up_proj"}


def test_modules_with_faulty_numbers_are_said_not_to_be_compared(call, broken):
    edit_tensors(broken, lambda t: t[f"{Q}.weight_scale"].__setitem__((3, 1), np.nan))
    found, faults = verify(call, broken)
    assert found["equal"] == 13
    assert found["not_comparable"] == [{"reason": "the numbers are faulty", "modules": 1}]
    assert [fault["tensor"] for fault in faults] == [f"{Q}.weight_scale"]


def test_what_compressed_tensors_refuses_is_said_not_to_be_compared(
    call, packed_folder, monkeypatch
):
    def refuse(self, module, arrays):
        raise ValueError("it trips over this")

    monkeypatch.setattr(oracle._Reader, "decompress", refuse)
    outcome = call("verify", packed_folder, "--oracle")
    assert "0 of 0 modules equal" in outcome.out
    reason = "compressed-tensors cannot decompress it: ValueError: it trips over this"
    assert f"14 not comparable: {reason}" in outcome.out


def test_a_converted_copy_names_its_original(call, packed_folder, tmp_path):
    assert call("convert", packed_folder, tmp_path / "copy").code == 0
    found, _ = verify(call, tmp_path / "copy")
    [entry] = found["not_comparable"]
    assert entry["modules"] == 14
    assert "verify the original" in entry["reason"]


def test_a_missing_extra_is_named(call, packed_folder, monkeypatch):
    import_module = importlib.import_module

    def fail(name, *args):
        if name.startswith("compressed_tensors"):
            raise ImportError(name)
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", fail)
    outcome = call("verify", packed_folder, "--oracle")
    assert outcome.code == 1
    assert 'pip install "jaxwna16[oracle]"' in outcome.err


def test_another_version_is_refused(call, packed_folder, monkeypatch):
    monkeypatch.setattr("compressed_tensors.__version__", "0.17.1")
    outcome = call("verify", packed_folder, "--oracle")
    assert outcome.code == 1
    assert "needs compressed-tensors 0.20, found 0.17.1" in outcome.err


def test_a_bit_is_a_difference_and_a_flushed_number_is_none():
    theirs = np.array([1, -2, 3e-39, 0, np.nan], np.float32)
    ours = np.array([1, -2, 0, 0, np.nan], np.float32)
    assert not find_differences(ours, theirs).any()
    assert find_differences(np.nextafter(ours, 9, dtype=np.float32), theirs)[:2].all()
    assert find_differences(-ours, theirs).any()
    halves = np.array([0, 1], np.float16)
    assert find_differences(halves, np.array([6e-8, 1], np.float16)).tolist() == [True, False]
    assert find_differences(ours.astype(ml_dtypes.bfloat16), theirs).all()
