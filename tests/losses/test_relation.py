"""Relation losses against the numbers of reference implementations."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_inputs import maps, waves

from qkd_jax.losses import cc, cc_adjacent, pkt, rkd, sp

VECTORS = waves((8, 16), 5), waves((8, 16), 6)
MAPS = maps(6, 8, 3, 4)


@pytest.mark.parametrize(
    ("loss", "inputs", "keywords", "wanted"),
    [
        (rkd, VECTORS, {}, 1.2091037),
        (rkd, VECTORS, {"distance": 1.0, "angle": 0.0}, 0.0092150378),
        (rkd, VECTORS, {"distance": 0.0, "angle": 1.0}, 0.019574555),
        (cc, VECTORS, {}, 0.00145841),
        (cc_adjacent, VECTORS, {}, 27.0352595),
        (sp, MAPS, {}, 0.000706784),
        (pkt, VECTORS, {}, 0.00075567869),
    ],
)
def test_golden_numbers(loss, inputs, keywords, wanted):
    # As many digits as the number has; the reference of pkt is exact to 1e-5.
    digits = len(f"{wanted}".lstrip("0.").replace(".", ""))
    np.testing.assert_allclose(
        jnp.mean(loss(*inputs, **keywords)), wanted, rtol=max(1e-5, 5 * 10.0**-digits)
    )


def test_maps_are_flattened():
    flat = tuple(x.reshape(8, -1) for x in MAPS)
    for loss in (cc, sp, pkt):
        np.testing.assert_allclose(loss(*MAPS), loss(*flat), rtol=1e-6)


def test_cc_order_is_checked():
    with pytest.raises(ValueError, match="order is 0"):
        cc(*VECTORS, order=0)


def test_neighbours_are_the_next_kept_examples():
    mask = np.array([1, 0, 0, 1, 1, 0, 1, 0], bool)
    few = cc_adjacent(*(x[mask] for x in VECTORS))
    np.testing.assert_allclose(cc_adjacent(*VECTORS, where=mask)[mask], few, rtol=1e-6)
    assert few[-1] == 0 and np.all(few[:-1] > 0)
