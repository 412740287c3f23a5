"""`jaxwna16 doctor`."""

from __future__ import annotations

import importlib.metadata

import jax
import numpy as np
import pytest


def test_versions_are_those_of_the_packages(call):
    report = call("doctor", "--json").report
    assert report["versions"]["jax"] == jax.__version__
    assert report["versions"]["numpy"] == np.__version__


def test_the_backend_of_each_dtype_is_explained(call):
    report = call("doctor", "--json").report
    choices = {(choice["bits"], choice["dtype"]): choice for choice in report["backends"]}
    assert len(choices) == 6
    assert all(choice["reason"] for choice in choices.values())


def test_it_prints_devices_and_extras(call):
    outcome = call("doctor")
    assert outcome.code == 0
    assert f"0: {jax.devices()[0].device_kind}" in outcome.out
    assert "text: tokenizers" in outcome.out


def test_a_missing_extra_says_how_to_install_it(call, monkeypatch):
    version = importlib.metadata.version

    def find(package):
        if package == "tokenizers":
            raise importlib.metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr("importlib.metadata.version", find)
    outcome = call("doctor")
    assert "tokenizers missing" in outcome.out
    assert 'generate and eval need the extra text: pip install "jaxwna16[text]"' in outcome.out


@pytest.mark.parametrize("json", [["--json"], []])
def test_no_device_is_advice_and_no_traceback(call, monkeypatch, json):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fail)
    outcome = call("doctor", *json)
    assert outcome.code == 0
    assert "JAX cannot use any device: Unable to initialize backend 'cuda'" in outcome.out
