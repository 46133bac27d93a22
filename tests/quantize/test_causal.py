"""Dynamic ranges on causal nets: nothing sees the future, and a decoder computes the same."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax.quantize import presets

TOKENS = jax.random.randint(jax.random.key(1), (3, 6), 0, 20)


class Language(nn.Module):
    """One block of causal attention, for whole sequences or token by token."""

    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(20, 16, name="table")(tokens)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        attention = nn.MultiHeadDotProductAttention(2, decode=self.decode, name="attention")
        return nn.Dense(20, name="head")(h + attention(h, mask=mask))


class Waves(nn.Module):
    """Causal convolutions over [batch, time, features], up to a window of one and upwards again."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(8, (3,), padding="CAUSAL", name="causal")(x))
        x = nn.gelu(nn.Conv(8, (1,), name="point")(x))
        x = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
        x = nn.gelu(nn.Conv(8, (3,), padding="VALID", name="padded")(x))
        x = nn.ConvTranspose(8, (2,), strides=(2,), padding="VALID", name="up")(x)
        return nn.Dense(3, name="head")(x)


def calibrated(preset, model, inputs):
    net = qk.quantize(model, presets.rules(preset, model=model, images=inputs))
    return net, qk.calibrate(net, jax.jit(model.init)(jax.random.key(0), inputs), [inputs])


@functools.cache
def language(preset):
    return calibrated(preset, Language(), TOKENS)


@pytest.mark.parametrize(
    "preset", ["dynamic", pytest.param("w4a4:dynamic", marks=pytest.mark.slow)]
)
def test_a_language_model_decodes_what_it_computes_for_the_whole_sequence(preset):
    net, variables = language(preset)
    apply = jax.jit(net.apply)
    whole = apply(variables, TOKENS)
    assert np.abs(whole - Language().apply(variables, TOKENS)).max() > 1e-4  # it is quantized
    later = apply(variables, TOKENS.at[:, 3:].set((TOKENS[:, 3:] + 7) % 20))
    np.testing.assert_array_equal(later[:, :3], whole[:, :3])

    model = Language(decode=True)
    decoder = qk.quantize(model, net.rules)
    cache = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)["cache"],
    )
    decode = jax.jit(lambda cache, t: decoder.apply({**variables, **cache}, t, mutable=["cache"]))
    cache = {"cache": cache}
    for step in range(TOKENS.shape[1]):
        logits, cache = decode(cache, TOKENS[:, step : step + 1])
        np.testing.assert_allclose(logits[:, 0], whole[:, step], atol=1e-5, err_msg=str(step))


def test_each_value_of_attention_has_a_range_of_its_own():
    net, variables = language("dynamic")
    found = {}

    def watch(path, operand, x, x_hat, spec, params):
        found[path, operand] = x, params

    _, found = jax.jit(lambda v, t: (net.apply(v, t, watch=watch), found))(variables, TOKENS)
    values, params = found["attention/weights_value", "other"]  # [batch, time, heads, depth]
    lo, hi = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    np.testing.assert_allclose(params["scale"][..., 0], (hi - lo) / 255, rtol=1e-6)
    assert found["attention/query_key", "other"][1]["scale"].shape == (3, 6, 2, 1)
    assert found["attention/weights_value", "input"][1]["scale"].shape == (3, 2, 6, 1)


def test_a_causal_convnet_does_not_see_its_future():
    x = jax.random.normal(jax.random.key(2), (2, 7, 4))
    net, variables = calibrated("dynamic", Waves(), x)
    assert {p.status for p in qk.coverage(net, variables, x).products} == {"quantized"}
    apply = jax.jit(net.apply)
    whole, later = (apply(variables, a) for a in (x, x.at[:, 4:].multiply(9.0)))
    np.testing.assert_array_equal(whole[:, :8], later[:, :8])
    assert np.abs(whole[:, 8:] - later[:, 8:]).max() > 1


@pytest.mark.parametrize("granularity", ["token", "example", "tensor"])
def test_a_wider_range_sees_what_it_is_asked_to_see(granularity):
    x = jax.random.normal(jax.random.key(2), (2, 7, 4))
    spec = qk.Spec(4, dynamic=True, granularity=granularity)
    net = qk.quantize(nn.Dense(3), [qk.Rule(".*", input=spec)])
    variables = qk.calibrate(net, net.init(jax.random.key(0), x), [x])
    first, later, other = (
        net.apply(variables, a) for a in (x, x.at[0, 4:].multiply(9.0), x.at[1].multiply(9.0))
    )
    assert np.array_equal(first[0, :4], later[0, :4]) == (granularity == "token")
    assert np.array_equal(first[0], other[0]) == (granularity != "tensor")


@pytest.mark.parametrize(
    "options",
    [
        dict(mask=jnp.ones((3, 3, 2, 4)).at[2].set(0).at[1, 1:].set(0)),
        dict(padding=((2, 0), (1, 1))),
        dict(padding=((1, 1), (4, 0)), kernel_dilation=(1, 2)),
    ],
)
def test_a_causal_convolution_of_images_is_refused_by_name(options):
    model, x = nn.Sequential([nn.Conv(4, (3, 3), **options)]), jnp.ones((2, 5, 5, 2))
    spec = dict(bits=8, dynamic=True)
    rules = [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(**spec, granularity="token"))]
    with pytest.raises(ValueError, match=r"causal convolution 'layers_0'.*dynamic=False"):
        qk.quantize(model, rules).init(jax.random.key(0), x)
    rules = [qk.Rule(".*", weight=qk.Spec(8), input=qk.Spec(**spec, granularity="example"))]
    qk.quantize(model, rules).init(jax.random.key(0), x)
