"""Packed codes come back as they went in, at the size that the format promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax.deploy.pack import pack, packed_bytes, unpack
from qkd_jax.numerics import IntFormat


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 16), signed=st.booleans(), size=st.integers(0, 19))
def test_round_trip(bits, signed, size):
    format = IntFormat(bits, signed=signed)
    rng = np.random.default_rng(size)
    codes = rng.integers(format.qmin, format.qmax, size, endpoint=True)
    packed = pack(codes, format)
    assert packed.nbytes == packed_bytes(codes.shape, format)
    np.testing.assert_array_equal(unpack(np.asarray(packed), codes.shape, format), codes)


def test_layout_and_sizes():
    np.testing.assert_array_equal(pack(np.array([-2, -1, 0, 1, 1]), IntFormat(2)), [0b11100100, 3])
    np.testing.assert_array_equal(
        pack(np.array([[0, 15], [1, 2]]), IntFormat(4, signed=False)), [0xF0, 0x21]
    )
    sizes = {
        bits: packed_bytes((3, 3, 8, 8), IntFormat(bits)) for bits in (1, 2, 3, 4, 5, 8, 9, 16)
    }
    assert sizes == {1: 72, 2: 144, 3: 288, 4: 288, 5: 576, 8: 576, 9: 1152, 16: 1152}
    assert pack(np.array([7]), IntFormat(5)).dtype == np.int8
    assert pack(np.array([255]), IntFormat(8, signed=False)).dtype == np.uint8


def test_codes_outside_the_format_are_refused():
    with pytest.raises(ValueError, match=r"int2 holds \[-2, 1\]"):
        pack(np.array([2]), IntFormat(2))
