"""The supported releases, and what they must compute: JAX 0.10.2 does not (jax-ml/jax#39103)."""

import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The Python that each lock is resolved for.
LOCKS = {"requirements.lock": "3.11", "requirements-newest.lock": "3.13"}


def requirements():
    """{name: specifier} of everything that pyproject.toml asks for."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["export"], *extras["dev"]]
    return {_name(r.name): r.specifier for r in map(Requirement, lines) if r.name != "qkd_jax"}


def locked(lock):
    """{name: version} of a lock."""
    lines = [ln for ln in (ROOT / lock).read_text().splitlines() if not ln.startswith("#")]
    # No host, no local path, no editable line.
    assert [ln for ln in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", ln)] == []
    return {_name(name): version for name, version in (ln.split("==") for ln in lines)}


def _name(name):
    return name.lower().replace("-", "_")


def test_the_pin_excludes_the_broken_release():
    assert requirements()["jax"] == SpecifierSet(">=0.10.0,!=0.10.2,<0.13")


def test_the_installed_version_is_within_the_pin():
    assert jax.__version__ in requirements()["jax"]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_every_requirement(lock):
    versions = locked(lock)
    assert {n: s for n, s in requirements().items() if versions.get(n) not in s} == {}
    assert LOCKS[lock] in SpecifierSet(PROJECT["requires-python"])


def test_the_locks_hold_the_two_ends():
    """The newest JAX for Python 3.11 that computes rightly, and the newest of all."""
    assert locked("requirements.lock")["jax"] == "0.10.1"
    assert locked("requirements-newest.lock")["jax"].startswith("0.12.")


def test_classifiers_and_pages_name_the_supported_pythons():
    minors = [f"3.{minor}" for minor in range(30)]
    supported = [m for m in minors if m in SpecifierSet(PROJECT["requires-python"])]
    assert supported == ["3.11", "3.12", "3.13"]
    label = "Programming Language :: Python :: "
    assert [c.removeprefix(label) for c in PROJECT["classifiers"] if c.startswith(label)] == (
        supported
    )
    for page in ("README.md", "docs/start.md"):
        assert "Python 3.11 to 3.13" in (ROOT / page).read_text(), page


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
