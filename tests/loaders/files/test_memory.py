"""Whether a checkpoint can fit: refused only if it cannot, and before anything of it is read."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxwna16 import load_checkpoint
from loaders.errors import CheckpointError
from loaders.files import memory
from loaders.files.folder import CONFIG, SINGLE
from loaders.files.memory import find_available, require_memory
from loaders.files.safetensors_file import read_tensor
from loaders.plan import make_plan
from loaders.stream import require_memory_for
from tests.folders import describe_entry, write_folder, write_raw

GB = 10**9
CPU = jax.devices("cpu")[0]


def test_a_tensor_larger_than_any_memory_is_refused_at_once(tmp_path):
    """The file is sparse: a terabyte that takes no room, as a broken download may leave it."""
    (tmp_path / CONFIG).write_text("{}")
    path = write_raw(tmp_path / SINGLE, {"a": describe_entry("F32", [2**20, 2**18], 0, 2**40)})
    try:
        os.truncate(path, path.stat().st_size + 2**40)
    except OSError:
        pytest.skip("this file system has no such sparse files")
    start = time.perf_counter()
    expected = r"its arrays take 1099\.5 GB, and reading them up to 2199\.0 GB more; .* available"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(tmp_path)
    assert time.perf_counter() - start < 5


def test_a_tensor_that_finds_no_memory_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "c", {}, [{"a": np.ones(16, np.float32)}])
    plan = make_plan(folder)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("loaders.files.host_memory.np.zeros", fail)
    with pytest.raises(CheckpointError, match=r"a: there is no memory for its 64 bytes"):
        read_tensor(plan.plain["a"])


def test_more_experts_than_any_model_has_are_refused_and_not_made(tmp_path):
    """Each would be an object of some hundred bytes, and of one byte in the file."""
    (tmp_path / CONFIG).write_text("{}")
    name, count = "m.experts.down_proj", 10_001
    entry = describe_entry("U8", [count, 1, 1], 0, count)
    write_raw(tmp_path / SINGLE, {name: entry}, bytes(count))
    with pytest.raises(CheckpointError, match=f"{name}: more than 10000 experts"):
        make_plan(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "needed"), [(None, 96), ("float16", 64), ("float32", 96), ("bfloat16", 64)]
)
def test_what_counts_are_the_arrays_as_they_are_held(tmp_path, monkeypatch, dtype, needed):
    """16 float32 and 8 int32; a cast to fewer bytes counts."""
    tensors = {"a": np.ones(16, np.float32), "b": np.ones(8, np.int32)}
    plan = make_plan(write_folder(tmp_path / "c", {}, [tensors]))
    monkeypatch.setattr(memory, "find_available", lambda _: needed)
    require_memory_for(plan, dtype)
    monkeypatch.setattr(memory, "find_available", lambda _: needed - 1)
    with pytest.raises(CheckpointError, match="free memory, or use a machine"):
        require_memory_for(plan, dtype)


def test_a_device_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "find_available", lambda _: None)
    require_memory(Path("c"), 10**18, 0)


@pytest.mark.parametrize(
    ("stats", "available"),
    [({"bytes_limit": 100, "bytes_in_use": 30}, 70), ({"bytes_limit": 100}, 100), (None, None)],
)
def test_of_a_gpu_the_rest_of_its_pool_is_available(stats, available):
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert find_available(device) == available


def _fake_system(tmp_path: Path, monkeypatch, files: dict[str, object]) -> None:
    """/proc and /sys/fs/cgroup made of these files."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")


MEMINFO = "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\nSwapFree: 1000000 kB"


def test_of_a_host_what_the_kernel_calls_available_and_swap(tmp_path, monkeypatch):
    _fake_system(tmp_path, monkeypatch, {"proc/meminfo": MEMINFO})
    assert find_available(CPU) == 9_000_000 * 1024


def test_a_system_without_proc_refuses_nothing(tmp_path, monkeypatch):
    _fake_system(tmp_path, monkeypatch, {})
    assert find_available(CPU) is None


def test_a_container_has_what_its_group_and_those_around_it_leave(tmp_path, monkeypatch):
    stat = f"anon 5\nactive_file {GB // 2}\ninactive_file {GB // 2}"
    files = {
        "proc/meminfo": "MemAvailable: 64000000 kB",
        "proc/self/cgroup": "0::/a/b",
        "cgroup/a/b/memory.max": "max",
        "cgroup/a/memory.max": 8 * GB,
        "cgroup/a/memory.current": 3 * GB,
        "cgroup/a/memory.stat": stat,
    }
    _fake_system(tmp_path, monkeypatch, files)
    assert find_available(CPU) == 6 * GB
    (tmp_path / "cgroup/a/b/memory.max").write_text(f"{2 * GB}\n")
    assert find_available(CPU) == 2 * GB


def test_groups_of_the_first_version_count_as_well(tmp_path, monkeypatch):
    files = {
        "proc/meminfo": "MemAvailable: 64000000 kB",
        "proc/self/cgroup": "5:cpu:/x\n4:cpuset,memory:/x\n0::/",
        "cgroup/memory/x/memory.limit_in_bytes": 5 * GB,
        "cgroup/memory/x/memory.usage_in_bytes": 2 * GB,
        "cgroup/memory/x/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB}",
        "cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
        "cgroup/cpu/x/memory.limit_in_bytes": 1,
    }
    _fake_system(tmp_path, monkeypatch, files)
    assert find_available(CPU) == 4 * GB


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc")
def test_this_machine_has_some_memory_and_not_all_of_the_world():
    available = find_available(CPU)
    assert available is not None and 10**7 < available < 10**15
