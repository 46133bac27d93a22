"""Nets, batches and plans small enough that a compiled step costs seconds and runs milliseconds."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np

from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.training import plan_step

OPTIM = {"lr": 0.05, "weight_decay": 1e-4}
RULES = (
    Rule(
        "stem|conv|head",
        weight=Spec(4, quantizer="lsq", granularity="channel"),
        input=Spec(4, quantizer="lsq"),
    ),
)


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm and a linear head."""

    width: int = 4

    @nn.compact
    def __call__(self, images, train=False):
        """Returns logits [batch, 3]."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(
            norm(name="bn1")(nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(images))
        )
        x = nn.relu(norm(name="bn2")(nn.Conv(self.width, (3, 3), use_bias=False, name="conv")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Mlp(nn.Module):
    """No BatchNorm, no `train` argument; dropout where asked for."""

    width: int = 5
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, deterministic=False):
        """Returns logits [batch, 3]."""
        x = nn.relu(nn.Dense(self.width, name="hidden")(images.reshape(images.shape[0], -1)))
        x = nn.Dropout(self.dropout, deterministic=deterministic, name="drop")(x)
        return nn.Dense(3, name="head")(x)


def batch(seed: int = 0, rows: int = 16) -> dict[str, np.ndarray]:
    """One batch of noise."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(rows, 6, 6, 1)).astype(np.float32),
        "label": rng.integers(0, 3, rows).astype(np.int32),
        "index": np.arange(rows),
    }


@functools.cache
def conv_nets():
    """({net: module}, {net: variables}): quantized student and its twin, float teacher."""
    student, twin, teacher = (
        quantize(ConvNet(), RULES),
        quantize(ConvNet(), RULES),
        quantize(ConvNet(6)),
    )
    images = batch(99)["image"]
    init = jax.jit(lambda key, images: student.init(key, images))
    of_student = calibrate(student, init(jax.random.key(0), images), [images])
    of_teacher = jax.jit(lambda key, images: teacher.init(key, images))(jax.random.key(1), images)
    modules = {"student": student, "qat_only": twin, "teacher": teacher}
    return modules, {"student": of_student, "qat_only": of_student, "teacher": of_teacher}


@functools.cache
def mlps():
    """({net: module}, {net: variables}) of three float MLPs, two of them alike."""
    modules = {"a": quantize(Mlp(5)), "b": quantize(Mlp(7)), "c": quantize(Mlp(7))}
    keys = {"a": 0, "b": 1, "c": 2}
    images = batch()["image"]
    return modules, {
        net: module.init(jax.random.key(keys[net]), images) for net, module in modules.items()
    }


def co_study_plan(horizon: int = 100):
    """Student and teacher learn from each other."""
    modules, _ = conv_nets()
    learn = {
        net: {"ce": {}, "kd": {"source": other, "temperature": 2.0}}
        for net, other in (("student", "teacher"), ("teacher", "student"))
    }
    return plan_step(modules, learn, {net: OPTIM for net in learn}, horizon=horizon)
