"""Sensitivities against float64 restatements, and budgets against brute force."""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

from qkd_jax.mixed_precision import Candidate, Sensitivity, allocate, sensitivity
from qkd_jax.mixed_precision.hessian import mean_curvatures, weight_errors
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, inspection, quantize
from qkd_jax.quantize.calibration import calibrate

W = Spec(8, granularity="channel")
RULES = (Rule(".*", weight=W, input=Spec(8, symmetric=False)),)
BITS = (2, 3, 4, 8)


class Wide(nn.Module):
    """Small ends and a large middle, as in most nets."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="first")(x))
        x = nn.relu(nn.Dense(96, name="second")(x))
        x = nn.relu(nn.Dense(8, name="neck")(x))
        return nn.Dense(4, name="head")(x)


@functools.lru_cache
def trained():
    """Returns (float variables, images [256, 10], labels) of `Wide`, fitted to four blobs."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    x = rng.normal(0, 1, (256, 10)) + 1.5 * rng.normal(0, 1, (4, 10))[labels]
    x, model = jnp.asarray(x, jnp.float32), Wide()
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, x))
        return -jnp.mean(log_p[jnp.arange(256), labels])

    @jax.jit
    def fit(params):
        step = lambda _, p: jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(loss)(p))
        return jax.lax.fori_loop(0, 300, step, params)

    params = fit(params)
    assert loss(params) < 0.2
    return {"params": params}, x, labels


@functools.lru_cache
def table(metric="mse"):
    variables, x, labels = trained()
    batches = [{"image": x[:128], "label": labels[:128]}, {"image": x[128:], "label": labels[128:]}]
    net = quantize(Wide(), RULES)
    return sensitivity(net, variables, batches, bits=BITS, metric=metric, probes=64)


def forward(params, x, replaced=()):
    """`Wide` in float64 NumPy."""
    x = np.asarray(x, np.float64)
    for name in ("first", "second", "neck", "head"):
        kernel = dict(replaced).get(name, params[name]["kernel"])
        x = x @ np.asarray(kernel, np.float64) + np.asarray(params[name]["bias"], np.float64)
        x = x if name == "head" else np.maximum(x, 0)
    return x


def rounded(kernel, bits):
    """The best of the mse observer's hundred ranges for each column, in NumPy."""
    lo_code, hi_code = -(2 ** (bits - 1)) + (bits >= 8), 2 ** (bits - 1) - 1
    columns = []
    for column in np.asarray(kernel, np.float64).T:
        best = (np.inf, column)
        for i in range(100, 0, -1):
            lo, hi = column.min() * i / 100, column.max() * i / 100
            scale = max(min(lo, 0) / lo_code, max(hi, 0) / hi_code)
            back = np.clip(np.rint(column / scale), lo_code, hi_code) * scale
            best = min(best, (np.sum((back - column) ** 2), back), key=lambda e: e[0])
        columns.append(best[1])
    return np.stack(columns, axis=1)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Each table compiles a net for each choice of bits.
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("kl", "hessian")]


@pytest.mark.parametrize("metric", ["mse", SLOW[0]])
def test_losses_against_numpy(metric):
    variables, x, _ = trained()
    params, found = variables["params"], table(metric)
    wanted = forward(params, x)
    for path, row in found.layers.items():
        for bits, candidate in zip(BITS, row, strict=True):
            out = forward(params, x, {path: rounded(params[path]["kernel"], bits)})
            if metric == "mse":
                loss = np.mean((out - wanted) ** 2)
            else:
                p, q = softmax(wanted), softmax(out)
                loss = np.mean(np.sum(p * (np.log(p) - np.log(q)), -1))
            # Both sides round to a code in their own precision; float32's KL cancels.
            np.testing.assert_allclose(candidate.loss, loss, rtol=1e-3, atol=3e-7)


