"""Engines take turns."""

import numpy as np
import pytest

from qkd_jax.deploy import latency


def test_engines_are_interleaved():
    calls = []
    engines = {name: (lambda x, name=name: calls.append((name, x.shape))) for name in "ab"}
    found = latency(engines, np.zeros((3, 2), np.float32), rounds=3, warmup=1)
    assert [name for name, _ in calls] == list("ab" + "ab" + "ba" + "ab")
    assert set(found) == {"a", "b"}
    assert found["a"]["batch"] == 3 and 0 <= found["a"]["min_ms"] <= found["a"]["median_ms"]
    with pytest.raises(ValueError, match="engines is empty"):
        latency({}, np.zeros((1, 1)))
