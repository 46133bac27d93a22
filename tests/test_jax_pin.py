"""The pinned JAX computes what was asked: 0.10.2 does not, on CPU (jax-ml/jax#39103)."""

import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]


def test_the_pin_excludes_the_broken_release():
    (pin,) = (d for d in PROJECT["project"]["dependencies"] if re.match(r"jax\b", d))
    assert pin == "jax>=0.10.0,!=0.10.2,<0.11"


def test_the_installed_version_is_within_the_pin():
    version = tuple(int(part) for part in jax.__version__.split(".")[:3])
    assert (0, 10, 0) <= version < (0, 11)
    assert version != (0, 10, 2)


def test_the_lock_holds_versions_only_and_every_dependency():
    """No host, no local path, no editable line."""
    assert [
        line for line in LOCK if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)
    ] == []
    locked = {line.split("==")[0].lower().replace("-", "_") for line in LOCK}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["export"], *extras["dev"]]
    names = {re.match(r"[A-Za-z0-9._-]+", w)[0].lower().replace("-", "_") for w in wanted}
    assert names - {"qkd_jax"} <= locked


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("rows", [1, 64, 32_769])
def test_a_mapped_product_of_rows_is_right(rows, size):
    """jit(vmap(sum((M @ row)**2))): 0.10.2 returns a wrong last row of 32,769."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(size, size)).astype(np.float32)
    table = rng.normal(size=(rows, size)).astype(np.float32)
    compute = jax.jit(lambda m, t: jax.vmap(lambda row: jnp.sum((m @ row) ** 2))(t))
    truth = ((table.astype(np.float64) @ matrix.T.astype(np.float64)) ** 2).sum(-1)
    # Sums of `size` squares in float32: each rounding is below 6e-8 of the terms' magnitude.
    np.testing.assert_allclose(compute(matrix, table), truth, rtol=1e-4, atol=1e-5)
