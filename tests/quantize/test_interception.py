"""Interception: every layer kind and every lifting, against NumPy and against plain linen."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, load_float, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.inspection import layers

W4 = Spec(4, granularity="channel")
A8 = Spec(8, symmetric=False)
ALL = [Rule(".*", weight=W4, input=A8)]
KEY = jax.random.key(0)


def images(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(x, bits, axes=None, affine=False):
    """Fake quantization restated in float64 NumPy: per tensor, or one scale along `axes`."""
    x = np.asarray(x, np.float64)
    over = None if axes is None else tuple(i for i in range(x.ndim) if i not in axes)
    if affine:
        lo, hi = min(x.min(), 0), max(x.max(), 0)
        scale = (hi - lo) / (2**bits - 1)
        zero = np.clip(
            np.round(-(2 ** (bits - 1)) - lo / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        )
        codes = np.clip(np.round(x / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (codes - zero) * scale
    top = 2 ** (bits - 1) - 1
    low = -top if bits >= 8 else -top - 1
    ends = {"axis": over, "keepdims": over is not None}
    scale = np.maximum(np.maximum(x.max(**ends), 0) / top, np.minimum(x.min(**ends), 0) / low)
    return np.clip(np.round(x / scale), low, top) * scale


def calibrated(model, x, rules=ALL, **kwargs):
    net = quantize(model, rules)
    variables = net.init(KEY, x)
    return net, calibrate(net, variables, [x], **kwargs)


class Block(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.features, name="dense")(x))


class FancyDense(nn.Dense):
    """A subclass that calls its parent: the interceptor comes by twice."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs) * 2


class Setup(nn.Module):
    def setup(self):
        self.first = nn.Dense(5)
        self.second = nn.Dense(3)

    def __call__(self, x):
        return self.second(self.first(x))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(x.shape[-1], name="twice")
        return layer(nn.relu(layer(x)))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name="block")(x)


class RematLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(4, name="dense")(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda block, carry, _: (block(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(Block(x.shape[-1], name="block"), x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = nn.vmap(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return stacked(name="blocks")(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(11, 6, name="table")
        return table.attend(table(tokens))


def test_a_net_without_quant_is_the_linen_model_bit_for_bit():
    x = images(2, 6, 6, 3)
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Dense(3)])
    net = quantize(model, ALL)
    variables = net.init(KEY, x)
    assert set(variables) == {"params"}
    jax.tree.map(np.testing.assert_array_equal, variables, model.init(KEY, x))
    np.testing.assert_array_equal(net.apply(variables, x), model.apply(variables, x))


def test_dense_against_numpy():
    x = images(5, 7)
    net, variables = calibrated(nn.Dense(4), x)
    kernel, bias = (
        variables["params"]["kernel"],
        np.asarray(variables["params"]["bias"], np.float64),
    )
    want = rounded(x, 8, affine=True) @ rounded(kernel, 4, (1,)) + bias
    np.testing.assert_allclose(net.apply(variables, x), want, rtol=2e-5, atol=1e-5)


def test_dense_general_with_two_output_axes_has_a_scale_for_each():
    x = images(2, 5, 7)
    net, variables = calibrated(nn.DenseGeneral((2, 3)), x)
    kernel = variables["params"]["kernel"]
    assert variables["quant"]["weight_quantizer"]["scale"].shape == (1, 2, 3)
    want = np.einsum("btc,chd->bthd", rounded(x, 8, affine=True), rounded(kernel, 4, (1, 2)))
    np.testing.assert_allclose(net.apply(variables, x), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("padding", ["SAME", pytest.param("CIRCULAR", marks=pytest.mark.slow)])
def test_convolution_against_numpy(groups, padding):
    x = images(2, 5, 5, 4)
    model = nn.Conv(
        8, (3, 3), strides=(2, 2), padding=padding, feature_group_count=groups, use_bias=False
    )
    net, variables = calibrated(model, x)
    kernel = rounded(variables["params"]["kernel"], 4, (3,))
    with jax.enable_x64(True):
        want = model.apply(
            {"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(rounded(x, 8, affine=True))
        )
    np.testing.assert_allclose(net.apply(variables, x), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("padding", ["SAME", pytest.param("CIRCULAR", marks=pytest.mark.slow)])
def test_transposed_convolution(transpose_kernel, padding):
    x = images(2, 4, 4, 3)
    model = nn.ConvTranspose(
        5, (3, 3), strides=(2, 2), padding=padding, transpose_kernel=transpose_kernel
    )
    net, variables = calibrated(model, x)
    variables["params"]["bias"] = jnp.arange(5.0)
    axis = 2 if transpose_kernel else 3
    with jax.enable_x64(True):
        params = {
            "kernel": jnp.asarray(rounded(variables["params"]["kernel"], 4, (axis,))),
            "bias": jnp.arange(5.0),
        }
        want = model.apply({"params": params}, jnp.asarray(rounded(x, 8, affine=True)))
    np.testing.assert_allclose(net.apply(variables, x), want, rtol=2e-5, atol=2e-5)


def test_einsum_layer_with_bias():
    x = images(2, 3, 6)
    net, variables = calibrated(nn.Einsum((6, 2, 5), "btc,chd->bhtd"), x)
    bias = images(2, 5, seed=3)
    variables["params"]["bias"] = bias
    want = np.einsum(
        "btc,chd->bhtd",
        rounded(x, 8, affine=True),
        rounded(variables["params"]["kernel"], 4, (1, 2)),
    )
    want += np.asarray(bias, np.float64)[None, :, None, :]
    np.testing.assert_allclose(net.apply(variables, x), want, rtol=2e-5, atol=1e-5)


def test_embedding_and_its_tied_product():
    tokens = jnp.asarray([[1, 4, 10], [0, 2, 2]])
    net, variables = calibrated(Tied(), tokens)
    table = rounded(variables["params"]["table"]["embedding"], 4, (0,))
    found = table[np.asarray(tokens)]
    # The product's input was observed on the float table.
    scale = variables["quant"]["table"]["input_quantizer"]
    s, z = np.float64(scale["scale"]), np.float64(scale["zero_point"])
    found = (np.clip(np.round(found / s) + z, -128, 127) - z) * s
    np.testing.assert_allclose(net.apply(variables, tokens), found @ table.T, rtol=2e-5, atol=1e-5)


def test_attention_products():
    x = images(2, 5, 8)
    rules = [Rule("query_key|weights_value", input=Spec(8)), Rule(".*", weight=W4, input=A8)]
    net, variables = calibrated(nn.MultiHeadDotProductAttention(2), x, rules)
    assert set(variables["quant"]["query_key"]) == {"input_quantizer", "other_quantizer"}
    params = variables["params"]

    def project(name, x):
        kernel = rounded(params[name]["kernel"], 4, (1, 2))
        return np.einsum("btc,chd->bthd", rounded(x, 8, affine=True), kernel)

    def at(name, operand, value):
        scale = np.float64(variables["quant"][name][f"{operand}_quantizer"]["scale"])
        return np.clip(np.round(value / scale), -127, 127) * scale

    q, k, v = (project(n, x) for n in ("query", "key", "value"))
    scores = np.einsum(
        "bqhd,bkhd->bhqk", at("query_key", "input", q / np.sqrt(4)), at("query_key", "other", k)
    )
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum(
        "bhqk,bkhd->bqhd", at("weights_value", "input", weights), at("weights_value", "other", v)
    )
    quant = variables["quant"]["out"]["input_quantizer"]
    s, z = np.float64(quant["scale"]), np.float64(quant["zero_point"])
    mixed = (np.clip(np.round(mixed / s) + z, -128, 127) - z) * s
    want = np.einsum("bqhd,hdc->bqc", mixed, rounded(params["out"]["kernel"], 4, (2,)))
    got = net.apply(variables, x)
    assert np.mean(np.abs(got - want) > 1e-4 * np.abs(want).max()) < 0.05  # a rare code may flip


@pytest.mark.parametrize(
    "model", [Setup(), Shared(), Remat(), RematLayer(), Scanned(), Mapped(), FancyDense(4)]
)
def test_liftings_quantize_once_and_train(model):
    x = images(3, 6)
    net, variables = calibrated(model, x)
    quantized = net.apply(variables, x)
    floats = model.apply({"params": variables["params"]}, x)
    assert not np.array_equal(quantized, floats)
    np.testing.assert_allclose(quantized, floats, atol=0.35 * float(jnp.abs(floats).max()))
    grads = jax.jit(jax.grad(lambda p: net.apply({**variables, "params": p}, x).sum()))(
        variables["params"]
    )
    plain = jax.grad(lambda p: model.apply({"params": p}, x).sum())(variables["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(plain)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_scanned_layer_has_a_scale_for_every_step_of_the_scan():
    x = images(3, 6)
    net, variables = calibrated(Scanned(), x)
    quant = variables["quant"]["block"]["dense"]
    assert quant["input_quantizer"]["scale"].shape == (3, 1, 1)
    assert quant["weight_quantizer"]["scale"].shape == (3, 1, 6)
    y, kernels = np.asarray(x, np.float64), variables["params"]["block"]["dense"]["kernel"]
    for i in range(3):
        s, z = (np.float64(quant["input_quantizer"][k][i]) for k in ("scale", "zero_point"))
        codes = (np.clip(np.round(y / s) + z, -128, 127) - z) * s
        y = np.maximum(codes @ rounded(kernels[i], 4, (1,)), 0)
    got = net.apply(variables, x)
    assert np.mean(np.abs(got - y) > 1e-4 * np.abs(y).max()) < 0.05


@pytest.mark.parametrize("observer", ["minmax", "ema", "mse"])
@pytest.mark.parametrize("model", [Scanned(), pytest.param(Mapped(), marks=pytest.mark.slow)])
def test_every_observer_sees_each_lifted_layer_apart(model, observer):
    x = images(3, 6)
    _, variables = calibrated(model, x, observer=observer)
    name = "block" if isinstance(model, Scanned) else "blocks"
    quant = variables["quant"][name]["dense"]["weight_quantizer"]
    kernels = variables["params"][name]["dense"]["kernel"]
    alone = quantize(nn.Dense(kernels.shape[-1]), ALL)
    for i, kernel in enumerate(kernels):
        params = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
        want = calibrate(alone, {"params": params}, [x], observer=observer)["quant"]
        np.testing.assert_allclose(quant["scale"][i], want["weight_quantizer"]["scale"], rtol=1e-6)


def test_parameters_shared_over_a_scan_are_refused_with_the_repair():
    x = images(2, 3, 6)
    net = quantize(nn.RNN(nn.SimpleCell(4)), ALL)
    with pytest.raises(ValueError, match=r"shares its parameters.*rule without specs"):
        calibrate(net, net.init(KEY, x), [x])
    rest = quantize(nn.RNN(nn.SimpleCell(4)), [Rule("cell.*"), Rule(".*", weight=W4)])
    assert rest.apply(rest.init(KEY, x), x).shape == (2, 3, 4)


def test_float16_sums_do_not_overflow():
    x = nn.relu(images(2, 512) * 4).astype(jnp.float16)
    rules = [Rule(".*", weight=Spec(8), input=Spec(8, signed=False))]
    net, variables = calibrated(nn.Dense(8, dtype=jnp.float16), x, rules)
    out = net.apply(variables, x)
    assert out.dtype == jnp.float16
    floats = nn.Dense(8).apply({"params": variables["params"]}, x.astype(jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), floats, atol=0.1)
    grads = jax.grad(lambda p: net.apply({**variables, "params": p}, x).sum())(variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_an_unbatched_call_is_one_example():
    x = images(5, 6)
    net, variables = calibrated(
        nn.Dense(4), x, [Rule(".*", weight=Spec(4), input=Spec(4, quantizer="lsq"))]
    )
    step = lambda v, f: jax.grad(lambda q: jnp.sum(f({**v, "quant": q}) ** 2))(v["quant"])[
        "input_quantizer"
    ]["step"]
    batched = step(variables, lambda v: net.apply(v, x))
    mapped = step(variables, lambda v: jax.vmap(lambda a: net.apply(v, a))(x))
    np.testing.assert_allclose(batched, mapped, rtol=1e-5)
    one, spatial = images(4, 4, 3), nn.ConvTranspose(5, (3, 3))
    net, variables = calibrated(spatial, one)
    assert net.apply(variables, one).shape == (4, 4, 5)


class Coder(nn.Module):
    """A table that is looked up and attended to; `tied=False` has a dense layer for the second."""

    tied: bool = True

    def setup(self):
        self.table = nn.Embed(40, 16, embedding_init=nn.initializers.normal(0.02))
        self.hidden = nn.Dense(16)
        if not self.tied:
            self.head = nn.Dense(40, use_bias=False)

    def embed(self, tokens):
        return self.hidden(self.table(tokens))

    def logits(self, h):
        return self.table.attend(h) if self.tied else self.head(h)

    def __call__(self, tokens):
        return self.logits(8 * self.embed(tokens))


def test_what_a_table_returns_and_what_attends_to_it_have_grids_of_their_own():
    tokens = jax.random.randint(KEY, (6, 5), 0, 40)
    floats = Coder().init(KEY, tokens)
    head = {"kernel": floats["params"]["table"]["embedding"].T}
    untied = {"params": {**floats["params"], "head": head}}
    rules = [Rule("table|head", output=Spec(8))]
    net, twin = quantize(Coder(), rules), quantize(Coder(False), rules)
    variables = calibrate(net, floats, [tokens])
    wanted = calibrate(twin, untied, [tokens])
    quant = variables["quant"]["table"]
    assert set(quant) == {"output_quantizer", "attend_output_quantizer"}
    for key, path in (("output_quantizer", "table"), ("attend_output_quantizer", "head")):
        of_twin = wanted["quant"][path]["output_quantizer"]["scale"]
        np.testing.assert_allclose(quant[key]["scale"], of_twin, rtol=1e-6)
    np.testing.assert_allclose(net.apply(variables, tokens), twin.apply(wanted, tokens), atol=1e-6)
    # One after the other, by the methods of the net.
    first = calibrate(net, floats, [tokens], method="embed")
    assert set(first["quant"]["table"]) == {"output_quantizer"}
    assert layers(net, first, tokens)[0].uncalibrated == ("attend_output",)
    h = 8 * net.apply(first, tokens, method="embed")
    both = calibrate(net, first, [h], method="logits")
    assert set(both["quant"]["table"]) == set(quant)
    weights = calibrate(net, variables, [tokens], operands=("output",))
    assert set(weights["quant"]["table"]) == set(quant)


def test_a_net_that_only_attends_may_keep_its_grid_under_the_name_of_the_output():
    class Attends(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Embed(40, 16, name="table").attend(x)

    net, x = quantize(Attends(), [Rule("table", output=Spec(8))]), images(4, 16)
    variables = calibrate(net, net.init(KEY, x), [x])
    (params,) = variables["quant"]["table"].values()
    named = {**variables, "quant": {"table": {"output_quantizer": params}}}
    np.testing.assert_array_equal(net.apply(named, x), net.apply(variables, x))
    assert layers(net, named, x)[0].calibrated
    assert not np.array_equal(net.apply(named, x), Attends().apply(net.init(KEY, x), x))


@pytest.mark.parametrize("name", ["folded", "weight_quantizer", "weight_observed"])
@pytest.mark.parametrize("kind", ["module", "parameter"])
def test_reserved_names_are_refused(name, kind):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if kind == "module":
                return nn.Dense(4, name=name)(x)
            return nn.Dense(4)(x * self.param(name, nn.initializers.ones, (1, 3)))

    x = images(2, 3)
    with pytest.raises(ValueError, match=f"'{name}'.*Rename it"):
        quantize(Net(), ALL).init(KEY, x)
    with pytest.raises(ValueError, match=f"'{name}'.*Rename it"):  # a float checkpoint
        calibrate(quantize(Net(), ALL), Net().init(KEY, x), [x])


def test_remat_and_plain_give_the_same_values_and_gradients():
    x = images(3, 6)
    net, variables = calibrated(Block(4), x)
    remat = quantize(nn.remat(Block)(4), ALL)
    value = jax.value_and_grad(lambda n, v: n.apply(v, x).sum(), argnums=1)
    for a, b in zip(
        jax.tree.leaves(value(net, variables)),
        jax.tree.leaves(value(remat, variables)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_outputs_of_any_module():
    x = images(3, 6)
    rules = [Rule("", output=Spec(4)), Rule("dense", weight=W4, input=A8)]
    net, variables = calibrated(Block(4), x, rules)
    scale = float(variables["quant"]["output_quantizer"]["scale"])
    codes = np.asarray(net.apply(variables, x)) / scale
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert codes.max() <= 7 + 1e-5


def test_the_first_rule_that_matches_decides():
    x = images(3, 6)
    net, variables = calibrated(Setup(), x, [Rule("first"), Rule(".*", weight=W4, input=A8)])
    assert set(variables["quant"]) == {"second"}
    assert net.spec_of("first", "weight") is None and net.spec_of("second", "weight") == W4


def test_batch_norm_reduces_over_a_named_axis():
    x = images(4, 3, 6)
    net = quantize(nn.BatchNorm(use_running_average=False), ())
    variables = net.init(KEY, x[0])
    split = jax.vmap(
        lambda x: net.apply(variables, x, mutable=["batch_stats"], axis_name="b")[0], axis_name="b"
    )(x)
    whole = net.apply(variables, x.reshape(12, 6), mutable=["batch_stats"])[0]
    np.testing.assert_allclose(split.reshape(12, 6), whole, atol=1e-5)


def test_a_folded_batch_norm_is_the_layers_multiplier():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, use_bias=False, name="dense")(x)
            return nn.BatchNorm(use_running_average=True, name="bn")(x)

    x = images(3, 6)
    net, variables = calibrated(Net(), x, [Rule("dense", weight=W4, input=A8)])
    variables["batch_stats"]["bn"] = {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5.0)}
    want = net.apply(variables, x)
    gain = 1 / np.sqrt(np.arange(1.0, 5.0) + 1e-5)
    quant = variables["quant"]["dense"]
    scale = quant["input_quantizer"]["scale"] * quant["weight_quantizer"]["scale"][0]
    folded = {
        "dense": {
            **quant,
            "folded": {"multiplier": scale * gain, "bias": jnp.asarray(-np.arange(4.0) * gain)},
        },
        "bn": {"folded": {"identity": jnp.ones(())}},
    }
    np.testing.assert_allclose(
        net.apply({**variables, "quant": folded}, x), want, rtol=1e-5, atol=1e-5
    )


def test_bfloat16_runs_and_stays_bfloat16():
    x = images(3, 6).astype(jnp.bfloat16)
    net, variables = calibrated(nn.Dense(4, dtype=jnp.bfloat16), x)
    out = net.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    wide = quantize(nn.Dense(4), ALL).apply(variables, x.astype(jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize(Block(), [Rule("dens", weight=W4)]).init(KEY, images(2, 3)), "'dense'"),
        (lambda: quantize(Block(), ["dense"]), "must be a Rule"),
        (lambda: quantize(quantize(Block(), ()), ()), "must be a flax.linen module"),
        (lambda: Rule("(", weight=W4), "not a regular expression"),
        (lambda: Rule(".*", weight=Spec(4, quantizer="lqs")), "Did you mean 'lsq'"),
        (lambda: Rule(".*", weight=4), "must be a Spec"),
        (lambda: Rule(".*", weight=Spec(4, granularity="token", dynamic=True)), "is for inputs"),
        (lambda: Rule(".*", input=Spec(4, granularity=32)), "per tensor"),
        (lambda: Rule(".*", weight=Spec(4, options={"x": 1})), "allowed: scale_format"),
        (lambda: Rule(".*", weight=Spec(4, quantizer="tqt", options={"x": 1})), "it has none"),
        (lambda: Rule(".*", input=Spec(4, granularity="channel")), "per tensor"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_load_float_takes_same_paths_and_refuses_others():
    x = images(2, 6)
    net = quantize(Setup(), ALL)
    variables, other = net.init(KEY, x), net.init(jax.random.key(5), x)
    loaded = load_float(calibrate(net, variables, [x]), other)
    jax.tree.map(np.testing.assert_array_equal, loaded, other)
    with pytest.raises(ValueError, match=r"missing params/first/bias.*unexpected params/frist"):
        load_float(
            variables,
            {
                "params": {
                    "frist": {},
                    **{"frist": other["params"]["first"]},
                    "second": other["params"]["second"],
                }
            },
        )
    with pytest.raises(ValueError, match=r"has shape \(9, 5\), wanted \(6, 5\)"):
        bad = jax.tree.map(lambda a: a, other)
        bad["params"]["first"]["kernel"] = jnp.zeros((9, 5))
        load_float(variables, bad)
    with pytest.raises(ValueError, match="variables tree with 'params'"):
        load_float(variables, other["params"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(".*", weight=Spec(2)), Rule("head", weight=Spec(8))], r"rules\[1\] 'head' is never"),
        (
            [Rule("enc", weight=Spec(4)), Rule(".*")],
            r"rules\[0\] 'enc' matches 'enc', with no weight.*such as 'enc/\.\*'.*enc/dense",
        ),
    ],
)
def test_rules_that_change_nothing_are_refused(rules, message):
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Dense(4, name="dense")(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(Encoder(name="enc")(x))

    x = jnp.ones((2, 3))
    net = quantize(Net(), rules)
    with pytest.raises(ValueError, match=message):
        net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        calibrate(net, Net().init(jax.random.key(0), x), [x])
