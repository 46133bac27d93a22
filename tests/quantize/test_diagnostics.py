"""What is said of each quantizer, against NumPy on the operands themselves."""

from __future__ import annotations

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.diagnostics import Diagnosis, diagnose
from qkd_jax.quantizers import QUANTIZERS

KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_key(diagnosis):
    return {(d.path, d.operand): d for d in diagnosis.operands}


def dense(weight, x, rules, quant, *, wrap=lambda module: module):
    """A net of one dense layer with this weight, and quantizers given by hand."""
    net = quantize(wrap(nn.Dense(weight.shape[1], use_bias=False)), rules)
    return net, {"params": {"kernel": jnp.asarray(weight)}, "quant": quant}, jnp.asarray(x)


def test_every_number_by_hand():
    # Weight: step 1, codes -2 .. 1; affine input: scale 0.5, zero point 1, codes 0 .. 3.
    weight = np.array([[-4.0, -2.4, -0.4], [0.3, 1.2, 1.6]], np.float32)
    x = np.array([[-0.5, 0.2], [1.0, 1.26], [0.0, -0.76]], np.float32)
    rules = [
        Rule(".*", weight=Spec(2), input=Spec(2, signed=False, symmetric=False, observer="minmax"))
    ]
    quant = {
        "weight_quantizer": {"scale": jnp.float32(1), "zero_point": jnp.float32(0)},
        "input_quantizer": {"scale": jnp.float32(0.5), "zero_point": jnp.float32(1)},
    }
    found = by_key(diagnose(*dense(weight, x, rules, quant)[:2], [x]))
    w, a = found["", "weight"], found["", "input"]
    # -4 -> -2 (clipped), -2.4 -> -2, -0.4 -> 0, 0.3 -> 0, 1.2 -> 1, 1.6 -> 1 (clipped).
    assert (w.count, w.bits, w.label) == (6, 2, "int2 uniform")
    assert (w.lo, w.hi, w.grid_lo, w.grid_hi) == pytest.approx((-4, 1.6, -2, 1))
    assert (w.clipped, w.zeros, w.used, w.levels) == (2 / 6, 2 / 6, 3, 4)
    signal = 16 + 5.76 + 0.16 + 0.09 + 1.44 + 2.56
    noise = 4 + 0.16 + 0.16 + 0.09 + 0.04 + 0.36
    assert w.sqnr == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    # -0.5 -> -0.5, 0.2 -> 0, 1 -> 1, 1.26 -> 1 (clipped), 0 -> 0, -0.76 -> -0.5 (clipped).
    assert (a.lo, a.hi, a.grid_lo, a.grid_hi) == pytest.approx((-0.76, 1.26, -0.5, 1))
    assert (a.clipped, a.zeros, a.used, a.levels) == (2 / 6, 2 / 6, 3, 4)
    noise = 0.04 + 0.26**2 + 0.26**2
    signal = 0.25 + 0.04 + 1 + 1.26**2 + 0.76**2
    assert a.sqnr == pytest.approx(10 * math.log10(signal / noise), rel=1e-5)


@pytest.mark.parametrize("bits", [3, 8])
def test_uniform_data_have_six_decibels_a_bit(bits):
    # Data uniform over 2^b steps of 2 / 2^b, each code's step about it: noise step^2 / 12.
    spec = Spec(bits, symmetric=False, signed=False)
    step = 2 / 2**bits
    x = np.random.default_rng(0).uniform(-1, 1, (400, 250)).astype(np.float32) - step / 2
    quant = {
        "input_quantizer": {
            "scale": jnp.float32(step), "zero_point": jnp.float32(2 ** (bits - 1)),
        }
    }  # fmt: skip
    net, variables, x = dense(normal(0, 250, 2), x, [Rule(".*", input=spec)], quant)
    (found,) = diagnose(net, variables, [x]).operands
    signal, noise = 1 / 3 + step**2 / 4, step**2 / 12
    assert found.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=0.05)
    assert found.used == found.levels == 2**bits and found.clipped == 0


