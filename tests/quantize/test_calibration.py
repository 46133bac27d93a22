"""Calibration: exact over batches, sees every operand, and says which layer is at fault."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.numerics import Spec
from qkd_jax.observers import OBSERVERS
from qkd_jax.quantize import Rule, model, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.rules import first_match

KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8, name="first")(x))
        return nn.Dense(3, name="second")(x)


def build(**input_spec):
    spec = Spec(4, **{"quantizer": "lsq", "signed": False, **input_spec})
    rules = [Rule("second", weight=Spec(4, quantizer="lsq", granularity="channel"), input=spec)]
    net = quantize(Net(), rules)
    x = jax.random.normal(jax.random.key(1), (12, 5))
    return net, net.init(KEY, x), x


def hidden(variables, x):
    params = {k: np.asarray(v, np.float64) for k, v in variables["params"]["first"].items()}
    return np.maximum(np.asarray(x, np.float64) @ params["kernel"] + params["bias"], 0)


def test_steps_of_lsq_are_the_papers_over_all_batches_whatever_their_size():
    net, variables, x = build()
    want = 2 * hidden(variables, x).mean() / np.sqrt(15)
    for batches in ([x], [x[:4], x[4:]], [x[:1], x[1:7], x[7:]]):
        quant = calibrate(net, variables, batches)["quant"]["second"]
        np.testing.assert_allclose(quant["input_quantizer"]["step"], want, rtol=1e-6)
    kernel = np.asarray(variables["params"]["second"]["kernel"], np.float64)
    want = 2 * np.abs(kernel).mean(0, keepdims=True) / np.sqrt(7)
    np.testing.assert_allclose(quant["weight_quantizer"]["step"], want, rtol=1e-6)


def test_an_observer_that_is_named_sets_the_range():
    net, variables, x = build()
    quant = calibrate(net, variables, [x[:5], x[5:]], observer="minmax")["quant"]["second"]
    want = hidden(variables, x).max() / 15
    np.testing.assert_allclose(quant["input_quantizer"]["step"], want, rtol=1e-6)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_batches_that_four_devices_hold_calibrate_as_on_one(observer):
    net, variables, x = build(quantizer="uniform")
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    across = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    one = calibrate(net, variables, [x[:8], x[8:]], observer=observer)["quant"]
    batches = [jax.device_put(part, across) for part in (x[:8], x[8:])]
    four = calibrate(net, variables, batches, observer=observer)["quant"]
    # Counts and extremes are the same, sums of floats to rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), four, one)


def test_the_mse_observer_finds_the_best_of_its_grid():
    net, variables, x = build(quantizer="uniform")
    quant = calibrate(net, variables, [x[:5], x[5:]], observer="mse")["quant"]["second"]
    data = hidden(variables, x)
    grid = data.max() / 15 * np.arange(1, 101) / 100
    errors = [np.mean((np.clip(np.round(data / s), 0, 15) * s - data) ** 2) for s in grid]
    found = float(quant["input_quantizer"]["scale"])
    error = np.mean((np.clip(np.round(data / found), 0, 15) * found - data) ** 2)
    np.testing.assert_allclose(error, min(errors), rtol=1e-4)


def test_everything_else_stays_as_it_was_and_recalibrating_starts_afresh():
    net, variables, x = build()
    first = calibrate(net, variables, [x])
    again = calibrate(net, first, [x])
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, first["params"], variables["params"])


def test_batches_may_be_dicts_or_argument_tuples():
    net, variables, x = build()
    plain = calibrate(net, variables, [x])
    for batch in ({"image": np.asarray(x), "label": np.zeros(12)}, (x, False)):
        jax.tree.map(np.testing.assert_array_equal, plain, calibrate(net, variables, [batch]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        (jnp.ones((2, 5)), "give a list of batches"),
        ([{"pixels": jnp.ones((2, 5))}], "needs 'image'"),
        ([jnp.full((2, 5), jnp.nan)], "input of layer 'second'.*NaN"),
        ([jnp.full((2, 5), jnp.inf)], "input of layer 'second'"),
        ([jnp.ones((0, 5))], "input of layer 'second': no calibration data.*non-empty batch"),
        ([jnp.zeros((2, 5))] * 2, "input of layer 'second' is 0 in all.*batches of real inputs"),
    ],
)
def test_bad_batches(batches, message):
    net, variables, _ = build()
    with pytest.raises(ValueError, match=message):
        calibrate(net, variables, batches)


def test_negative_values_under_an_unsigned_symmetric_spec():
    net = quantize(Net(), [Rule("first", weight=Spec(4), input=Spec(4, signed=False))])
    x = jnp.asarray([[1.0, -2.5, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"'first' goes down to -2\.5.*signed=True"):
        calibrate(net, net.init(KEY, x), [x])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(bad):
    net, variables, x = build()
    variables["params"]["second"]["kernel"] = jnp.full((8, 3), bad)
    with pytest.raises(ValueError, match=r"weight of layer 'second'.*finite data.*float net's"):
        calibrate(net, variables, [x])


@pytest.mark.parametrize("constant", [0.0, 0.3, -2.0])
def test_constant_weights_and_inputs_lie_on_their_grid(constant):
    spec = Spec(4, symmetric=False)
    net = quantize(Net(), [Rule("second", weight=Spec(4), input=spec), Rule("first")])
    _, variables, _ = build()
    variables["params"]["first"]["bias"] = jnp.full((8,), 0.7)
    variables["params"]["second"]["kernel"] = jnp.full((8, 3), constant)
    x = jnp.zeros((6, 5))  # so the second layer sees 0.7 alone
    want = net.apply(variables, x)
    found = net.apply(calibrate(net, variables, [x]), x)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)


def test_an_input_that_is_0_once_is_no_error():
    net, variables, x = build()
    assert calibrate(net, variables, [jnp.zeros((2, 5)), x])["quant"]
    # What has no range to learn is not asked for one.
    only_weights = calibrate(net, variables, [jnp.zeros((2, 5))], operands=("weight",))
    assert set(only_weights["quant"]["second"]) == {"weight_quantizer"}


def test_errors_of_names_and_of_rules_that_do_nothing():
    net, variables, x = build()
    with pytest.raises(ValueError, match="Did you mean 'minmax'"):
        calibrate(net, variables, [x], observer="minmaxx")
    with pytest.raises(ValueError, match="no operand of this net is quantized"):
        calibrate(quantize(Net(), [Rule(".*")]), variables, [x])
    # A float checkpoint drops in without `init`, so a rule for nothing has to be found here too.
    rules = [Rule("secnd", weight=Spec(8)), Rule("second", weight=Spec(4))]
    with pytest.raises(ValueError, match=r"rules\[0\] 'secnd' matches no layer.*'second'"):
        calibrate(quantize(Net(), rules), variables, [x])


def test_layers_with_borrowed_parameters_are_refused_by_name():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(3))(x)

    net = quantize(Net(), [Rule(".*", weight=Spec(8), input=Spec(8))])
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"nn.WeightNorm.*a rule without specs"):
        calibrate(net, net.init(jax.random.key(0), x), [x])


class Deep(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = x + nn.relu(nn.Dense(5, name=f"dense{i}")(x))
        return x


def test_twice_the_layers_compile_nothing_more(tmp_path):
    """What XLA is given grows with the layers that differ, not with the equal ones."""
    spec = Spec(4, quantizer="lsq", granularity="channel")
    rules = [Rule(".*", weight=spec, input=Spec(4, quantizer="lsq"))]
    x = jax.random.normal(jax.random.key(1), (6, 5))
    sizes = []
    for layers in (4, 8, 16):  # what does not depend on the net is compiled with the first
        net = quantize(Deep(layers), rules)
        variables = net.init(KEY, x)
        out = tmp_path / str(layers)
        jax.config.update("jax_dump_ir_to", str(out))
        try:
            calibrate(net, variables, [x, x[::-1]])
        finally:
            jax.config.update("jax_dump_ir_to", "")
        sizes.append(sum(path.stat().st_size for path in out.iterdir()))
    assert sizes[0] >= sizes[1] == sizes[2] > 0


def test_a_net_is_traced_once_for_its_states_and_once_for_each_shape_of_batch():
    traces = []

    class Counted(Net):
        def __call__(self, x, train=False):
            traces.append(x.shape)
            return super().__call__(x, train)

    _, variables, x = build()
    net = quantize(Counted(), [Rule("second", weight=Spec(4), input=Spec(4, signed=False))])
    calibrate(net, variables, [x[:5], x[5:10], x[10:], x[:5]])
    assert traces == [(5, 5), (5, 5), (2, 5)]


def test_the_rule_of_a_path_is_looked_for_once(monkeypatch):
    asked = []
    look = lambda rules, path: asked.append(path) or first_match(rules, path)
    monkeypatch.setattr(model, "first_match", look)
    net, variables, x = build()
    net.apply(calibrate(net, variables, [x]), x)
    assert sorted(asked) == ["", "first", "second"]
