"""The README's own snippets, run one after the other as a reader would."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwna16.checkpoints.quantize import quantize_checkpoint
from tests.jaxwna16.cli.checkpoints import write_float_checkpoint

README = Path(__file__).parents[1] / "README.md"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def small_checkpoint(tmp_path):
    """A packed checkpoint with a chat template."""
    write_float_checkpoint(tmp_path / "float")
    (tmp_path / "float" / "chat_template.jinja").write_text(TEMPLATE)
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed", group_size=32, symmetric=False)
    return tmp_path / "packed"


def test_the_python_snippets_of_the_readme_run_in_order(small_checkpoint, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 6
    scope = {}
    for snippet in snippets:
        exec(snippet.replace("path/to/checkpoint", str(small_checkpoint)), scope)
    assert scope["answer"].result.decoded_tokens > 0
    assert capsys.readouterr().out
    assert scope["y_linen"].shape == scope["x"].shape
    expected = jnp.ones((3, 256)) @ scope["w"].T
    # bfloat16 rounds the weight (scales are bfloat16 too) not at all and the result by 2^-9
    np.testing.assert_allclose(
        np.asarray(scope["y"], np.float32), np.asarray(expected), rtol=2.0**-8, atol=1e-4
    )
    assert isinstance(scope["y"], jax.Array)
    before, after = scope["weights"]["up_proj"], scope["trained"]["up_proj"]
    np.testing.assert_array_equal(after["packed"], before["packed"])
    assert after["scale"].dtype == before["scale"].dtype
    mixed, again = (np.asarray(scope[name], np.float32) for name in ("mixed", "again"))
    # one of them may leave out the rounding of the router's logits to bfloat16
    np.testing.assert_allclose(mixed, again, rtol=0, atol=2.0**-6 * np.abs(again).max())
    assert np.abs(again).max() > 0
