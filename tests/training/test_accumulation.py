"""Micro-batches for one update: the whole batch's gradients in less memory."""

import distill_nets
import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_nets

from qkd_jax.quantize import quantize
from qkd_jax.training import (
    compile_step,
    frozen_variables,
    locate_nonfinite,
    make_step,
    plan_step,
    start_state,
)

LEARN = {"a": {"ce": {"label_smoothing": 0.1}, "kd": {"source": "b", "temperature": 2.0}}}
# One step of this moves every parameter by minus its gradient.
PLAIN = {"a": {"lr": 1.0, "momentum": 0.0, "schedule": "constant"}}


def one_step(accumulate, batch, *, mode="jit", devices=1, learn=LEARN):
    modules, variables = tiny_nets.mlps()
    plan = plan_step(modules, learn, PLAIN, horizon=10, accumulate=accumulate)
    step = compile_step(make_step(plan.structure), mode=mode, devices=jax.devices()[:devices])
    state, metrics = step(start_state(plan, variables), batch, frozen_variables(plan, variables))
    return jax.device_get((state.nets, metrics))


@pytest.mark.parametrize(("mode", "devices"), [("jit", 1), ("jit", 2), ("pmap", 2)])
def test_micro_batches_equal_the_whole_batch(mode, devices):
    # The mask leaves micro-batches of unlike counts: their means would weigh examples unequally.
    batch = {**tiny_nets.batch(rows=16), "mask": np.arange(16) % 7 != 1}
    whole = one_step(1, batch)
    parts = one_step(4, batch, mode=mode, devices=devices)
    assert parts[1]["net0"]["count"] == np.sum(batch["mask"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7), parts, whole)


class Normed(nn.Module):
    """A BatchNorm and a head."""

    @nn.compact
    def __call__(self, images, train=False):
        """Returns logits [batch, 3]."""
        x = images.reshape(images.shape[0], -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="head")(x)


def test_running_averages_see_one_micro_batch_after_the_other():
    net, batch = quantize(Normed()), tiny_nets.batch(rows=8)
    variables = {"net": net.init(jax.random.key(0), batch["image"])}
    plan = plan_step(
        {"net": net}, {"net": {"ce": {}}}, {"net": PLAIN["a"]}, horizon=10, accumulate=2
    )
    for mode, devices in (("jit", 1), ("pmap", 2)):
        step = compile_step(make_step(plan.structure), mode=mode, devices=jax.devices()[:devices])
        state, _ = step(start_state(plan, variables), batch, {})
        rows = batch["image"].reshape(8, -1).astype(np.float64)
        mean = np.zeros(rows.shape[1])
        for part in (rows[0::2], rows[1::2]):
            mean = 0.9 * mean + 0.1 * part.mean(0)
        found = state.nets["net0"]["batch_stats"]["norm"]["mean"]
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7)


def test_memory_of_the_activations_falls():
    modules, variables = tiny_nets.conv_nets()
    batch, temporary = tiny_nets.batch(rows=512), {}
    for accumulate in (1, 8):
        plan = plan_step(
            modules,
            {"student": {"ce": {}, "kd": {"source": "teacher"}}},
            {"student": tiny_nets.OPTIM},
            horizon=10,
            accumulate=accumulate,
        )
        step = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
        arguments = start_state(plan, variables), batch, frozen_variables(plan, variables)
        memory = step.lower(*arguments).compile().memory_analysis()
        temporary[accumulate] = memory.temp_size_in_bytes
    # The activations are an eighth; gradients and one copy of the batch stay.
    assert temporary[8] < temporary[1] / 4, temporary


@pytest.mark.parametrize("loss", ["rkd", "crd", "dist"])
def test_losses_of_a_batch_are_refused(loss):
    modules, _ = distill_nets.nets()
    learn = {"student": {"relation": {"loss": loss, "source": "teacher"}}}
    rates = {"student": tiny_nets.OPTIM}
    message = rf"accumulate is 2.*student\.relation \(loss '{loss}'\) relates"
    with pytest.raises(ValueError, match=message):
        plan_step(modules, learn, rates, horizon=9, data=distill_nets.DATA, accumulate=2)


def test_a_batch_that_has_no_such_parts():
    with pytest.raises(ValueError, match="accumulate is 3, which does not divide the 16 examples"):
        one_step(3, tiny_nets.batch(rows=16))


def test_a_bad_gradient_is_located_through_micro_batches():
    modules, variables = tiny_nets.mlps()
    plan = plan_step(modules, {"a": {"ce": {}}}, PLAIN, horizon=10, accumulate=2)
    broken = jax.tree.map(np.array, variables)
    broken["a"]["params"]["head"]["kernel"][0, 0] = np.inf
    state, metrics = jax.jit(make_step(plan.structure))(
        start_state(plan, broken), tiny_nets.batch(), {}
    )
    assert not metrics["finite"]
    located = locate_nonfinite(plan, state, tiny_nets.batch(), {})
    assert located is not None and located.layer == "head"
