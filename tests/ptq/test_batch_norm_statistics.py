"""Re-estimated statistics are those of all batches together."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_nets

from qkd_jax.ptq import fold_bn, reestimate_batch_norm


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


def test_what_cannot_be_re_estimated(setup):
    net, variables, x, _ = setup
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate_batch_norm(net, variables, [])
    with pytest.raises(ValueError, match="no 'batch_stats'"):
        reestimate_batch_norm(net, {"params": variables["params"]}, [x])
    with pytest.raises(ValueError, match="re-estimate first"):
        reestimate_batch_norm(net, fold_bn(net, variables, x), [x])
