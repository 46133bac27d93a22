"""Nets divided over a (data, model) mesh: the step of one device, and what the rules may say."""

import jax
import jax.export
import numpy as np
import pytest
import tiny_nets
from jax.sharding import PartitionSpec

from qkd_jax.training import (
    compile_step,
    frozen_variables,
    make_step,
    plan_step,
    start_state,
)
from qkd_jax.training.mesh import MeshLayout, bytes_on_a_device

STATES, WARM = 20, 3  # as in test_parallel.py
KERNELS = (("(stem|conv)/kernel", ("model",)),)


@pytest.fixture(scope="module")
def plan():
    """A W4A4 student, whose weights' oscillations are tracked, learns from labels and a teacher."""
    modules, _ = tiny_nets.conv_nets()
    learn = {"student": {"ce": {}, "kd": {"source": "teacher", "temperature": 2.0}}}
    return plan_step(
        modules,
        learn,
        {"student": tiny_nets.OPTIM},
        horizon=100,
        hygiene={"student": {"track": True}},
    )


def frozen_of(plan):
    return frozen_variables(plan, tiny_nets.conv_nets()[1])


@pytest.fixture(scope="module")
def stored(plan):
    """[(state before, state after, metrics)] on one device, on the host."""
    alone = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
    state, rows = start_state(plan, tiny_nets.conv_nets()[1]), []
    for index in range(WARM + STATES):
        before = jax.device_get(state)
        state, metrics = alone(state, tiny_nets.batch(index), frozen_of(plan))
        rows.append((before, *jax.device_get((state, metrics))))
    return rows


def largest_difference(got, want, least=0.0):
    """Over all arrays: the largest difference, as a share of the array's largest entry."""

    def share(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), least, 1e-30)

    return max(jax.tree.leaves(jax.tree.map(share, got, want)))


