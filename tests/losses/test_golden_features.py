"""Losses on features and on batches against PyTorch: values and all gradients, on random inputs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_inputs import maps, waves

from qkd_jax.losses import LOSSES

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "features.npz"))
KEYS = [key.removesuffix("|value") for key in GOLDEN if key.endswith("|value")]
# Tested by closed forms and restatements in files of their own.
ELSEWHERE = {"crd", "byot", "one"}
RESPONSE = ("response", "decoupled", "hierarchical")


def family(name):
    return LOSSES[name].__module__.split(".")[-1]


def read(prefix):
    """{argument: array or nested tuple} of all keys that start with `prefix`."""
    found = {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}

    def gather(name):
        if name in found:
            return found[name]
        count = len({k.split("/")[len(name.split("/"))] for k in found if k.startswith(f"{name}/")})
        return tuple(gather(f"{name}/{i}") for i in range(count))

    return {name: gather(name) for name in {k.split("/")[0] for k in found}}


def parse(text):
    keywords = dict(word.split("=") for word in text.split(",") if word)
    kinds = {"mode": str, "power": int, "order": int, "compat": bool, "standardize": bool}
    return {k: kinds.get(k, float)(v) for k, v in keywords.items()}


def test_every_other_loss_is_covered():
    wanted = {n for n in LOSSES if family(n) not in RESPONSE} | {"ctkd"}
    assert {key.split("|")[0] for key in KEYS} == wanted - ELSEWHERE


@pytest.mark.parametrize("key", KEYS)
def test_values_and_gradients_equal_pytorch(key):
    name, hyper, inputs = key.split("|")
    keywords = parse(hyper)
    args = {k: v for part in inputs.split("+") for k, v in read(f"{part}/").items()}
    wanted = read(f"{key}|")
    value = wanted.pop("value")
    fixed = {k: v for k, v in args.items() if k not in wanted}

    def mean(moving):
        return jnp.mean(LOSSES[name](**moving, **fixed, **keywords))

    moving = {k: args[k] for k in wanted}
    fast = {"xla_backend_optimization_level": 0}
    found, grads = jax.jit(jax.value_and_grad(mean), compiler_options=fast)(moving)
    # Float32 against float64: a few roundings of an array's largest number.
    np.testing.assert_allclose(found, value, rtol=1e-4 if name == "pkt" else 1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.any(other)
        atol = (1e-5 if name == "pkt" else 2e-6) * np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


MAPS, SECOND_MAPS = maps(6, 8, 3, 4), maps(5, 4, 7, 8)
LOGITS = waves((8, 10), 1), waves((8, 10), 2)
LISTS = tuple((x,) for x in MAPS)
PAIRS = tuple(zip(MAPS, SECOND_MAPS, strict=True))


@pytest.mark.parametrize(
    ("name", "inputs", "keywords", "wanted"),
    [
        ("dist", LOGITS, {}, 1.8398972),
        ("dist", LOGITS, {"temperature": 4.0}, 24.1790733),
        ("fitnet", MAPS, {}, 2.4784783),
        ("at", LISTS, {}, 0.00543559),
        ("at", LISTS, {"mode": "paper"}, 0.58878944),
        ("nst", LISTS, {}, 0.2276509),
        ("fsp", PAIRS, {}, 0.0961573),
        ("ft", MAPS, {}, 0.0516113),
        ("ab", LISTS, {}, 637.396933),
        ("vid", (*LISTS, (np.full(6, 5.0),)), {}, 1.0525668),
        ("ofd", (*LISTS, (np.full(6, -0.5),)), {}, 637.975629),
        ("reviewkd", LISTS, {}, 1.7090451),
    ],
)
def test_golden_numbers(name, inputs, keywords, wanted):
    np.testing.assert_allclose(jnp.mean(LOSSES[name](*inputs, **keywords)), wanted, rtol=1e-5)
