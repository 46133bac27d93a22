"""Weights as they are stored: the codes of every quantizer give back what the net computes with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax.numerics import FloatFormat, IntFormat, Spec, TableFormat
from qkd_jax.quantize import stored_tensor as module
from qkd_jax.quantize.presets import pair
from qkd_jax.quantize.stored_tensor import stored_tensor
from qkd_jax.quantize.traced import is_quantizer, trace_net
from qkd_jax.quantizers import QUANTIZERS


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(x.shape[-1], name="dense")(x), None


class Net(nn.Module):
    """Kernels of two, three and four axes, and a table."""

    @nn.compact
    def __call__(self, x, ids):
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="conv")(x)).mean(1)
        x = x + nn.Embed(5, 8, name="table")(ids)
        x = nn.DenseGeneral((2, 4), name="heads")(x)
        return nn.DenseGeneral(6, axis=(-2, -1), name="out")(x)


class Lifted(nn.Module):
    """Layers that a scan and a vmap stack."""

    @nn.compact
    def __call__(self, x, ids):
        stacked = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        x = nn.scan(Step, length=2, **stacked)(name="steps")(x, None)[0]
        members = nn.vmap(nn.Dense, in_axes=None, out_axes=1, axis_size=2, **stacked)
        return members(4, name="members")(x)


IMAGES = np.random.default_rng(0).normal(0.1, 1, (2, 3, 4, 8)).astype(np.float32)
IDS = np.array([[0, 1, 2, 4]] * 2)


def fake_quantized(net, variables):
    """The values of every weight as the compiled net multiplies with them, in order of use."""
    names = []

    def run(variables):
        arrays = []
        names.clear()

        def watch(path, operand, x, x_hat, spec, params):
            if operand == "weight":
                names.append(path)
                arrays.append(x_hat)

        net.apply(variables, IMAGES, IDS, watch=watch)
        return arrays

    return dict(zip(names, jax.jit(run)(variables), strict=True))


def calibrated(weight, pattern, model=None):
    net = qk.quantize(model or Net(), [qk.Rule(pattern, weight=weight)])
    shapes = jax.eval_shape(net.init, jax.random.key(0), IMAGES, IDS)
    variables = small_nets.trained_like(shapes)
    return net, qk.calibrate(net, variables, [(IMAGES, IDS)], observer="minmax")


def stored(net, variables):
    traced = trace_net(net, variables, (IMAGES, IDS))
    markers = [n for n in traced.graph.nodes if is_quantizer(n)]
    return [(n.params["path"], stored_tensor(traced, n)) for n in markers]


def weight(name, **fields):
    bits = dict(binary=1, ternary=2, float=8).get(name, 4)
    own = {k: v for k, v in pair(name, bits, 4)[0].items() if k != "observer"}
    return Spec(**{"bits": bits, **own, **fields})


FORMATS = {"float": FloatFormat, "codebook": TableFormat, "apot": TableFormat}
SIGNED = [name for name in QUANTIZERS if name != "pact"]
CASES = [(n, dict(granularity=g)) for n in SIGNED for g in ("tensor", "channel", 2)]
CASES += [
    ("uniform", dict(symmetric=False, granularity=4)),
    ("uniform", dict(dynamic=True, granularity=4)),
    ("float", dict(dynamic=True, granularity="channel")),
    ("apot", dict(options={"normalize": True}, granularity="channel")),
    ("lsq", dict(options={"learn_bits": True})),
    ("dorefa", dict(bits=1)),
    *(("float", dict(bits=b, granularity=2)) for b in (4, 6, 16)),
    *(("float", dict(bits=b, options={"format": f})) for b, f in ((8, "e5m2"), (16, "half"))),
    *(("codebook", dict(bits=b, granularity=2)) for b in (2, 3, 5, 6)),
    *(("uniform", dict(bits=b, granularity=2)) for b in (2, 3, 5, 6, 7, 8)),
]
FAST = [(n, dict(granularity=2)) for n in ("codebook", "apot", "lsq")]


@pytest.mark.parametrize(
    ("name", "fields"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES],
    ids=str,
)
def test_codes_times_scales_are_what_the_net_multiplies_with(name, fields):
    spec = weight(name, **fields)
    # Nothing is summed over in a table, so that it has no groups.
    groups = isinstance(spec.granularity, int)
    net, variables = calibrated(spec, "conv|heads|out" + ("" if groups else "|table"))
    wanted = fake_quantized(net, variables)
    found = stored(net, variables)
    assert {path for path, _ in found} == set(wanted) and len(found) >= 3
    for path, tensor in found:
        assert isinstance(tensor.format, FORMATS.get(name, IntFormat))
        assert tensor.codes.shape == wanted[path].shape
        np.testing.assert_array_equal(tensor.values(), wanted[path], err_msg=path)
        levels = 2 ** (spec.bits + (tensor.stride == 2))
        assert len(np.unique(tensor.codes)) <= levels
        # The equation of the docstring, in NumPy alone.
        shape = tensor.codes.shape
        if groups:
            axis, size = tensor.group
            assert size == spec.granularity
            shape = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        values = tensor.format.values()
        codes = tensor.codes.reshape(shape)
        if isinstance(tensor.format, IntFormat):
            units = (codes - tensor.zero_point).astype(np.float32)
        elif isinstance(tensor.format, TableFormat):
            units = values[codes].astype(np.float32)
        else:
            continue
        np.testing.assert_array_equal(
            (units * tensor.scale).reshape(wanted[path].shape), wanted[path]
        )


def test_layers_that_a_scan_or_a_vmap_stacks_have_their_own_groups():
    spec = Spec(4, quantizer="codebook", granularity=4)
    net, variables = calibrated(spec, ".*", Lifted())
    found = stored(net, variables)
    assert [path for path, _ in found] == ["steps/dense", "steps/dense", "members"]
    scales = variables["quant"]["steps"]["dense"]["weight_quantizer"]["scale"]
    kernel = variables["params"]["steps"]["dense"]["kernel"]
    for step, (_, tensor) in enumerate(found[:2]):
        assert tensor.group == (0, 4) and tensor.scale.shape == (2, 1, 8)
        np.testing.assert_array_equal(tensor.scale, scales[step])
        largest = np.abs(kernel[step]).reshape(2, 4, 8).max(1, keepdims=True)
        np.testing.assert_array_equal(tensor.scale, largest)
    members = found[2][1]
    assert members.group == (1, 4) and members.codes.shape == (2, 8, 4)
    kernel = np.asarray(variables["params"]["members"]["kernel"])
    bound = np.abs(kernel).reshape(2, 2, 4, 4).max(2, keepdims=True)
    np.testing.assert_array_equal(members.scale, bound)
    assert np.abs(members.values() - kernel).max() <= 0.16 * bound.max()


def marker_of(traced, operand):
    return next(n for n in traced.graph.nodes if n.params.get("operand") == operand)


def test_what_is_no_weight_or_off_its_grid_is_refused(monkeypatch):
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="dense")(x)

    x = IMAGES[:, 0, 0]
    rules = [qk.Rule("dense", weight=Spec(4, granularity=4), input=Spec(8))]
    net = qk.quantize(Dense(), rules)
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    traced = trace_net(net, variables, x)
    inputs, kernel = marker_of(traced, "input"), marker_of(traced, "weight")
    with pytest.raises(ValueError, match=r"input of layer 'dense'.*no calibrated weight"):
        stored_tensor(traced, inputs)
    real = module.code_grid
    for change, message in (
        (lambda g: g._replace(scale=g.scale * jnp.float32(1.25)), r"24 values that are not codes"),
        (lambda g: None, "states no codes"),
    ):
        monkeypatch.setattr(module, "code_grid", lambda *a, change=change: change(real(*a)))
        with pytest.raises(ValueError, match=message):
            stored_tensor(traced, kernel)
    monkeypatch.undo()
    bad = variables["quant"]["dense"]["weight_quantizer"]["scale"].at[1].set(0)
    variables["quant"]["dense"]["weight_quantizer"]["scale"] = bad
    traced = trace_net(net, variables, x)
    with pytest.raises(ValueError, match=r"scale.* holds 0"):
        stored_tensor(traced, marker_of(traced, "weight"))


@pytest.mark.parametrize("table", [(0.0,), (0.0, 0.0), (1.0, 0.0), (0.0, float("nan"))])
def test_tables_are_checked(table):
    with pytest.raises(ValueError, match="table"):
        TableFormat("odd", table)


def test_a_table_takes_the_nearest_value():
    format = TableFormat("three", (-1.0, 0.25, 2.0))
    assert (format.bits, format.levels, format.min, format.max, format.smallest) == (
        2,
        3,
        -1.0,
        2.0,
        0.25,
    )
    x = jnp.array([-9.0, -0.375, -0.37, 1.125, 1.13, 9.0])  # -0.375 and 1.125 lie half way
    np.testing.assert_array_equal(format.encode(x), [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(format.fake_cast(x), [-1, -1, 0.25, 0.25, 2, 2])
    np.testing.assert_array_equal(format.decode(jnp.array([2, 0])), [2, -1])