LAYOUTS = {
    "4x1": MeshLayout(rules=(("conv/kernel", ("data", "")),)),  # parts on the data axis
    "2x2": MeshLayout(2),
    "1x4": MeshLayout(4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_four_devices_equal_one_from_stored_states(plan, stored, name):
    step = make_step(plan.structure)
    shared = compile_step(step, devices=jax.devices()[:4], layout=LAYOUTS[name])
    frozen = shared.place(frozen_of(plan))
    for index, (before, want, want_metrics) in enumerate(stored[WARM:]):
        new, metrics = shared(before, tiny_nets.batch(WARM + index), frozen)
        state = jax.device_get(new)
        assert largest_difference(state.nets, want.nets) < 1e-5, index
        # A BatchNorm takes away what some gradients were, and their moments are rounding noise.
        assert largest_difference(state.opt, want.opt, least=0.1) < 1e-5, index
        assert metrics["net0"]["loss"] == pytest.approx(want_metrics["net0"]["loss"], rel=1e-5)
    assert shared.traces == 1

    quarter = {"4x1": (3, 3, 1, 4), "2x2": (3, 3, 4, 2), "1x4": (3, 3, 4, 1)}[name]
    net, opt = new.nets["net0"], new.opt["net0"]
    for array in (
        net["params"]["conv"]["kernel"],
        opt["inner"][1].trace["params"]["conv"]["kernel"],
        opt["hygiene"]["weights"]["conv"]["frequency"],
    ):
        assert array.sharding.shard_shape(array.shape) == quarter
    step = net["quant"]["conv"]["weight_quantizer"]["step"]
    assert step.shape == (1, 1, 1, 4)
    assert step.sharding.shard_shape(step.shape) == (1, 1, 1, quarter[-1])
    # Three classes are not divisible, so the default rules leave the head whole.
    assert net["params"]["head"]["kernel"].sharding.is_fully_replicated


def test_a_state_goes_from_one_mesh_to_another(plan, stored):
    before, want, _ = stored[WARM]
    layouts = [MeshLayout(2), MeshLayout(4), MeshLayout(2, KERNELS)]
    steps = [
        compile_step(make_step(plan.structure), devices=jax.devices()[:4], layout=layout)
        for layout in layouts
    ]
    state = before
    for step in steps:
        state = step.place(state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    new, _ = steps[0](state, tiny_nets.batch(WARM), frozen_of(plan))
    assert largest_difference(jax.device_get(new.nets), want.nets) < 1e-5


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_divided_step_lowers_for_accelerators(plan, platform):
    step = compile_step(
        make_step(plan.structure), devices=jax.devices()[:4], layout=MeshLayout(model=2)
    )
    arguments = start_state(plan, tiny_nets.conv_nets()[1]), tiny_nets.batch(), frozen_of(plan)
    function = step.jitted(arguments[0], arguments[2])
    exported = jax.export.export(function, platforms=[platform])(*arguments)
    assert exported.platforms == (platform,) and exported.nr_devices == 4
    assert "model" in exported.mlir_module()


# --- the rules ---------------------------------------------------------------------------------

NET = {
    "params": {
        "conv": {"kernel": np.zeros((3, 3, 4, 8), np.float32), "bias": np.zeros(8, np.float32)},
        "head": {"kernel": np.zeros((8, 3), np.float32)},
        "table": {"embedding": np.zeros((5, 6), np.float32)},
    },
    "quant": {
        "conv": {
            "weight_quantizer": {"step": np.zeros((1, 1, 1, 8), np.float32)},
            "input_quantizer": {"step": np.zeros((), np.float32)},
        },
        "head": {"weight_quantizer": {"step": np.zeros((2, 4, 3), np.float32)}},  # groups
    },
}


def test_what_rules_divide():
    whole, last = PartitionSpec(), PartitionSpec(None, "model")
    channels = PartitionSpec(None, None, None, "model")
    specs = MeshLayout(2).specs(NET, 4)
    assert specs["params"] == {
        "conv": {"kernel": channels, "bias": whole},
        "head": {"kernel": whole},
        "table": {"embedding": last},
    }
    assert specs["quant"]["conv"]["weight_quantizer"]["step"] == channels
    assert specs["quant"]["conv"]["input_quantizer"]["step"] == whole
    assert specs["quant"]["head"]["weight_quantizer"]["step"] == whole
    assert jax.tree.leaves(MeshLayout().specs(NET, 4)) == [whole] * 7
    both = MeshLayout(2, (("conv/kernel", ("data", "model")),), ("data", "model")).specs(NET, 8)
    assert both["params"]["conv"]["kernel"] == PartitionSpec(None, None, "data", "model")
    # By hand: 288 + 8 + 24 + 30 + 8 + 1 + 24 numbers, of which 288 + 30 + 8 in halves.
    layout = MeshLayout(2)
    assert bytes_on_a_device(NET, specs, layout.sizes(4)) == (4 * 383, 4 * (383 - 163))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 0}, "model is 0"),
        ({"axes": ("data", "data")}, "both have the same name"),
        ({"axes": ("batch", "model")}, "'batch' is the axis over which a step under pmap"),
        ({"rules": (("conv/kernel", ("modle",)),)}, "Did you mean 'model'"),
        ({"rules": (("conv/kernel", ("model", "model")),)}, "two axes of an array by 'model'"),
        ({"rules": (("conv/kernel", ()),)}, "name some"),
        ({"rules": (("conv/(", ("model",)),)}, "no regular expression"),
        ({"rules": (("conv", ("model",)), ("conv", ("data",)))}, "a second time"),
        ({"rules": ("conv/kernel",)}, r"a rule is \(pattern, axes\)"),
    ],
)
def test_layouts_that_collide_in_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshLayout(**fields)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ((".*/kernel", ("model",)), ("conv/.*", ("model", ""))),
            r"net 'student': rules '\.\*/kernel' and 'conv/\.\*' collide: both match 'conv/kernel'",
        ),
        (
            ((".*/k.*", ("model",)), ("head/.*", ("model",))),
            r"rules\[1\] .* divides nothing by .*'head/kernel' of net 'student'.* \(8, 3\)",
        ),
        ((("conv/bias", ("data", "model")),), "divides nothing.*'conv/bias' of net 'student'"),
        ((("conv/kernal", ("model",)),), "matches no array.*Did you mean 'conv/kernel'"),
    ],
)
def test_rules_that_collide_over_a_net(rules, message):
    with pytest.raises(ValueError, match=message):
        MeshLayout(2, rules).check_nets({"student": NET}, 4)


def test_rules_that_agree_are_no_collision():
    specs = MeshLayout(2, ((".*v/kernel", ("model",)), ("conv/k.*", ("", "model")))).specs(NET, 4)
    assert specs["params"]["conv"]["kernel"] == PartitionSpec(None, None, None, "model")


def test_layouts_that_the_devices_do_not_allow(plan):
    step = make_step(plan.structure)
    with pytest.raises(ValueError, match="mode is 'pmap', which keeps whole nets"):
        compile_step(step, mode="pmap", devices=jax.devices()[:4], layout=MeshLayout(2))
    with pytest.raises(ValueError, match="model is 3, which does not divide 4 devices"):
        compile_step(step, devices=jax.devices()[:4], layout=MeshLayout(3))
    shared = compile_step(step, devices=jax.devices()[:4], layout=MeshLayout(2))
    with pytest.raises(ValueError, match="15 examples, which 2 devices cannot share"):
        shared.shard_batch(tiny_nets.batch(rows=15))
