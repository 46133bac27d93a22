"""The whole examples of CONTRIBUTING.md work as they stand there."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkd_jax import losses, models, observers, quantizers
from qkd_jax.losses import response
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule, presets, quantize, targets
from qkd_jax.quantize.calibration import calibrate
from qkd_jax.quantize.rules import first_match
from qkd_jax.training import clamping
from qkd_jax.training.hygiene import check as check_hygiene
from qkd_jax.training.hygiene import plan_hygiene

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def blocks(heading: str) -> list[str]:
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)


def block(heading: str) -> str:
    return blocks(heading)[0]


def run(code: str, **names) -> dict:
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(heading: str, name: str, monkeypatch) -> types.ModuleType:
    """The module of an example."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(block(heading), "CONTRIBUTING.md", "exec"), module.__dict__)
    return module


def cases(module: types.ModuleType, test: Callable, name: str) -> Iterator[dict]:
    """The arguments of a contract test that are about one entry of its dict."""
    tables = []
    marks = getattr(module, "pytestmark", [])
    for mark in [
        *getattr(test, "pytestmark", ()),
        *(marks if isinstance(marks, list) else [marks]),
    ]:
        if mark.name == "parametrize":
            given = mark.args[0]
            names = [n.strip() for n in (given.split(",") if isinstance(given, str) else given)]
            rows = [
                getattr(row, "values", row if len(names) > 1 else (row,)) for row in mark.args[1]
            ]
            tables.append([dict(zip(names, row, strict=True)) for row in rows])
    for parts in itertools.product(*tables):
        arguments = {k: v for part in parts for k, v in part.items()}
        if name in (arguments.get("name"), getattr(arguments.get("spec"), "quantizer", None)):
            yield arguments


def meets_contract(contract: str, name: str) -> int:
    """Runs a contract module's tests on a new entry of its dict; returns how many there are."""
    module, count = load(Path(__file__).parent / contract), 0
    for key, test in vars(module).items():
        for arguments in cases(module, test, name) if key.startswith("test_") else ():
            assert set(inspect.signature(test).parameters) == set(arguments), key
            with contextlib.suppress(pytest.skip.Exception):  # says that it does not apply
                test(**arguments)
                count += 1
    return count


@pytest.fixture
def clipped(monkeypatch):
    module = example("Add a quantizer", "qkd_jax.quantizers.clipped", monkeypatch)
    monkeypatch.setitem(quantizers.QUANTIZERS, "clipped", module)
    return module


def test_quantizer(clipped):
    module = clipped
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


@pytest.mark.usefixtures("clipped")
def test_quantizer_meets_the_contract():
    assert meets_contract("quantizers/test_every_quantizer.py", "clipped") > 40


class Three(nn.Module):
    """Three layers with an activation function between them."""

    function: Callable

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = self.function(nn.Dense(4)(x))
        return nn.Dense(3)(x)


@pytest.mark.usefixtures("clipped")
def test_quantizer_is_seen_by_presets_clamps_and_targets():
    stem, _, inner = presets.rules("w2a3:clipped")
    assert (inner.weight, inner.input) == (
        Spec(2, quantizer="lsq"),
        Spec(3, quantizer="clipped", signed=False),
    )
    targets.check([stem, inner], "xla")
    assert clamping.clamps(inner.input, "level") and not clamping.clamps(inner.input, "other")
    # Where a model's inputs may be negative, LSQ takes its place.
    for function, wanted in ((nn.gelu, "lsq"), (nn.relu, "clipped")):
        rules = presets.rules("w2a3:clipped", model=Three(function), images=jnp.ones((2, 4)))
        assert first_match(rules, "Dense_1").input.quantizer == wanted
    hygiene = plan_hygiene("net", {"max_ratio": 4.0}, horizon=1)[0]
    check_hygiene(hygiene, {}, [(inner.input, "level")])


def test_observer_meets_the_contract(monkeypatch):
    module = example("Add an observer", "qkd_jax.observers.sigmas", monkeypatch)
    monkeypatch.setitem(observers.OBSERVERS, "sigmas", module)
    assert meets_contract("observers/test_every_observer.py", "sigmas") > 20


@pytest.fixture
def reverse_kd(monkeypatch):
    """The example's function and its row, where CONTRIBUTING puts them."""
    function, row = blocks("Add a loss")
    loss = run(function, **vars(response))["reverse_kd"]
    table = eval(f"{{{row}}}", {"Loss": losses.Loss, "reverse_kd": loss})
    monkeypatch.setitem(losses.TABLE, "reverse_kd", table["reverse_kd"])
    monkeypatch.setitem(losses.LOSSES, "reverse_kd", loss)
    monkeypatch.setattr(losses, "reverse_kd", loss, raising=False)
    monkeypatch.setattr(losses, "__all__", [*losses.__all__, "reverse_kd"])
    return loss


def test_loss(reverse_kd):
    student = jnp.asarray([[1.0, 2.0, 0.5]])
    assert reverse_kd(student, student).shape == (1,)
    assert abs(float(reverse_kd(student, student)[0])) < 1e-6
    # The reverse divergence is Hinton's with the roles exchanged.
    teacher = jnp.asarray([[0.0, 1.0, 3.0]])
    want = losses.kd(teacher, student, temperature=2.0)
    np.testing.assert_allclose(reverse_kd(student, teacher, temperature=2.0), want, rtol=1e-5)
    contract = load(Path(__file__).parent / "test_docstring_examples.py")
    contract.test_example_runs("loss reverse_kd")


@pytest.mark.usefixtures("reverse_kd")
def test_loss_trains_by_the_config_of_all_losses():
    from configs import feature_kd
    from qkd_jax.experiment import inspect

    config = feature_kd.get_config("loss=reverse_kd")
    rows = config.stages.distil.learn.student
    assert (rows.ce.weight, rows.reverse_kd.weight, rows.reverse_kd.source) == (1.0, 0.5, "teacher")
    assert "student <- 0.5 reverse_kd(temperature=2" in inspect(config, verbose=False)


@pytest.mark.slow
@pytest.mark.usefixtures("reverse_kd")
def test_loss_meets_the_contract():
    assert meets_contract("losses/test_losses.py", "reverse_kd") > 20


def test_model_meets_the_contract(monkeypatch):
    module = example("Add a model", "qkd_jax.models.tiny", monkeypatch)
    monkeypatch.setitem(models.MODELS, "tiny", module.Tiny)
    assert meets_contract("models/test_models.py", "tiny") == 6


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
