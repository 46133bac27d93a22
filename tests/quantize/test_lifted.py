"""Scanned and vmapped layers against the same net with every step and member written out."""

import functools

import jax
import lifted_nets
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax.quantize import inspection
from qkd_jax.quantize.stored_weights import quantized_weights, rounded, with_weight

CASES = [
    ("scan", 0, "tensor", "mse"),
    ("scan", 1, "channel", "percentile"),
    ("scan", -1, 2, "minmax"),
    ("shared", 0, "tensor", "ema"),
    ("shared", 1, 2, "minmax"),
    ("own", -1, "tensor", "mse"),
    ("both", 0, 2, "minmax"),
    ("both", 1, "tensor", "percentile"),
    ("both", -1, "channel", "minmax"),
]
# Shape by shape the same code: one of each transform is enough for every day.
QUICK = CASES[1:3] + CASES[4:5] + CASES[7:8]
EVERY = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
AFFINE = qk.Spec(8, symmetric=False)


@functools.lru_cache
def calibrated(kind, axis, granularity, observer):
    """Returns (net, variables, twin, its variables), calibrated apart from each other."""
    rules = [qk.Rule(".*", weight=qk.Spec(4, granularity=granularity), input=AFFINE)]
    net, twin = (qk.quantize(lifted_nets.Net(kind, axis, apart), rules) for apart in (False, True))
    floats = net.init(jax.random.key(1), X)
    # Members of very different sizes: a scale that is taken for another's shows.
    kernel = floats["params"]["layers"]["up"]["kernel"]
    sizes = np.exp(np.random.default_rng(1).normal(size=kernel.shape))
    floats["params"]["layers"]["up"]["kernel"] = kernel * sizes.astype(np.float32)
    apart = {"params": lifted_nets.written_out(floats["params"], kind, axis)}
    return (
        net,
        qk.calibrate(net, floats, [X], observer=observer),
        twin,
        qk.calibrate(twin, apart, [X], observer=observer),
    )


def same(found, wanted, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance}),
        found,
        wanted,
    )


@pytest.mark.parametrize(("kind", "axis", "granularity", "observer"), EVERY)
def test_parameters_are_those_of_each_member_and_lie_where_its_weight_lies(
    kind, axis, granularity, observer
):
    net, variables, twin, apart = calibrated(kind, axis, granularity, observer)
    same(lifted_nets.written_out(variables["quant"], kind, axis), apart["quant"])
    np.testing.assert_allclose(net.apply(variables, X), twin.apply(apart, X), atol=1e-5)
    layer = variables["quant"]["layers"]["up"]
    kernel = variables["params"]["layers"]["up"]["kernel"]
    if granularity != 2:
        np.broadcast_to(layer["weight_quantizer"]["scale"], kernel.shape)


@pytest.mark.parametrize(("kind", "axis", "granularity", "observer"), EVERY)
def test_stored_weights_are_rounded_on_the_grid_of_their_own_member(
    kind, axis, granularity, observer
):
    net, variables, twin, apart = calibrated(kind, axis, granularity, observer)
    weights = {w.path: w for w in quantized_weights(net, variables)}
    stacked = weights["layers/up"]
    put = lambda values: with_weight(variables, stacked, values)["params"]
    grid = rounded(variables, stacked)
    same(put(grid.values), variables["params"], rtol=0, atol=0)
    found = lifted_nets.written_out(put(grid.on_grid), kind, axis)
    for weight in quantized_weights(twin, apart):
        if weight.path != "head":
            wanted = twin_kernel = rounded(apart, weight).on_grid
            twin_kernel = np.reshape(wanted, (4, 4))
            got = found[weight.path.removesuffix("/up")]["up"]["kernel"]
            np.testing.assert_allclose(got, twin_kernel, atol=1e-6)


@pytest.mark.parametrize(("kind", "axis", "granularity", "observer"), EVERY)
def test_diagnosis_of_each_member(kind, axis, granularity, observer):
    net, variables, twin, apart = calibrated(kind, axis, granularity, observer)
    found = qk.diagnose(net, variables, [X[:2], X[2:]]).operands
    wanted = {(d.path, d.operand): d for d in qk.diagnose(twin, apart, [X]).operands}
    assert len(found) == len(wanted)
    for d in found:
        path = d.path
        if path != "head":
            step = int(path.removeprefix("layers/up[").removesuffix("]"))
            name = str(step)
            if kind == "both":
                # The stacked axes in their order in the arrays: those of later transforms last,
                # unless they count from the front.
                name = "{}_{}".format(*divmod(step, lifted_nets.MEMBERS))
                if axis == -1:
                    name = "{1}_{0}".format(*divmod(step, lifted_nets.STEPS))
            path = f"layers{name}/up"
        other = wanted[path, d.operand]
        assert (d.count, d.used) == (other.count, other.used)
        assert d.sqnr == pytest.approx(other.sqnr, rel=1e-4)


@pytest.mark.parametrize(("kind", "axis", "granularity", "observer"), EVERY)
def test_planned_size_is_the_calibrated_one(kind, axis, granularity, observer):
    net, variables, twin, apart = calibrated(kind, axis, granularity, observer)
    floats = {"params": variables["params"]}
    sizes = [
        sum(layer.bits for layer in inspection.layers(net, v, X))
        for net, v in ((net, floats), (net, variables), (twin, apart))
    ]
    assert sizes[0] == sizes[1] == sizes[2]
