"""The step: who learns from whom, gradients, statistics, metrics, and what shares a compilation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_nets

from qkd_jax.distillation.forward import mode_arguments
from qkd_jax.losses import ce, kd
from qkd_jax.quantize import quantize
from qkd_jax.training import (
    StepCache,
    eval_step,
    frozen_variables,
    locate_nonfinite,
    make_step,
    name_metrics,
    plan_step,
    start_state,
)

# One step of this moves every parameter by minus its gradient.
PLAIN = {"lr": 1.0, "momentum": 0.0, "schedule": "constant"}


def leaves_close(one, two, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)


def test_all_gradients_from_one_call_equal_each_net_alone():
    modules, variables = tiny_nets.mlps()
    learn = {
        "a": {
            "ce": {"weight": 0.7, "label_smoothing": 0.1},
            "from_b": {"loss": "kd", "source": "b", "weight": 0.5, "temperature": 2.0},
            "from_c": {"loss": "kd", "source": "c", "weight": 2.0},
        },
        "b": {"ce": {}, "kd": {"source": "a", "temperature": 3.0}},
    }
    plan = plan_step(modules, learn, {"a": PLAIN, "b": PLAIN}, horizon=10)
    batch = tiny_nets.batch()
    state = start_state(plan, variables)
    new, metrics = jax.jit(make_step(plan.structure))(
        state, batch, frozen_variables(plan, variables)
    )

    x, y = batch["image"], batch["label"]
    logits = {net: modules[net].apply(variables[net], x) for net in modules}

    def loss_of_a(params):
        own = modules["a"].apply({"params": params}, x)
        terms = 0.7 * ce(own, y, label_smoothing=0.1) + 0.5 * kd(own, logits["b"], temperature=2.0)
        return jnp.mean(terms + 2.0 * kd(own, logits["c"], temperature=4.0))

    def loss_of_b(params):
        own = modules["b"].apply({"params": params}, x)
        return jnp.mean(ce(own, y) + kd(own, logits["a"], temperature=3.0))

    named = name_metrics(plan, metrics)
    for net, loss in (("a", loss_of_a), ("b", loss_of_b)):
        value, grads = jax.jit(jax.value_and_grad(loss))(variables[net]["params"])
        moved = jax.tree.map(lambda p, g: p - g, variables[net]["params"], grads)
        leaves_close(new.nets[plan.slots[net]]["params"], moved, rtol=1e-5, atol=1e-6)
        assert named[net]["loss"] == pytest.approx(float(value), rel=1e-5)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        assert named[net]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    top1 = np.mean(np.argmax(logits["a"], -1) == y)
    assert named["a"]["top1"] == pytest.approx(top1)
    plain = float(jnp.mean(kd(logits["a"], logits["c"], temperature=4.0)))
    assert named["a"]["from_c"] == pytest.approx(plain, rel=1e-5)
    assert set(named["a"]) == {
        *("loss", "top1", "ce", "from_b", "from_c"),
        *("lr", "quant_lr", "grad_norm"),
    }


@pytest.fixture(scope="module")
def cache():
    return StepCache(devices=jax.devices()[:1])


def test_learners_update_statistics_and_quantizers_and_the_frozen_stay(cache):
    modules, variables = tiny_nets.conv_nets()
    learn = {"student": {"ce": {}, "kd": {"source": "teacher"}}}
    plan = plan_step(modules, learn, {"student": tiny_nets.OPTIM}, horizon=10)
    frozen = jax.tree.map(jnp.array, frozen_variables(plan, variables))
    before = jax.device_get(frozen)
    state = start_state(plan, variables, step=5)
    state, metrics = cache.get(plan)(state, tiny_nets.batch(), frozen)
    assert bool(metrics["finite"]) and state.step == 6 and state.opt["net0"]["position"] == 1
    leaves_close(frozen, before, rtol=0)
    for name in ("params", "batch_stats", "quant"):
        old, new = variables["student"][name], state.nets["net0"][name]
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), old, new)
        assert all(jax.tree.leaves(changed)), name


def test_teacher_runs_in_evaluation_mode(cache):
    modules, variables = tiny_nets.conv_nets()
    learn = {"student": {"kd": {"source": "teacher", "temperature": 1.0}}}
    plan = plan_step(modules, learn, {"student": tiny_nets.OPTIM}, horizon=10)
    batch = tiny_nets.batch()
    _, metrics = cache.get(plan)(
        start_state(plan, variables), batch, frozen_variables(plan, variables)
    )
    own, _ = modules["student"].apply(
        variables["student"], batch["image"], train=True, mutable=["batch_stats"]
    )
    teach = modules["teacher"].apply(variables["teacher"], batch["image"])
    want = float(jnp.mean(kd(own, teach, temperature=1.0)))
    assert name_metrics(plan, metrics)["student"]["kd"] == pytest.approx(want, rel=1e-4)


def test_arms_that_differ_in_names_and_numbers_share_one_compiled_step():
    modules, variables = tiny_nets.conv_nets()
    cache = StepCache(devices=jax.devices()[:1])
    numbers = [{"lr": 0.05}, {"lr": 0.1, "quant_lr": 0.01, "weight_decay": 1e-3, "warmup": 4}]
    arms = [
        ({"student": {"ce": {}}}, numbers[0], 30),  # self-study
        ({"qat_only": {"labels": {"loss": "ce", "weight": 0.5}}}, numbers[1], 200),  # its control
        ({"student": {"ce": {}, "kd": {"source": "teacher", "temperature": 2.0}}}, numbers[0], 30),
        (
            {
                "qat_only": {
                    "kd": {"source": "teacher", "weight": 3.0},
                    "ce": {"label_smoothing": 0.1},
                }
            },
            {**numbers[1], "clip_norm": 1.0},
            70,
        ),
    ]
    for learn, fields, horizon in arms:
        plan = plan_step(modules, learn, dict.fromkeys(learn, fields), horizon=horizon)
        state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
        compiled = cache.get(plan)
        for index in range(2):
            state, metrics = compiled(state, tiny_nets.batch(index), frozen)
        # The second step of every arm, whatever was compiled first, has its own numbers.
        lr = name_metrics(plan, metrics)[plan.learners[0]]["lr"]
        warmup, factor = fields.get("warmup", 1), (1 + np.cos(np.pi / horizon)) / 2
        want = fields["lr"] * (factor if warmup == 1 else 2 / warmup)
        assert lr == pytest.approx(want, rel=1e-5)
    assert len(cache) == 2
    assert cache.traces == 2


class Counted(nn.Module):
    """Counts how often it is called while tracing."""

    calls: tuple = dataclasses.field(default=(), hash=False, compare=False)

    @nn.compact
    def __call__(self, images):
        COUNTS.append(images.shape)
        return nn.Dense(3)(images.reshape(images.shape[0], -1))


COUNTS: list = []


def test_each_net_runs_forward_once_in_co_study():
    nets = {"a": quantize(Counted()), "b": quantize(Counted())}
    batch = tiny_nets.batch()
    variables = {
        net: module.init(jax.random.key(0), batch["image"]) for net, module in nets.items()
    }
    learn = {"a": {"ce": {}, "kd": {"source": "b"}}, "b": {"ce": {}, "dml": {"source": "a"}}}
    plan = plan_step(nets, learn, dict.fromkeys(learn, PLAIN), horizon=10)
    COUNTS.clear()
    jax.make_jaxpr(make_step(plan.structure))(start_state(plan, variables), batch, {})
    assert len(COUNTS) == 2


def test_masked_rows_count_nowhere():
    modules, variables = tiny_nets.mlps()
    learn = {"a": {"ce": {}, "kd": {"source": "b"}}}
    plan = plan_step(modules, learn, {"a": PLAIN}, horizon=10)
    frozen = frozen_variables(plan, variables)
    step = jax.jit(make_step(plan.structure))
    small = tiny_nets.batch(rows=6)
    padded = {
        "image": np.concatenate([small["image"], np.full((2, 6, 6, 1), np.nan, np.float32)]),
        "label": np.concatenate([small["label"], np.zeros(2, np.int32)]),
        "mask": np.arange(8) < 6,
    }
    # NaN images reach the kernels' gradients as 0 * NaN; finite padding is the loader's promise.
    padded["image"] = np.nan_to_num(padded["image"], nan=3.0)
    one, m1 = step(start_state(plan, variables), small, frozen)
    two, m2 = step(start_state(plan, variables), padded, frozen)
    leaves_close(one.nets, two.nets, rtol=1e-5, atol=1e-6)
    assert m1["net0"]["count"] == m2["net0"]["count"] == 6
    leaves_close(m1, m2, rtol=1e-5)


def test_dropout_differs_by_step_and_repeats():
    modules = {"a": quantize(tiny_nets.Mlp(8, dropout=0.5))}
    batch = tiny_nets.batch()
    variables = {"a": modules["a"].init(jax.random.key(0), batch["image"], deterministic=True)}
    plan = plan_step(modules, {"a": {"ce": {}}}, {"a": PLAIN}, horizon=10)
    step = jax.jit(make_step(plan.structure))
    losses = [
        float(step(start_state(plan, variables, step=s, seed=1), batch, {})[1]["net0"]["loss"])
        for s in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_eval_step_is_exact_on_a_padded_batch():
    modules, variables = tiny_nets.mlps()
    evaluate = eval_step(modules["b"])
    assert evaluate is eval_step(quantize(tiny_nets.Mlp(7)))
    batch = tiny_nets.batch()
    sums, logits = evaluate(variables["b"], {**batch, "mask": np.arange(16) < 11})
    want = modules["b"].apply(variables["b"], batch["image"], deterministic=True)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)
    assert sums["count"] == 11
    assert sums["top1"] == np.sum((np.argmax(want, -1) == batch["label"])[:11])


def poisoned(tree, path, value=np.nan):
    """A copy of a tree with one array's first entry replaced."""
    if not path:
        tree = np.array(tree)
        tree.reshape(-1)[0] = value
        return tree
    return {**tree, path[0]: poisoned(tree[path[0]], path[1:], value)}


