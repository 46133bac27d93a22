"""The average of a net's variables against a restatement in float64, in the compiled step."""

import distill_nets as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.training import averages, make_step, plan_step, start_state
from qkd_jax.training.state import average_variables, net_variables
from qkd_jax.trees import flatten


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_follows_all_variables(warmup):
    modules, variables = tiny.nets()
    fields = {"lr": 0.05, "ema": 0.8, "ema_warmup": warmup, "freeze": ("c1",)}
    plan = plan_step(modules, {"student": {"ce": {}}}, {"student": fields}, horizon=9)
    state = start_state(plan, variables)
    step = jax.jit(make_step(plan.structure))
    want = jax.tree.map(np.float64, variables["student"])
    for t in range(4):
        state, _ = step(state, tiny.batch(t), {})
        d = min(0.8, (1 + t) / (10 + t)) if warmup else 0.8
        new = jax.device_get(net_variables(plan, state)["student"])
        want = jax.tree.map(lambda a, v, d=d: d * a + (1 - d) * np.float64(v), want, new)
    found = average_variables(plan, state)["student"]
    assert {path.split("/")[0] for path in flatten(found)} == {"params", "batch_stats"}
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, flatten(want)[path], rtol=1e-5, atol=1e-6, err_msg=path)
    frozen = found["params"]["c1"]["kernel"]  # frozen: not a bit away from where it was
    np.testing.assert_array_equal(frozen, variables["student"]["params"]["c1"]["kernel"])
    assert not np.array_equal(*(t["batch_stats"]["n1"]["mean"] for t in (found, new)))

    bad = tiny.batch(5) | {"image": np.full_like(tiny.batch(5)["image"], np.inf)}
    after, _ = step(state, bad, {})  # donates nothing: not the compiled step of a run
    jax.tree.map(np.testing.assert_array_equal, average_variables(plan, after)["student"], found)


def test_without_it_the_program_is_the_same():
    """What is off is no part of the structure, nor are its numbers among the arguments."""
    modules, _ = tiny.nets()
    one, two = (
        plan_step(modules, {"student": {"ce": {}}}, {"student": fields}, horizon=9)
        for fields in (
            {"lr": 0.1},
            {"lr": 0.1, "ema": 0.0, "ema_warmup": True, "layer_decay": 1.0, "decay": 0.5, "rms": 1},
        )
    )
    assert one.structure == two.structure and set(one.hyper["net0"]["optim"]) == {
        "lr", "quant_lr", "weight_decay", "clip_norm", "momentum", "final", "horizon", "warmup",
    }  # fmt: skip


def test_what_is_annealed_is_copied_and_half_precision_averaged_in_float32():
    variables = {
        "params": {"kernel": jnp.ones(2, jnp.bfloat16)},
        "quant": {"temperature": jnp.ones(()), "step": jnp.ones(())},
        "batch_stats": {"seen": jnp.zeros((), jnp.int32)},
    }
    state = averages.init(variables)
    assert state["average"]["params"]["kernel"].dtype == jnp.float32
    new = jax.tree.map(lambda x: x + 1, variables)
    state = averages.update(state, new, jnp.float32(0.999), warmup=False, copied={"temperature": 0})
    found = state["average"]
    np.testing.assert_allclose(found["params"]["kernel"], 1.001, rtol=1e-6)
    assert found["quant"]["temperature"] == 2 and found["batch_stats"]["seen"] == 1
    np.testing.assert_allclose(found["quant"]["step"], 1.001, rtol=1e-6)
    assert averages.averaged(state, variables)["params"]["kernel"].dtype == jnp.bfloat16
