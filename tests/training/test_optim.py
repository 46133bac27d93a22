"""Schedules, groups and optimizers against restatements in NumPy, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.training import optim
from qkd_jax.training.schedules import SCHEDULES

HORIZON = 200


SHAPES = {"linear": lambda t: 1 - t, "1-sqrt": lambda t: 1 - t**0.5}
SHAPES["cosine"] = lambda t: (1 + np.cos(np.pi * t)) / 2


def expected_factor(schedule, position, warmup, final, milestones, decay_factor, shape):
    """What the documentation says, in plain Python."""
    rise = min(1.0, (position + 1) / warmup) if warmup else 1.0
    if schedule == "wsd":  # the last quarter of 200 steps
        t = min(max((position - 150) / 50, 0.0), 1.0)
        return rise * (final + (1 - final) * SHAPES[shape](t))
    if schedule == "constant":
        return rise
    if schedule == "step":
        return rise * decay_factor ** sum(position >= m for m in milestones)
    t = min(max((position - warmup) / (HORIZON - warmup), 0.0), 1.0)
    return rise * (final + (1 - final) * (1 + np.cos(np.pi * t)) / 2)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [*((name, "linear") for name in sorted(SCHEDULES)), ("wsd", "1-sqrt"), ("wsd", "cosine")],
)
@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (10, 0.1), (0.25, 0.0)])
def test_schedule_equals_numpy(schedule, shape, warmup, final):
    fields = {
        "lr": 0.1,
        "schedule": schedule,
        "warmup": warmup,
        "final": final,
        "milestones": (0.5, 150, 180),
        "decay_factor": 0.2,
        "decay": 50 if final else 0.25,
        "decay_shape": shape,
    }
    structure, hyper = optim.plan_optimizer("net", fields, HORIZON)
    positions = np.arange(HORIZON + 20)
    got = jax.jit(jax.vmap(lambda p: optim.schedule_factor(structure, hyper, p)))(positions)
    steps = 50 if warmup == 0.25 else warmup
    want = [
        expected_factor(schedule, p, steps, final, (100, 150, 180), 0.2, shape)
        for p in positions.tolist()
    ]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_first_and_last_steps_of_a_cosine():
    structure, hyper = optim.plan_optimizer("net", {"lr": 1.0}, HORIZON)
    assert optim.schedule_factor(structure, hyper, 0) == 1.0
    assert 0.0 < optim.schedule_factor(structure, hyper, HORIZON - 1) < 1e-3
    assert optim.schedule_factor(structure, hyper, HORIZON) == 0.0


def tree(rng, dtype):
    """One array of each kind."""

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "params": {
            "conv": {"kernel": draw(3, 3, 1, 2)},
            "bn": {"scale": draw(2), "bias": draw(2)},
            "attention": {"query": {"kernel": draw(4, 2, 2), "bias": draw(2, 2)}},
            "embed": {"embedding": draw(5, 2)},
            "own": {"matrix": draw(2, 2), "gain": draw(2)},
        },
        "quant": {"conv": {"weight_quantizer": {"step": draw(1, 1, 1, 2)}}},
    }


def test_groups_by_path():
    found = optim.groups(tree(np.random.default_rng(0), np.float32))
    assert found == {
        "params": {
            "conv": {"kernel": "weights"},
            "bn": {"scale": "plain", "bias": "plain"},
            "attention": {"query": {"kernel": "weights", "bias": "plain"}},
            "embed": {"embedding": "weights"},
            "own": {"matrix": "weights", "gain": "plain"},
        },
        "quant": {"conv": {"weight_quantizer": {"step": "quant"}}},
    }


def restated_sgd(p, m, g, lr, decay, momentum, nesterov):
    """One array's step in float64."""
    d = g + decay * p
    m = d + momentum * m
    return p - lr * (d + momentum * m if nesterov else m), m


def restated_adamw(p, m, v, g, t, lr, decay):
    """One array's step in float64."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p - lr * (update + decay * p), m, v


def restated_lion(p, m, g, lr, decay):
    """One array's step in float64, with b1 0.9 and b2 0.99."""
    return p - lr * (np.sign(0.9 * m + 0.1 * g) + decay * p), 0.99 * m + 0.01 * g


@pytest.mark.parametrize(
    ("name", "nesterov"), [("sgd", True), ("sgd", False), ("adamw", True), ("lion", True)]
)
def test_update_equals_float64_restatement(name, nesterov):
    rng = np.random.default_rng(1)
    params = tree(rng, np.float32)
    clip, lr, quant_lr, decay = 4.0, 0.1, 0.03, 0.05
    fields = {
        "name": name,
        "lr": lr,
        "quant_lr": quant_lr,
        "weight_decay": decay,
        "nesterov": nesterov,
        "b2": 0.99 if name == "lion" else 0.999,
        "clip_norm": clip,
        "warmup": 3,
    }
    structure, hyper = optim.plan_optimizer("net", fields, 20)
    state = optim.init_optimizer(structure, params)
    update = jax.jit(lambda *a: optim.update_optimizer(structure, *a))

    labels = jax.tree.leaves(optim.groups(params))
    leaves, treedef = jax.tree.flatten(params)
    p = [x.astype(np.float64) for x in leaves]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for position in range(6):
        grads = tree(rng, np.float32)
        params, state, info = update(hyper, grads, state, params)
        flat = [x.astype(np.float64) for x in jax.tree.leaves(grads)]
        norm = np.sqrt(sum(np.sum(x * x) for x in flat))
        factor = expected_factor_20(position)
        np.testing.assert_allclose(info["grad_norm"], norm, rtol=1e-6)
        np.testing.assert_allclose(info["lr"], lr * factor, rtol=1e-6)
        np.testing.assert_allclose(info["quant_lr"], quant_lr * factor, rtol=1e-6)
        for i, label in enumerate(labels):
            g = flat[i] * min(1.0, clip / norm)
            rate = factor * (quant_lr if label == "quant" else lr)
            wd = decay if label == "weights" else 0.0
            if name == "sgd":
                p[i], m[i] = restated_sgd(p[i], m[i], g, rate, wd, 0.9, nesterov)
            elif name == "lion":
                p[i], m[i] = restated_lion(p[i], m[i], g, rate, wd)
            else:
                p[i], m[i], v[i] = restated_adamw(p[i], m[i], v[i], g, position + 1, rate, wd)
    assert state["position"] == 6
    want = jax.tree.unflatten(treedef, p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6), params, want)


