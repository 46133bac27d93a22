"""Classifiers that a term owns: what they compute, whom they teach, how they are evaluated."""

import functools

import distill_nets as tiny
import jax
import numpy as np
import pytest

from qkd_jax.distillation import adaptors
from qkd_jax.distillation.head_evaluation import eval_heads
from qkd_jax.distillation.taps import features_of, resolve_taps
from qkd_jax.training import frozen_variables, make_step, plan_step, start_state
from qkd_jax.training.objective import adaptor_params, total_loss
from qkd_jax.training.state import split
from qkd_jax.trees import flatten

FAST = {"xla_backend_optimization_level": 0}


def plan_of(**rows):
    modules, _ = tiny.nets()
    return plan_step(
        modules, {"student": rows}, {"student": tiny.PLAIN}, horizon=10, data=tiny.DATA
    )


@functools.cache
def gradients(loss, **fields):
    """(plan, state, sums of the metrics, gradients of the net and of the heads) of one term."""
    _, variables = tiny.nets()
    plan = plan_of(**{loss: {**dict(fields)}})
    state = start_state(plan, variables)
    parts = {slot: split(v) for slot, v in state.nets.items()}
    learned, carried = ({s: p[i] for s, p in parts.items()} for i in (0, 1))

    @functools.partial(jax.jit, compiler_options=FAST)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def differentiate(learned, heads):
        return total_loss(plan.structure, learned, carried, state, tiny.batch(), {}, adaptors=heads)

    (_, (_, _, sums)), grads = differentiate(learned, adaptor_params(state))
    return plan, state, sums["net0"], *(flatten(g) for g in grads)


