"""Muon against its authors' steps in NumPy, and against optax's own on a plain tree."""

import jax
import numpy as np
import optax
import pytest

from qkd_jax.training import muon, optim
from qkd_jax.trees import flatten


def tree(rng):
    """A convolution, attention, an embedding, a head, a norm and a quantizer."""

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "params": {
            "conv": {"kernel": draw(2, 2, 3, 4)},
            "attention": {"query": {"kernel": draw(6, 2, 2)}, "out": {"kernel": draw(2, 3, 4)}},
            "bn": {"scale": draw(4)},
            "embed": {"embedding": draw(5, 6)},
            "positions": draw(1, 7, 6),
            "head": {"kernel": draw(4, 3), "bias": draw(3)},
        },
        "quant": {"conv": {"weight_quantizer": {"step": draw(4, 4)}}},
    }


MATRICES = {  # rows: what is summed over
    "params/conv/kernel": (12, 4),
    "params/attention/query/kernel": (6, 4),
    "params/attention/out/kernel": (6, 4),
}


def restated_muon(g, m, t, momentum):
    """One step of a matrix in float64: (direction, momentum), as optax corrects its bias."""
    m = momentum * m + (1 - momentum) * g
    x = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x, m


@pytest.mark.parametrize("rms", [0.2, 0.0])
def test_steps_equal_a_restatement_in_float64(rms):
    rng = np.random.default_rng(0)
    params = tree(rng)
    lr, decay, momentum = 0.05, 0.1, 0.95
    fields = dict(name="muon", lr=lr, weight_decay=decay, momentum=momentum, rms=rms)
    structure, hyper = optim.plan_optimizer("net", fields | {"schedule": "constant"}, 10)
    state = optim.init_optimizer(structure, params)
    update = jax.jit(lambda *a: optim.update_optimizer(structure, *a))
    names = list(flatten(params))
    p = {name: np.float64(leaf) for name, leaf in flatten(params).items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in p.items()} for _ in "mv")
    for t in range(1, 5):
        grads = tree(rng)
        params, state, _ = update(hyper, grads, state, params)
        for name, g in flatten(grads).items():
            g = np.float64(g)
            if name in MATRICES:
                shape = MATRICES[name]
                d, m[name] = restated_muon(g.reshape(shape), m[name].reshape(shape), t, momentum)
                scale = rms * max(shape) ** 0.5 if rms else max(1, shape[1] / shape[0]) ** 0.5
                d = scale * d.reshape(g.shape)
            else:
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
                d = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            decayed = name in MATRICES or name.rpartition("/")[2] in ("kernel", "embedding")
            decayed |= name == "params/positions"
            p[name] = p[name] - lr * (d + (decay if decayed else 0.0) * p[name])
    for name, leaf in flatten(params).items():
        np.testing.assert_allclose(leaf, p[name], rtol=1e-4, atol=2e-5, err_msg=name)
    assert names == list(p)


@pytest.mark.parametrize("rms", [0.2, 0.0])
def test_a_plain_tree_gets_the_steps_of_optax(rms):
    rng = np.random.default_rng(1)
    params = {"params": {"a": {"kernel": rng.normal(size=(6, 9)), "bias": rng.normal(size=9)}}}
    params = jax.tree.map(np.float32, params)
    fields = dict(name="muon", lr=0.1, rms=rms, schedule="constant", adam_layers=())
    structure, hyper = optim.plan_optimizer("net", fields, 10)
    state = optim.init_optimizer(structure, params)
    own = optax.contrib.muon(0.1, beta=0.9, consistent_rms=rms or None, weight_decay=0.0)
    # Its Adam is Nesterov's; ours is Adam, as the authors of Muon have it.
    wanted, theirs = params, own.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), params)
        params, state, _ = optim.update_optimizer(structure, hyper, grads, state, params)
        updates, theirs = own.update(grads, theirs, wanted)
        wanted = optax.apply_updates(wanted, updates)
    got, want = params["params"]["a"]["kernel"], wanted["params"]["a"]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_who_is_trained_by_adam():
    params = tree(np.random.default_rng(0))
    found = flatten(muon.labels_of(params, optim.groups(params), ("head",)))
    assert {name for name, label in found.items() if label == "muon"} == set(MATRICES)
    found = flatten(muon.labels_of(params, optim.groups(params), ("attention", "conv")))
    assert [name for name, label in found.items() if label == "muon"] == ["params/head/kernel"]


def test_layers_stacked_into_one_array_are_matrices_by_themselves():
    rng = np.random.default_rng(2)
    fields = dict(name="muon", lr=0.1, schedule="constant", adam_layers=())
    kernels = rng.normal(size=(3, 4, 6)).astype(np.float32)
    grads = rng.normal(size=(3, 4, 6)).astype(np.float32)

    def stepped(params, gradients, **more):
        structure, hyper = optim.plan_optimizer("net", fields | more, 10)
        state = optim.init_optimizer(structure, params)
        return optim.update_optimizer(structure, hyper, gradients, state, params)[0]

    def stack(array):
        return {"params": {"blocks": {"dense": {"kernel": array}}}}

    def apart(array):
        return {"params": {f"block{i}": {"kernel": layer} for i, layer in enumerate(array)}}

    got = stepped(stack(kernels), stack(grads), stacked_layers=("blocks",))
    want = stepped(apart(kernels), apart(grads))
    got, want = flatten(got), flatten(want)
    together = np.stack([want[f"params/block{i}/kernel"] for i in range(3)])
    np.testing.assert_allclose(got["params/blocks/dense/kernel"], together, rtol=1e-5, atol=1e-6)
    one = flatten(stepped(stack(kernels), stack(grads)))["params/blocks/dense/kernel"]
    assert np.abs(one - together).max() > 1e-3
