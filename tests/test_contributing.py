"""The whole examples of CONTRIBUTING.md work as they stand there."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import losses, quantizers
from qkd_jax.losses import response
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, quantize
from qkd_jax.quantize.calibration import calibrate

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def block(heading: str) -> str:
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)[0]


def run(code: str, **names) -> dict:
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quantizer(monkeypatch):
    module = types.ModuleType("qkd_jax.quantizers.clipped")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block("Add a quantizer"), "CONTRIBUTING.md", "exec"), module.__dict__)
    monkeypatch.setitem(quantizers.QUANTIZERS, "clipped", module)
    import flax.linen as nn

    rule = Rule(".*", weight=Spec(4), input=Spec(2, quantizer="clipped", signed=False))
    net = quantize(nn.Dense(3), [rule])
    x = jnp.asarray([[0.2, 0.9, 3.0], [0.0, 1.4, 2.0]])
    variables = calibrate(net, net.init(jax.random.key(0), x), [x])
    level = variables["quant"]["input_quantizer"]["level"]
    assert float(level) == 3.0
    # Level 2, codes 0..3 of 2/3 each; PACT's level gradient counts the elements at or above it.
    got = module.fake_quant(x, {"level": jnp.float32(2)}, rule.input)
    want = np.asarray([[0, 2 / 3, 2], [0, 4 / 3, 2]])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    grad = jax.grad(lambda v: module.fake_quant(x, {"level": v}, rule.input).sum())(jnp.float32(2))
    assert float(grad) == 2.0
    assert np.isfinite(net.apply(variables, x)).all()


def added_loss() -> Callable[..., jax.Array]:
    return run(block("Add a loss"), **vars(response))["reverse_kd"]


def test_loss():
    reverse_kd = added_loss()
    student = jnp.asarray([[1.0, 2.0, 0.5]])
    assert reverse_kd(student, student).shape == (1,)
    assert abs(float(reverse_kd(student, student)[0])) < 1e-6
    # The reverse divergence is Hinton's with the roles exchanged.
    teacher = jnp.asarray([[0.0, 1.0, 3.0]])
    want = losses.kd(teacher, student, temperature=2.0)
    np.testing.assert_allclose(reverse_kd(student, teacher, temperature=2.0), want, rtol=1e-5)


@pytest.mark.slow
def test_loss_meets_the_contract(monkeypatch):
    contract = load(Path(__file__).parent / "losses" / "test_losses.py")
    monkeypatch.setitem(losses.LOSSES, "reverse_kd", added_loss())
    monkeypatch.setitem(losses.TABLE, "reverse_kd", losses.Loss(losses.LOSSES["reverse_kd"]))
    monkeypatch.setattr(losses, "reverse_kd", losses.LOSSES["reverse_kd"], raising=False)
    monkeypatch.setattr(losses, "__all__", [*losses.__all__, "reverse_kd"])
    tried = 0
    for name, test in vars(contract).items():
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["name"]:
            with contextlib.suppress(pytest.skip.Exception):
                test("reverse_kd")
                tried += 1
    assert tried > 10


def test_model():
    tiny = run(block("Add a model"), __name__=__name__)["Tiny"]
    images = jnp.ones((2, 8, 8, 1))
    variables = tiny(num_classes=5).init(jax.random.key(0), images)
    assert tiny(num_classes=5).apply(variables, images).shape == (2, 5)


def test_data_set_meets_the_contract(monkeypatch, tmp_path):
    from qkd_jax import data

    entry = eval("{" + block("Add a data set") + "}", vars(data))
    ((name, source),) = entry.items()
    monkeypatch.setitem(data.DATASETS, name, source)
    contract = load(Path(__file__).parent / "data" / "test_load.py")
    contract.test_every_data_set_loads_or_says_how_to_prepare_it(name, tmp_path)
    contract.test_every_recipe_can_be_followed(name)
    config = run(block("Add an experiment"))["get_config"](f"data={name}")
    assert config.data.augment == source.recipe.augment and config.data.train_examples == 0


def test_experiment():
    from qkd_jax.experiment import inspect

    config = run(block("Add an experiment"))["get_config"]("epochs=1.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[1])
        inspect(config)
