"""Re-estimated statistics are those of all batches together."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_nets

from qkd_jax.ptq import fold_bn, reestimate_batch_norm
from qkd_jax.quantize import quantize


class OneNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.99, name="bn")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


@pytest.fixture(scope="module")
def setup():
    x = small_nets.images(10)
    net, variables = small_nets.float_net(OneNorm(), x)
    conv = nn.Conv(4, (3, 3)).apply({"params": variables["params"]["conv"]}, x)
    return net, variables, x, np.asarray(conv, np.float64)


def test_population_statistics_over_uneven_batches(setup):
    net, variables, x, conv = setup
    for batches in ([x[:5], x[5:]], [x[:7], {"image": x[7:]}], [(x[5:],), (x[:5],)]):
        stats = reestimate_batch_norm(net, variables, batches)["batch_stats"]["bn"]
        np.testing.assert_allclose(stats["mean"], conv.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], conv.var((0, 1, 2)), rtol=1e-5)


def test_padding_is_left_out_and_all_else_is_kept(setup):
    net, variables, x, conv = setup
    padded = {"image": x.at[7:].set(100.0), "mask": np.arange(10) < 7}
    new = reestimate_batch_norm(net, variables, [padded])
    np.testing.assert_allclose(
        new["batch_stats"]["bn"]["mean"], conv[:7].mean((0, 1, 2)), rtol=1e-5, atol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])


class Scaled(nn.Module):
    """Does not hash, and takes an array by keyword."""

    table: np.ndarray

    @nn.compact
    def __call__(self, x, gain=None, train=False):
        x = x * self.table if gain is None else x * gain
        return nn.BatchNorm(use_running_average=not train, name="bn")(x)


def test_a_model_that_does_not_hash_and_an_array_by_keyword():
    x = np.float32(np.random.default_rng(0).normal(1, 2, (12, 3)))
    net = quantize(Scaled(np.full((1, 1), 3.0, np.float32)))
    variables = net.init(jax.random.key(0), x)
    for factor, options in ((3, {}), (5, {"gain": np.full((1, 1), 5.0, np.float32)})):
        stats = reestimate_batch_norm(net, variables, [x[:4], x[4:]], **options)["batch_stats"]
        np.testing.assert_allclose(stats["bn"]["mean"], factor * x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(stats["bn"]["var"], factor**2 * x.var(0), rtol=1e-5)


def test_what_cannot_be_re_estimated(setup):
    net, variables, x, _ = setup
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate_batch_norm(net, variables, [])
    with pytest.raises(ValueError, match="no 'batch_stats'"):
        reestimate_batch_norm(net, {"params": variables["params"]}, [x])
    with pytest.raises(ValueError, match="re-estimate first"):
        reestimate_batch_norm(net, fold_bn(net, variables, x), [x])