@pytest.mark.slow
def test_the_trace_against_the_whole_hessian():
    variables, x, labels = trained()
    params, found = variables["params"], table("hessian")

    def loss(kernel, path):
        given = {**params, path: {**params[path], "kernel": kernel}}
        log_p = jax.nn.log_softmax(Wide().apply({"params": given}, x))
        return -jnp.mean(log_p[jnp.arange(256), labels])

    shapes = {path: params[path]["kernel"].shape for path in ("neck", "head")}
    estimates = mean_curvatures(
        lambda v, x: Wide().apply(v, x),
        variables,
        [(x[:128], labels[:128]), (x[128:], labels[128:])],
        shapes,
        probes=2048,
        seed=0,
    )
    for path in shapes:
        kernel = params[path]["kernel"]
        full = jax.jit(jax.hessian(loss), static_argnums=1)(kernel, path)
        mean = float(np.trace(np.asarray(full, np.float64).reshape(kernel.size, -1))) / kernel.size
        # The estimate's standard error is some 2 % here; a tenth of the vectors gives 3 times that.
        np.testing.assert_allclose(estimates[path], mean, rtol=0.08)
        errors = [np.sum((rounded(kernel, b) - np.asarray(kernel, np.float64)) ** 2) for b in BITS]
        losses = np.array([c.loss for c in found.layers[path]])
        # The ratio of two choices has no noise.
        np.testing.assert_allclose(losses / losses[0], np.array(errors) / errors[0], rtol=1e-3)


@pytest.mark.parametrize("metric", ["mse", *SLOW])
def test_few_bits_hurt_more_and_the_table_prints(metric):
    for path, row in table(metric).layers.items():
        # Not step by step: an error of the weights need not be one of the outputs.
        assert row[0].loss > row[-1].loss >= 0, path
    text = str(table(metric))
    assert all(word in text for word in (metric, "first", "head", "KiB", "bit operations"))
    assert len({len(line) for line in text.splitlines()}) == 1


def test_storage_and_operations_counted_by_hand():
    found = table()
    assert list(found.layers) == ["first", "second", "neck", "head"]
    shapes = {"first": (10, 16), "second": (16, 96), "neck": (96, 8), "head": (8, 4)}
    for path, (rows, columns) in shapes.items():
        for bits, c in zip(BITS, found.layers[path], strict=True):
            assert c.bits == bits * rows * columns + 2 * 32 * columns  # scales and biases
            assert c.bops == rows * columns * bits * 8  # the rules' inputs have 8 bits
            assert re.fullmatch(c.rule.pattern, path)
            assert c.rule.weight == dataclasses.replace(W, bits=bits)
            assert c.rule.input == RULES[0].input
    assert found.other_bits == found.other_bops == 0


