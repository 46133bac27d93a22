"""The published vision nets quantized whole: every product, their gradients, and both exports."""

import jax
import numpy as np
import pytest
import small_nets
import small_vision

from qkd_jax import models
from qkd_jax.deploy import convert, integer_apply, onnx_session, to_onnx
from qkd_jax.quantize import presets
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.inspection import coverage

IMAGES = jax.random.normal(jax.random.key(1), small_vision.IMAGES)
every = pytest.mark.parametrize("name", small_vision.FIELDS)


def net_of(name, preset):
    model = models.create(name, 5, **small_vision.FIELDS[name])
    rules = presets.rules(preset, model=model, images=IMAGES)
    return small_nets.float_net(model, IMAGES, rules)


@every
def test_rules_reach_every_product(name):
    net, variables = net_of(name, "w4a4")
    found = coverage(net, variables, IMAGES)
    assert not found.missed and {p.status for p in found.products} == {"quantized"}
    transformer = "blocks" not in small_vision.FIELDS[name] and "mobilenet" not in name
    parts = {product.path.rpartition("/")[2] for product in found.products}
    assert ({"query_key", "weights_value"} <= parts) == transformer


@pytest.mark.slow
@every
def test_training_and_both_exports(name, tmp_path):
    pytest.importorskip("onnxruntime")
    net, variables = net_of(name, "w4a4")
    variables = calibrate(net, variables, [IMAGES], observer="minmax")
    assert "0 MISSED" in str(coverage(net, variables, IMAGES))
    fast = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})

    def loss(learned):
        return (net.apply({**variables, **learned}, IMAGES) ** 2).mean()

    gradients = fast(jax.grad(loss))({key: variables[key] for key in ("params", "quant")})
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        # The range of the images is not learned.
        assert np.any(leaf) or "stem" in jax.tree_util.keystr(path), path
    wanted = np.asarray(jax.jit(net.apply)(variables, IMAGES))
    largest = np.abs(wanted).max()
    found = jax.jit(integer_apply)(convert(net, variables, IMAGES), IMAGES)
    assert np.abs(found - wanted).max() < 1e-5 * largest
    to_onnx(net, variables, IMAGES[:2], tmp_path / "net.onnx")
    session = onnx_session(tmp_path / "net.onnx")
    given = {session.get_inputs()[0].name: np.moveaxis(np.asarray(IMAGES), -1, 1)}
    assert np.abs(session.run(None, given)[0] - wanted).max() < 1e-5 * largest