def expected_factor_20(position):
    """Cosine over 20 steps with a warm-up of 3."""
    t = max(position - 3, 0) / 17
    return min(1.0, (position + 1) / 3) * (1 + np.cos(np.pi * t)) / 2


def test_no_clipping_changes_no_bit():
    rng = np.random.default_rng(2)
    params, grads = tree(rng, np.float32), tree(rng, np.float32)
    fields = {"lr": 1.0, "momentum": 0.0, "schedule": "constant"}
    structure, hyper = optim.plan_optimizer("net", fields, 1)
    state = optim.init_optimizer(structure, params)
    moved, _, _ = optim.update_optimizer(structure, hyper, grads, state, params)
    jax.tree.map(
        np.testing.assert_array_equal, moved, jax.tree.map(lambda p, g: p - g, params, grads)
    )


def test_update_keeps_dtype_of_parameters():
    params = {"params": {"dense": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}}
    structure, hyper = optim.plan_optimizer("net", {"lr": 0.1}, 10)
    state = optim.init_optimizer(structure, params)
    moved, state, _ = optim.update_optimizer(structure, hyper, params, state, params)
    assert moved["params"]["dense"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"optim\.student\.lr is missing"),
        ({"lr": 0.1, "weight_decy": 1e-4}, "Did you mean 'weight_decay'"),
        ({"lr": 0.1, "name": "adam"}, "Did you mean 'adamw'"),
        ({"lr": 0.1, "schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"lr": -0.1}, r"optim\.student\.lr is -0\.1"),
        ({"lr": float("nan")}, r"optim\.student\.lr is nan"),
        ({"lr": 0.1, "clip_norm": 0.0}, "greater than 0"),
        ({"lr": 0.1, "warmup": 500}, r"optim\.student\.warmup is 500"),
        ({"lr": 0.1, "schedule": "step"}, "milestones is empty"),
        ({"lr": 0.1, "schedule": "step", "milestones": (0.5, 500)}, r"milestones\[1\] is 500"),
        ({"lr": 0.1, "schedule": "wsd", "decay": 500}, r"optim\.student\.decay is 500"),
        ({"lr": 0.1, "schedule": "wsd", "decay": 0.9, "warmup": 20}, "110 steps of a schedule"),
        ({"lr": 0.1, "schedule": "wsd", "decay_shape": "sqrt"}, "Did you mean '1-sqrt'"),
        ({"lr": 0.1, "layer_rates": "stem:0.1"}, "give pairs of a regular expression"),
        ({"lr": 0.1, "layer_rates": (("stem", "x"),)}, "give pairs of a regular expression"),
        ({"lr": 0.1, "layer_rates": ("stem:-1",)}, r"layer_rates of 'stem' is -1"),
        ({"lr": 0.1, "layer_rates": ("st(em:1",)}, "is no regular expression"),
        ({"lr": 0.1, "layer_decay": 1.5}, r"layer_decay is 1\.5"),
        ({"lr": 0.1, "layer_decay": 0.5, "layer_stem": ()}, "layer_stem is empty"),
        ({"lr": 0.1, "ema": 1.0}, "an average that forgets nothing"),
        ({"lr": 0.1, "rms": -1, "name": "muon"}, r"rms is -1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        optim.plan_optimizer("student", fields, 100)


def test_numbers_are_not_structure():
    one = optim.plan_optimizer("a", {"lr": 0.1, "clip_norm": 1.0, "warmup": 5}, 100)
    two = optim.plan_optimizer("b", {"lr": 0.2, "weight_decay": 1e-3, "quant_lr": 0.0}, 300)
    assert one[0] == two[0] and hash(one[0]) == hash(two[0])
    assert set(one[1]) == set(two[1])
    assert all(value.dtype == np.float32 for value in one[1].values())
    rates = {"layer_rates": ("stem:0.1", "head:2"), "layer_decay": 0.5, "schedule": "wsd"}
    three = optim.plan_optimizer("c", rates | {"lr": 1, "ema": 0.9, "name": "muon"}, 100)
    rates |= {"layer_rates": (("stem", 1), ("head", 1)), "layer_decay": 0.9, "decay": 7}
    four = optim.plan_optimizer("d", rates | {"lr": 2, "ema": 0.5, "name": "muon", "rms": 1}, 9)
    assert three[0] == four[0] and three[0] != one[0]