def costs(found, picked):
    """(loss, bytes, bit operations) of one candidate a layer."""
    bits = found.other_bits + sum(c.bits for c in picked)
    return (
        sum(c.loss for c in picked),
        -(-bits // 8),
        found.other_bops + sum(c.bops for c in picked),
    )


def candidates_of(found, rules):
    return [
        next(c for c in row if c.rule == rule)
        for row, rule in zip(found.layers.values(), rules, strict=False)
    ]


def test_allocation_is_the_best_of_all_at_every_budget():
    found = table()
    every = [costs(found, p) for p in itertools.product(*found.layers.values())]
    sizes, operations = sorted({c[1] for c in every}), sorted({c[2] for c in every})
    assert len(every) == 4**4
    for size in [*sizes[::9], sizes[-1] + 5, sizes[20] + 1]:
        least = min(c[0] for c in every if c[1] <= size)
        got = costs(found, candidates_of(found, allocate(found, budget_bytes=size)))
        assert got[1] <= size and got[0] == pytest.approx(least, rel=1e-12)
    for bops in operations[5::25]:
        least = min(c[0] for c in every if c[2] <= bops)
        got = costs(found, candidates_of(found, allocate(found, budget_bops=bops)))
        assert got[2] <= bops and got[0] == pytest.approx(least, rel=1e-12)
    size, bops = sizes[40], operations[60]
    least = min(c[0] for c in every if c[1] <= size and c[2] <= bops)
    rules = allocate(found, budget_bytes=size, budget_bops=bops)
    assert costs(found, candidates_of(found, rules))[0] == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_with_losses_over_ten_decades(seed):
    rng = np.random.default_rng(seed)
    layers = {
        f"layer{i}": tuple(
            Candidate(
                float(10 ** rng.uniform(-10, 0)), int(rng.integers(10**7)), 1, Rule(f"layer{i}", W)
            )
            for _ in range(3)
        )
        for i in range(6)
    }
    found = Sensitivity("mse", (2, 4, 8), layers, 12_345, 0, (), (), ())
    every = [costs(found, p) for p in itertools.product(*layers.values())]
    budget = int(np.quantile([c[1] for c in every], 0.3))
    least = min(c[0] for c in every if c[1] <= budget)
    # All rules of a layer are alike here, so the loss is asked of the solver's own choice.
    layers = {
        path: tuple(
            dataclasses.replace(c, rule=Rule(path, dataclasses.replace(W, bits=b)))
            for b, c in zip((2, 4, 8), row, strict=True)
        )
        for path, row in layers.items()
    }
    found = dataclasses.replace(found, layers=layers)
    got = costs(found, candidates_of(found, allocate(found, budget_bytes=budget)))
    assert got[1] <= budget and got[0] == pytest.approx(least, rel=1e-11)


def test_the_mixed_net_fits_and_beats_equal_bits():
    variables, x, _ = trained()
    found, floats = table(), quantize(Wide()).apply(variables, x)

    def measured(rules):
        net = quantize(Wide(), rules)
        quantized = calibrate(net, variables, [x], observer="mse", operands=("weight",))
        loss = float(jnp.mean((net.apply(quantized, x) - floats) ** 2))
        return inspection.size(net, quantized, x).bytes, loss

    # At 3 bits equal ones are best, for 2 bits anywhere cost more than 4 and 8 elsewhere bring.
    for bits, most in ((3, 1.0), (4, 0.8)):
        equal, error = measured([Rule(".*", weight=dataclasses.replace(W, bits=bits))])
        rules = allocate(found, budget_bytes=equal)
        size, mixed = measured(rules)
        assert size == costs(found, candidates_of(found, rules))[1] <= equal
        assert mixed <= most * error, (bits, mixed, error)


def test_pins_hold_and_other_rules_stay():
    found = table()
    least = costs(found, [row[0] for row in found.layers.values()])[1]
    rules = allocate(found, budget_bytes=least + 500, pin={"first": 8, "h.*": 4, ".*ad": 2})
    chosen = {rule.pattern: rule.weight.bits for rule in rules[:4]}
    assert chosen["first"] == 8 and chosen["head"] == 4  # the first pin that matches
    assert rules[4:] == RULES
    assert quantize(Wide(), rules).spec_of("head", "weight").bits == 4


@pytest.mark.slow
def test_weights_and_inputs_together_without_and_with_a_base():
    variables, x, _ = trained()
    pairs = ((2, 8), (4, 4), (8, 8))
    ours = sensitivity(quantize(Wide(), RULES), variables, [x], bits=pairs)
    for path, row in ours.layers.items():
        w2, w4, w8 = (c.loss for c in row)
        assert w2 > w8 and w4 > w8, path
        assert row[1].rule.weight.bits == row[1].rule.input.bits == 4
        assert row[1].bops * 4 == row[2].bops
        # Quantized inputs come on top of quantized weights.
        assert row[0].loss != table().layers[path][0].loss
    assert "W2A8" in str(ours)
    plain = sensitivity(Wide(), variables, [x], bits=[(4, 4)], base=W)
    assert plain.layers["neck"][0].rule.input == dataclasses.replace(
        W, bits=4, granularity="tensor"
    )


@pytest.mark.slow
def test_one_program_serves_all_layers():
    variables, x, _ = trained()
    seen = []

    class Counting(Wide):
        @nn.compact
        def __call__(self, x):
            seen.append(isinstance(x, jax.core.Tracer))
            return super().__call__(x)

    counts = {}
    for bits in ((4,), (4, 8)):
        seen.clear()
        sensitivity(Counting(), variables, [x], bits=bits)
        counts[bits] = len(seen)
    # A further choice costs calibration, sizes and one measuring pass, whatever the layers.
    assert counts[4, 8] - counts[4,] <= 6


@pytest.mark.slow
def test_folded_convolutions_and_quantizers_that_are_there_already():
    net, variables, images = small_nets.case("w2a2")
    chosen = sensitivity(net, variables, [images], bits=(2, 8))
    assert set(chosen.layers) == {"stem", "depthwise", "grouped", "dilated", "hidden", "head"}
    floats = {k: v for k, v in variables.items() if k != "quant"}
    assert chosen == sensitivity(net, floats, [images], bits=(2, 8))
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    of_layers = sum(i.params for i in inspection.layers(net, variables, images))
    assert chosen.other_bits == 32 * (params - of_layers) > 0
    rules = allocate(chosen, budget_bytes=10**6)
    assert all(rule.weight.bits == 8 for rule in rules[:6])
    mixed = quantize(net.model, rules)
    size = inspection.size(mixed, calibrate(mixed, variables, [images]), images).bytes
    assert size == costs(chosen, [row[1] for row in chosen.layers.values()])[1]


@pytest.mark.slow
def test_scanned_layers_are_one_layer():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(8, name="dense")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return nn.Dense(3, name="head")(scanned(name="blocks")(x, None)[0])

    x = jax.random.normal(jax.random.key(0), (16, 8))
    variables = Stack().init(jax.random.key(1), x)
    found = sensitivity(Stack(), variables, [x], bits=(2, 8))
    row = found.layers["blocks/dense"]
    assert row[0].loss > row[1].loss > 0
    assert row[0].bits == 3 * (2 * 64 + 2 * 32 * 8) and row[0].bops == 3 * 64 * 2 * 32
    net = quantize(Stack(), allocate(found, budget_bytes=10**5))
    size = inspection.size(net, calibrate(net, variables, [x]), x).bytes
    assert size == costs(found, [r[1] for r in found.layers.values()])[1]
    with pytest.raises(ValueError, match=r"'blocks/dense' is one of 3 steps.*'mse' or 'kl'"):
        sensitivity(Stack(), variables, [x], bits=(2, 8), metric="hessian")


def measure(**kw):
    variables, x, _ = trained()
    kw = dict(model=Wide(), variables=variables, batches=[x], bits=(4,)) | kw
    return sensitivity(kw.pop("model"), kw.pop("variables"), kw.pop("batches"), **kw)


class Turned(nn.Module):
    """One of two layers by the sign of the input, or one of them without a branch."""

    way: str = ""

    def setup(self):
        self.a, self.b, self.head = nn.Dense(6), nn.Dense(6), nn.Dense(3)

    def __call__(self, x):
        if self.is_initializing():
            self.a(x), self.b(x)
        if self.way:
            return self.head(nn.relu(getattr(self, self.way)(x)))
        ways = (lambda m, x: m.a(x)), (lambda m, x: m.b(x))
        return self.head(nn.relu(nn.cond(x.sum() > 0, *ways, self, x)))


def test_layers_of_branches_are_measured_on_what_runs_through_them():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (8, 5)))
    variables = Turned().init(jax.random.key(1), x)
    found = sensitivity(Turned(), variables, [x, -x], bits=(2, 8)).layers
    assert set(found) == {"a", "b", "head"}
    for way, batch in (("a", x), ("b", -x)):
        alone = {"params": {n: variables["params"][n] for n in (way, "head")}}
        # Truth: that way without a branch. The other half of the examples adds 0 to the mean.
        wanted = sensitivity(Turned(way), alone, [batch], bits=(2, 8)).layers[way]
        for one, two in zip(found[way], wanted, strict=True):
            assert one.loss == pytest.approx(two.loss / 2, rel=1e-5)