def normalized(x, params):
    """BatchNorm of the batch, and ReLU."""
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return np.maximum((x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"], 0)


def log_softmax(z):
    return (
        z
        - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - z.max(-1, keepdims=True)
    )


def test_byot_in_a_step_is_its_formula_on_the_nets_own_features():
    """Heads, BatchNorms and the loss in float64 NumPy, from the features of the net alone."""
    modules, variables = tiny.nets()
    plan, state, sums, _, _ = gradients("byot", hint=0.01)
    assert plan.describe() == [
        "student <- 1 byot(alpha=0.1, hint=0.01, temperature=3) at stage1 from student at stage2"
    ]
    batch = tiny.batch()
    z, found = modules["student"].apply(
        variables["student"], batch["image"], train=True, mutable=["features", "batch_stats"]
    )
    shallow, deep = (np.float64(found["features"][name][0]) for name in ("stage1", "stage2"))
    own = jax.tree.map(np.float64, jax.device_get(state.loss_state["net0"]["term0"]["params"]))
    kernels = [own[f"head0_conv{k}"]["kernel"] for k in (1, 2, 3)]
    assert [k.shape for k in kernels] == [(1, 1, 4, 2), (2, 2, 2, 2), (1, 1, 2, 8)]
    x = normalized(shallow @ kernels[0][0, 0], own["head0_bn1"])
    patches = x.reshape(8, 4, 2, 4, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(8, 4, 4, 8)
    x = normalized(patches @ kernels[1].reshape(8, 2), own["head0_bn2"])
    x = normalized(x @ kernels[2][0, 0], own["head0_bn3"])
    feature = x.mean((1, 2))
    logits = feature @ own["head0"]["kernel"] + own["head0"]["bias"]
    soft, target = log_softmax(logits / 3), log_softmax(np.float64(z) / 3)
    want = (
        0.9 * -log_softmax(logits)[np.arange(8), batch["label"]]
        + 0.1 * 9 * (np.exp(target) * (target - soft)).sum(-1)
        + 0.01 * ((feature - deep.mean((1, 2))) ** 2).sum(-1)
    )
    assert float(sums["term0"]) == pytest.approx(want.sum(), rel=1e-5)


def test_what_a_deepest_classifier_teaches_does_not_move_it():
    _, _, _, net, heads = gradients("byot", hint=0.01)
    moved = {path for path, grad in net.items() if np.any(grad)}
    assert moved == {f"net0/params/{name}" for name in ("c1/kernel", "n1/scale", "n1/bias")}
    assert all(np.any(grad) for grad in heads.values()) and len(heads) == 11


def test_another_net_may_teach_the_heads():
    _, variables = tiny.nets()
    plan = plan_of(byot={"source": "teacher"})
    state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
    assert set(frozen) == {"net1"}
    # The bottleneck comes to the teacher's 18 channels and 2x2 positions.
    own = state.loss_state["net0"]["term0"]["params"]
    assert own["head0_conv2"]["kernel"].shape == (4, 4, 4, 4)
    assert own["head0_conv3"]["kernel"].shape[-1] == 18
    _, metrics = jax.jit(make_step(plan.structure))(state, tiny.batch(), frozen)
    assert bool(metrics["finite"])


def test_heads_are_evaluated_by_their_running_statistics():
    modules, variables = tiny.nets()
    plan, state, *_ = gradients("byot", hint=0.01)
    (learner,) = plan.structure.learners
    (term,) = learner.terms
    own = state.loss_state["net0"]["term0"]
    batch = tiny.batch() | {"mask": np.array([1, 1, 1, 0, 1, 1, 0, 0], bool)}
    found = eval_heads(learner.net, term)(variables["student"], own, batch)
    (sums_of_head, head), (sums, ensemble) = found
    z, taps = modules["student"].apply(variables["student"], batch["image"], mutable=["features"])
    heads = term.adaptor.apply(
        {k: own[k] for k in ("params", "batch_stats")},
        (taps["features"]["stage1"][0],),
        (taps["features"]["stage2"][0],),
    )["heads_logits"]
    np.testing.assert_allclose(head, heads[0], rtol=1e-5, atol=1e-6)
    mean = np.mean([np.exp(log_softmax(np.float64(x))) for x in (z, heads[0])], axis=0)
    np.testing.assert_allclose(np.exp(ensemble), mean, rtol=1e-5)
    right = (mean.argmax(-1) == batch["label"])[batch["mask"]]
    assert float(sums["top1"]) == right.sum()
    assert float(sums["count"]) == float(sums_of_head["count"]) == 5


def test_one_in_a_step_is_its_formula_with_the_gate_on_the_trunk():
    modules, variables = tiny.nets()
    plan, state, sums, net, heads = gradients("one")
    assert plan.describe() == ["student <- 1 one(distil=1, temperature=3) at stage1+stage2"]
    batch = tiny.batch()
    z, found = modules["student"].apply(
        variables["student"], batch["image"], train=True, mutable=["features", "batch_stats"]
    )
    features = tuple(found["features"][name][0] for name in ("stage1", "stage2"))
    own = jax.device_get(state.loss_state["net0"]["term0"])
    (term,) = plan.structure.learners[0].terms
    outputs, _ = term.adaptor.apply(
        {k: own[k] for k in ("params", "batch_stats")},
        features,
        (),
        train=True,
        mutable=["batch_stats"],
    )
    mean = np.float64(features[0]).mean((1, 2))
    raw = mean @ np.float64(own["params"]["gate"]["kernel"])
    raw = (raw - raw.mean(0)) / np.sqrt(raw.var(0) + 1e-5)
    gate = np.exp(log_softmax(np.maximum(raw, 0)))
    branches = np.float64(np.stack([z, *outputs["heads_logits"]], axis=1))
    assert branches.shape == (8, 3, 3)
    ensemble = (gate[:, :, None] * branches).sum(1)
    rows = np.arange(8)
    hard = [
        -log_softmax(x)[rows, batch["label"]] for x in (branches[:, 1], branches[:, 2], ensemble)
    ]
    target = log_softmax(ensemble / 3)[:, None]
    soft = 9 * (np.exp(target) * (target - log_softmax(branches / 3))).sum((1, 2))
    assert float(sums["term0"]) == pytest.approx((sum(hard) + soft).sum(), rel=1e-4)
    # The net's own end learns from the ensemble too, and nothing stays behind.
    assert all(np.any(grad) for grad in (*net.values(), *heads.values()))
    evaluated = eval_heads(plan.structure.learners[0].net, term)(
        variables["student"], own, batch | {"mask": np.ones(8, bool)}
    )
    assert len(evaluated) == 3


@pytest.mark.parametrize("trunk", [(8, 8, 4), (7, 7, 4), (16, 6), (10,)])
def test_branches_on_trunks_of_any_kind(trunk):
    last = {3: (4, 4, 8), 2: (16, 6), 1: (12,)}[len(trunk)]
    module = adaptors.build("one", (trunk, last), (), 5, branches=4, blocks=2)
    given = tuple(jax.ShapeDtypeStruct((3, *shape), np.float32) for shape in (trunk, last))
    found = jax.eval_shape(
        lambda *x: module.apply(module.init(jax.random.key(0), x, ()), x, ()), *given
    )
    assert [x.shape for x in found["heads_logits"]] == [(3, 5)] * 3
    assert found["gate"].shape == (3, 4)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (((7, 7, 4), (4, 4, 6)), ((3, 3, 9),)),
        (((17, 8), (17, 8)), ((17, 8),)),
        (((10,), (12,)), ((7,),)),
        (((2, 2, 4),), ((8, 8, 3),)),
    ],
)
def test_heads_on_features_of_any_kind(student, teacher):
    module = adaptors.build("byot", student, teacher, 5)
    assert hash(module) == hash(adaptors.build("byot", student, teacher, 5))
    given = [
        tuple(jax.ShapeDtypeStruct((3, *shape), np.float32) for shape in side)
        for side in (student, teacher)
    ]

    def run(*features):
        return module.apply(module.init(jax.random.key(0), *features), *features)

    found = jax.eval_shape(run, *given)
    assert [x.shape for x in found["heads_logits"]] == [(3, 5)] * len(student)
    channels = teacher[0][-1]
    assert [x.shape for x in found["student_features"]] == [(3, channels)] * len(student)
    assert found["teacher_feature"].shape == (3, channels)


def test_shallow_is_all_but_the_last():
    modules, _ = tiny.nets()
    teacher, student = (features_of(modules[n], tiny.DATA.image) for n in ("teacher", "student"))
    assert resolve_taps("taps", teacher, "shallow") == ("stage1", "stage2")
    assert resolve_taps("taps", student, "shallow") == ("stage1",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (dict(byot={"adaptor": {"classes": 3}}), "unknown option 'classes'"),
        (dict(byot={"alpha": 2.0}), "alpha is 2"),
        (dict(byot={"teacher_taps": "stage9"}), "unknown tap 'stage9'"),
        (dict(kd={"source": "student"}), "source is the net itself"),
        (dict(one={"source": "teacher"}), "compares with no other net; drop the source"),
        (dict(one={"teacher_taps": "last"}), "compares with no other net; drop it"),
        (dict(one={"taps": "last"}), "taps has 1 entry"),
        (dict(one={"adaptor": {"branches": 1}}), "branches is 1"),
    ],
)
def test_bad_rows_of_heads(rows, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**rows)


def test_a_net_of_one_stage_has_no_shallow_ones():
    from qkd_jax.models import create
    from qkd_jax.quantize import quantize

    found = features_of(quantize(create("mlp", 3, hidden=(5,))), (8, 8, 1))
    with pytest.raises(ValueError, match="'hidden1' is the only feature"):
        resolve_taps("taps", found, "shallow")
