"""The example of a model of one's own runs, learns, and loses next to nothing when packed."""

from __future__ import annotations

import re

import jax

from examples import own_moe


def test_packed_versions_do_the_work_of_the_float_one(capsys, monkeypatch):
    monkeypatch.setattr(own_moe, "STEPS", 100)
    # optax does not keep the strict rules of our tests
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        own_moe.main()
    out = capsys.readouterr().out
    rows = re.findall(r"^(\w+ ?\w+) +(\d+) kB +([\d.]+) nats .* ([\d.]+)% right$", out, re.M)
    sizes, losses, shares = ([float(row[i]) for row in rows] for i in (1, 2, 3))
    assert [row[0] for row in rows] == ["float32", "8 bits", "4 bits"]
    assert sizes[0] > 3 * sizes[1] > 4 * sizes[2]
    assert losses[0] < 2.5  # 4.0 is to know nothing, 2.9 to know how often each character is
    assert abs(losses[1] - losses[0]) < 0.005
    assert abs(losses[2] - losses[0]) < 0.05
    assert min(shares) > 30
    assert float(re.search(r"logits differ by (\S+)", out)[1]) < 1e-5
    assert "She could not help " in out