def test_the_errors_of_weights_in_branches_against_numpy():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (8, 5)))
    net = quantize(Turned(), [Rule(".*", weight=Spec(3, granularity="channel"))])
    variables = calibrate(net, net.init(jax.random.key(1), x), [x, -x])
    found = weight_errors(net, variables, [x, -x])
    assert set(found) == {"a", "b", "head"}
    for path, error in found.items():
        kernel = np.asarray(variables["params"][path]["kernel"], np.float64)
        scale = np.asarray(variables["quant"][path]["weight_quantizer"]["scale"], np.float64)
        on_grid = np.clip(np.round(kernel / scale), -4, 3) * scale
        assert error == pytest.approx(np.square(on_grid - kernel).sum(), rel=1e-4)
    table = sensitivity(Turned(), {"params": variables["params"]}, [x, -x], metric="hessian")
    assert set(table.layers) == {"a", "b", "head"}


class Boxed(nn.Module):
    boxed: bool

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, ("model", None)) if self.boxed else init
        return nn.Dense(3, kernel_init=init, name="b")(
            nn.relu(nn.Dense(8, kernel_init=init, name="a")(x))
        )


@pytest.mark.parametrize("metric", ["mse", SLOW[1]])
def test_parameters_in_boxes_give_the_same_table_and_rules(metric):
    x = jax.random.normal(jax.random.key(0), (8, 5))
    tables = {}
    for boxed in (True, False):
        variables = Boxed(boxed).init(jax.random.key(1), x)
        tables[boxed] = sensitivity(
            Boxed(boxed), variables, [x], bits=(2, 8), metric=metric, probes=2
        )
    assert tables[True] == tables[False]
    budget = sum(t.bits for t in (tables[True].layers["a"][0], tables[True].layers["b"][1]))
    budget = (budget + tables[True].other_bits) // 8 + 1
    assert allocate(tables[True], budget_bytes=budget) == allocate(
        tables[False], budget_bytes=budget
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(batches=[]), r"batches is empty.*at least one batch"),
        (dict(batches=[np.zeros((0, 10), np.float32)]), r"batches is empty"),
        (dict(batches=np.zeros((4, 10), np.float32)), r"is one batch; give a list"),
        (dict(batches=[{"label": [1]}]), r"needs 'image'"),
        (dict(batches=[(1, 2)]), r"tuple of 2.*one input"),
        (dict(batches=[np.full((4, 10), np.nan, np.float32)]), r"not finite.*normalisation"),
        (dict(metric="msee"), r"metric is 'msee'.*Did you mean 'mse'"),
        (dict(observer="mean"), r"unknown observer 'mean'"),
        (dict(bits=()), r"bits is \(\); give a list"),
        (dict(bits=4), r"bits is 4; give a list"),
        (dict(bits=(4, 4)), r"a choice twice"),
        (dict(bits=(0,)), r"bits\[0\] is 0"),
        (dict(bits=((4, 4, 4),)), r"a pair is \(weight bits, input bits\)"),
        (dict(bits=(1,)), r"bits=1.*Use quantizer='binary'"),
        (dict(metric="hessian", bits=((4, 4),)), r"trace belongs to weights"),
        (dict(probes=0), r"probes is 0"),
        (dict(model=quantize(Wide(), RULES), base=W), r"Drop base"),
        (dict(model=quantize(Wide())), r"no layer of this net has a weight spec"),
        (
            dict(model=quantize(Wide(), [Rule(".*", weight=W)]), bits=[(4, 4)]),
            r"pair \(4, 4\).*'first' no input spec",
        ),
    ],
)
def test_bad_input_to_sensitivity(wrong, message):
    with pytest.raises(ValueError, match=message):
        measure(**wrong)


