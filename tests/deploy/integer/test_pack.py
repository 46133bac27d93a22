"""Packed codes come back as they went in, at the size that the format promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_jax.deploy.integer.pack import pack, packed_bytes, unpack
from qkd_jax.numerics import FLOAT_FORMATS, IntFormat, TableFormat


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 16), signed=st.booleans(), size=st.integers(0, 19))
def test_round_trip(bits, signed, size):
    format = IntFormat(bits, signed=signed)
    rng = np.random.default_rng(size)
    codes = rng.integers(format.qmin, format.qmax, size, endpoint=True)
    packed = pack(codes, format)
    assert packed.nbytes == packed_bytes(codes.shape, format)
    np.testing.assert_array_equal(unpack(np.asarray(packed), codes.shape, format), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("size", [0, 1, 5, 16])
def test_odd_codes_take_as_many_bits_as_they_carry(bits, size):
    levels = 2**bits - 1
    format = IntFormat(bits + 1, True, True)  # -levels .. levels
    codes = np.random.default_rng(bits).integers(0, levels, size, endpoint=True) * 2 - levels
    packed = pack(codes, format, 2)
    assert packed.nbytes == packed_bytes((size,), format, 2) == -(-size * bits // 8)
    np.testing.assert_array_equal(unpack(np.asarray(packed), (size,), format, 2), codes)
    with pytest.raises(ValueError, match="there are others between"):
        pack(np.array([0]), IntFormat(3, True, True), 2)


def test_layout_and_sizes():
    # Three bits: fields 0 to 7 from the lowest bit on.
    codes = np.arange(8) - 4
    wanted = sum(f << (3 * i) for i, f in enumerate(range(8))).to_bytes(3, "little")
    assert pack(codes, IntFormat(3)).tobytes() == wanted
    assert pack(np.array([-1, 1, 1]), IntFormat(2, True, True), 2) == np.uint8([0b110])
    np.testing.assert_array_equal(pack(np.array([-2, -1, 0, 1, 1]), IntFormat(2)), [0b11100100, 3])
    np.testing.assert_array_equal(
        pack(np.array([[0, 15], [1, 2]]), IntFormat(4, signed=False)), [0xF0, 0x21]
    )
    sizes = {
        bits: packed_bytes((3, 3, 8, 8), IntFormat(bits)) for bits in (1, 2, 3, 4, 5, 8, 9, 16)
    }
    assert sizes == {1: 72, 2: 144, 3: 216, 4: 288, 5: 360, 8: 576, 9: 1152, 16: 1152}
    # Five, six and seven bits: the same, where a field may lie in two bytes.
    for bits in (5, 6, 7):
        codes = np.random.default_rng(bits).integers(0, 2**bits, 11)
        wanted = sum(int(f) << (bits * i) for i, f in enumerate(codes))
        wanted = wanted.to_bytes(-(-11 * bits // 8), "little")
        assert pack(codes, IntFormat(bits, signed=False)).tobytes() == wanted
    assert pack(np.array([7]), IntFormat(8)).dtype == np.int8
    assert pack(np.array([255]), IntFormat(8, signed=False)).dtype == np.uint8


@pytest.mark.parametrize("size", [0, 1, 5, 16])
@pytest.mark.parametrize(
    ("format", "bits"),
    [
        *((FLOAT_FORMATS[n], bits) for n, bits in dict(e2m1=4, e3m2=6, e5m2=8, half=16).items()),
        *((TableFormat(f"t{n}", tuple(range(n))), bits) for n, bits in ((2, 1), (15, 4), (33, 6))),
    ],
)
def test_bit_patterns_and_indices_are_packed_too(format, bits, size):
    count = format.levels if isinstance(format, TableFormat) else 2**bits
    codes = np.random.default_rng(size).integers(0, count, size)
    packed = pack(codes, format)
    assert packed.nbytes == packed_bytes((size,), format) == -(-size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, (size,), format), codes)
    with pytest.raises(ValueError, match="codes lie in"):
        pack(np.array([count]), format)


def test_codes_outside_the_format_are_refused():
    with pytest.raises(ValueError, match=r"int2 holds \[-2, 1\]"):
        pack(np.array([2]), IntFormat(2))
