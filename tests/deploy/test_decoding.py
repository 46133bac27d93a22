"""Decoding step by step with linen's cache, which is an argument and a result of the step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_nets

import qkd_jax as qk
from qkd_jax import deploy

LENGTH, VOCABULARY = 5, 11
TOKENS = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, VOCABULARY)


class Decoder(nn.Module):
    """A layer of a language model: whole sequences, or a token at a time."""

    decode: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, 8, name="embed")(tokens)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        y = nn.MultiHeadDotProductAttention(2, decode=self.decode, name="attend")(
            nn.LayerNorm()(x), mask=mask
        )
        x = x + y
        x = x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY, name="head")(x)


@functools.cache
def nets(preset):
    """Returns (net of whole sequences, its step, calibrated variables, the empty cache)."""
    rules = qk.presets.rules(preset, model=Decoder(), images=TOKENS)
    net, variables = small_nets.float_net(Decoder(), TOKENS, rules)
    variables = qk.calibrate(net, variables, [TOKENS])
    step = qk.quantize(Decoder(decode=True), rules)
    shapes = jax.eval_shape(step.init, jax.random.key(0), TOKENS)["cache"]
    return net, step, variables, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def decoded(run, cache):
    """Returns the logits of all positions, one step after another."""
    logits = []
    for i in range(LENGTH):
        out, cache = run(TOKENS[:, i : i + 1], cache)
        logits.append(out)
    return np.concatenate(logits, 1)


SLOW = [pytest.param(p, marks=pytest.mark.slow) for p in ("static", "int8_weight_only")]


@pytest.mark.parametrize("preset", ["dynamic", *SLOW])
def test_steps_give_what_the_whole_sequence_gives(preset):
    net, step, variables, cache = nets(preset)
    whole = jax.jit(net.apply)(variables, TOKENS)
    floats = jax.jit(Decoder().apply)({"params": variables["params"]}, TOKENS)
    assert np.abs(whole - floats).max() > 1e-4  # it is quantized

    @jax.jit
    def run(tokens, cache):
        out, new = step.apply({**variables, "cache": cache}, tokens, mutable=["cache"])
        return out, new["cache"]

    found = decoded(run, cache)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    example = {**variables, "cache": cache}, TOKENS[:, :1]
    statuses = {p.status for p in qk.coverage(step, *example, mutable=["cache"]).products}
    wanted = {"weight only", "skipped"} if preset == "int8_weight_only" else {"quantized"}
    assert statuses == wanted


@pytest.mark.parametrize("preset", ["dynamic", SLOW[0]])
def test_a_step_is_converted_with_its_cache(preset, tmp_path):
    net, step, variables, cache = nets(preset)
    example = {**variables, "cache": cache}, TOKENS[:, :1]
    with pytest.raises(ValueError, match=r"one batch axis of one size.*any_batch=False"):
        qk.convert(step, *example, mutable=["cache"])
    integer = qk.convert(step, *example, any_batch=False, mutable=["cache"])
    whole = jax.jit(net.apply)(variables, TOKENS)

    def run(tokens, cache):
        out, new = qk.integer_apply(integer, (tokens, {"cache": cache}))
        return out, new["cache"]

    np.testing.assert_allclose(decoded(run, cache), whole, rtol=1e-5, atol=1e-5)
    deploy.save_stablehlo(integer, tmp_path / "hlo", platforms=["cpu"])
    module = deploy.load_stablehlo(tmp_path / "hlo")
    first = TOKENS[:, :1], {"cache": cache}
    wanted, got = qk.integer_apply(integer, first), module(*jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(wanted))
    pytest.importorskip("onnxruntime")
    path = tmp_path / "step.onnx"
    deploy.to_onnx(step, *example, path, any_batch=False, mutable=["cache"])
    session = deploy.onnx_session(path)
    names = [i.name for i in session.get_inputs()]
    outputs = [np.asarray(a) for a in jax.tree.leaves(cache)]
    structure = jax.tree.structure(cache)

    def run(tokens, cache):
        arrays = [np.asarray(tokens), *map(np.asarray, jax.tree.leaves(cache))]
        out, *new = session.run(None, dict(zip(names, arrays, strict=True)))
        return out, structure.unflatten(new)

    assert len(outputs) == 3
    np.testing.assert_allclose(decoded(run, cache), whole, rtol=1e-4, atol=1e-4)


def test_without_its_cache_a_step_is_refused():
    _, step, variables, cache = nets("dynamic")
    with pytest.raises(ValueError, match=r"writes .*'cache'.*mutable=\['cache'\]"):
        qk.convert(step, {**variables, "cache": cache}, TOKENS[:, :1], any_batch=False)
