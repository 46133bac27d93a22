"""The NumPy twin's operations against XLA's, on integers: equal."""

import jax
import numpy as np
import pytest
from jax import lax

from qkd_jax.deploy.integer import reference

RNG = np.random.default_rng(0)


def integers(*shape):
    return RNG.integers(-128, 128, shape).astype(np.int32)


def compiled(fn, *arrays):
    """What XLA computes, and the parameters of the operation."""
    closed = jax.make_jaxpr(fn)(*arrays)
    (eqn,) = closed.jaxpr.eqns
    return np.asarray(jax.jit(fn)(*arrays)), eqn.params, eqn.primitive.name


@pytest.mark.parametrize(
    ("rhs", "options"),
    [
        ((3, 2, 4, 6), dict(window_strides=(2, 1), padding="SAME")),
        ((3, 3, 2, 6), dict(feature_group_count=2, padding=((2, 0), (-1, 3)), rhs_dilation=(1, 2))),
        ((2, 3, 1, 8), dict(feature_group_count=4, padding="VALID")),
        ((3, 3, 4, 2), dict(lhs_dilation=(2, 3), padding=((1, 2), (2, 2)))),
    ],
)
def test_convolutions(rhs, options):
    options = dict(window_strides=(1, 1)) | options
    fn = lambda x, w: lax.conv_general_dilated(
        x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
    x, w = integers(2, 7, 6, 4), integers(*rhs)
    wanted, params, _ = compiled(fn, x, w)
    np.testing.assert_array_equal(reference.convolve(x, w, params), wanted)


@pytest.mark.parametrize(
    ("lhs", "rhs", "numbers"),
    [
        ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
        ((2, 3, 4, 5), (2, 6, 4, 5), (((3,), (3,)), ((0, 2), (0, 2)))),
        ((4, 2, 3), (3, 5, 4, 2), (((0, 2), (2, 0)), ((1,), (3,)))),
    ],
)
def test_products(lhs, rhs, numbers):
    x, w = integers(*lhs), integers(*rhs)
    wanted, params, _ = compiled(lambda x, w: lax.dot_general(x, w, numbers), x, w)
    np.testing.assert_array_equal(reference.dot(x, w, params), wanted)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: lax.reduce_window_max_p.bind(
            x, window_dimensions=(1, 3, 2, 1), window_strides=(1, 2, 1, 1),
            padding=((0, 0), (1, 0), (0, 1), (0, 0)), base_dilation=(1,) * 4,
            window_dilation=(1, 2, 3, 1)),
        lambda x: lax.reduce_window_sum_p.bind(
            x, window_dimensions=(1, 2, 3, 1), window_strides=(1, 1, 2, 1),
            padding=((0, 0), (0, 1), (1, 1), (0, 0)), base_dilation=(1,) * 4,
            window_dilation=(1,) * 4),
        lambda x: lax.slice(x, (0, 1, 0, 2), (2, 5, 6, 4), (1, 2, 3, 1)),
        lambda x: lax.transpose(x, (3, 0, 2, 1)),
        lambda x: lax.rev(x, (1, 2)),
        lambda x: lax.broadcast_in_dim(x, (2, 3, 7, 6, 4), (0, 2, 3, 4)),
        lambda x: lax.reduce_max(x, (1, 2)),
        lambda x: lax.reduce_sum(x, (1, 3)),
    ],
)  # fmt: skip
def test_moves_and_pools(fn):
    x = integers(2, 7, 6, 4)
    wanted, params, name = compiled(fn, x)
    np.testing.assert_array_equal(reference.MOVES[name](params, x), wanted)


def test_padding_and_joining():
    x, zero = integers(2, 3, 4), np.zeros((), np.int32)
    config = ((0, 0, 0), (1, 2, 0), (-1, 3, 0))
    wanted, params, _ = compiled(lambda x, z: lax.pad(x, z, config), x, zero)
    np.testing.assert_array_equal(reference.MOVES["pad"](params, x, zero), wanted)
    other = integers(2, 5, 4)
    wanted, params, _ = compiled(lambda x, y: lax.concatenate([x, y], 1), x, other)
    np.testing.assert_array_equal(reference.MOVES["concatenate"](params, x, other), wanted)
