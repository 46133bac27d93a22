"""Models that call, hold and apply their parts otherwise than the package's own nets do."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk

X = jax.random.normal(jax.random.key(0), (4, 6))
KEY = jax.random.key(1)
Pair = collections.namedtuple("Pair", "first second")


class Widths(nn.Module):
    """Holds its widths in a field of any type."""

    widths: object

    @nn.compact
    def __call__(self, x):
        for width in getattr(self.widths, "values", lambda: self.widths)():
            x = nn.relu(nn.Dense(int(width))(x))
        return nn.Dense(5)(x)


class Shifted(nn.Module):
    """Holds an array in a field."""

    mean: jax.Array

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x - self.mean)
        return nn.Dense(5)(x)


class Mode(nn.Module):
    """Trains by default."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8)(x)
        return nn.Dense(5)(nn.relu(nn.BatchNorm(use_running_average=not train)(x)))


class Required(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x)
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        x = nn.Dense(8)(x)
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=deterministic)(x))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, y, scale=None):
        z = jnp.concatenate([nn.Dense(8)(x), nn.Dense(8)(y)], -1)
        return nn.Dense(5)(z if scale is None else z * scale)


class OneOfTwo(nn.Module):
    @nn.compact
    def __call__(self, both):
        z = jnp.concatenate([nn.Dense(8)(both[0]), nn.Dense(8)(both[1])], -1)
        return nn.Dense(5)(z)


class Keyed(nn.Module):
    @nn.compact
    def __call__(self, given):
        x = nn.Dense(8)(given["x"])
        return nn.Dense(5)(x + jax.random.normal(given["key"], x.shape))


class Keyword(nn.Module):
    @nn.compact
    def __call__(self, *, inputs, mask=None):
        h = nn.Dense(8)(inputs)
        return nn.Dense(5)(h if mask is None else h * mask)


class Forward(nn.Module):
    """Has no `__call__`."""

    def setup(self):
        self.a, self.b = nn.Dense(8), nn.Dense(5)

    def forward(self, x):
        return self.b(nn.relu(self.a(x)))


