"""What a block's backward pass computes again: equal numbers, fewer arrays between the passes."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_nets

from qkd_jax.models import BorrowedClassifier, create
from qkd_jax.models.features import sow_feature
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.training import make_step, plan_step, start_state
from qkd_jax.training.objective import total_loss
from qkd_jax.training.rematerialisation import has_blocks
from qkd_jax.training.state import split


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU, dropout, and the input added."""

    @nn.compact
    def __call__(self, x, train):
        """Returns a map of the shape of x."""
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(y))
        sow_feature(self, "inner", y)
        return x + nn.Dropout(0.2, deterministic=not train)(y)


class Blocks(nn.Module):
    """A stem, two blocks, a head."""

    @nn.compact
    def __call__(self, images, train=False):
        """Returns logits [batch, 3]."""
        x = nn.Conv(4, (3, 3), name="stem")(images)
        for index in range(2):
            x = Block(name=f"block{index}")(x, train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def prepared():
    lsq = Spec(4, quantizer="lsq")
    first = Rule("block0/.*", weight=Spec(4, rounding="stochastic"), input=lsq)
    net = quantize(Blocks(), [first, Rule(".*", weight=tiny_nets.RULES[0].weight, input=lsq)])
    images = tiny_nets.batch(99)["image"]
    return net, calibrate(net, net.init(jax.random.key(0), images), [images])


def plan_of(net, remat):
    learn = {"net": {"ce": {}}}
    return plan_step({"net": net}, learn, {"net": tiny_nets.OPTIM}, horizon=9, remat=remat)


def test_the_step_is_the_same(prepared):
    net, variables = prepared
    results = {}
    for remat in ("none", "products", "blocks"):
        plan = plan_of(net, remat)
        step = jax.jit(make_step(plan.structure))
        results[remat] = step(start_state(plan, {"net": variables}), tiny_nets.batch(), {})
    for remat in ("products", "blocks"):
        new, metrics = results[remat]
        want, want_metrics = results["none"]
        # Statistics, dropout's masks and stochastic rounding are among what must be drawn alike.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), new.nets, want.nets
        )
        np.testing.assert_allclose(metrics["net0"]["loss"], want_metrics["net0"]["loss"], rtol=1e-6)


def test_less_is_kept_for_the_backward_pass(prepared):
    net, variables = prepared
    batch = tiny_nets.batch(rows=64)
    kept = {}
    for remat in ("none", "products", "blocks"):
        plan = plan_of(net, remat)
        state = start_state(plan, {"net": variables})
        learned, carried = split(state.nets["net0"])

        def loss(learned, plan=plan, state=state, carried=carried):
            return total_loss(
                plan.structure, {"net0": learned}, {"net0": carried}, state, batch, {}
            )[0]

        # The function that `vjp` returns is a tree of the arrays that it keeps.
        arrays = jax.eval_shape(lambda learned, loss=loss: jax.vjp(loss, learned)[1], learned)
        examples = [a for a in jax.tree.leaves(arrays) if a.shape[:1] == (64,)]
        kept[remat] = sum(a.size * a.dtype.itemsize for a in examples)
    assert kept["blocks"] < kept["products"] < kept["none"], kept


def test_nets_that_have_blocks(prepared):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    assert has_blocks(prepared[0], tiny_nets.batch()["image"])
    sizes = {"resnet8": {"width": 4}, "vit": {}, "mobilenet_v2": {}, "mlp": {"hidden": (4,)}}
    found = {name: has_blocks(quantize(create(name, 3, **f)), images) for name, f in sizes.items()}
    assert found == dict.fromkeys(sizes, True) | {"mlp": False}
    assert has_blocks(quantize(BorrowedClassifier(create("resnet8", 3, width=4), 3, 8)), images)


def test_unknown_remat(prepared):
    with pytest.raises(ValueError, match="Did you mean 'blocks'"):
        plan_of(prepared[0], "block")
