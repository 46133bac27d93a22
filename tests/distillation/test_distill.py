"""Every loss in a training step between two nets that share nothing, and the step's promises."""

import functools
import inspect

import distill_nets as tiny
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import terms
from qkd_jax import losses
from qkd_jax.losses import LOSSES, TABLE
from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.training import (
    compile_step,
    frozen_variables,
    locate_nonfinite,
    make_step,
    name_metrics,
    plan_step,
    start_state,
)
from qkd_jax.training.objective import adaptor_params, total_loss
from qkd_jax.training.state import net_variables, split
from qkd_jax.trees import flatten

FAST = {"xla_backend_optimization_level": 0}


def inputs_of(name):
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in inspect.signature(LOSSES[name]).parameters.values() if p.kind is kinds]


def row_of(name):
    taught = any(p.startswith("teacher") for p in inputs_of(name))
    several = "teachers_logits" in inputs_of(name)
    return {"source": ("teacher", "other") if several else "teacher"} if taught else {}


def student_of(name):
    return "borrower" if name == "simkd" else "student"


def plan_of(name, *, optim=tiny.PLAIN, steps=10, **fields):
    modules, _ = tiny.nets()
    net = student_of(name)
    if name == "crd":
        fields = {"negatives": 6, **fields}
    if name == "ft":  # its paraphraser learns first
        fields = {"start": 1, **fields}
    learn = {net: {name: {**row_of(name), **fields}}}
    return plan_step(modules, learn, {net: optim}, horizon=steps, data=tiny.DATA)


