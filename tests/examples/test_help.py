"""Every example says how it is called."""

import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["jit_generation", "linen_model", "lora", "nnx_classifier", "sensitivity"]
)
def test_help_names_the_checkpoint_and_its_default(name, capsys):
    example = importlib.import_module(f"examples.{name}")
    with pytest.raises(SystemExit) as end:
        example.main(["--help"])
    assert end.value.code == 0
    assert "checkpoint" in (out := capsys.readouterr().out)
    assert "SmolLM2" in out
    assert f"python examples/{name}.py [" in example.__doc__
