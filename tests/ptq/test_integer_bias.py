"""Biases as integer kernels have them: multiples of the unit of the sums, nothing else moved."""

import jax
import numpy as np
import pytest
import small_nets

from qkd_jax.deploy import onnx_session, to_onnx
from qkd_jax.ptq import fold_bn, integer_bias

QUANTIZED = ("stem", "depthwise", "grouped", "dilated", "hidden", "head")


def biases(variables):
    """layer -> bias of a folded net, wherever it lies."""
    found = {}
    for layer in QUANTIZED:
        folded = variables["quant"][layer].get("folded", {})
        found[layer] = np.asarray(folded.get("bias", variables["params"][layer].get("bias")))
    return found


@pytest.mark.slow
def test_biases_become_multiples_of_the_unit_of_the_sums():
    net, variables, images = small_nets.case("w8a8")
    before = fold_bn(net, variables, images)
    after = integer_bias(net, variables, images)
    old, new = biases(before), biases(after)
    for layer in QUANTIZED:
        unit = before["quant"][layer].get("folded", {}).get("multiplier")
        if unit is None:  # no BatchNorm behind it: the product of the two scales
            quant = before["quant"][layer]
            scale = np.asarray(quant["input_quantizer"]["scale"], np.float64)
            unit = scale * np.asarray(quant["weight_quantizer"]["scale"], np.float64).reshape(-1)
        unit = np.asarray(unit, np.float64).reshape(-1)
        sums = new[layer] / unit
        assert np.abs(sums - np.round(sums)).max() < 2e-2  # float32 of some 10,000 units
        assert np.all(np.abs(new[layer] - old[layer]) <= 0.5001 * np.abs(unit) + 1e-7)
        assert np.any(new[layer] != old[layer])
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before, after)
    paths = {jax.tree_util.keystr(p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c}
    assert all("bias" in path for path in paths) and len(paths) == len(QUANTIZED)


def test_coarse_layers_keep_their_biases():
    net, variables, images = small_nets.case("w2a2")
    old = biases(fold_bn(net, variables, images))
    new = biases(integer_bias(net, variables, images))
    for layer in QUANTIZED:
        assert np.array_equal(old[layer], new[layer]) == (layer not in ("stem", "head"))


@pytest.mark.slow
def test_the_engine_then_gives_the_nets_own_codes(tmp_path):
    """Fewer logits differ than from the net whose biases the engine rounds by itself."""
    pytest.importorskip("onnxruntime")
    net, variables, images = small_nets.case("w8a8")
    rounded = integer_bias(net, variables, images)
    path = to_onnx(net, rounded, images, tmp_path / "m.onnx").path
    found = onnx_session(path).run(None, {"images": np.moveaxis(np.asarray(images), -1, 1)})[0]
    gaps = [
        float(np.abs(found - np.asarray(jax.jit(net.apply)(v, images))).mean())
        for v in (rounded, variables)
    ]
    assert gaps[0] < 0.5 * gaps[1]
