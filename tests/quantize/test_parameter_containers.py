"""Parameters in flax's boxes, in tuples and in dataclasses, in every function on variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.core import freeze, meta

import qkd_jax as qk
from qkd_jax import ptq
from qkd_jax.training.optim import groups
from qkd_jax.trees import find, flatten, get, insert, put

X = jax.random.normal(jax.random.key(0), (16, 6))
MESH_AXES = {"Dense_0": ("a", "b"), "Dense_1": ("b", "c"), "Dense_2": ("c", "d")}


class Net(nn.Module):
    """Dense layers with or without boxes, around a parameter that is a tuple."""

    box: str = ""

    @nn.compact
    def __call__(self, x):
        def dense(width, name):
            def boxed(init, axes):
                return getattr(nn, self.box)(init, axes) if self.box else init

            kernel = boxed(nn.initializers.lecun_normal(), MESH_AXES[name])
            bias = boxed(nn.initializers.normal(0.1), MESH_AXES[name][1:])
            return nn.Dense(width, kernel_init=kernel, bias_init=bias, name=name)

        x = nn.BatchNorm(use_running_average=True)(dense(8, "Dense_0")(x))
        x = dense(8, "Dense_1")(nn.relu(x))
        shift, gain = self.param("pair", lambda key: (jnp.full((1, 8), 0.1), jnp.ones((1, 8))))
        return dense(5, "Dense_2")(nn.relu((x + shift) * gain))


BOXES = ("with_partitioning", "with_logical_partitioning")


def nets(box, preset="w4a4"):
    """Returns (net, float variables, calibrated ones) of the boxed model and of its twin."""
    rules = qk.presets.rules(preset, model=Net(box), images=X)
    made = []
    for model in (Net(box), Net()):
        net, floats = qk.quantize(model, rules), model.init(jax.random.key(1), X)
        made.append((net, floats, qk.calibrate(net, floats, [X])))
    return made


STEPS = {
    "absorb_bias": lambda net, floats, quantized: ptq.absorb_bias(net, floats, [X]),
    "equalize": lambda net, floats, quantized: ptq.equalize(net, ptq.fold_bn(net, floats, X), X),
    "smooth": lambda net, floats, quantized: ptq.smooth(net, floats, [X]),
    "reestimate": lambda net, floats, q: ptq.reestimate_batch_norm(net, floats, [X]),
    "fold_bn": lambda net, floats, quantized: ptq.fold_bn(net, floats, X),
    "fold_bn of a quantized net": lambda net, floats, quantized: ptq.fold_bn(net, quantized, X),
    "integer_bias": lambda net, floats, quantized: ptq.integer_bias(net, quantized, X),
    "gptq": lambda net, floats, quantized: ptq.gptq(net, quantized, [X]),
    "adaround": lambda net, floats, quantized: ptq.adaround(net, quantized, [X], steps=3),
    "brecq": lambda net, floats, quantized: ptq.brecq(net, quantized, [X], steps=3),
    "qdrop": lambda net, floats, quantized: ptq.qdrop(net, quantized, [X], steps=3),
    "correct_bias": lambda net, floats, q: ptq.correct_bias(net, q, [X], reference=floats),
    "load_float": lambda net, floats, quantized: qk.load_float(floats, Net().init(KEY, X)),
    "load_float boxed": lambda net, floats, q: qk.load_float(floats, Net(BOXES[0]).init(KEY, X)),
}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def pairs():
    return {box: nets(box) for box in BOXES}


@pytest.mark.parametrize("step", STEPS)
def test_steps_give_boxed_parameters_what_they_give_plain_ones(pairs, step):
    # The two kinds of box are one class and its heir: one of them suffices for slow steps.
    for box in BOXES if step in ("gptq", "load_float", "load_float boxed") else BOXES[:1]:
        got, want = (STEPS[step](*given) for given in pairs[box])
        flat, twin = flatten(meta.unbox(got)), flatten(want)
        assert flat.keys() == twin.keys()
        for name, array in twin.items():
            np.testing.assert_array_equal(flat[name], array, err_msg=name)
        assert nn.get_partition_spec(got["params"]) == nn.get_partition_spec(
            pairs[box][0][1]["params"]
        )


READERS = {
    "layers": lambda net, floats, quantized: qk.layers(net, quantized, X),
    "size": lambda net, floats, quantized: qk.size(net, quantized, X),
    "coverage": lambda net, floats, quantized: str(qk.coverage(net, quantized, X)),
    "diagnose": lambda net, floats, quantized: str(qk.diagnose(net, quantized, [X])),
    "sensitivity": lambda net, floats, q: str(qk.sensitivity(net, floats, [X], bits=(2, 4))),
    "hessian": lambda net, floats, quantized: str(
        qk.sensitivity(net, floats, [X], bits=(4,), metric="hessian", probes=2)
    ),
    "convert": lambda net, floats, quantized: str(
        qk.integer_apply(qk.convert(net, quantized, X), X)
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_boxed_parameters(pairs, reader):
    got, want = (READERS[reader](*given) for given in pairs["with_partitioning"])
    assert got == want


def test_onnx_of_boxed_parameters(pairs, tmp_path):
    net, _, quantized = pairs["with_partitioning"][0]
    qk.deploy.to_onnx(net, quantized, X, tmp_path / "net.onnx")
    (found,) = qk.deploy.onnx_session(tmp_path / "net.onnx").run(None, {"images": np.asarray(X)})
    np.testing.assert_allclose(found, net.apply(quantized, X), rtol=1e-5, atol=1e-5)


def test_weight_decay_goes_by_the_names_inside_boxes():
    axes = nn.with_partitioning(nn.initializers.zeros, ("heads", "features"))
    attention = nn.MultiHeadDotProductAttention(2, bias_init=axes)
    params = attention.init(jax.random.key(0), jnp.ones((1, 3, 6)))["params"]
    found = groups({"params": params})
    assert jax.tree.structure(found) == jax.tree.structure({"params": params})
    plain = groups({"params": meta.unbox(params)})
    assert jax.tree.leaves(found) == jax.tree.leaves(plain)
    # A bias of attention has two axes and is no weight for all that.
    assert jax.tree.leaves(found["params"]["query"]["bias"]) == ["plain"]


class Affine(struct.PyTreeNode):
    gain: jax.Array
    shift: jax.Array


class Holding(nn.Module):
    """Its parameters lie in a container."""

    make: object

    @nn.compact
    def __call__(self, x):
        gain, shift = jax.tree.leaves(self.param("held", lambda key: self.make()))
        return nn.Dense(5)(nn.relu(nn.Dense(6)(x) * gain + shift))


ONES, TENTHS = jnp.ones((1, 6)), jnp.full((1, 6), 0.1)
CONTAINERS = {
    "tuple": (lambda: (ONES, TENTHS), "held/1"),
    "list": (lambda: [ONES, TENTHS], "held/1"),
    "dataclass": (lambda: Affine(ONES, TENTHS), "held/shift"),
    "FrozenDict": (lambda: freeze({"a": ONES, "b": TENTHS}), "held/b"),
    "box in a tuple": (lambda: (ONES, meta.Partitioned(TENTHS, (None, "x"))), "held/1"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_parameters_in_containers(name):
    make, path = CONTAINERS[name]
    model = Holding(make)
    net = qk.quantize(model, qk.presets.rules("w4a4", model=model, images=X))
    floats = net.init(jax.random.key(1), X)
    quantized = qk.calibrate(net, qk.load_float(floats, jax.tree.map(jnp.copy, floats)), [X])
    for step in ("gptq", "adaround"):
        options = {"steps": 3} if step == "adaround" else {}
        out = getattr(ptq, step)(net, quantized, [X], **options)
        assert jax.tree.structure(out["params"]) == jax.tree.structure(floats["params"])
    # The mean error of the first layer goes into the array that is added to its output.
    corrected = ptq.correct_bias(net, quantized, [X], reference=floats)
    assert jax.tree.structure(corrected["params"]) == jax.tree.structure(floats["params"])
    assert np.shape(get(corrected, f"params/{path}")) == (1, 6)
    integer = qk.integer_apply(qk.convert(net, quantized, X), X)
    np.testing.assert_allclose(integer, net.apply(quantized, X), rtol=1e-5, atol=1e-5)


def test_paths_enter_containers_and_keep_them():
    box = nn.LogicallyPartitioned(jnp.zeros(3), ("embed",))
    tree = {"a": (ONES, [box, {"b": Affine(ONES, TENTHS)}])}
    assert get(tree, "a/1/0").shape == (3,)
    assert get(tree, "a/1/1/b/shift") is TENTHS
    assert find(tree, "a/1/1/b/none", 7) == find(tree, "a/9", 7) == find(tree, "a/0/x", 7) == 7
    new = put(tree, "a/1/0", np.ones(3))
    assert isinstance(new["a"][1][0], nn.LogicallyPartitioned)
    assert new["a"][1][0].names == ("embed",) and new["a"][1][0].value.sum() == 3
    new = insert(tree, "a/1/1/b/gain", 5)
    moved = new["a"][1][1]["b"]
    assert (moved.gain, moved.shift is TENTHS, new["a"][0] is ONES) == (5, True, True)
    assert tree["a"][1][1]["b"].gain is ONES and box.value.sum() == 0
