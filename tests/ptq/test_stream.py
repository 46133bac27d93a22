"""What calibration batches may hold: no pixel that would move a whole layer without a word."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax import ptq
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.variables import without_quantizers

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)


class Net(nn.Module):
    """A convolution, a BatchNorm and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def bad_batches(pixel):
    images = IMAGES.copy()
    images[4, 2, 3] = pixel
    return [IMAGES, images]


METHODS = {
    "adaround": lambda *a: ptq.adaround(*a, steps=1),
    "brecq": lambda *a: ptq.brecq(*a, steps=1),
    "qdrop": lambda *a: ptq.qdrop(*a, steps=1),
    "gptq": ptq.gptq,
    "propagate_errors": ptq.propagate_errors,
    "awq": lambda net, variables, batches: ptq.awq(net, without_quantizers(variables), batches),
    "correct_bias": ptq.correct_bias,
    "reestimate_batch_norm": ptq.reestimate_batch_norm,
}


@pytest.mark.parametrize("pixel", [np.nan, np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_pixels_that_are_not_finite_are_refused(name, pixel):
    net = qk.quantize(Net(), [qk.Rule(".*", weight=qk.Spec(4), input=qk.Spec(8))])
    variables = net.init(jax.random.key(0), IMAGES)
    calibrated = calibrate(net, variables, [IMAGES])
    bad = "NaN" if np.isnan(pixel) else "infinite values"
    with pytest.raises(ValueError, match=rf"batches\[1\] holds {bad} in 1 of 6 .*example 4;"):
        METHODS[name](net, calibrated, bad_batches(pixel))
