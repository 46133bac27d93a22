"""Nets that teach one another through older copies, against a restatement in float64 NumPy."""

import distill_nets as tiny
import jax
import numpy as np
import pytest

from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.training import compile_step, make_step, plan_step, start_state
from qkd_jax.training.state import jit_once, net_variables, stale_variables

FIRST, STEPS, LR = 5, 8, 0.02
OPTIM = {"lr": LR, "momentum": 0.0, "schedule": "constant"}


def table(start=0):
    """Two nets that learn from labels and, from step `start` on, from each other."""
    return {
        net: {"ce": {}, "dml": {"source": peer, "weight": 0.7, "start": start}}
        for net, peer in (("a", "b"), ("b", "a"))
    }


def linear_nets():
    module = quantize(create("mlp", tiny.CLASSES, hidden=()))
    images = tiny.batch()["image"]
    variables = {
        net: jit_once(module.init)(jax.random.key(seed), images) for seed, net in enumerate("ab")
    }
    return {"a": module, "b": module}, variables


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def restated(variables, every, start):
    """Two linear classifiers by hand: gradients p - y of the labels, p - q of a peer q."""
    own = {n: jax.tree.map(np.float64, v["params"]["head"]) for n, v in variables.items()}
    copies = {}
    for step in range(STEPS):
        if step % every == 0:
            copies = {n: dict(p) for n, p in own.items()}
        batch = tiny.batch(step)
        x, y = np.float64(batch["image"]).reshape(8, -1), np.eye(tiny.CLASSES)[batch["label"]]

        def p(params, x=x):
            return softmax(x @ params["kernel"] + params["bias"])

        moved = {}
        for net, peer in (("a", "b"), ("b", "a")):
            g = p(own[net]) - y
            if step >= start:
                g = g + 0.7 * (p(own[net]) - p(copies[peer]))
            moved[net] = {
                "kernel": own[net]["kernel"] - LR * x.T @ g / 8,
                "bias": own[net]["bias"] - LR * g.mean(0),
            }
        own = moved
    return own, copies


@pytest.mark.parametrize(("every", "start"), [(3, 0), (3, 2), (1, 0), (100, 0)])
def test_copies_teach_as_they_stood(every, start):
    modules, variables = linear_nets()
    optim = dict.fromkeys("ab", OPTIM)
    plan = plan_step(
        modules, table(start), optim, horizon=STEPS, steps=STEPS, first=FIRST, stale=every
    )
    assert plan.structure.stale == ("net0", "net1")
    state = start_state(plan, variables, step=FIRST)
    step = COMPILED.setdefault(plan.structure, jax.jit(make_step(plan.structure)))
    for index in range(STEPS):
        state, _ = step(state, tiny.batch(index), {})
    want, copies = restated(variables, every, start)
    # The sums of 64 products in float32.
    for found, wanted in (
        (net_variables(plan, state), want),
        (stale_variables(plan, state), copies),
    ):
        for net in "ab":
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6),
                found[net]["params"]["head"],
                wanted[net],
            )
    # Another interval is another result: what is compared has it in it.
    other, _ = restated(variables, 2 if every == 1 else 1, start)
    assert np.abs(other["a"]["kernel"] - want["a"]["kernel"]).max() > 1e-4


COMPILED: dict = {}


def test_other_intervals_are_no_other_program():
    modules, _ = linear_nets()
    optim = dict.fromkeys("ab", OPTIM)
    structures = {
        plan_step(modules, table(), optim, horizon=9, stale=every).structure for every in (2, 7)
    }
    assert len(structures) == 1
    plan = plan_step(modules, table(), optim, horizon=9, stale=7)
    (line,) = [text for text in plan.describe() if text.startswith("a <- 0.7")]
    assert line == "a <- 0.7 dml() from b as it stood up to 7 steps before"
    assert plan_step(modules, table(), optim, horizon=9).structure.stale == ()


def test_a_step_that_is_not_finite_moves_no_copy():
    modules, variables = linear_nets()
    plan = plan_step(modules, table(), dict.fromkeys("ab", OPTIM), horizon=9, stale=2)
    step = COMPILED.setdefault(plan.structure, jax.jit(make_step(plan.structure)))
    state, _ = step(start_state(plan, variables), tiny.batch(), {})
    bad = tiny.batch() | {"image": np.full((8, *tiny.DATA.image), np.inf, np.float32)}
    before = jax.device_get(state.stale)
    state, metrics = step(state, bad, {})
    assert not metrics["finite"]
    state, _ = step(state, tiny.batch(), {})  # the second one would be due
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.stale))


@pytest.mark.parametrize(
    ("stale", "learn", "message"),
    [
        (-1, table(), "stale is -1"),
        (0.5, table(), "stale is 0.5"),
        (4, {"a": {"ce": {}, "kd": {"source": "b"}}}, "no net that learns here teaches another"),
        (4, {"a": {"ce": {}}, "b": {"ce": {}}}, "give stale=0"),
    ],
)
def test_stale_says_what_is_wrong(stale, learn, message):
    modules, _ = linear_nets()
    with pytest.raises(ValueError, match=message):
        plan_step(modules, learn, dict.fromkeys(learn, OPTIM), horizon=9, stale=stale)


@pytest.mark.slow
def test_four_devices_equal_one():
    """With features of a copy too, and BatchNorms that it uses as they stood."""
    modules, variables = tiny.nets()
    learn = {
        "student": {"ce": {}, "rkd": {"source": "teacher"}},
        "teacher": {"ce": {}, "byot": {}, "dml": {"source": "student"}},
    }
    optim = {net: {"lr": 0.05, "weight_decay": 1e-3} for net in learn}
    plan = plan_step(modules, learn, optim, horizon=4, data=tiny.DATA, stale=2)
    results = {}
    for devices in (1, 4):
        step = compile_step(make_step(plan.structure), mode="pmap", devices=jax.devices()[:devices])
        state = start_state(plan, variables)
        for index in range(3):
            state, metrics = step(state, tiny.batch(index), {})
        results[devices] = jax.device_get((net_variables(plan, state), state.stale, metrics))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results.values()
    )
