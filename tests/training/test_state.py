"""State: built from variables, shares nothing with them, carries an optimizer on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_nets

from qkd_jax.training import plan_step, state


def test_start_state_copies_and_counts():
    plan = tiny_nets.co_study_plan()
    _, variables = tiny_nets.conv_nets()
    start = state.start_state(plan, variables, step=7, seed=3)
    assert start.step == 7 and start.step.dtype == jnp.int32
    assert set(start.nets) == {"net0", "net1"} and start.loss_state == {}
    assert set(start.nets["net0"]) == {"params", "batch_stats", "quant"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(start.hyper))

    def check(mine, given):
        np.testing.assert_array_equal(mine, given)
        assert mine.unsafe_buffer_pointer() != jnp.asarray(given).unsafe_buffer_pointer()

    jax.tree.map(check, start.nets, {"net0": variables["student"], "net1": variables["teacher"]})
    back = state.net_variables(plan, start)
    assert set(back) == {"student", "teacher"}


def test_learners_and_teachers_are_told_apart():
    modules, variables = tiny_nets.mlps()
    learn = {"b": {"kd": {"source": "c"}}}
    plan = plan_step(modules, learn, {"b": {"lr": 0.1}}, horizon=5)
    assert (plan.learners, plan.teachers) == (("b",), ("c",))
    frozen = state.frozen_variables(plan, variables)
    assert set(frozen) == {"net1"} and frozen["net1"] is variables["c"]
    assert set(state.start_state(plan, variables).nets) == {"net0"}
    with pytest.raises(ValueError, match="variables are missing"):
        state.frozen_variables(plan, {"b": variables["b"]})


def test_continued_optimizer():
    modules, variables = tiny_nets.mlps()
    learn = {"a": {"ce": {}}}
    plan = plan_step(modules, learn, {"a": {"lr": 0.1, "continues": "first"}}, horizon=9)
    assert plan.continues == {"a": "first"}
    first = state.start_state(plan, variables)
    later = jax.tree.map(lambda x: x + 1, state.optimizer_states(plan, first)["a"])
    second = state.start_state(plan, variables, step=4, opt={"a": later})
    assert second.opt["net0"]["position"] == 1
    other = plan_step(modules, learn, {"a": {"lr": 0.1, "name": "adamw"}}, horizon=9)
    with pytest.raises(ValueError, match=r"optim\.a\.continues"):
        state.start_state(other, variables, opt={"a": later})


def test_folded_net_is_refused():
    modules, variables = tiny_nets.mlps()
    plan = plan_step(modules, {"a": {"ce": {}}}, {"a": {"lr": 0.1}}, horizon=9)
    folded = {**variables["a"], "quant": {"block": {"bn": {"folded": {"identity": np.ones(())}}}}}
    with pytest.raises(ValueError, match="folded BatchNorm or a rotation at 'block/bn'"):
        state.start_state(plan, {"a": folded})


def test_streams_differ_by_name_seed_and_step():
    def draw(*args):
        return float(jax.random.uniform(state.step_key(*args)))

    values = [
        draw(0, "dropout", 1),
        draw(0, "dropout", 2),
        draw(0, "noise", 1),
        draw(1, "dropout", 1),
    ]
    assert len(set(values)) == 4
    traced = jax.jit(lambda seed, step: jax.random.uniform(state.step_key(seed, "dropout", step)))
    assert float(traced(np.uint32(0), np.int32(2))) == values[1]
