"""`jaxwna16 doctor`: what this machine can run."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "safetensors", "rich")
_EXTRAS = {
    "text": ("tokenizers", "jinja2", "huggingface_hub"),
    "cuda12": ("jax_cuda12_plugin",),
    "cuda13": ("jax_cuda13_plugin",),
    "plot": ("matplotlib",),
    "eval": ("lm_eval",),
    "oracle": ("compressed_tensors", "torch"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what this machine can run: versions, devices, backends and extras."
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.cli.backends import list_backends, spare_device_memory
    from jaxwna16.version import __version__

    del args
    spare_device_memory()
    devices, problem = _list_devices()
    schedules, fault = _try_schedules() if devices else ([], [])
    extras = [_describe_extra(extra) for extra in _EXTRAS]
    return {
        "versions": {
            "jaxwna16": __version__,
            "python": platform.python_version(),
            **{name: _find_version(name) for name in _PACKAGES},
        },
        "system": {
            "platform": platform.platform(),
            "processors": os.process_cpu_count() if sys.version_info >= (3, 13) else os.cpu_count(),
            "memory_bytes": _read_memory("MemTotal"),
            "memory_available_bytes": _read_memory("MemAvailable"),
        },
        "devices": devices,
        "pallas_triton": _try_pallas_triton(),
        "backends": list_backends() if devices else [],
        "schedules": schedules,
        "extras": extras,
        "advice": [*problem, *fault, *_advise(devices, extras)],
    }


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.backends import word_backends, word_schedules
    from jaxwna16.cli.screen import make_facts

    facts = [("versions", ", ".join(f"{name} {v}" for name, v in report["versions"].items()))]
    facts.append(("machine", _word_system(report["system"])))
    facts += [("device", _word_device(device)) for device in report["devices"]]
    facts += [("backend", line) for line in word_backends(report["backends"])]
    facts += [("schedule", line) for line in word_schedules(report["schedules"])]
    triton = report["pallas_triton"]
    state = "importable" if triton["importable"] else f"not importable: {triton['reason']}"
    facts.append(("triton", f"Pallas-Triton is {state}"))
    facts += [("extra", _word_extra(extra)) for extra in report["extras"]]
    facts += [("advice", line) for line in report["advice"] or ["none, nothing is missing"]]
    console.print(make_facts(facts))


def _word_system(system: dict[str, Any]) -> str:
    from rich.filesize import decimal

    words = f"{system['platform']}, {system['processors']} processors"
    if system["memory_bytes"] is None:
        return words
    free = decimal(system["memory_available_bytes"] or 0)
    return f"{words}, {decimal(system['memory_bytes'])} of memory, {free} available"


def _word_device(device: dict[str, Any]) -> str:
    from rich.filesize import decimal

    words = f"{device['id']}: {device['kind']} ({device['platform']})"
    memory = device["memory_bytes"]
    return words if memory is None else f"{words}, {decimal(memory)} for JAX"


def _word_extra(extra: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {v or 'missing'}" for name, v in extra["packages"].items())
    words = f"{extra['extra']}: {packages}"
    return words if extra["installed"] else f"{words}; to install it: {extra['install']}"


def _list_devices() -> tuple[list[dict[str, Any]], list[str]]:
    """The devices JAX sees, or why it sees none."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [], [f"JAX cannot use any device: {error}"]
    return [
        {
            "id": device.id,
            "platform": device.platform,
            "kind": device.device_kind,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        }
        for device in devices
    ], []


def _try_schedules() -> tuple[list[dict[str, Any]], list[str]]:
    """The schedules of a typical product, or why this GPU's table of tiles cannot be used."""
    from jaxwna16.cli.backends import list_schedules
    from pallas_kernels.errors import TableError

    try:
        return list_schedules(), []
    except TableError as error:
        return [], [str(error)]


def _try_pallas_triton() -> dict[str, Any]:
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError as error:
        return {"importable": False, "reason": str(error)}
    return {"importable": True, "reason": ""}


def _describe_extra(extra: str) -> dict[str, Any]:
    packages = {name: _find_version(name) for name in _EXTRAS[extra]}
    return {
        "extra": extra,
        "installed": all(packages.values()),
        "packages": packages,
        "install": f'pip install "jaxwna16[{extra}]"',
    }


def _find_version(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _advise(devices: list[dict[str, Any]], extras: list[dict[str, Any]]) -> list[str]:
    """Changes that would let this machine run more, or faster."""
    installed = {extra["extra"] for extra in extras if extra["installed"]}
    advice = []
    if "text" not in installed:
        advice.append('generate and eval need the extra text: pip install "jaxwna16[text]"')
    has_gpu = Path("/proc/driver/nvidia/version").exists()
    sees_gpu = any(device["platform"] == "gpu" for device in devices)
    if has_gpu and not sees_gpu and not installed & {"cuda12", "cuda13"}:
        advice.append('JAX does not see the NVIDIA GPU: pip install "jaxwna16[cuda13]"')
    elif has_gpu and not sees_gpu:
        chosen = os.environ.get("JAX_PLATFORMS")
        reason = f"JAX_PLATFORMS={chosen}" if chosen else "see the messages of JAX above"
        advice.append(f"JAX has a CUDA plugin, but does not use the NVIDIA GPU: {reason}")
    return advice


def _read_memory(field: str) -> int | None:
    """A field of Linux's /proc/meminfo in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None
    )