CALLS = {
    "a list": (Widths([8, 8]), X, {}, 3),
    "a dict": (Widths({"a": 8}), X, {}, 2),
    "an array": (Shifted(jnp.ones((1, 6))), X, {}, 2),
    "a NumPy array": (Widths(np.array([8])), X, {}, 2),
    "train=False": (Mode(), X, {"train": False}, 2),
    "train required": (Required(), X, {"train": False}, 2),
    "dropout": (Dropping(), X, {"deterministic": True}, 2),
    "two arguments": (Two(), (X, X), {}, 3),
    "two arguments and an array by keyword": (Two(), (X, X), {"scale": np.float32([[2.0]])}, 3),
    "one argument, the other by keyword": (Two(), X, {"y": X}, 3),
    "a tuple": (OneOfTwo(), (X, X), {}, 3),
    "a tuple in a tuple": (OneOfTwo(), ((X, X),), {}, 3),
    "a list of two": (OneOfTwo(), [X, X], {}, 3),
    "a named tuple": (OneOfTwo(), Pair(X, X), {}, 3),
    "None inside": (OneOfTwo(), {0: X, 1: X, 2: None}, {}, 3),
    "a random key": (Keyed(), {"x": X, "key": KEY}, {}, 2),
    "an old random key": (Keyed(), {"x": X, "key": jax.random.PRNGKey(1)}, {}, 2),
    "keywords alone": (Keyword(), None, {"inputs": X}, 2),
    "no position": (Keyword(), (), {"inputs": X, "mask": np.ones((1, 8), np.float32)}, 2),
    "shapes": (Two(), (jax.ShapeDtypeStruct((4, 6), np.float32),) * 2, {}, 3),
    "a method": (Forward(), X, {"method": "forward"}, 2),
    "a method as a function": (Forward(), X, {"method": Forward.forward}, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_preset_is_fitted_to_any_call(name):
    model, images, options, layers = CALLS[name]
    net = qk.quantize(model, qk.presets.rules("w4a4", model=model, images=images, **options))
    paths = [f"Dense_{i}" for i in range(layers)]
    if isinstance(model, Forward):
        paths = ["a", "b"]
    # What a fitted preset is: the ends at 8 bits, and inputs behind no ReLU signed.
    bits = [net.spec_of(path, "weight").bits for path in paths]
    assert bits == [8] + [4] * (layers - 2) + [8]
    behind_relu = isinstance(model, Widths | Mode | Forward)
    assert net.spec_of(paths[-1], "input").signed != behind_relu


def test_what_a_call_does_not_take_is_said():
    with pytest.raises(ValueError, match=r"call is Two\(x, y, scale=None\).*missing.*'y'"):
        qk.presets.rules("w8a8", model=Two(), images=X)
    with pytest.raises(ValueError, match=r"missing a required (keyword-only )?argument: 'train'"):
        qk.presets.rules("w8a8", model=Required(), images=X)
    with pytest.raises(ValueError, match=r"too many positional arguments.*by keyword"):
        qk.presets.rules("w8a8", model=Keyword(), images=X)
    with pytest.raises(ValueError, match="Forward has no __call__; give method="):
        qk.presets.rules("w8a8", model=Forward(), images=X)
    with pytest.raises(ValueError, match="'train' came without a model"):
        qk.presets.rules("w8a8", train=False)
    for model in (Mode(), Dropping()):
        with pytest.raises(ValueError, match=r"runs in training mode.*such as train=False"):
            qk.presets.rules("w8a8", model=model, images=X)


@pytest.mark.parametrize(
    ("model", "mode"), [(Mode(), {"train": False}), (Dropping(), {"deterministic": True})]
)
def test_calls_in_training_mode_say_so(model, mode, tmp_path):
    pytest.importorskip("onnx")
    net = qk.quantize(model, [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(8))])
    streams = {"params": KEY, "dropout": KEY}
    variables = qk.calibrate(net, net.init(streams, X), [X], **mode)
    for call in (
        lambda: qk.coverage(net, variables, X),
        lambda: qk.diagnose(net, variables, [X]),
        lambda: qk.sensitivity(net, variables, [X]),
        lambda: qk.convert(net, variables, X),
        lambda: qk.ptq.fold_bn(net, variables, X),
        lambda: qk.deploy.to_onnx(net, variables, X, tmp_path / "net.onnx"),
    ):
        with pytest.raises(ValueError, match=r"runs in training mode.*such as train=False"):
            call()


def test_calibration_in_training_mode_says_so():
    model = Mode()
    net = qk.quantize(model, qk.presets.rules("w8a8", model=model, images=X, train=False))
    variables = net.init(KEY, X)
    with pytest.raises(ValueError, match=r"runs in training mode.*train=False"):
        qk.calibrate(net, variables, [X])
    assert "quant" in qk.calibrate(net, variables, [X], train=False)


def test_a_field_that_changes_between_two_calls_is_read_anew():
    widths = {"a": 8}
    model = Widths(widths)
    assert len(qk.presets.rules("w4a4", model=model, images=X)[0].pattern.split("|")) == 1
    widths["b"] = 8
    net = qk.quantize(model, qk.presets.rules("w4a4", model=model, images=X))
    assert net.spec_of("Dense_2", "weight").bits == 8


def test_nets_are_equal_where_their_models_are():
    rules = qk.presets.rules("w8a8")
    same = [qk.quantize(Widths((8,)), rules) for _ in range(2)]
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    assert same[0] != qk.quantize(Widths((9,)), rules) and same[0] != qk.quantize(Widths((8,)))
    model = Widths([8])
    assert qk.quantize(model) == qk.quantize(model) != qk.quantize(Widths([8]))
    assert hash(qk.quantize(model)) == hash(qk.quantize(model))
    assert len({qk.quantize(model), qk.quantize(model), qk.quantize(model, rules)}) == 2


class Unreached(nn.Module):
    """Its one product is its own code."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (6, 5))
        return jnp.einsum("bi,io->bo", x, w)


def test_a_fitted_preset_of_a_model_without_layers():
    model = Unreached()
    net = qk.quantize(model, qk.presets.rules("w8a8", model=model, images=X))
    variables = net.init(KEY, X)
    assert [p.status for p in qk.coverage(net, variables, X).products] == ["MISSED"]
    with pytest.raises(ValueError, match=r"no operand of this net is quantized.*`coverage` lists"):
        qk.calibrate(net, variables, [X])


def test_only_an_unfitted_preset_is_advised_to_be_fitted():
    model = Widths((8,))
    with pytest.raises(ValueError, match=r"matches no layer.*presets.rules\(name, model="):
        qk.quantize(model, qk.presets.rules("w8a8")).init(KEY, X)
    fitted = qk.presets.rules("w8a8", model=model, images=X)
    with pytest.raises(ValueError, match="matches no layer") as error:
        qk.quantize(model, [qk.Rule("head"), *fitted]).init(KEY, X)
    assert "preset" not in str(error.value)


class Tied(nn.Module):
    """Applies a layer to parameters that it hands in, as T5, GPT-2 and Whisper do."""

    def setup(self):
        self.embed, self.mid = nn.Embed(20, 8), nn.Dense(8)
        self.head = nn.Dense(20, use_bias=False)

    def __call__(self, tokens):
        h = nn.relu(self.mid(self.embed(tokens)))
        table = self.embed.variables["params"]["embedding"]
        return self.head.apply({"params": {"kernel": table.T}}, h)


class TiedBlock(nn.Module):
    """Hands parameters to a module with layers, whose paths are those of its own layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="layers_0")(x))
        weights = self.param(
            "block", lambda key: nn.Sequential([nn.Dense(8)]).init(key, x)["params"]
        )
        return nn.Dense(5, name="head")(nn.Sequential([nn.Dense(8)]).apply({"params": weights}, x))