def moved(old, new):
    """{path: whether any number changed}."""
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), old, new)
    return {jax.tree_util.keystr(path): c for path, c in jax.tree.leaves_with_path(changed)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches_the_student_and_its_adaptor_and_not_the_teacher(name):
    _, variables = tiny.nets()
    plan = plan_of(name)
    # At step 1 all terms have started.
    state, frozen = start_state(plan, variables, step=1), frozen_variables(plan, variables)
    parts = {slot: split(v) for slot, v in state.nets.items()}
    learned, carried = ({s: p[i] for s, p in parts.items()} for i in (0, 1))

    @functools.partial(jax.jit, compiler_options=FAST)
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def differentiate(learned, adaptors, frozen):
        return total_loss(
            plan.structure, learned, carried, state, tiny.batch(), frozen, adaptors=adaptors
        )

    (value, (_, owned, sums)), grads = differentiate(learned, adaptor_params(state), frozen)
    assert np.isfinite(value) and sums["net0"]["term0"] != 0
    flat = [{k: np.any(v) for k, v in flatten(tree).items()} for tree in grads]
    # A loss on features reaches neither the head nor a layer after its tap; all reach the first.
    assert flat[0]["net0/params/c1/kernel"], flat[0]
    before = TABLE[name].before_start
    assert all(learns != any(part in path for part in before) for path, learns in flat[1].items())
    assert not any(flat[2].values()), flat[2]
    assert jax.tree.structure(owned) == jax.tree.structure(dict(state.loss_state))
    banks = [path for path in flatten(owned) if "/memory/" in path]
    before, after = flatten(state.loss_state), flatten(owned)
    assert bool(banks) == any(np.any(before[path] != after[path]) for path in banks)


def test_a_step_moves_an_adaptor_by_its_gradient():
    # Independent of the step: the regressor's own apply, and the mean of squares written out.
    modules, variables = tiny.nets()
    plan, batch = plan_of("cc_adjacent"), tiny.batch()
    state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
    new, _ = jax.jit(make_step(plan.structure))(state, batch, frozen)
    own = state.loss_state["net0"]["term0"]["params"]

    def pooled(net, train):
        _, found = modules[net].apply(
            variables[net], batch["image"], train=train, mutable=["features", "batch_stats"]
        )
        return found["features"]["pooled"][0]

    def loss(params):
        student, teacher = (
            pooled(net, train) @ params[side]["kernel"] + params[side]["bias"][None]
            for net, side, train in (("student", "student", True), ("teacher", "teacher", False))
        )
        gap = jnp.abs(student - teacher)
        return jnp.mean(jnp.sum(gap[:-1] * gap[1:], axis=-1))

    grads = jax.grad(loss)(own)
    jax.tree.map(
        lambda p, g, q: np.testing.assert_allclose(q, p - g, rtol=1e-4, atol=1e-5),
        own,
        grads,
        new.loss_state["net0"]["term0"]["params"],
    )


def test_adaptors_learn_with_the_nets_optimizer():
    """Momentum of its own, the net's decay on kernels only, and frozen layers are the net's.

    The adaptor has a layer "student", which one of the patterns would match.
    """
    _, variables = tiny.nets()
    optim = {
        "lr": 0.1,
        "weight_decay": 0.5,
        "schedule": "constant",
        "freeze": ("c1", "head|student"),
    }
    plan = plan_of("cc_adjacent", optim=optim, weight=0.0)
    state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
    step = jax.jit(make_step(plan.structure))
    before = jax.device_get(state.loss_state["net0"]["term0"]["params"])
    new, _ = step(state, tiny.batch(), frozen)
    after = new.loss_state["net0"]["term0"]["params"]
    # No gradient at weight 0: Nesterov's first step moves by lr * decay * (1 + momentum).
    for side in ("student", "teacher"):
        want = before[side]["kernel"] * (1 - 0.1 * 0.5 * 1.9)
        np.testing.assert_allclose(after[side]["kernel"], want, rtol=1e-6)
        np.testing.assert_array_equal(after[side]["bias"], before[side]["bias"])
    found = moved(state.nets["net0"]["params"], new.nets["net0"]["params"])
    assert not found["['c1']['kernel']"] and not found["['head']['kernel']"]
    assert found["['c2']['kernel']"]  # decayed
    assert not found["['n1']['bias']"]
    with pytest.raises(ValueError, match=r"matches no layer.*Did you mean 'head'"):
        start_state(plan_of("kd", optim={**optim, "freeze": ("heat",)}), variables)
    with pytest.raises(ValueError, match="give a tuple of regular expressions"):
        plan_of("kd", optim={**optim, "freeze": "head"})
    with pytest.raises(ValueError, match="no regular expression"):
        plan_of("kd", optim={**optim, "freeze": ("(",)})


def test_nothing_is_tapped_where_nobody_looks():
    plan = plan_of("kd")
    assert plan.structure.taps == {"net0": (), "net1": ()}
    _, variables = tiny.nets()
    assert start_state(plan, variables).loss_state == {}


def test_a_bank_knows_the_classes_from_the_start():
    _, variables = tiny.nets()
    plan, labels = plan_of("crd"), np.arange(tiny.DATA.examples) % tiny.CLASSES
    state = start_state(plan, variables, labels=labels)
    np.testing.assert_array_equal(state.loss_state["net0"]["term0"]["memory"]["label"], labels)
    assert np.all(start_state(plan, variables).loss_state["net0"]["term0"]["memory"]["label"] == -1)
    with pytest.raises(ValueError, match=r"labels has shape \(23,\)"):
        start_state(plan, variables, labels=labels[1:])


def test_where_losses_look_unless_told_otherwise():
    """FitNets' hint is a middle layer; the likelihood of VID is that of all stages."""
    (term,) = plan_of("fitnet").structure.learners[0].terms
    assert (term.taps, term.teacher_taps) == (("stage1",), ("stage2",))
    (term,) = plan_of("vid").structure.learners[0].terms
    # Unlike depths: the deepest belong together.
    assert (term.taps, term.teacher_taps) == (("stage1", "stage2"), ("stage2", "stage3"))


def test_a_paraphraser_learns_alone_and_stands_still_from_the_start_on():
    """Neither a gradient nor momentum nor decay moves it then."""
    modules, variables = tiny.nets()
    optim = {"lr": 0.1, "weight_decay": 0.1, "schedule": "constant"}
    learn = {"student": {"ft": {"source": "teacher", "start": 2}}}
    plan = plan_step(modules, learn, {"student": optim}, horizon=4, data=tiny.DATA, first=7)
    frozen = frozen_variables(plan, variables)
    step = jax.jit(make_step(plan.structure), compiler_options=FAST)
    state, seen = start_state(plan, variables, step=7), []
    for index in range(4):
        new, metrics = step(state, tiny.batch(index), frozen)
        assert bool(metrics["finite"])
        own, old = (s.loss_state["net0"]["term0"]["params"] for s in (new, state))
        seen.append({part: any(moved(old[part], own[part]).values()) for part in own})
        student = moved(state.nets["net0"]["params"], new.nets["net0"]["params"])
        assert bool(metrics["net0"]["loss"] > 0) and student["['c1']['kernel']"]  # or its decay
        state = new
    for index, found in enumerate(seen):
        assert found.pop("translator")
        assert set(found) == set(TABLE["ft"].before_start)
        assert set(found.values()) == {index < 2}
    # Nobody would have taught it.
    message = r"learn\.student\.ft starts at step 0.*paraphraser.*start=0\.125"
    with pytest.raises(ValueError, match=message):
        plan_of("ft", start=0)
    goes_on = plan_of("ft", start=0, optim={**optim, "continues": "before"})
    with pytest.raises(ValueError, match=message):
        start_state(goes_on, variables)
    carried = {"student": {"ft": state.loss_state["net0"]["term0"]}}
    start_state(goes_on, variables, term_states=carried)


def test_a_term_at_rest_cannot_poison_the_step():
    """Its value is infinite and its slope NaN, at weight 0."""
    _, variables = tiny.nets()
    teacher = jax.device_get(variables["teacher"])
    teacher["params"]["head"]["bias"] = np.full(tiny.CLASSES, np.inf, np.float32)
    variables = {**variables, "teacher": teacher}
    modules, _ = tiny.nets()
    learn = {"student": {"ce": {}, "logit_regression": {"source": "teacher", "start": 3}}}
    plan = plan_step(modules, learn, {"student": tiny.PLAIN}, horizon=6, data=tiny.DATA)
    frozen = frozen_variables(plan, variables)
    step = jax.jit(make_step(plan.structure), compiler_options=FAST)
    alone = plan_step(modules, {"student": {"ce": {}}}, {"student": tiny.PLAIN}, horizon=6)
    wanted, _ = jax.jit(make_step(alone.structure), compiler_options=FAST)(
        start_state(alone, variables, step=2), tiny.batch(), {}
    )
    got, metrics = step(start_state(plan, variables, step=2), tiny.batch(), frozen)
    assert bool(metrics["finite"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got.nets, wanted.nets
    )
    _, metrics = step(start_state(plan, variables, step=3), tiny.batch(), frozen)
    assert not bool(metrics["finite"])


def test_margins_need_a_batch_norm_or_a_number():
    modules = {
        "student": quantize(create("mlp", tiny.CLASSES, hidden=(4,))),
        "teacher": quantize(create("mlp", tiny.CLASSES, hidden=(6,))),
    }

    def plan(**fields):
        learn = {"student": {"ofd": {"source": "teacher", **fields}}}
        return plan_step(modules, learn, {"student": tiny.PLAIN}, horizon=1, data=tiny.DATA)

    with pytest.raises(ValueError, match=r"ofd: no BatchNorm leads into tap 'hidden1_pre'.*margin"):
        plan()
    with pytest.raises(ValueError, match=r"margin is 0\.5"):
        plan(adaptor={"margin": 0.5})
    variables = {n: m.init(jax.random.key(0), tiny.batch()["image"]) for n, m in modules.items()}
    state = start_state(plan(adaptor={"margin": -0.5}), variables)
    found = state.loss_state["net0"]["term0"]["teacher"]["margin0"]
    np.testing.assert_array_equal(found, np.full(6, -0.5))


def test_a_bad_statistic_of_an_adaptor_is_named():
    modules = {
        "student": quantize(create("mlp", tiny.CLASSES, hidden=(4,))),
        "teacher": quantize(create("mlp", tiny.CLASSES, hidden=(6,))),
    }
    variables = {n: m.init(jax.random.key(0), tiny.batch()["image"]) for n, m in modules.items()}
    learn = {"student": {"hint": {"source": "teacher", "loss": "fitnet"}}}
    plan = plan_step(modules, learn, {"student": tiny.PLAIN}, horizon=1, data=tiny.DATA)
    frozen = frozen_variables(plan, variables)
    step = jax.jit(make_step(plan.structure), compiler_options=FAST)
    # A variance that overflows while the net and its loss on labels would not.
    kernel = variables["student"]["params"]["dense1"]["kernel"]
    large = {
        **variables["student"]["params"],
        "dense1": {"kernel": 1e25 * kernel, "bias": np.zeros(4)},
    }
    state = start_state(plan, {**variables, "student": {"params": large}})
    new, metrics = step(state, tiny.batch(), frozen)
    assert not bool(metrics["finite"])
    found = locate_nonfinite(plan, new, tiny.batch(), frozen)
    wanted = "statistic/regressor0_bn/var of the adaptor of loss 'hint' is not finite"
    assert (found.net, found.what) == ("student", wanted)
    # One that is bad already.
    state = start_state(plan, variables)
    norm = state.loss_state["net0"]["term0"]["batch_stats"]["regressor0_bn"]
    norm["mean"] = norm["mean"].at[0].set(np.nan)
    new, metrics = step(state, tiny.batch(), frozen)
    assert not bool(metrics["finite"])
    found = locate_nonfinite(plan, new, tiny.batch(), frozen)
    assert "batch_stats/regressor0_bn/mean of the adaptor of loss 'hint'" in found.what


class Rounded(nn.Module):
    """Draws from the stream of stochastic rounding, as a layer with such a quantizer does."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(tiny.CLASSES, name="head")(images.reshape(images.shape[0], -1))
        return x + jax.random.uniform(self.make_rng("rounding"), x.shape) if train else x


def test_a_bad_step_is_run_again_with_its_own_rounding():
    modules = {"student": quantize(Rounded())}
    variables = {"student": modules["student"].init(jax.random.key(0), tiny.batch()["image"])}
    plan = plan_step(modules, {"student": {"ce": {}}}, {"student": tiny.PLAIN}, horizon=1)
    state = start_state(plan, variables)
    head = state.nets["net0"]["params"]["head"]
    head["bias"] = head["bias"].at[0].set(np.nan)
    new, _ = jax.jit(make_step(plan.structure), compiler_options=FAST)(state, tiny.batch(), {})
    found = locate_nonfinite(plan, new, tiny.batch(), {})
    assert found.layer == "head" and "params/head/bias" in found.what


def test_a_bad_adaptor_leaves_everything_and_is_named():
    _, variables = tiny.nets()
    plan = plan_of("cc_adjacent")
    state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
    own = state.loss_state["net0"]["term0"]
    own["params"]["teacher"]["kernel"] = own["params"]["teacher"]["kernel"].at[0, 0].set(jnp.inf)
    new, metrics = jax.jit(make_step(plan.structure))(state, tiny.batch(), frozen)
    assert not bool(metrics["finite"])
    assert not any(moved(state.nets, new.nets).values())
    assert not any(moved(state.loss_state, new.loss_state).values())
    found = locate_nonfinite(plan, new, tiny.batch(), frozen)
    assert "cc_adjacent" in str(found)


def on_one_and_four(plan, variables, mode):
    """(nets, what terms own, metrics) after two steps on one device, and on four."""
    for devices in (1, 4):
        step = compile_step(make_step(plan.structure), mode=mode, devices=jax.devices()[:devices])
        state = start_state(plan, variables)
        for index in range(2):
            state, metrics = step(state, tiny.batch(index), frozen_variables(plan, variables))
        yield jax.device_get((net_variables(plan, state), state.loss_state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("fitnet", "pmap"),
        ("crd", "pmap"),
        ("crd", "jit"),
        ("byot", "pmap"),
        ("one", "pmap"),
    ],
)
def test_four_devices_equal_one(name, mode):
    _, variables = tiny.nets()
    optim = {"lr": 0.05, "weight_decay": 1e-3}
    results = on_one_and_four(plan_of(name, optim=optim), variables, mode)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "jit"])
def test_relations_over_four_devices_are_those_of_one(mode):
    """Each loss's value, and the update by all of them at their published weights."""
    modules, variables = tiny.nets()
    names = ("rkd", "sp", "pkt", "irg", "cc", "crd_in_batch")
    learn = {"student": {name: terms.learn(name, "teacher")[name] for name in names}}
    optim = {"student": {"lr": 1e-3, "weight_decay": 1e-3}}
    plan = plan_step(modules, learn, optim, horizon=4, data=tiny.DATA)
    (*states, one), (*others, four) = on_one_and_four(plan, variables, mode)
    for place, _ in enumerate(names):  # relations are small numbers: relative to themselves
        value = one["net0"][f"term{place}"]
        assert value > 0
        np.testing.assert_allclose(four["net0"][f"term{place}"], value, rtol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), states, others
    )


BAD = [
    ("rkd", {"taps": "poled"}, "unknown tap 'poled'.*Did you mean 'pooled'"),
    ("rkd", {"teacher_taps": "stage4"}, r"teacher_taps; the net sows.*Did you mean 'stage3'"),
    ("rkd", {"taps": "stages"}, "2 taps, but loss 'rkd' compares one feature"),
    ("rkd", {"adaptor": {"dim": 3}}, "has no adaptor"),
    ("cc_adjacent", {"adaptor": {"dims": 3}}, "unknown option 'dims'.*Did you mean 'dim'"),
    ("cc_adjacent", {"adaptor": {"dim": 0}}, "adaptor: dim is 0"),
    ("kd", {"taps": "pooled"}, "looks at no feature"),
    ("kd", {"source": ("teacher", "other")}, "names 2 nets, but loss 'kd' takes one"),
    ("kd", {"source": ("teacher", "teecher")}, "names 2 nets|Did you mean 'teacher'"),
    ("kd", {"warmup": -1}, "warmup is -1"),
    ("kd", {"end": 1.0}, "end is 1.0, which may mean one step"),
    ("kd", {"start": 0.5, "end": 0.25}, "starts at step 5 and ends at 2"),
    ("kd", {"decay": 11}, "decay is 11"),
    ("kd", {"temperature": {"begin": 4.0}}, "temperature.end is missing"),
    ("kd", {"temperature": {"begin": 4.0, "end": 0.0}}, "temperature is 0"),
    ("kd", {"temperature": {"begin": 4, "end": 1, "shape": "cosin"}}, "Did you mean 'cosine'"),
    ("kd", {"temperature": {"begin": 4, "end": 1, "step": 3}}, "Did you mean 'steps'"),
    ("kd", {"weight": {"begin": 1, "end": -1}}, "weight is -1"),
]


@pytest.mark.parametrize(("name", "fields", "message"), BAD)
def test_bad_rows_are_refused_before_anything_runs(name, fields, message):
    with pytest.raises(ValueError, match=message):
        plan_of(name, **fields)


def test_features_need_the_shapes_of_the_data():
    modules, _ = tiny.nets()
    with pytest.raises(ValueError, match="give plan_step data=DataShape"):
        plan_step(
            modules, {"student": {"rkd": {"source": "teacher"}}}, {"student": tiny.PLAIN}, horizon=1
        )


def weights(steps, **fields):
    """The weight that each step of a stage of `steps` really has, through one compiled step."""
    modules, variables = tiny.nets()
    learn = {"student": {"kd": {"source": "teacher", **fields}}}
    plan = plan_step(
        modules, learn, {"student": tiny.PLAIN}, horizon=steps, data=tiny.DATA, first=100
    )
    batch, frozen = tiny.batch(), frozen_variables(plan, variables)
    step = COMPILED.setdefault(
        plan.structure, jax.jit(make_step(plan.structure), compiler_options=FAST)
    )
    found = []
    for place in range(steps):
        state = start_state(plan, variables, step=100 + place)
        _, metrics = step(state, batch, frozen)
        named = name_metrics(plan, metrics)["student"]
        found.append((named["loss"] / named["kd"], named["kd"]))
    return np.array(found).T


COMPILED: dict = {}


def test_the_course_of_a_weight():
    got, _ = weights(8, weight=2.0, start=0.25, warmup=2, decay=3, end=7)
    want = [0, 0, 0.5, 1, 1, 2 / 3, 1 / 3, 0]
    np.testing.assert_allclose(got, 2 * np.array(want), atol=1e-6)
    # Other numbers, no other program.
    assert len(COMPILED) == 1
    got, _ = weights(4, warmup=1)
    np.testing.assert_allclose(got, [1, 1, 1, 1], atol=1e-6)
    assert len(COMPILED) == 1 and next(iter(COMPILED.values()))._cache_size() == 1


def test_a_temperature_that_changes():
    modules, variables = tiny.nets()
    image = tiny.batch()["image"]
    own, _ = modules["student"].apply(
        variables["student"], image, train=True, mutable=["batch_stats"]
    )
    taught = modules["teacher"].apply(variables["teacher"], image)
    _, got = weights(5, temperature={"begin": 8.0, "end": 2.0, "shape": "cosine"})
    t = np.arange(5) / 4
    for value, temperature in zip(got, 5 + 3 * np.cos(np.pi * t), strict=True):
        want = float(jnp.mean(losses.kd(own, taught, temperature=float(temperature))))
        assert value == pytest.approx(want, rel=1e-4)
    _, got = weights(5, temperature={"begin": 8.0, "end": 2.0, "shape": "gaussian"})
    for value, temperature in zip(got, 8 - 6 * np.exp(-5 * (1 - t) ** 2), strict=True):
        want = float(jnp.mean(losses.kd(own, taught, temperature=float(temperature))))
        assert value == pytest.approx(want, rel=1e-4)
    _, got = weights(5, temperature={"begin": 8.0, "end": 2.0, "steps": 0.6})
    for value, temperature in zip(got, [8, 5, 2, 2, 2], strict=True):
        want = float(jnp.mean(losses.kd(own, taught, temperature=float(temperature))))
        assert value == pytest.approx(want, rel=1e-4)


def test_what_a_plan_says_of_its_terms():
    plan = plan_of("kd", temperature={"begin": 8.0, "end": 2.0}, warmup=0.5)
    assert plan.describe() == [
        "student <- 1 kd(temperature=8..2, start 0, end 10, warmup 5, decay 0) from teacher"
    ]
    plan = plan_of("cc_adjacent", taps="stage1")
    assert plan.describe() == ["student <- 1 cc_adjacent() at stage1 from teacher at pooled"]