CASES = {
    "student's weight": (
        ("student", "params", "conv", "kernel"),
        ("student", "conv", "variable params/conv/kernel is not finite"),
    ),
    "student's step": (
        ("student", "quant", "head", "input_quantizer", "step"),
        ("student", "head", "variable quant/head/input_quantizer/step is not finite"),
    ),
    "teacher's statistic": (
        ("teacher", "batch_stats", "bn2", "mean"),
        ("teacher", "bn2", "variable batch_stats/bn2/mean is not finite"),
    ),
    "image": (("image",), ("batch", "image", "input is not finite")),
    "label": (("label",), ("student", "", "loss 'ce' is not finite")),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_bad_step_changes_nothing_and_is_located(cache, case):
    modules, variables = tiny_nets.conv_nets()
    path, want = CASES[case]
    batch = dict(tiny_nets.batch())
    variables = {net: jax.device_get(tree) for net, tree in variables.items()}
    if path[0] in batch:
        batch = poisoned(batch, path, -1 if case == "label" else np.nan)
    else:
        variables = poisoned(variables, path)
    learn = {"student": {"ce": {}, "kd": {"source": "teacher"}}}
    plan = plan_step(modules, learn, {"student": tiny_nets.OPTIM}, horizon=10)
    frozen = frozen_variables(plan, variables)
    state, metrics = cache.get(plan)(start_state(plan, variables), batch, frozen)
    assert not bool(metrics["finite"])
    assert state.step == 1 and state.opt["net0"]["position"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.nets["net0"], variables["student"])
    assert locate_nonfinite(plan, state, batch, frozen) == want
    if path[0] in batch:
        # A step handed over before the loop has read the metrics must not move on from there.
        later, metrics = cache.get(plan)(jax.device_get(state), tiny_nets.batch(), frozen)
        assert not bool(metrics["finite"]) and later.step == 2
        jax.tree.map(np.testing.assert_array_equal, later.nets["net0"], variables["student"])


class SquareRoot(nn.Module):
    """Finite forward, infinite gradient: the square root at 0 of what `low` returns."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4, name="low", bias_init=nn.initializers.zeros)(0 * images[:, 0, 0])
        return nn.Dense(3, name="high")(jnp.sqrt(x))


def test_an_infinite_gradient_is_located():
    modules = {"a": quantize(SquareRoot())}
    batch = tiny_nets.batch()
    variables = {"a": modules["a"].init(jax.random.key(0), batch["image"])}
    plan = plan_step(modules, {"a": {"ce": {}}}, {"a": PLAIN}, horizon=10)
    state, metrics = jax.jit(make_step(plan.structure))(start_state(plan, variables), batch, {})
    assert not bool(metrics["finite"])
    found = locate_nonfinite(plan, state, batch, {})
    assert (found.net, found.layer) == ("a", "low")
    assert "gradient of params/low/" in found.what
    healthy = start_state(
        plan,
        {
            "a": {
                "params": {
                    **variables["a"]["params"],
                    "low": {
                        "kernel": variables["a"]["params"]["low"]["kernel"],
                        "bias": np.ones(4, np.float32),
                    },
                }
            }
        },
    )
    assert locate_nonfinite(plan, healthy, batch, {}) is None


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        ({}, "learn is empty"),
        ({"studnt": {"ce": {}}}, "Did you mean 'student'"),
        ({"student": {}}, r"learn\.student is empty"),
        ({"student": {"cee": {}}}, r"unknown loss in learn\.student\.cee 'cee'.*Did you mean 'ce'"),
        ({"student": {"x": {"loss": "kdd", "source": "teacher"}}}, "Did you mean 'kd'"),
        (
            {"student": {"kd": {"source": "teacher", "temprature": 2.0}}},
            "Did you mean 'temperature'",
        ),
        ({"student": {"a/b": {"loss": "ce"}}}, r"label 'a/b' has a '/'"),
        ({"student": {"kd": {}}}, r"learn\.student\.kd\.source is missing.*teacher"),
        ({"student": {"kd": {"source": "techer"}}}, "Did you mean 'teacher'"),
        ({"student": {"kd": {"source": "student"}}}, "is the net itself"),
        ({"student": {"ce": {"source": "teacher"}}}, "compares with no other net"),
        ({"student": {"ce": {"weight": -1.0}}}, r"learn\.student\.ce\.weight is -1\.0"),
        ({"student": {"ce": {"weight": float("inf")}}}, "finite"),
        ({"student": {"ce": {"weight": "1"}}}, "finite number"),
        (
            {"student": {"kd": {"source": "teacher", "temperature": 0.0}}},
            r"learn\.student\.kd: temp",
        ),
        ({"student": {"ce": {"label_smoothing": 1.5}}}, r"learn\.student\.ce: label_smoothing"),
    ],
)
def test_bad_tables(learn, message):
    modules, _ = tiny_nets.conv_nets()
    with pytest.raises(ValueError, match=message):
        plan_step(modules, learn, {net: {"lr": 0.1} for net in learn}, horizon=10)


def test_optim_must_fit_learn():
    modules, _ = tiny_nets.conv_nets()
    learn = {"student": {"ce": {}}}
    with pytest.raises(ValueError, match=r"optim\.student is missing"):
        plan_step(modules, learn, {}, horizon=10)
    with pytest.raises(ValueError, match="does not learn in this stage"):
        plan_step(modules, learn, {"student": {"lr": 1}, "teacher": {"lr": 1}}, horizon=10)


class Shifted(nn.Module):
    """Holds an array as a field, so it does not hash."""

    table: np.ndarray

    @nn.compact
    def __call__(self, images):
        """Returns logits."""
        x = images.reshape(images.shape[0], -1)
        return nn.Dense(3)(x - self.table)


def test_a_model_that_does_not_hash_trains_and_is_evaluated():
    shift = np.full((1, 1), 2.0, np.float32)
    images = np.float32(np.random.default_rng(0).normal(0, 1, (6, 4)))
    batch = {"image": images, "label": np.array([0, 1, 2, 0, 1, 2], np.int32)}
    net = quantize(Shifted(shift))
    variables = net.init(jax.random.key(0), images)
    plans = [plan_step({"a": net}, {"a": {"ce": {}}}, {"a": PLAIN}, horizon=1) for _ in range(2)]
    assert make_step(plans[0].structure) is make_step(plans[1].structure)
    state = start_state(plans[0], {"a": variables})
    new, _ = jax.jit(make_step(plans[0].structure))(state, batch, {})
    # Truth: the gradient of the cross-entropy of the layer on shifted inputs.
    loss = lambda params: jnp.mean(
        ce((images - shift) @ params["kernel"] + params["bias"][None], batch["label"])
    )
    params = variables["params"]["Dense_0"]
    moved = jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))
    leaves_close(new.nets[plans[0].slots["a"]]["params"]["Dense_0"], moved, rtol=1e-5, atol=1e-6)
    sums, _ = eval_step(net)(variables, batch)
    np.testing.assert_allclose(sums["loss"] / 6, loss(params), rtol=1e-6)


def test_config_dicts_are_tables_too():
    config_dict = pytest.importorskip("ml_collections.config_dict")
    modules, _ = tiny_nets.conv_nets()
    learn = {"student": {"ce": {}, "kd": {"source": "teacher"}}}
    fields = {"student": {"lr": 1, "schedule": "step", "milestones": (0.5,)}}
    plan = plan_step(modules, learn, fields, horizon=10)
    same = plan_step(
        modules, config_dict.ConfigDict(learn), config_dict.ConfigDict(fields), horizon=10
    )
    assert plan.structure == same.structure
    jax.tree.map(np.testing.assert_array_equal, plan.hyper, same.hyper)


def test_plan_describes_itself():
    assert tiny_nets.co_study_plan().describe() == [
        "student <- 1 ce(label_smoothing=0)",
        "student <- 1 kd(temperature=2) from teacher",
        "teacher <- 1 ce(label_smoothing=0)",
        "teacher <- 1 kd(temperature=2) from student",
    ]


def test_a_mode_by_another_name_is_refused():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, images, training=False):
            return nn.Dense(4)(images.reshape(images.shape[0], -1))

    class Both(Foreign):
        def __call__(self, images, train=False, training=False):
            return images

    with pytest.raises(ValueError, match=r"takes 'training', which nothing sets.*`train`"):
        mode_arguments(quantize(Foreign()), False)
    assert mode_arguments(quantize(Both()), True) == {"train": True}
