"""Contractions on codes: axes, exact sums, and gradients against plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qkd_jax.graph import scale_in_output
from qkd_jax.numerics import IntFormat
from qkd_jax.quantize.contraction import (
    conv_contraction,
    dot_contraction,
    einsum_contraction,
    quantized_contraction,
)


def grid(key, shape, bits, signed, scale):
    format = IntFormat(bits, signed)
    codes = np.random.default_rng(key).integers(format.qmin, format.qmax + 1, shape)
    return codes, (codes.astype(np.float32) * np.asarray(scale, np.float32)), format


def conv(lhs, rhs, groups=1):
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    return conv_contraction(
        lhs, rhs, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups,
        base=lax.conv_general_dilated,
    )  # fmt: skip


CASES = {
    "conv": (lambda a, b: conv(a, b), (2, 5, 5, 4), (3, 3, 4, 6), (1, 1, 1, 6)),
    "grouped": (lambda a, b: conv(a, b, 2), (2, 5, 5, 4), (3, 3, 2, 6), (1, 1, 1, 6)),
    "depthwise": (lambda a, b: conv(a, b, 4), (2, 5, 5, 4), (3, 3, 1, 8), (1, 1, 1, 8)),
    "dense": (
        lambda a, b: dot_contraction(a, b, (((1,), (0,)), ((), ())), base=lax.dot_general),
        (3, 7), (7, 5), (1, 5),
    ),
    "two output axes": (
        lambda a, b: dot_contraction(a, b, (((2,), (0,)), ((), ())), base=lax.dot_general),
        (2, 3, 7), (7, 4, 5), (1, 4, 5),
    ),
    "batched": (
        lambda a, b: dot_contraction(a, b, (((2,), (1,)), ((0,), (0,))), base=lax.dot_general),
        (2, 3, 7), (2, 7, 5), (2, 1, 5),
    ),
    "einsum": (
        lambda a, b: einsum_contraction("btc,hcd->bhtd", a, b),
        (2, 3, 7), (4, 7, 5), (4, 1, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sums_are_exact_and_scaled_once(name):
    describe, x_shape, w_shape, scale_shape = CASES[name]
    s_x = np.float32(0.037)
    s_w = np.random.default_rng(0).uniform(0.01, 0.2, scale_shape).astype(np.float32)
    codes_x, x_hat, x_format = grid(1, x_shape, 8, False, s_x)
    codes_w, w_hat, w_format = grid(2, w_shape, 4, True, s_w)
    contraction = describe(x_hat, w_hat)
    y = quantized_contraction(
        contraction, jnp.asarray(x_hat), jnp.asarray(w_hat),
        (jnp.asarray(s_x), x_format, False), (jnp.asarray(s_w), w_format, False),
    )  # fmt: skip
    # Integers in float64 and the dequantized contraction in float64 are two independent truths.
    with jax.enable_x64(True):
        exact = np.asarray(
            contraction.fn(jnp.asarray(codes_x, jnp.float64), jnp.asarray(codes_w, jnp.float64))
        )
        real = np.asarray(
            contraction.fn(
                jnp.asarray(codes_x * np.float64(s_x)),
                jnp.asarray(codes_w * s_w.astype(np.float64)),
            )
        )
    np.testing.assert_allclose(y, real, rtol=1e-6, atol=1e-6 * np.abs(real).max())
    unit = quantized_contraction(
        contraction, jnp.asarray(codes_x, jnp.float32), jnp.asarray(codes_w, jnp.float32),
        (jnp.float32(1), x_format, False), (jnp.float32(1), w_format, False),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(unit), exact)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_dequantized_contraction(name):
    describe, x_shape, w_shape, scale_shape = CASES[name]
    s_x = np.float32(0.05)
    s_w = np.random.default_rng(0).uniform(0.01, 0.2, scale_shape).astype(np.float32)
    _, x_hat, x_format = grid(1, x_shape, 4, False, s_x)
    _, w_hat, w_format = grid(2, w_shape, 4, True, s_w)
    contraction = describe(x_hat, w_hat)
    views = (jnp.asarray(s_x), x_format, False), (jnp.asarray(s_w), w_format, False)
    out = jax.eval_shape(contraction.fn, x_hat, w_hat)
    assert out.ndim == contraction.rank
    weights = jnp.asarray(np.random.default_rng(3).normal(size=out.shape), jnp.float32)
    ours = jax.grad(
        lambda a, b: jnp.sum(weights * quantized_contraction(contraction, a, b, *views)), (0, 1)
    )
    plain = jax.grad(lambda a, b: jnp.sum(weights * contraction.fn(a, b)), (0, 1))
    for got, want in zip(ours(x_hat, w_hat), plain(x_hat, w_hat), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_affine_codes_keep_nine_bits_between_the_passes():
    scale = jnp.float32(0.1)
    x_hat = jnp.asarray([[255.0, -255.0, 128.0, 0.0]]) * scale  # centred codes of 8 affine bits
    w_hat = jnp.ones((4, 1)) * 0.5
    contraction = dot_contraction(x_hat, w_hat, (((1,), (0,)), ((), ())), base=lax.dot_general)
    views = (scale, IntFormat(8, False), True), (jnp.float32(0.5), IntFormat(2), False)
    grad = jax.grad(lambda w: quantized_contraction(contraction, x_hat, w, *views).sum())(w_hat)
    np.testing.assert_allclose(grad[:, 0], x_hat[0], rtol=1e-6)


def test_a_scale_along_the_contraction_is_refused():
    contraction = dot_contraction(
        np.zeros((2, 3)), np.zeros((3, 4)), (((1,), (0,)), ((), ())), base=None
    )
    with pytest.raises(ValueError, match="varies along a summed axis"):
        scale_in_output(jnp.ones((3, 1)), contraction.rhs_axes, contraction.rank)


@pytest.mark.parametrize(
    "equation", ["...qhd,...khd->...hqk", "...hqk,...khd->...qhd", "ij,jk->ik"]
)
def test_einsum_axes(equation):
    sizes = dict(zip("qhdkij", (3, 2, 5, 4, 6, 7), strict=True))
    left, right = equation.split("->")[0].split(",")
    shapes = [
        tuple([9] * ("..." in labels) + [sizes[c] for c in labels.replace("...", "")])
        for labels in (left, right)
    ]
    contraction = einsum_contraction(equation, np.zeros(shapes[0]), np.zeros(shapes[1]))
    out = jnp.einsum(equation, np.zeros(shapes[0]), np.zeros(shapes[1]))
    assert contraction.rank == out.ndim
    for shape, places in zip(shapes, (contraction.lhs_axes, contraction.rhs_axes), strict=True):
        for size, place in zip(shape, places, strict=True):
            assert place is None or out.shape[place] == size


def test_the_backward_pass_keeps_codes_not_floats():
    x_hat, w_hat = jnp.ones((64, 32)), jnp.ones((32, 8))
    contraction = dot_contraction(x_hat, w_hat, (((1,), (0,)), ((), ())), base=lax.dot_general)
    views = (jnp.float32(1), IntFormat(2, False), False), (jnp.float32(1), IntFormat(2), False)
    _, pull = jax.vjp(lambda a, b: quantized_contraction(contraction, a, b, *views), x_hat, w_hat)
    kept = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")}
    assert kept[(64, 32)] == np.uint8 and kept[(32, 8)] == np.int8
