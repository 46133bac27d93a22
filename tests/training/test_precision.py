"""bfloat16 activations over float32 masters: exact codes, float32 state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_nets

from qkd_jax.deploy import convert
from qkd_jax.deploy.integer.pack import pack
from qkd_jax.models import BorrowedClassifier, create
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.training import frozen_variables, make_step, plan_step, start_state
from qkd_jax.training.precision import computing_in

WEIGHT = Spec(4, quantizer="lsq", granularity="channel")


@pytest.fixture(scope="module")
def nets():
    """A W4A4 student and a float teacher, calibrated in float32."""
    images = tiny_nets.batch(9)["image"]
    rules = [Rule(".*", weight=WEIGHT, input=Spec(4, quantizer="lsq"))]
    student = quantize(create("mlp", 3, hidden=(12, 12), batch_norm=True), rules)
    teacher = quantize(create("mlp", 3, hidden=(24,)))
    start = calibrate(student, student.init(jax.random.key(0), images), [images])
    variables = {"student": start, "teacher": teacher.init(jax.random.key(1), images)}
    return {"student": student, "teacher": teacher}, variables


def plan_of(modules, compute):
    learn = {"student": {"ce": {}, "kd": {"source": "teacher", "temperature": 2.0}}}
    return plan_step(modules, learn, {"student": tiny_nets.OPTIM}, horizon=9, compute=compute)


def weight_codes(net, variables, images):
    codes = {}

    def watch(path, operand, x, x_hat, spec, params):
        if operand == "weight":
            assert x.dtype == jnp.float32  # the master
            codes[path] = np.rint(np.asarray(x_hat) / np.asarray(params["step"]))

    net.apply(variables, images, train=False, watch=watch)
    return codes


def test_a_step_keeps_float32_and_trains_what_is_deployed(nets):
    modules, variables = nets
    ends = {}
    for compute in ("", "bfloat16"):
        plan = plan_of(modules, compute)
        step = jax.jit(make_step(plan.structure))
        state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
        losses = []
        for index in range(3):
            state, metrics = step(state, tiny_nets.batch(index), frozen)
            losses.append(float(metrics["net0"]["loss"]))
        assert metrics["finite"] and metrics["net0"]["loss"].dtype == jnp.float32
        types = {leaf.dtype for leaf in jax.tree.leaves((state.nets, state.opt))}
        assert types == {np.dtype(np.float32), np.dtype(np.int32)}
        ends[compute] = plan, state, losses
    plan, state, losses = ends["bfloat16"]
    # From one state: activations have 8 bits, of which three layers and a norm lose some.
    assert losses[0] == pytest.approx(ends[""][2][0], rel=2**-6)
    assert losses[0] != ends[""][2][0]

    images, trained = tiny_nets.batch(7)["image"], state.nets["net0"]
    half = plan.learner("student").net
    own = weight_codes(half, trained, images)
    assert set(own) == {"dense1", "dense2", "head"}
    deployed = convert(modules["student"], trained, images, train=False)
    for path, codes in weight_codes(modules["student"], trained, images).items():
        np.testing.assert_array_equal(own[path], codes)
        kernel = np.asarray(trained["params"][path]["kernel"], np.float64)
        size = np.asarray(trained["quant"][path]["weight_quantizer"]["step"], np.float64)
        np.testing.assert_array_equal(codes, np.clip(np.rint(kernel / size), -8, 7))
        packed = np.asarray(pack(codes.astype(np.int8), WEIGHT.format)).ravel()
        leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(deployed)]
        assert any(np.array_equal(leaf, packed) for leaf in leaves), path


def test_the_modules_inside_a_model_follow():
    body = create("resnet8", 3, width=4)
    net = quantize(BorrowedClassifier(body, 3, features=8))
    half = computing_in("bfloat16", "net", net)
    assert half.model.dtype == half.model.body.dtype == jnp.bfloat16
    assert net.model.dtype is None and net.model.body.dtype is None
    assert computing_in("", "net", net) is net


class Plain(nn.Module):
    """No field `dtype`."""

    @nn.compact
    def __call__(self, images):
        """Returns logits."""
        return nn.Dense(3)(images.reshape(images.shape[0], -1))


def test_what_is_refused(nets):
    modules, _ = nets
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        plan_of(modules, "bfloat")
    plain = quantize(Plain())
    with pytest.raises(ValueError, match="net 'teacher', Plain, has no field `dtype`"):
        plan_of({**modules, "teacher": plain}, "bfloat16")
    plan_of({**modules, "idle": plain}, "bfloat16")  # takes no part in the stage