def test_a_model_of_two_outputs_is_refused():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x), x

    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"returns tuple.*one array"):
        sensitivity(Two(), Two().init(jax.random.key(0), x), [x], bits=(4,))


def test_budgets_that_nothing_meets():
    found = table()
    smallest = [row[0] for row in found.layers.values()]
    _, size, bops = costs(found, smallest)
    assert len(allocate(found, budget_bytes=size)) == 5
    with pytest.raises(ValueError, match=rf"budget_bytes is {size - 1}, and {size} is the least"):
        allocate(found, budget_bytes=size - 1)
    with pytest.raises(ValueError, match=rf"budget_bops is 7, and {bops} is the least.*Raise"):
        allocate(found, budget_bops=7)
    with pytest.raises(ValueError, match=r"no budget was given"):
        allocate(found)
    with pytest.raises(ValueError, match=r"budget_bytes is -1"):
        allocate(found, budget_bytes=-1)
    # With the largest layer pinned the least is more.
    more = costs(found, [found.layers["first"][3], *smallest[1:]])[1]
    with pytest.raises(ValueError, match=rf"and {more} is the least possible"):
        allocate(found, budget_bytes=size, pin={"first": 8})


def test_two_budgets_that_exclude_each_other():
    # The choice of few bits is the one of many operations.
    rules = [Rule("a", dataclasses.replace(W, bits=b)) for b in (2, 8)]
    row = (Candidate(1.0, 80, 100, rules[0]), Candidate(0.5, 800, 10, rules[1]))
    found = Sensitivity("mse", (2, 8), {"a": row}, 0, 0, (), (), ())
    with pytest.raises(ValueError) as error:
        allocate(found, budget_bytes=50, budget_bops=50)
    assert "budget_bytes is 50, and 10 is the least possible (100 within budget_bops)" in str(
        error.value
    )
    assert "budget_bops is 50, and 10 is the least possible (100 within budget_bytes)" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"first": 5}, r"pin\['first'\] is 5; the table has 2, 3, 4, 8"),
        ({"frst": 8}, r"'frst' matches no layer.*Did you mean 'first'"),
    ],
)
def test_bad_pins(pin, message):
    with pytest.raises(ValueError, match=message):
        allocate(table(), budget_bytes=10**6, pin=pin)


