"""The arguments of a model's call, as every function that runs a model once takes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax import deploy

X = jax.random.normal(jax.random.key(0), (4, 6))
MASK = jnp.array([[1.0], [0.0], [1.0], [1.0]])
RULES = [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(8))]


class Masked(nn.Module):
    """Takes an array and a flag beside its input."""

    @nn.compact
    def __call__(self, x, mask=None, double=False):
        h = nn.relu(nn.Dense(8, name="up")(x)) * (2 if double else 1)
        return nn.Dense(5, name="head")(h if mask is None else h * mask)


class KeywordMask(Masked):
    @nn.compact
    def __call__(self, x, *, mask):
        h = nn.relu(nn.Dense(8, name="up")(x))
        return nn.Dense(5, name="head")(h * mask)


@pytest.fixture(scope="module")
def masked():
    net, variables = small_nets.float_net(Masked(), X, RULES)
    return net, qk.calibrate(net, variables, [(X, MASK, True)])


def test_a_tuple_is_the_positional_arguments_everywhere(masked, tmp_path):
    net, variables = masked
    given = (X, MASK, True)
    assert [p.path for p in qk.coverage(net, variables, given).products] == ["up", "head"]
    assert [layer.path for layer in qk.layers(net, variables, given)] == ["up", "head"]
    qk.ptq.equalize(net, {"params": variables["params"]}, given)
    integer = qk.convert(net, variables, given)
    two = (X[1:3], MASK[1:3], True)  # at another batch size
    expected = jax.jit(lambda v, x, m: net.apply(v, x, m, True))(variables, *two[:2])
    np.testing.assert_array_equal(qk.integer_apply(integer, two), expected)
    deploy.save_stablehlo(integer, tmp_path / "hlo", platforms=["cpu"])
    np.testing.assert_array_equal(deploy.load_stablehlo(tmp_path / "hlo")(*two[:2]), expected)
    pytest.importorskip("onnxruntime")
    path = deploy.to_onnx(net, variables, given, tmp_path / "net.onnx").path
    session = deploy.onnx_session(path)
    feeds = {i.name: np.asarray(a) for i, a in zip(session.get_inputs(), two, strict=False)}
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-5, atol=1e-5)


def test_arrays_by_keyword_are_constants_and_refused_at_the_size_of_the_batch(masked):
    net, variables = masked
    with pytest.raises(ValueError, match=r"'mask' came by keyword.*images=\(\.\.\., mask\)"):
        qk.convert(net, variables, X, mask=MASK)
    # One of another size is a constant, as it was.
    gain = jnp.linspace(0, 1, 8)[None]
    integer = qk.convert(net, variables, X, mask=gain)
    expected = jax.jit(net.apply)(variables, X[:2], gain)
    np.testing.assert_array_equal(qk.integer_apply(integer, X[:2]), expected)


def test_what_comes_by_keyword_alone_is_an_input_of_a_method():
    method = lambda m, x, mask: m(x, mask=mask)  # as the message says
    model = KeywordMask()
    rules = qk.presets.rules("static", model=model, images=(X, MASK), method=method)
    net = qk.quantize(model, rules)
    floats = small_nets.trained_like(jax.eval_shape(net.init, jax.random.key(1), X, mask=MASK))
    variables = qk.calibrate(net, floats, [(X, MASK)], method=method)
    with pytest.raises(ValueError, match="method=lambda m, x, mask"):
        qk.convert(net, variables, X, mask=MASK)
    integer = qk.convert(net, variables, (X, MASK), method=method)
    expected = jax.jit(lambda v: net.apply(v, X, mask=MASK))(variables)
    np.testing.assert_array_equal(qk.integer_apply(integer, (X, MASK)), expected)


FUNCTIONS = {
    "equalize": lambda net, v, x: qk.ptq.equalize(net, {"params": v["params"]}, x),
    "pairs": lambda net, v, x: qk.ptq.equalization_pairs(net, {"params": v["params"]}, x),
    "fold_bn": qk.ptq.fold_bn,
    "integer_bias": qk.ptq.integer_bias,
    "coverage": qk.coverage,
    "layers": qk.layers,
    "convert": qk.convert,
    "rules": lambda net, v, x: qk.presets.rules("w8a8", model=net.model, images=x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [[X], [X, X], {"image": X}], ids=["one", "two", "dict"])
def test_batches_in_the_place_of_an_example_are_refused(masked, name, given):
    with pytest.raises(ValueError, match=r"images, which is a (list|dict of \['image'\]).*example"):
        FUNCTIONS[name](*masked, given)


class Tokened(nn.Module):
    """Has a parameter for each example, as class tokens are written now and then."""

    @nn.compact
    def __call__(self, x):
        token = self.param("token", nn.initializers.normal(1.0), (x.shape[0], 6))
        return nn.Dense(5, name="head")(x + token)


def test_a_model_of_one_batch_size_is_refused_at_any_other():
    net, variables = small_nets.float_net(Tokened(), X, RULES)
    variables = qk.calibrate(net, variables, [X])
    with pytest.raises(ValueError, match=r"batch size of its example.*any_batch=False"):
        qk.convert(net, variables, X)
    integer = qk.convert(net, variables, X, any_batch=False)
    expected = jax.jit(net.apply)(variables, X)
    np.testing.assert_array_equal(qk.integer_apply(integer, X), expected)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return nn.Dense(5, name="head")(jnp.tanh(nn.Dense(8, name="body")(x)) * y.mean(1)[:, None])


def test_inputs_of_other_shapes_than_the_examples_are_refused():
    """A mean over an axis is a sum times a number, which is that of the example's axis."""
    net = qk.quantize(Pair(), RULES)
    variables = qk.calibrate(net, net.init(jax.random.key(0), X, X), [(X, X)])
    integer = qk.convert(net, variables, (X, X))
    assert qk.integer_apply(integer, (X[:2], X[:2])).shape == (2, 5)
    for given in (X, (X, X[:, :4]), (X, X[0]), [(X, X)] * 2):
        with pytest.raises(ValueError, match=r"images is of shapes .* converted for .*'batch', 6"):
            qk.integer_apply(integer, given)
    with pytest.raises(ValueError, match=r"tuple of 3, its positional arguments.*Labels are no"):
        qk.calibrate(net, variables, [(X, X, X[:, 0])])


def test_a_file_of_several_inputs_runs_on_a_tuple(tmp_path):
    pytest.importorskip("onnxruntime")
    net = qk.quantize(Pair(), [])
    variables = net.init(jax.random.key(0), X, X)
    path = qk.deploy.to_onnx(net, variables, (X, X), tmp_path / "m.onnx").path
    (found,) = qk.deploy.open_onnx(path, "onnxruntime")((X, X))
    np.testing.assert_allclose(found, net.apply(variables, X, X), rtol=1e-5, atol=1e-6)
