"""Factors of the learning rate by layer: a ViT's by hand, and what is refused."""

import jax
import numpy as np
import pytest

from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.training import layer_rates, optim, plan_step, start_state
from qkd_jax.training.state import jit_once
from qkd_jax.trees import flatten

DEPTHS = {"stem": 0, "positions": 0, "token": 0, "block0": 1, "block1": 2, "norm": 3, "head": 3}


def vit():
    net = quantize(create("vit", 3, patch=4, depth=2, width=8, heads=2, pool="class"))
    return net, jit_once(net.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))


def moved(variables, **fields):
    """{path: step of one SGD update with all gradients 1, in rates}."""
    plain = dict(lr=0.5, momentum=0.0, nesterov=False, schedule="constant")
    structure, hyper = optim.plan_optimizer("net", plain | fields, 10)
    state = optim.init_optimizer(structure, variables)
    grads = jax.tree.map(np.ones_like, variables)
    new, _, _ = optim.update_optimizer(structure, hyper, grads, state, variables)
    steps = jax.tree.map(lambda old, new: np.mean(np.asarray(old) - new) / 0.5, variables, new)
    return flatten(steps)


def test_rates_of_a_vit_fall_towards_its_input():
    _, variables = vit()
    found = moved(variables, layer_decay=0.6)
    assert {path.split("/")[1] for path in found} == set(DEPTHS)
    for path, step in found.items():
        assert step == pytest.approx(0.6 ** (3 - DEPTHS[path.split("/")[1]]), rel=1e-4), path


def test_the_first_pattern_decides_and_multiplies_the_decay_by_depth():
    _, variables = vit()
    variables = {
        **variables,
        "quant": {"stem": {"weight_quantizer": {"step": np.ones(1, np.float32)}}},
    }
    patterns = ("block0/attention/query:3", ("block0", 0.5), "stem:0.25", "positions:0")
    found = moved(variables, layer_rates=patterns, layer_decay=0.5)
    for path, wanted in {
        "params/block0/attention/query/kernel": 3 * 0.25,
        "params/block0/attention/key/kernel": 0.5 * 0.25,
        "params/stem/bias": 0.25 * 0.125,
        "quant/stem/weight_quantizer/step": 0.25 * 0.125,
        "params/positions": 0,
        "params/head/kernel": 1,
    }.items():
        assert found[path] == pytest.approx(wanted, rel=1e-4, abs=1e-6), path


def test_blocks_are_counted_in_the_order_of_their_numbers():
    names = ("stage10_block0", "stage2_block1", "stage2_block0", "dense1_bn", "dense1", "head")
    tree = {"params": {name: {"kernel": np.ones(1)} for name in names}}
    found, last = layer_rates.depths(tree, ("stem.*",))
    assert [found[name] for name in names] == [4, 3, 2, 1, 1, 5] and last == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_rates": ("stm:0.5",)}, r"optim\.net\.layer_rates 'stm' matches no layer.*'stem'"),
        ({"layer_rates": (".*:1", "stem:0")}, "'stem' never decides"),
        ({"layer_decay": 0.5, "layer_stem": (".*",)}, "layer_decay needs blocks with numbers"),
        ({"name": "muon", "adam_layers": ("haed",)}, "adam_layers 'haed' matches no layer.*'head'"),
    ],
)
def test_patterns_that_do_nothing_are_refused(fields, message):
    net, variables = vit()
    plan = plan_step({"net": net}, {"net": {"ce": {}}}, {"net": {"lr": 0.1} | fields}, horizon=9)
    with pytest.raises(ValueError, match=message):
        start_state(plan, {"net": variables})
