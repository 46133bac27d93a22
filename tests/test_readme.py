"""The README's library example runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk

ROOT = Path(__file__).parents[1]


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)


@pytest.mark.slow
def test_library_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, *others = blocks(ROOT / "README.md")
    exec(compile(first, "README.md", "exec"), names)
    assert names["loss"].shape == (64,)
    assert (tmp_path / "student.onnx").stat().st_size > 0
    assert "0 MISSED" in capsys.readouterr().out
    # The integer net is the trained net with BatchNorm folded in.
    want, got = names["student_logits"], names["logits"]
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))
    for example in others:
        exec(compile(example, "README.md", "exec"), names)
    learned = names["static"].apply(names["variables"], names["images"])
    floats = names["teacher_logits"]
    assert np.linalg.norm(learned - floats) < 0.2 * np.linalg.norm(floats)


@pytest.mark.parametrize("name", ["MODELS", "LOSSES", "QUANTIZERS", "OBSERVERS", "PRESETS"])
def test_the_tables_are_at_the_front_door(name):
    assert getattr(qk, name)
