import numpy as np
import pytest

from qkd_jax import quantizers
from qkd_jax.numerics import IntFormat, Spec


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("signed", [True, False])
def test_codes_fill_the_bits_and_fit_their_storage(bits, signed):
    form = IntFormat(bits, signed)
    assert form.levels == 2**bits
    assert (form.qmin < 0) == signed
    info = np.iinfo(form.storage)
    assert info.min <= form.qmin and form.qmax <= info.max
    assert form.storage.itemsize == (1 if bits <= 8 else 2)
    assert form.name == ("int" if signed else "uint") + str(bits)


@pytest.mark.parametrize("bits", range(2, 17))
def test_a_narrow_range_is_symmetric(bits):
    form = IntFormat(bits, narrow_range=True)
    assert form.qmin == -form.qmax
    assert form.levels == 2**bits - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bits=0), "bits is 0"),
        (dict(bits=17), "bits is 17"),
        (dict(bits=2.0), "bits is 2.0"),
        (dict(bits=True), "bits is True"),
        (dict(bits=8, signed=False, narrow_range=True), "narrow_range=True came with signed=False"),
        (dict(bits=1, narrow_range=True), "narrow_range=True came with bits=1"),
    ],
)
def test_refused_formats(arguments, message):
    with pytest.raises(ValueError, match=message):
        IntFormat(**arguments)


def test_formats_and_specs_are_plain_hashable_data():
    assert len({IntFormat(4), IntFormat(4), IntFormat(4, False)}) == 2
    assert len({Spec(4), Spec(4), Spec(4, quantizer="lsq")}) == 2
    with pytest.raises(TypeError):
        Spec(4, "lsq")


@pytest.mark.parametrize("bits", range(2, 17))
def test_narrow_range_default(bits):
    assert Spec(bits).format.narrow_range == (bits >= 8)
    assert not Spec(bits, signed=False).format.narrow_range
    assert not Spec(bits, symmetric=False).format.narrow_range
    assert Spec(bits, narrow_range=True).format.qmin == -Spec(bits).format.qmax
    assert Spec(bits, narrow_range=False).format.qmin == -(2 ** (bits - 1))


def test_one_bit_specs():
    assert Spec(1, signed=False).format.levels == 2
    assert Spec(1, symmetric=False).format.qmin == -1
    with pytest.raises(ValueError, match=r"that grid is \{-1, 0\}.*bits=2"):
        quantizers.check(Spec(1))


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (Spec(2, quantizer="lsq", granularity="channel"), "int2 lsq per channel"),
        (Spec(8, signed=False, symmetric=False), "uint8 uniform affine"),
        (Spec(4, granularity=32), "int4 uniform per group of 32"),
    ],
)
def test_label(spec, label):
    assert spec.label == label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bits=0), "bits is 0"),
        (dict(bits=4, granularity="chanel"), "granularity is 'chanel'.*'channel'"),
        (dict(bits=4, granularity=0), "granularity is 0"),
        (dict(bits=4, granularity=None), "granularity is None"),
        (dict(bits=4, mask="rounds"), "mask is 'rounds'.*'rounded'"),
        (dict(bits=4, quantizer=None), "quantizer is None"),
        (dict(bits=4, observer=3), "observer is 3"),
        (dict(bits=4, signed="yes"), "signed is 'yes'"),
        (dict(bits=4, narrow_range="no"), "narrow_range is 'no'"),
        (dict(bits=4, signed=False, narrow_range=True), "narrow_range=True came with signed=False"),
    ],
)
def test_refused_specs(arguments, message):
    with pytest.raises(ValueError, match=message):
        Spec(**arguments)
