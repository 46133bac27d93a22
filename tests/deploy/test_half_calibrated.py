"""Nets of which a part has no quantizers: every list of them says so, and no export takes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk

X = jnp.abs(jax.random.normal(jax.random.key(0), (8, 16)))


class Coder(nn.Module):
    """An encoder and a decoder, each with a method of its own."""

    def setup(self):
        self.enc, self.dec = nn.Dense(3), nn.Dense(16)

    def encode(self, x):
        return nn.relu(self.enc(x))

    def decode(self, z):
        return self.dec(z)

    def __call__(self, x):
        return self.decode(self.encode(x))


SPEC = qk.Spec(2, quantizer="lsq")


@pytest.mark.parametrize("patterns", [(".*",), ("enc", "dec")])
def test_methods_are_calibrated_one_after_the_other(patterns, tmp_path):
    net = qk.quantize(Coder(), [qk.Rule(p, weight=SPEC, input=SPEC) for p in patterns])
    floats = net.init(jax.random.key(0), X)
    encoded = qk.calibrate(net, floats, [X], method="encode")
    z = net.apply(encoded, X, method="encode")

    # The decoder runs in float, and says so: in the table, in the sizes, in what it refuses.
    found = qk.coverage(net, encoded, X)
    assert [(p.path, p.status, p.bits) for p in found.products] == [
        ("enc", "quantized", (2, 2)),
        ("dec", "NOT CALIBRATED", (32, 32)),
    ]
    assert [p.path for p in found.uncalibrated] == ["dec"]
    share = "50.0% of multiply-accumulates quantized"
    assert str(found).endswith(f"2 products, {share}, 1 NOT CALIBRATED, 0 MISSED")
    layers = qk.layers(net, encoded, X)
    assert [(layer.path, layer.uncalibrated) for layer in layers] == [
        ("enc", ()),
        ("dec", ("input", "weight")),
    ]
    assert [layer.width("weight") for layer in layers] == [2, 32]
    assert qk.size(net, encoded, X).bytes == 48 * 2 // 8 + 4 * (3 + 48 + 16 + 1)
    for export in (
        lambda: qk.convert(net, encoded, X),
        lambda: qk.deploy.to_onnx(net, encoded, X, tmp_path / "net.onnx"),
        lambda: qk.ptq.integer_bias(net, encoded, X),
    ):
        with pytest.raises(ValueError, match="NOT CALIBRATED: input of layer 'dec', weight of"):
            export()

    # And the encoder keeps its quantizers when the decoder gets its own.
    both = qk.calibrate(net, encoded, [z], method="decode")
    assert set(both["quant"]) == {"enc", "dec"}
    jax.tree.map(np.testing.assert_array_equal, both["quant"]["enc"], encoded["quant"]["enc"])
    np.testing.assert_array_equal(net.apply(both, X, method="encode"), z)
    assert {p.status for p in qk.coverage(net, both, X).products} == {"quantized"}
    integer = qk.convert(net, both, X)
    np.testing.assert_array_equal(qk.integer_apply(integer, X), jax.jit(net.apply)(both, X))


def test_a_file_for_a_target_is_of_a_calibrated_net(tmp_path):
    pytest.importorskip("onnx")
    net = qk.quantize(Coder(), [qk.Rule("enc", weight=SPEC)])
    variables, path = net.init(jax.random.key(0), X), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="NOT CALIBRATED: weight of layer 'enc'"):
        qk.deploy.to_onnx(net, variables, X, path, target="onnxruntime-x86")
    assert not path.exists()
    qk.deploy.to_onnx(net, variables, X, path)
    floats = qk.quantize(Coder(), [])
    qk.deploy.to_onnx(floats, variables, X, path, target="onnxruntime-x86")


def test_quantizers_that_no_rule_asks_for_are_not_kept():
    net = qk.quantize(Coder(), [qk.Rule(".*", weight=SPEC)])
    variables = qk.calibrate(net, net.init(jax.random.key(0), X), [X])
    other = qk.quantize(Coder(), [qk.Rule("enc"), qk.Rule(".*", weight=SPEC)])
    decoded = qk.calibrate(other, variables, [jnp.ones((2, 3))], method="decode")
    assert set(decoded["quant"]) == {"dec"}