class Attending(nn.Module):
    """Attention of 2 heads of 3 features over 5 positions, between two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="stem")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="att")(x)
        return nn.Dense(3, name="head")(x.mean(1))


def operations_by_hand(weights, products):
    """Bit operations of `Attending` for one example; inputs have 8 bits, products' operands 4."""
    macs = {"stem": 5 * 4 * 6, "head": 6 * 3}
    macs |= {f"att/{name}": 5 * 6 * 6 for name in ("query", "key", "value", "out")}
    macs_of_products = 2 * (2 * 5 * 5 * 3)
    return sum(macs[p] * bits * 8 for p, bits in weights.items()) + macs_of_products * products**2


@pytest.mark.parametrize(
    ("rules", "products"),
    [
        ((Rule("att/.*", W, Spec(8)), Rule("stem|head", W, Spec(8))), 8),
        ((Rule("att/.*", W, Spec(8)), Rule(".*", W, Spec(8), other=Spec(4))), 8),
        ((Rule("stem|head|att/[a-z]*", W, Spec(8)), Rule("att/.*", input=Spec(4))), 4),
        ((Rule("att/.*_.*"), Rule(".*", W, Spec(8))), 32),
    ],
)  # fmt: skip
def test_products_without_a_weight_keep_their_rule_and_count(rules, products):
    x = jax.random.normal(jax.random.key(0), (8, 5, 4))
    net = quantize(Attending(), rules)
    variables = net.init(jax.random.key(1), x)
    found = sensitivity(net, variables, [x], bits=(2, 8), observer="minmax")
    every = []
    for picked in itertools.product((0, 1), repeat=len(found.layers)):
        row = [c[i] for c, i in zip(found.layers.values(), picked, strict=True)]
        weights = {p: (2, 8)[i] for p, i in zip(found.layers, picked, strict=True)}
        every.append((sum(c.loss for c in row), operations_by_hand(weights, products)))
    for bops in sorted({e[1] for e in every})[3::12]:
        chosen = allocate(found, budget_bops=bops)
        mixed = quantize(net.model, chosen)
        report = inspection.coverage(mixed, variables, x)
        counted = sum(p.macs * p.bits[0] * p.bits[1] for p in report.products)
        weights = {p: mixed.spec_of(p, "weight").bits for p in found.layers}
        assert counted == operations_by_hand(weights, products) <= bops
        loss = sum(
            c.loss
            for path, row in found.layers.items()
            for c in row
            if c.rule.weight.bits == weights[path]
        )
        assert loss == pytest.approx(min(e[0] for e in every if e[1] <= bops), rel=1e-12)
        for path in ("att/query_key", "att/weights_value"):
            for operand in ("input", "other", "output"):
                assert mixed.spec_of(path, operand) == net.spec_of(path, operand)
        mixed.init(jax.random.key(1), x)  # no rule that nothing is left for
    with pytest.raises(ValueError, match=f"{min(e[1] for e in every)} is the least possible"):
        allocate(found, budget_bops=min(e[1] for e in every) - 1)


def test_outputs_keep_their_rules_and_an_input_on_their_grid_counts_with_its_bits():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Dense(6, name="dense")(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(Block(name="block")(x))

    rules = (
        Rule("head", W, output=Spec(8)),
        Rule("block.*", W, Spec(8), output=Spec(4, signed=False)),
    )
    x = jax.random.normal(jax.random.key(0), (8, 4))
    net = quantize(Net(), rules)
    variables = net.init(jax.random.key(1), x)
    found = sensitivity(net, variables, [x], bits=(2, 8), observer="minmax")
    # The head reads the block's output, at 4 bits, without a spec of its own.
    assert [c.bops for c in found.layers["head"]] == [6 * 3 * 2 * 4, 6 * 3 * 8 * 4]
    mixed = quantize(Net(), allocate(found, budget_bops=10**9))
    mixed.init(jax.random.key(1), x)
    for path in ("", "block", "head", "block/dense"):
        assert mixed.spec_of(path, "output") == net.spec_of(path, "output")
    report = inspection.coverage(mixed, variables, x)
    assert {p.path: p.bits for p in report.products} == {"block/dense": (8, 8), "head": (8, 4)}
