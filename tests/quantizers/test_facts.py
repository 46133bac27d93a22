"""A new quantizer is no second class: a twin of one, under another name, is treated as it is."""

import dataclasses
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

import qkd_jax as qk
from qkd_jax import ptq, quantizers
from qkd_jax.numerics import Spec
from qkd_jax.quantize import presets, targets
from qkd_jax.quantizers import QUANTIZERS, is_uniform
from qkd_jax.training import clamping, hygiene


def renamed(value, name):
    """A value with the name of a quantizer, wherever it stands, replaced by "twin"."""
    if isinstance(value, dict):
        return {k: renamed(v, name) for k, v in value.items()}
    return "twin" if value == name else value


@pytest.fixture(params=QUANTIZERS)
def name(request, monkeypatch):
    """The name of a quantizer that has a twin."""
    twin = types.ModuleType("qkd_jax.quantizers.twin")
    twin.__dict__.update(vars(QUANTIZERS[request.param]))
    monkeypatch.setitem(QUANTIZERS, "twin", twin)
    is_uniform.cache_clear()
    return request.param


def specs(name):
    return [spec for spec in tried(name) if spec is not None]


def tried(name):
    for bits in (1, 2, 4, 8):
        for signed in (True, False):
            for static in ({}, {"static": True}):
                try:
                    spec = Spec(bits, quantizer=name, signed=signed, options=static)
                    quantizers.check(spec)
                    yield spec
                except ValueError:
                    pass


def outcome(function, *args, **kwargs):
    """What a call returns, or the message with which it refuses."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        return str(error)


def test_a_twin_has_the_same_presets(name):
    for bits in "w1a1", "w2a2", "w4a4", "w4a6", "w8a8":
        both = [
            outcome(presets.low_bit, int(bits[1]), int(bits[3]), quantizer=q)
            for q in (name, "twin")
        ]
        assert [renamed(rule, name) for rule in both[0][2:]] == list(both[1][2:])
        texts = [outcome(presets.rules, f"{bits}:{q}") for q in (name, "twin")]
        assert isinstance(texts[0], str) == isinstance(texts[1], str)


def test_a_twin_is_clamped_annealed_and_fits_engines(name):
    for spec in specs(name):
        twin = dataclasses.replace(spec, quantizer="twin")
        assert is_uniform(spec) == is_uniform(twin)
        assert quantizers.code_format(spec) == quantizers.code_format(twin)
        for parameter in (
            "step",
            "alpha",
            "log2_threshold",
            "lower",
            "gain",
            "center",
            "temperature",
        ):
            assert clamping.clamps(spec, parameter) == clamping.clamps(twin, parameter)
            anneal = hygiene.Hygiene(anneal=(parameter,))
            found = [outcome(hygiene.check, anneal, {}, [(s, parameter)]) for s in (spec, twin)]
            assert [text is None for text in found] == [found[0] is None] * 2
        for target in targets.TARGETS:
            found = [
                outcome(targets.check, [qk.Rule(".*", weight=s)], target) for s in (spec, twin)
            ]
            assert found[0] == (found[1] and found[1].replace("'twin'", repr(name)))


def test_a_twin_is_reconstructed(name):
    x = np.random.default_rng(0).normal(0, 1, (8, 4)).astype(np.float32)
    results = []
    for quantizer in (name, "twin"):
        bits = {"binary": 1, "ternary": 2}.get(name, 4)
        sign = {"signed": False, "symmetric": True} if name == "pact" else {}
        rules = [qk.Rule(".*", weight=Spec(bits, quantizer=quantizer, **sign), input=Spec(8))]
        net = qk.quantize(nn.Dense(2), rules)
        variables = jax.tree.map(abs, net.init(jax.random.key(0), x))  # pact takes no other weights
        variables = qk.calibrate(net, variables, [x])
        results.append(outcome(ptq.adaround, net, variables, [x], steps=2))
    if isinstance(results[0], str):
        assert isinstance(results[1], str) and "learns roundings" in results[1]
    else:
        jax.tree.map(np.testing.assert_array_equal, *results)
