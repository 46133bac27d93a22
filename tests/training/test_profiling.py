"""Profiles: scopes that name nets, quantizers and losses, the same numbers, and bad ranges."""

import types

import distill_nets as tiny
import jax
import numpy as np
import pytest

from qkd_jax import Rule, Spec, calibrate
from qkd_jax.quantize import quantize
from qkd_jax.training import frozen_variables, make_step, plan_step, profiling, start_state
from qkd_jax.training.plan import with_live, with_names

RULES = [Rule(".*", weight=Spec(4, quantizer="lsq"), input=Spec(4, quantizer="lsq"))]


def planned():
    modules, variables = tiny.nets()
    student = quantize(modules["student"].model, RULES)
    images = tiny.batch()["image"]
    known = {
        "student": calibrate(student, variables["student"], [images]),
        "teacher": variables["teacher"],
    }
    nets = {"student": student, "teacher": modules["teacher"]}
    learn = {"student": {"ce": {}, "soft": {"loss": "kd", "source": "teacher", "temperature": 2.0}}}
    return plan_step(nets, learn, {"student": {"lr": 0.1}}, horizon=9), known


def test_scopes_name_nets_quantizers_and_losses_and_change_no_number():
    plan, variables = planned()
    outputs, texts = [], []
    for one in (plan, with_names(plan)):
        state = start_state(one, variables)
        frozen = frozen_variables(one, variables)
        step = jax.jit(make_step(one.structure))
        lowered = step.lower(state, tiny.batch(), frozen)
        texts.append((lowered.as_text(), lowered.as_text(debug_info=True)))
        outputs.append(lowered.compile()(state, tiny.batch(), frozen))
    jax.tree.map(np.testing.assert_array_equal, outputs[0][0].nets, outputs[1][0].nets)
    jax.tree.map(np.testing.assert_array_equal, *(metrics for _, metrics in outputs))
    assert texts[0][0] == texts[1][0]
    for scope in (
        "jvp(student)/Conv/c1/weight_quantizer",
        "jvp(student)/Conv/head/input_quantizer",
        "jvp(teacher)/Patches/p1",
        "jvp(student/loss/soft)",
        "student/optimizer",
    ):
        assert scope in texts[1][1], scope
    assert "student" not in texts[0][1] and "net0/optimizer" in texts[0][1]


def test_live_values_of_a_step():
    plan, variables = planned()
    live = with_live(plan, ("agreement", "grad_norms"))
    assert plan.structure != live.structure
    state, frozen = start_state(plan, variables), frozen_variables(plan, variables)
    (_, plain), (_, found) = (
        jax.jit(make_step(p.structure))(state, tiny.batch(), frozen) for p in (plan, live)
    )
    found, plain = found["net0"], plain["net0"]
    parts = [found[f"grad_norm_{group}"] for group in ("weights", "plain", "quant")]
    np.testing.assert_allclose(np.linalg.norm(parts), plain["grad_norm"], rtol=1e-6)
    student, teacher = plan.structure.nets["net0"], plan.structure.nets["net1"]
    images = tiny.batch()["image"]
    logits, _ = student.apply(variables["student"], images, train=True, mutable=["batch_stats"])
    others = teacher.apply(variables["teacher"], images)
    same = np.sum(np.argmax(logits, -1) == np.argmax(others, -1))
    assert found["agreement/net1"] == same
    assert not [key for key in plain if "agreement" in key or "norm_" in key]


def test_a_trace_covers_its_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profile = profiling.Profile(13, 14, tmp_path / "profile")
    trace = profiling.tracer(profile, 10, lambda text: None)
    for step in range(1, 7):
        trace(step, None)
        calls.append(step)
    trace(0, None)
    assert calls == [1, 2, "start", 3, 4, "stop", 5, 6]
    trace(3, None)
    trace(0, None)  # stopped in between
    assert calls[8:] == ["start", "stop"]
    stage = types.SimpleNamespace(first=10, steps=10)
    assert profiling.is_within(profile, stage, 3) and not profiling.is_within(profile, stage, 4)
    assert not profiling.is_within(None, stage, 0)
    assert not profiling.is_within(profile, types.SimpleNamespace(first=2, steps=10), 0)


@pytest.mark.parametrize("moment", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, moment):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, moment, full)
    said = []
    trace = profiling.tracer(profiling.Profile(2, 3, tmp_path / "profile"), 0, said.append)
    for step in (1, 2, 3, 4, 0):
        trace(step, None)
    assert said == ["no trace of these steps (OSError: No space left on device); the run goes on"]


@pytest.mark.parametrize("text", ["5", "a,b", "1,2,3", "-1,4", "0,4", "9,3", ""])
def test_steps_that_are_none(text):
    with pytest.raises(ValueError, match="--profile_steps"):
        profiling.parse_steps(text)


def test_steps_lie_within_a_stage_that_trains():
    stages = [
        types.SimpleNamespace(name=name, first=first, steps=steps, trains=trains)
        for name, first, steps, trains in (("a", 0, 8, True), ("c", 8, 1, False), ("b", 9, 5, True))
    ]
    profiling.check_steps((1, 8), stages)
    profiling.check_steps((10, 14), stages)
    for steps in ((8, 10), (9, 9), (10, 15)):
        with pytest.raises(ValueError, match=r"not within one stage.*a 1 to 8, b 10 to 14"):
            profiling.check_steps(steps, stages)