@pytest.mark.parametrize("preset", ["w8a8", "int8_weight_only"])
def test_layers_on_parameters_handed_in_stay_in_float(preset):
    tokens = jax.random.randint(KEY, (4, 6), 0, 20)
    for model, x, missed in ((Tied(), tokens, "head"), (TiedBlock(), X, "Sequential_1/layers_0")):
        net = qk.quantize(model, qk.presets.rules(preset, model=model, images=x))
        variables = net.init(KEY, x)
        quantized = qk.calibrate(net, variables, [x])
        products = qk.coverage(net, quantized, x).products
        assert [p.path for p in products if p.status == "MISSED"] == [missed]
        # Truth: the same with the layer's product written out.
        out = net.apply(quantized, x)
        if isinstance(model, Tied):
            _, found = net.apply(quantized, x, capture_intermediates=True, mutable="intermediates")
            h = nn.relu(found["intermediates"]["mid"]["__call__"][0])
            want = h @ variables["params"]["embed"]["embedding"].T
            np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
        integer = qk.convert(net, quantized, x)
        np.testing.assert_allclose(qk.integer_apply(integer, x), out, rtol=1e-5, atol=1e-5)


def test_a_lifted_root_is_no_layer_on_parameters_handed_in():
    for lift in (nn.remat, nn.jit):
        model = lift(nn.Dense)(5)
        net = qk.quantize(model, [qk.Rule("", weight=qk.Spec(8))])
        quantized = qk.calibrate(net, net.init(KEY, X), [X])
        assert [p.status for p in qk.coverage(net, quantized, X).products] == ["weight only"]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.relu(nn.Dense(8)(x)))


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.relu(nn.Dense(8)(x)))


JitBlock = nn.jit(Block)  # a class that all nets share, and what it has traced


class Holding(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(self.block(name="block")(x))


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        (JitBlock(), Block()),
        pytest.param(JitMethod(), Block(), marks=pytest.mark.slow),
        pytest.param(Holding(JitBlock), Holding(Block), marks=pytest.mark.slow),
    ],
    ids=["class", "method", "inside"],
)
def test_nn_jit_runs_no_net_as_another(model, plain):
    variables = plain.init(KEY, X)
    model.apply(variables, X)  # traced in float
    for bits in (8, 2):
        rules = [qk.Rule(".*", weight=qk.Spec(bits), input=qk.Spec(8))]
        net, truth = (qk.quantize(m, rules) for m in (model, plain))
        net.init(KEY, X)
        calibrated = [qk.calibrate(n, variables, [X]) for n in (truth, net, net)]
        for tree in calibrated[1:]:
            jax.tree.map(np.testing.assert_array_equal, tree, calibrated[0])
        wanted = truth.apply(calibrated[0], X)
        np.testing.assert_allclose(net.apply(calibrated[0], X), wanted, rtol=1e-5, atol=1e-6)
    seen = []
    watched = net.apply(calibrated[0], X, watch=lambda path, *_: seen.append(path))
    integer = qk.integer_apply(qk.convert(net, calibrated[0], X), X)
    np.testing.assert_allclose(watched, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(integer, wanted, rtol=1e-5, atol=1e-6)
    found = qk.diagnose(net, calibrated[0], [X]).operands
    assert {d.path for d in found} == set(seen) and len(seen) == 4 + 2 * isinstance(model, Holding)


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.MultiHeadDotProductAttention(2, decode=True)(nn.Dense(8)(x)))


def test_a_net_with_a_cache():
    model, x = Cached(), X[:, None]
    net = qk.quantize(model, qk.presets.rules("w8a8", model=model, images=x))
    start = net.init(KEY, x)
    # A checkpoint never holds a cache: it is the net's own.
    loaded = qk.load_float(start, {"params": start["params"]})
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, start))
    quantized = qk.calibrate(net, loaded, [x, x])
    assert jax.tree.all(jax.tree.map(np.array_equal, quantized["cache"], start["cache"]))
    assert set(quantized["quant"]) == {"Dense_0", "Dense_1", "MultiHeadDotProductAttention_0"}
