"""Oscillation against the published algorithm in plain loops; clamps, annealing, budgets."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import numerics
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.stored_weights import quantized_weights, rounded
from qkd_jax.quantizers import QUANTIZERS
from qkd_jax.training import (
    clamping,
    frozen_variables,
    hygiene,
    make_step,
    name_metrics,
    oscillation,
    plan_step,
    start_state,
)
from qkd_jax.trees import flatten, unflatten_like

LSQ = Spec(3, quantizer="lsq")


def dense(spec=LSQ, shape=(4, 3), step=1.0, seed=0):
    """A dense net and its {"params", "quant"}, its weights a few steps wide."""
    net = quantize(nn.Dense(shape[1], use_bias=False), [Rule(".*", weight=spec)])
    kernel = np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)
    learned = {
        "params": {"kernel": jnp.asarray(kernel)},
        "quant": {"weight_quantizer": {"step": jnp.float32(step)}},
    }
    return net, learned


def planned(horizon=10, **fields):
    structure, hyper = hygiene.plan_hygiene("net", fields, horizon)
    assert structure is not None
    return structure, hyper


class Loops:
    """Algorithm 1 of the paper for one weight, written from the paper."""

    def __init__(self, code, momentum):
        self.code, self.mean, self.momentum = code, float(code), momentum
        self.direction, self.frequency, self.pinned = 0, 0.0, None

    def see(self, code, threshold):
        code = self.code if self.pinned is not None else code
        change = code - self.code
        direction = int(change > 0) - int(change < 0)
        oscillated = change != 0 and self.direction == -direction
        m = self.momentum
        self.frequency = m * oscillated + (1 - m) * self.frequency
        self.mean = m * code + (1 - m) * self.mean
        if change != 0:
            self.direction = direction
        self.code = code
        if self.pinned is None and threshold is not None and self.frequency > threshold:
            self.pinned = self.code = round(self.mean)


@pytest.mark.parametrize("freeze", [False, True])
def test_against_the_published_algorithm_in_loops(freeze):
    horizon, momentum = 60, 0.1
    fields = dict(freeze=0.3, freeze_end=0.05) if freeze else dict(track=True)
    structure, hyper = planned(horizon, momentum=momentum, **fields)
    net, learned = dense(step=0.5)
    rng = np.random.default_rng(1)
    start = np.asarray(learned["params"]["kernel"])
    code = lambda w: np.clip(np.round(w / np.float32(0.5)), -4, 3)
    loops = [Loops(c, momentum) for c in code(start).ravel()]
    state = hygiene.init(structure, net, learned)
    apply = jax.jit(lambda learned, state: hygiene.apply(structure, net, hyper, learned, state))
    frozen = set()
    for t in range(horizon):
        # Quick, slow and no oscillation, beside a walk.
        moves = np.where(np.arange(12) % 4 == 0, (-1) ** t, rng.integers(-1, 2, 12))
        moves = np.where(np.arange(12) % 4 == 1, 0.01, moves).reshape(4, 3)
        values = (start + 0.5 * moves).astype(np.float32)
        learned = {**learned, "params": {"kernel": jnp.asarray(values)}}
        learned, state, metrics = apply(learned, state)
        end = 0.05 + (0.3 - 0.05) * (1 + math.cos(math.pi * t / (horizon - 1))) / 2
        for place, (loop, c) in enumerate(zip(loops, code(values).ravel(), strict=True)):
            loop.see(c, end if freeze else None)
            if loop.pinned is not None:
                frozen.add(place)
                # It shows in the weight itself from the step on in which it was pinned.
                assert learned["params"]["kernel"].ravel()[place] == 0.5 * loop.pinned
        found = state["weights"][""]
        frequencies = [loop.frequency for loop in loops]
        np.testing.assert_allclose(found["frequency"].ravel(), frequencies, rtol=1e-5)
        share = np.mean(np.array(frequencies) > 0.005)
        assert float(metrics["oscillating"]) == pytest.approx(share)
        if freeze:
            assert float(metrics["frozen"]) == pytest.approx(len(frozen) / 12)
    assert bool(frozen) == freeze and len(frozen) < 12
    assert oscillation.oscillating(state) == {"": pytest.approx(share)}


def test_a_pinned_weight_follows_its_step():
    structure, hyper = planned(freeze=0.5, momentum=0.9)
    net, learned = dense(shape=(1, 2))
    state = hygiene.init(structure, net, learned)
    for value in (1.4, 1.6, 1.4, 1.6):
        learned = {**learned, "params": {"kernel": jnp.array([[value, 0.2]])}}
        learned, state, _ = hygiene.apply(structure, net, hyper, learned, state)
    pinned = float(state["weights"][""]["pinned"][0, 0])
    assert pinned in (1.0, 2.0) and np.isnan(state["weights"][""]["pinned"][0, 1])
    learned = {
        "params": {"kernel": jnp.array([[0.0, 0.2]])},
        "quant": {"weight_quantizer": {"step": jnp.float32(0.7)}},
    }
    learned, _, _ = hygiene.apply(structure, net, hyper, learned, state)
    np.testing.assert_allclose(learned["params"]["kernel"], [[0.7 * pinned, 0.2]], rtol=1e-6)


class Toy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2, use_bias=False, name="dense")(x)


def toy_run(steps, *, spec=LSQ, lr=0.02, resume_at=None, hygiene_fields=None, quant=None):
    """Trains a net of eight weights by the step itself; returns (state, plan, codes by step)."""
    net = quantize(Toy(), [Rule(".*", weight=spec)])
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 0.7, (4, 2)).astype(np.float32)
    variables = {"params": {"dense": {"kernel": jnp.asarray(kernel)}}}
    x = rng.normal(size=(64, 4)).astype(np.float32)
    variables = calibrate(net, variables, [x])
    if quant:
        variables["quant"]["dense"]["weight_quantizer"] |= quant
    target = x @ (kernel * 1.3 + 0.1)
    labels = (target[:, 1] > target[:, 0]).astype(np.int32)
    fields = {"net": hygiene_fields} if hygiene_fields else {}
    plan = plan_step(
        {"net": net},
        {"net": {"ce": {}}},
        {"net": {"lr": lr, "quant_lr": lr, "momentum": 0.0, "schedule": "constant"}},
        horizon=steps,
        hygiene=fields,
    )
    state = start_state(plan, {"net": variables})
    step = jax.jit(make_step(plan.structure))
    codes, rows = [], []
    for t in range(steps):
        rows_of = np.arange(16) + 16 * (t % 4)
        batch = {"image": jnp.asarray(x[rows_of]), "label": jnp.asarray(labels[rows_of])}
        state, metrics = step(state, batch, frozen_variables(plan, {}))
        rows.append(name_metrics(plan, metrics)["net"])
        slot = plan.slots["net"]
        learned = {k: state.nets[slot][k] for k in ("params", "quant")}
        (weight,) = quantized_weights(net, learned)
        codes.append(np.asarray(rounded(learned, weight).codes))
        if t + 1 == resume_at:  # what a checkpoint keeps of the optimizer and its company
            opt = unflatten_like(
                {k: np.asarray(v) for k, v in flatten(state.opt[slot]).items()}, state.opt[slot]
            )
            state = start_state(plan, {"net": state.nets[slot]}, step=t + 1, opt={"net": opt})
    return state.nets[plan.slots["net"]], state.opt[plan.slots["net"]], np.stack(codes), rows


def changes(codes):
    return np.count_nonzero(np.diff(codes[len(codes) // 2 :], axis=0))


def test_freezing_ends_the_oscillation_of_a_trained_net():
    _, _, plain, _ = toy_run(200, lr=0.3)
    _, opt, frozen, rows = toy_run(
        200, lr=0.3, hygiene_fields=dict(freeze=0.02, freeze_end=0.005, momentum=0.05)
    )
    assert changes(plain) > 20  # without oscillation there is nothing to see
    assert changes(frozen) < 0.3 * changes(plain)
    assert 0 < rows[-1]["frozen"] <= 1 and rows[0]["frozen"] == 0
    pinned = np.asarray(opt["hygiene"]["weights"]["dense"]["pinned"])
    np.testing.assert_array_equal(frozen[-1][~np.isnan(pinned)], pinned[~np.isnan(pinned)])


def test_dampening_draws_weights_to_their_codes():
    def distance(variables):
        step = variables["quant"]["dense"]["weight_quantizer"]["step"]
        place = variables["params"]["dense"]["kernel"] / step
        inside = jnp.clip(place, -4, 3)
        return float(jnp.mean(jnp.abs(inside - jnp.round(inside))))

    plain = distance(toy_run(200, lr=0.1)[0])
    damped = distance(toy_run(200, lr=0.1, hygiene_fields=dict(dampen=3.0))[0])
    assert damped < 0.3 * plain


def test_the_gradient_of_dampening_in_closed_form():
    structure, hyper = planned(horizon=11, dampen=0.8, dampen_start=0.2)
    net, learned = dense(step=0.4)
    kernel = np.asarray(learned["params"]["kernel"], np.float64)
    state = hygiene.init(structure, net, learned)
    for count, strength in ((0, 0.2), (5, 0.5), (10, 0.8), (50, 0.8)):
        state["count"] = jnp.int32(count)
        value, grads = jax.value_and_grad(
            lambda tree: hygiene.penalty(structure, net, hyper, tree, state)
        )(learned)
        code = np.clip(np.round(kernel / 0.4), -4, 3)
        inside = (kernel > -1.6) & (kernel < 1.2)
        gap = np.where(inside, kernel - 0.4 * code, 0)
        assert float(value) == pytest.approx(strength * np.sum(gap**2), rel=1e-4)
        np.testing.assert_allclose(
            grads["params"]["kernel"], 2 * strength * gap, rtol=1e-4, atol=1e-6
        )
        assert float(grads["quant"]["weight_quantizer"]["step"]) == 0
    assert np.any(~inside) and np.any(inside)


def test_steps_stay_within_the_ratio():
    # A rate that lets the step run away.
    plain = toy_run(40, lr=2.0)[0]["quant"]["dense"]["weight_quantizer"]["step"]
    start = toy_run(1, lr=1e-9)[0]["quant"]["dense"]["weight_quantizer"]["step"]
    held = toy_run(40, lr=2.0, hygiene_fields=dict(max_ratio=1.25))[0]["quant"]["dense"]
    assert not 1 / 1.25 <= plain / start <= 1.25
    assert 1 / 1.2501 <= held["weight_quantizer"]["step"] / start <= 1.2501


def test_powers_of_two_are_clamped_in_their_exponent():
    structure, hyper = planned(max_ratio=4.0)
    net, _ = dense(Spec(3, quantizer="tqt"))
    make = lambda t: {
        "params": {"kernel": jnp.ones((4, 3))},
        "quant": {"weight_quantizer": {"log2_threshold": jnp.float32(t)}},
    }
    state = hygiene.init(structure, net, make(1.0))
    for given, wanted in ((9.0, 3.0), (-9.0, -1.0), (2.5, 2.5)):
        learned, _, _ = hygiene.apply(structure, net, hyper, make(given), state)
        assert float(learned["quant"]["weight_quantizer"]["log2_threshold"]) == wanted


# {parameter: (at the start, after an update, held within a factor of 2)}
HELD = {
    "pact": (Spec(3, quantizer="pact", signed=False), {"alpha": (3.0, 9.0, 6.0)}),
    "apot": (Spec(3, quantizer="apot"), {"alpha": (3.0, 1.0, 1.5)}),
    "qil": (
        Spec(3, quantizer="qil"),
        {"center": (1.0, 5.0, 2.0), "half_width": (1.0, 0.1, 0.5)},
    ),
    # From -1..1, two wide, to 0..16: four wide about the middle, 8. A gain keeps its sign.
    "ewgs": (
        Spec(3, quantizer="ewgs"),
        {"lower": (-1.0, 0.0, 6.0), "upper": (1.0, 16.0, 10.0), "gain": (-1.0, 3.0, -0.5)},
    ),
    "ewgs, an end at 0": (
        Spec(3, quantizer="ewgs", signed=False),
        {"lower": (0.0, 0.1, 0.1), "upper": (1.0, 1.5, 1.5), "gain": (1.0, 1.5, 1.5)},
    ),
    # Its alpha is the shape of the gradient, no size.
    "dsq": (
        Spec(3, quantizer="dsq"),
        {"step": (1.0, 3.0, 2.0), "alpha": (0.2, 0.49, 0.49)},
    ),
    "binary": (
        Spec(1, quantizer="binary", options={"static": True}),
        {"alpha": (1.0, 3.0, 2.0)},
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_the_size_of_every_learned_grid_is_clamped(name):
    spec, numbers = HELD[name]
    structure, hyper = planned(max_ratio=2.0)
    net = quantize(nn.Dense(3, use_bias=False), [Rule(".*", input=spec)])
    make = lambda place: {
        "params": {"kernel": jnp.ones((4, 3))},
        "quant": {"input_quantizer": {k: jnp.float32(v[place]) for k, v in numbers.items()}},
    }
    state = hygiene.init(structure, net, make(0))
    learned, _, _ = hygiene.apply(structure, net, hyper, make(1), state)
    found = {k: float(v) for k, v in learned["quant"]["input_quantizer"].items()}
    assert found == pytest.approx({k: v[2] for k, v in numbers.items()}, rel=1e-6)


def test_every_quantizer_that_learns_a_size_is_clamped():
    # What has a gradient, but for the shape of a gradient, an offset and a number of bits.
    sized = {"step", "log2_threshold", "alpha", "lower", "upper", "gain", "center", "half_width"}
    x = jnp.linspace(0.1, 1.7, 30).reshape(6, 5)
    for name, module in QUANTIZERS.items():
        signed = name not in ("pact", "lsq_plus")
        bits = {"binary": 1, "ternary": 2}.get(name, 4)
        spec = Spec(bits, quantizer=name, signed=signed, symmetric=name != "lsq_plus")
        params = module.init(numerics.finish(numerics.measure(x)), spec)
        grads = jax.grad(lambda p: jnp.sum(x * module.fake_quant(x, p, spec)))(params)  # noqa: B023
        learned = {key for key, g in grads.items() if g != 0 and key in sized}
        learned -= {"alpha"} if name == "dsq" else set()
        assert {key for key in params if clamping.clamps(spec, key)} >= learned, name
    assert not clamping.clamps(Spec(4), "scale")


def test_annealing_by_equal_ratios_to_the_end():
    spec = Spec(3, quantizer="sigmoid", options={"temperature": 2.0})
    seen = [
        toy_run(n, spec=spec, hygiene_fields=dict(anneal={"temperature": 32.0}))[0] for n in (1, 5)
    ]
    temperature = lambda v: float(v["quant"]["dense"]["weight_quantizer"]["temperature"])
    assert temperature(seen[1]) == pytest.approx(32.0)
    structure, hyper = planned(5, anneal={"temperature": 32.0})
    net = quantize(Toy(), [Rule(".*", weight=spec)])
    learned = {k: seen[1][k] for k in ("params", "quant")}
    learned["quant"]["dense"]["weight_quantizer"]["temperature"] = jnp.float32(2.0)
    state, values = hygiene.init(structure, net, learned), []
    for _ in range(5):
        learned, state, _ = hygiene.apply(structure, net, hyper, learned, state)
        values.append(temperature(learned))
    np.testing.assert_allclose(values, [2, 4, 8, 16, 32], rtol=1e-6)


def test_a_size_budget_takes_learned_bits_down():
    spec = Spec(8, quantizer="lsq", options={"learn_bits": True})
    fields = dict(size_bytes=4.0, size_weight=5.0)  # 8 weights, so 4 bits each
    bits = lambda v: float(jnp.round(v["quant"]["dense"]["weight_quantizer"]["bits"]))
    assert bits(toy_run(60, spec=spec, lr=0.1)[0]) > 6
    assert bits(toy_run(60, spec=spec, lr=0.1, hygiene_fields=fields)[0]) <= 4
    structure, hyper = planned(**fields)
    net = quantize(Toy(), [Rule(".*", weight=spec)])
    learned = {
        "params": {"dense": {"kernel": jnp.ones((4, 2))}},
        "quant": {"dense": {"weight_quantizer": {"step": jnp.float32(1), "bits": jnp.float32(6)}}},
    }
    state = hygiene.init(structure, net, learned)
    found, grads = jax.value_and_grad(
        lambda tree: hygiene.penalty(structure, net, hyper, tree, state)
    )(learned)
    assert float(found) == pytest.approx(5 * (6 / 4 - 1))  # 6 bytes against 4
    assert float(grads["quant"]["dense"]["weight_quantizer"]["bits"]) == pytest.approx(5 / 4)


def test_a_budget_out_of_reach_leaves_bits_where_they_can_come_back():
    spec = Spec(8, quantizer="lsq", options={"learn_bits": True})
    fields = dict(size_bytes=1.0, size_weight=50.0)  # less than the fewest bits take
    found = toy_run(30, spec=spec, lr=0.1, hygiene_fields=fields)[0]
    assert found["quant"]["dense"]["weight_quantizer"]["bits"] == 2


def test_dampening_clips_at_the_grid_of_the_bits_in_use():
    structure, hyper = planned(dampen=1.0, dampen_start=1.0)
    net, learned = dense(Spec(8, quantizer="lsq", options={"learn_bits": True}), (1, 3))
    learned["quant"]["weight_quantizer"]["bits"] = jnp.float32(2.8)  # 3 bits, so -4 .. 3
    learned["params"]["kernel"] = jnp.array([[1.3, 3.4, -9.0]])
    state = hygiene.init(structure, net, learned)
    value, grads = jax.value_and_grad(
        lambda tree: hygiene.penalty(structure, net, hyper, tree, state)
    )(learned)
    assert float(value) == pytest.approx(0.3**2)
    np.testing.assert_allclose(grads["params"]["kernel"], [[0.6, 0, 0]], rtol=1e-5)


def test_annealing_from_what_is_not_positive_is_refused():
    structure, _ = planned(anneal={"alpha": 0.1})
    net, learned = dense(Spec(3, quantizer="dsq"))
    learned["quant"] = {"weight_quantizer": {"step": jnp.float32(1), "alpha": jnp.float32(-1.0)}}
    with pytest.raises(ValueError, match=r"anneal.alpha: .* starts at -1"):
        hygiene.init(structure, net, learned)


def test_annealing_leaves_parameters_of_the_same_name_alone():
    """DSQ's alpha is the softness of its staircase, PACT's the level that it clips at."""
    structure, hyper = planned(5, anneal={"alpha": 0.05})
    rule = Rule(
        ".*", weight=Spec(3, quantizer="dsq"), input=Spec(4, quantizer="pact", signed=False)
    )
    net = quantize(nn.Dense(3), [rule])
    x = jnp.abs(jax.random.normal(jax.random.key(0), (8, 4)))
    learned = calibrate(net, net.init(jax.random.key(1), x), [x])
    state = hygiene.init(structure, net, learned)
    level = learned["quant"]["input_quantizer"]["alpha"]
    for _ in range(5):
        learned, state, _ = hygiene.apply(structure, net, hyper, learned, state)
    assert learned["quant"]["weight_quantizer"]["alpha"] == pytest.approx(0.05)
    assert learned["quant"]["input_quantizer"]["alpha"] == level


def test_a_run_that_goes_on_is_the_run_that_was_not_broken():
    fields = dict(freeze=0.02, momentum=0.05, dampen=0.1, max_ratio=2.0)
    whole = toy_run(40, lr=0.3, hygiene_fields=fields)
    broken = toy_run(40, lr=0.3, hygiene_fields=fields, resume_at=17)
    assert any(row["frozen"] > 0 for row in whole[3])
    for a, b in zip(whole[:2], broken[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_groups_channels_and_scans():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, use_bias=False, name="dense")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = nn.scan(
                Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )(name="steps")(x, None)
            x = nn.Dense(6, use_bias=False, name="grouped")(x)
            return nn.Dense(2, use_bias=False, name="channels")(x)

    rules = [
        Rule("grouped", weight=Spec(4, granularity=2)),
        Rule("channels", weight=Spec(4, granularity="channel")),
        Rule(".*", weight=Spec(4)),
    ]
    net, x = quantize(Stack(), rules), np.random.default_rng(0).normal(size=(5, 4)).astype("f")
    variables = calibrate(net, net.init(jax.random.key(0), x), [x])
    learned = {k: variables[k] for k in ("params", "quant")}
    found = {w.path: rounded(learned, w) for w in quantized_weights(net, learned)}
    seen = {}
    net.apply(
        variables,
        x,
        watch=lambda path, operand, w, w_hat, spec, params: (
            seen.update({path: np.asarray(w_hat)}) if "steps" not in path else None
        ),
    )
    for path, w_hat in seen.items():
        np.testing.assert_array_equal(np.reshape(found[path].on_grid, w_hat.shape), w_hat)
    steps = found["steps/dense"]
    assert steps.codes.shape == (3, 4, 4) and steps.scale.size == 3
    kernel = np.asarray(learned["params"]["steps"]["dense"]["kernel"], np.float64)
    scale = np.asarray(learned["quant"]["steps"]["dense"]["weight_quantizer"]["scale"], np.float64)
    wanted = np.clip(np.round(kernel / scale.reshape(3, 1, 1)), -8, 7)
    np.testing.assert_array_equal(steps.codes, wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(freez=0.1), r"field of hygiene.net.*'freez'.*Did you mean 'freeze'"),
        (dict(freeze=2.0), r"hygiene.net.freeze is 2.0"),
        (dict(freeze_end=0.1), r"freeze_end came without freeze"),
        (dict(track=True, momentum=0.0), r"hygiene.net.momentum is 0.0"),
        (dict(dampen=-1.0), r"hygiene.net.dampen is -1.0"),
        (dict(max_ratio=0.5), r"hygiene.net.max_ratio is 0.5"),
        (dict(anneal={"temperature": 0.0}), r"anneal.temperature is 0.0"),
        (dict(size_bytes=-1.0), r"size_bytes is -1.0"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        hygiene.plan_hygiene("net", fields, 10)


@pytest.mark.parametrize(
    ("fields", "spec", "message"),
    [
        (dict(freeze=0.1), Spec(3, quantizer="dorefa"), r"quantizer 'dorefa'.*track alone"),
        (dict(dampen=0.1), Spec(3, quantizer="qil"), r"quantizer 'qil'"),
        (dict(anneal={"temperature": 9.0}), LSQ, r"anneal.temperature: .*quantizers are lsq"),
        (dict(size_bytes=9.0), LSQ, r"learn_bits"),
        (dict(max_ratio=2.0), Spec(3, quantizer="dorefa"), r"no quantizer.*learned step"),
        (dict(max_ratio=2.0), Spec(3), r"there are uniform's scale"),
        (dict(max_ratio=2.0), Spec(1, quantizer="binary"), r"binary's alpha.*option static"),
        (dict(track=True), Spec(4, dynamic=True), r"no weight of the net has a quantizer"),
    ],
)
def test_what_an_option_finds_nothing_to_act_on(fields, spec, message):
    net = quantize(Toy(), [Rule(".*", weight=spec)])
    x = np.ones((2, 4), np.float32)
    variables = calibrate(net, net.init(jax.random.key(0), x), [x])
    with pytest.raises(ValueError, match=message):
        hygiene.init(planned(**fields)[0], net, {k: variables[k] for k in ("params", "quant")})


def test_a_net_that_is_not_calibrated_and_one_that_does_not_learn():
    net, learned = dense()
    with pytest.raises(ValueError, match="Calibrate before this stage"):
        hygiene.init(planned(track=True)[0], net, {"params": learned["params"]})
    with pytest.raises(ValueError, match=r"net in hygiene.*'other'"):
        plan_step(
            {"net": net},
            {"net": {"ce": {}}},
            {"net": {"lr": 0.1}},
            horizon=3,
            hygiene={"other": {"track": True}},
        )


def test_what_is_off_shares_the_step_of_what_is_left_out():
    net, _ = dense()
    make = lambda **fields: (
        plan_step(
            {"net": net}, {"net": {"ce": {}}}, {"net": {"lr": 0.1}}, horizon=3, **fields
        ).structure
    )
    off = dict(hygiene={"net": {"freeze": 0.0, "dampen": 0.0}})
    assert make() == make(**off)
    assert make(hygiene={"net": {"freeze": 0.1}}) == make(hygiene={"net": {"freeze": 0.2}})