class Small(nn.Module):
    """Convolution, depthwise convolution and dense, with a layer that is called twice."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x))
        again = nn.Dense(6, name="again")
        x = nn.relu(again(nn.relu(again(x))))
        return nn.Dense(3, name="head")(jnp.mean(x, (1, 2)))


def small(weight, inputs, x):
    net = quantize(Small(), [Rule("conv", weight=weight), Rule(".*", weight=weight, input=inputs)])
    return net, calibrate(net, net.init(KEY, x), [x])


def test_batches_add_up():
    x = normal(1, 11, 5, 5, 2)
    net, variables = small(Spec(4, granularity="channel"), Spec(3, signed=False), x[:4] / 2)
    whole = diagnose(net, variables, [x])
    parts = diagnose(net, variables, [x[:4], x[4:5], {"image": x[5:], "mask": np.ones(6)}])
    assert len(whole.operands) == 7
    assert whole.operands[0].path == "conv"
    for a, b in zip(whole.operands, parts.operands, strict=True):
        assert a.sqnr == pytest.approx(b.sqnr, rel=1e-5)
        assert (a.path, a.operand, a.count, a.used) == (b.path, b.operand, b.count, b.used)
        assert (a.clipped, a.zeros, a.lo, a.hi) == (b.clipped, b.zeros, b.lo, b.hi)
    assert any(d.clipped > 0 for d in whole.operands)
    # Padding does not count.
    padded = {"image": np.concatenate([x, 99 * x[:2]]), "mask": np.arange(13) < 11}
    assert diagnose(net, variables, [padded]).operands == whole.operands


def test_operands_as_the_quantized_net_has_them():
    x = normal(2, 3, 5, 5, 2)
    net, variables = small(Spec(3, granularity="channel"), Spec(3, signed=False), x)
    seen = {}

    def watch(path, operand, x, x_hat, spec, params):
        seen.setdefault((path, operand), []).append((np.asarray(x), np.asarray(x_hat)))

    net.apply(variables, x, watch=watch)
    found = by_key(diagnose(net, variables, [x]))
    assert list(found) == list(seen)
    assert len(seen["again", "input"]) == 2  # the layer is called twice; its weight counts once
    for (path, operand), pairs in seen.items():
        a, a_hat = (np.concatenate([p[i].ravel() for p in pairs]) for i in (0, 1))
        if operand == "weight":
            a, a_hat = (v.ravel() for v in pairs[0])
        d = found[path, operand]
        assert d.count == a.size
        assert (d.lo, d.hi) == (a.min(), a.max())
        assert d.zeros == np.mean(a_hat == 0)
        noise = np.sum(np.square(np.float64(a) - a_hat))
        assert d.sqnr == pytest.approx(10 * np.log10(np.sum(np.float64(a) ** 2) / noise), rel=1e-5)


SPECS = {
    "binary": dict(bits=1), "ternary": dict(bits=2), "lsq_plus": dict(bits=3, symmetric=False),
    "float": dict(bits=4), "codebook": dict(bits=4), "apot": dict(bits=4),
}  # fmt: skip
# Values that a weight can take: binary has no 0, QIL and ternary are narrow, fp4 has two zeros.
LEVELS = {"binary": 2, "ternary": 3, "qil": 7}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer(name):
    fields = SPECS.get(name, dict(bits=3))
    module = QUANTIZERS[name]
    spec = Spec(quantizer=name, granularity="channel", **fields)
    try:
        module.check(spec)
    except ValueError as error:
        pytest.skip(f"no weight quantizer: {error}")
    weight, x = normal(3, 600, 2) * np.array([1, 5], np.float32), normal(4, 2, 600)
    net = quantize(nn.Dense(2, use_bias=False), [Rule(".*", weight=spec)])
    variables = calibrate(net, {"params": {"kernel": jnp.asarray(weight)}}, [x])
    (d,) = diagnose(net, variables, [x]).operands
    seen = []
    net.apply(variables, x, watch=lambda *given: seen.append(np.asarray(given[3])))
    channels = [np.unique(seen[0][:, i]) for i in (0, 1)]
    assert d.used == max(map(len, channels))  # 600 normal values a channel: all codes or the same
    assert d.levels == LEVELS.get(name, 2 ** fields["bits"]) and 2 <= d.used <= d.levels
    assert d.grid_lo <= seen[0].min() and seen[0].max() <= d.grid_hi
    if name == "dorefa":  # tanh squeezes weights of this size into [-1, 1]
        assert d.clipped == 0
    else:
        assert d.sqnr > {1: 4, 2: 6, 3: 8, 4: 13}[fields["bits"]]
        assert 0 <= d.clipped < 0.25
    assert d.zeros == np.mean(seen[0] == 0)


def test_learned_bits_are_those_in_use():
    # An upper bound of 8 bits, 3 of them in use: codes -4 .. 3 (narrow: -3 .. 3, as at 8 bits).
    spec = Spec(8, quantizer="lsq", options={"learn_bits": True})
    weight = np.array([[-9.0, -2.0, 0.2], [1.0, 3.4, 5.0]], np.float32)
    quant = {"weight_quantizer": {"step": jnp.float32(1), "bits": jnp.float32(2.7)}}
    net, variables, x = dense(weight, np.ones((1, 2)), [Rule(".*", weight=spec)], quant)
    (found,) = diagnose(net, variables, [x]).operands
    assert (found.bits, found.levels, found.used) == (3, 8, 5)
    assert found.label.split()[0] == "int3" and (found.grid_lo, found.grid_hi) == (-3, 3)
    assert found.clipped == 2 / 6  # -9 and 5; 3.4 is within half a step


def test_clipping_of_an_interval_is_not_pruning():
    # QIL, center 3 and half width 1: below 2 pruned, above 4 clipped; 3 codes above 0.
    x = np.array([[0.5, 1.9, 2.5, 3.9, 4.2, 6.0]], np.float32)
    spec = Spec(2, quantizer="qil", signed=False)
    quant = {"input_quantizer": {"center": jnp.float32(3), "half_width": jnp.float32(1)}}
    net, variables, x = dense(normal(0, 6, 1), x, [Rule(".*", input=spec)], quant)
    (d,) = diagnose(net, variables, [x]).operands
    assert d.clipped == 2 / 6
    assert d.zeros == 2 / 6
    assert (d.grid_lo, d.grid_hi) == pytest.approx((0, 4))
    assert (d.used, d.levels) == (3, 4)  # 0, 0, 1 (0.75), 3 (2.85), 3, 3


def test_groups():
    weight = normal(5, 8, 3) * np.repeat([1, 100], 4)[:, None].astype(np.float32)
    x = normal(6, 2, 8)
    net = quantize(nn.Dense(3, use_bias=False), [Rule(".*", weight=Spec(4, granularity=4))])
    variables = calibrate(net, {"params": {"kernel": jnp.asarray(weight)}}, [x])
    (d,) = diagnose(net, variables, [x]).operands
    assert d.label.endswith("per group of 4") and d.clipped == 0
    assert d.count == 24 and d.grid_hi >= np.abs(weight).max() * 7 / 8 - 1e-3
    # Half a step of each group at most, and every group has its own.
    noise = sum(
        4 * (np.abs(weight[g : g + 4, c]).max() / 7 / 2) ** 2 for g in (0, 4) for c in range(3)
    )
    assert d.sqnr > 10 * math.log10(np.sum(np.float64(weight) ** 2) / noise)


def test_dynamic_operands_have_the_ranges_of_their_rows():
    x = np.diag([1.0, 10.0]).astype(np.float32)
    spec = Spec(8, dynamic=True, granularity="token")
    net = quantize(nn.Dense(2, use_bias=False), [Rule(".*", input=spec)])
    variables = calibrate(net, net.init(KEY, x), [x])
    (d,) = diagnose(net, variables, [x[:1], x[1:]]).operands
    assert (d.grid_lo, d.grid_hi) == pytest.approx((-10, 10))
    assert d.zeros == 0.5 and d.clipped == 0
    assert d.used == 2


class Scanned(nn.Module):
    """Three steps of one dense layer, scanned or written out."""

    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(nn.Dense) if self.remat else nn.Dense

        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(layer(4, name="dense")(x)), None

        if not self.scan:
            for step in range(3):
                x, _ = Step(name=f"step{step}")(x, None)
            return x
        steps = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return steps(name="steps")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_steps_of_a_scan_are_layers_of_their_own(remat):
    rules = [Rule(".*dense", weight=Spec(3, granularity="channel"), input=Spec(3))]
    x = normal(7, 6, 4)
    scanned = quantize(Scanned(True, remat), rules)
    variables = calibrate(scanned, scanned.init(KEY, x), [x])
    found = diagnose(scanned, variables, [x[:2], x[2:]])
    # The same numbers where each step is a module of its own.
    written = quantize(Scanned(False), rules)
    apart = {
        name: {f"step{i}": jax.tree.map(lambda a, i=i: a[i], tree["steps"]) for i in range(3)}
        for name, tree in variables.items()
    }
    wanted = by_key(diagnose(written, apart, [x]))
    assert len(found.operands) == len(wanted) == 6
    for d in found.operands:
        step = int(d.path.removeprefix("steps/dense[").removesuffix("]"))
        other = wanted[f"step{step}/dense", d.operand]
        assert d.sqnr == pytest.approx(other.sqnr, rel=1e-4)
        assert (d.count, d.used, d.clipped) == (other.count, other.used, other.clipped)


def test_attention_and_outputs():
    x = normal(8, 2, 5, 8)
    net = quantize(
        nn.MultiHeadDotProductAttention(2), [Rule(".*", weight=Spec(8), input=Spec(8)),]
    )  # fmt: skip
    variables = calibrate(net, net.init(KEY, x), [x])
    keys = list(by_key(diagnose(net, variables, [x])))
    for sub in ("query_key", "weights_value"):
        assert (sub, "input") in keys and (sub, "other") in keys
    assert len(keys) == 4 * 2 + 4
    net = quantize(nn.Dense(3), [Rule("", output=Spec(8))])
    variables = calibrate(net, net.init(KEY, x[0]), [x[0]])
    (d,) = diagnose(net, variables, [x[0]]).operands
    assert (d.path, d.operand) == ("", "output")


def test_what_lies_on_the_grid_and_what_is_zero():
    weight = np.array([[1.0, 2.0], [-3.0, 0.0]], np.float32)
    x = np.zeros((2, 2), np.float32)
    quant = {
        name: {"scale": jnp.float32(1), "zero_point": jnp.float32(0)}
        for name in ("weight_quantizer", "input_quantizer")
    }
    rules = [Rule(".*", weight=Spec(3), input=Spec(3))]
    found = by_key(diagnose(*dense(weight, x, rules, quant)[:2], [x]))
    assert found["", "weight"].sqnr == math.inf
    assert math.isnan(found["", "input"].sqnr)


def test_table_and_records():
    x = normal(9, 3, 5, 5, 2)
    net, variables = small(Spec(3, granularity="channel"), Spec(3, signed=False), x)
    found = diagnose(net, variables, [x], oscillating={"depthwise": 0.125}, train=False)
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(found.operands)
    assert lines[0].split() == [
        "layer", "operand", "grid", "data", "grid", "range", "clipped", "zero", "codes", "SQNR",
        "dB", "oscillating",
    ]  # fmt: skip
    (row,) = [line for line in lines if "depthwise" in line and "weight" in line]
    assert row.endswith("12.50%") and "int3 uniform per channel" in row
    records = found.records()
    assert json.loads(json.dumps(records)) == records
    assert [r["oscillating"] for r in records].count(None) == len(records) - 1
    assert "oscillating" not in str(Diagnosis(found.operands[:1]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (np.zeros((2, 5, 5, 2), np.float32), "batches is one batch"),
        ([np.zeros((2, 5, 5, 2), np.float32), np.zeros((0, 5, 5, 2), np.float32)], "batch 1 of"),
        ([{"label": 1}], "needs 'image'"),
    ],
)
def test_batches_that_cannot_be_used(batches, message):
    x = normal(9, 3, 5, 5, 2)
    net, variables = small(Spec(3), Spec(3, signed=False), x)
    with pytest.raises(ValueError, match=message):
        diagnose(net, variables, batches)


def test_a_net_that_is_float_still():
    x = normal(9, 3, 5, 5, 2)
    net = quantize(Small(), [Rule(".*", weight=Spec(3))])
    with pytest.raises(ValueError, match="nothing of this net is quantized"):
        diagnose(net, net.init(KEY, x), [x])
