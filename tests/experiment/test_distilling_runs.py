"""Runs whose losses own something: resumed, continued, left behind; and borrowed classifiers."""

import contextlib
import inspect
import json

import numpy as np
import pytest
from stopped_runs import StopAt, checkpoint_of

from configs import common, terms
from qkd_jax import data, experiment
from qkd_jax.experiment import orchestrate
from qkd_jax.losses import TABLE
from qkd_jax.training.loop import Preempted
from qkd_jax.trees import tree_sha256

CRD = dict(weight=0.8, negatives=8)
PUBLISHED = [name for name, row in TABLE.items() if row.recipe is not None]


def config_of(stages, nets=None, save_steps=0, deploy=False):
    """MLPs on synthetic images; `stages` are {name: (steps, {net: rows}, continues)}."""
    config = common.frame(data="synthetic", seed=0, train_examples=96)
    config.eval_batch_size = 128
    config.log = dict(every_steps=3, eval_every_steps=0, quant_every_steps=0)
    config.checkpoint = dict(every_seconds=0.0, every_steps=save_steps)
    config.parallel.devices = 1
    tiny = dict(model="mlp", batch_norm=True)
    config.nets.teacher = dict(tiny, hidden=(24, 16))
    config.nets.student = dict(tiny, hidden=(12, 8))
    for name, fields in (nets or {}).items():
        config.nets[name] = dict(tiny, **fields)
    for name, (steps, rows, continues) in stages.items():
        freeze = ("head",) if "simkd" in next(iter(rows.values())) else ()
        config.stages[name] = dict(
            kind="train",
            epochs=0.0,
            steps=steps,
            batch_size=16,
            learn=rows,
            optim={
                net: common.sgd(0.05, weight_decay=1e-4, continues=continues, freeze=freeze)
                for net in rows
            },
        )
    config.schedule = tuple(stages)
    return config


def taught(loss, **fields):
    return {"ce": common.ce(), loss: common.term(loss, "teacher", **fields)}


def run_with_stops(config, folder, monkeypatch, questions):
    """Runs a config that is asked to stop again and again; yields each checkpoint, then returns."""
    for count in (*questions, 1000):
        stop = StopAt(count)
        monkeypatch.setattr(
            orchestrate, "GracefulStop", lambda stop=stop: contextlib.nullcontext(stop)
        )
        with contextlib.suppress(Preempted):
            experiment.run(config, folder, report=False, verbose=False)
            return
        yield checkpoint_of(folder)


@pytest.mark.slow
def test_a_run_with_a_bank_resumes_bit_for_bit_and_leaves_it_behind(tmp_path, monkeypatch):
    stages = {
        "teach": (2, {"teacher": {"ce": common.ce()}}, ""),
        "distil": (6, {"student": taught("crd", **CRD)}, ""),
        "tune": (3, {"student": taught("crd", **CRD)}, "distil"),
    }
    experiment.run(config_of(stages), tmp_path / "whole", report=False, verbose=False)
    halted, looked = tmp_path / "halted", 0
    for saved in run_with_stops(config_of(stages), halted, monkeypatch, (5, 5, 4)):
        if saved.meta["stage_step"] and saved.meta["stage"] == "distil":
            assert any("owned/crd/memory/student" in name for name in saved.tree)
            assert any("owned/crd/params" in name for name in saved.tree)
            assert any("owned/crd/opt" in name for name in saved.tree)
            # Classes are known from the start, not only of the examples that were seen.
            assert saved.meta["stage_step"] * 16 < 96
            (known,) = (x for name, x in saved.tree.items() if name.endswith("crd/memory/label"))
            np.testing.assert_array_equal(
                known, data.load("synthetic", train_examples=96).train_labels
            )
            looked += 1
    assert looked
    one, two = checkpoint_of(tmp_path / "whole"), checkpoint_of(halted)
    assert tree_sha256(one.tree) == tree_sha256(two.tree)
    assert not any("owned" in name for name in one.tree)


@pytest.mark.slow
def test_a_stage_that_continues_goes_on_with_what_its_terms_own(tmp_path):
    """Two stages of 2 and 3 steps are one of 5, if all that counts is carried over."""
    rows = {"student": taught("crd", **CRD)}
    found = {}
    for name, stages in {
        "one": {"distil": (5, rows, "")},
        "two": {"distil": (2, rows, ""), "tune": (3, rows, "distil")},
    }.items():
        experiment.run(config_of(stages), tmp_path / name, report=False, verbose=False)
        found[name] = checkpoint_of(tmp_path / name).tree
    # Keys of the terms and the data follow the steps; each stage counts its own.
    student = {
        n: {k: v for k, v in tree.items() if k.startswith("nets/student/params")}
        for n, tree in found.items()
    }
    assert student["one"].keys() == student["two"].keys()
    for path, leaf in student["one"].items():
        np.testing.assert_allclose(student["two"][path], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_heads_resume_bit_for_bit_and_are_left_behind(tmp_path, monkeypatch):
    rows = {"ce": common.ce(), "byot": common.term("byot", hint=0.01)}
    config = config_of({"distil": (6, {"student": rows}, "")})
    config.stages.evaluate = common.evaluate(student="own teacher")
    config.schedule = (*config.schedule, "evaluate")
    whole = experiment.run(config, tmp_path / "whole", report=False, verbose=False)
    halted, places = tmp_path / "halted", []
    for saved in run_with_stops(config, halted, monkeypatch, (3, 0, 1)):
        places.append((saved.meta["stage"], saved.meta["stage_step"]))
        for part in ("params/head0/kernel", "batch_stats/head0_bn1/mean", "opt/"):
            there = any(f"owned/byot/{part}" in name for name in saved.tree)
            assert there == (saved.meta["stage"] == "distil"), part
    assert places == [("distil", 4), ("distil", 5), ("evaluate", 0)]
    one, two = checkpoint_of(tmp_path / "whole"), checkpoint_of(halted)
    assert tree_sha256(one.tree) == tree_sha256(two.tree)
    assert json.loads((halted / "results.json").read_text())["rows"] == whole["rows"]
    assert not any("owned" in name or "head0" in name for name in one.tree)
    student, head, ensemble = whole["rows"]
    assert [r["net"] for r in (head, ensemble)] == ["student.hidden1", "student.ensemble"]
    # What is counted is the net alone: 64-12-8-10 dense layers, biases of the last, BatchNorms.
    assert student["params"] == 64 * 12 + 12 * 8 + 8 * 10 + 10 + 2 * (12 + 8)
    assert head["params"] is None and head["loss"] != student["loss"]


@pytest.mark.slow
def test_stale_peers_resume_bit_for_bit_on_digits(tmp_path, monkeypatch):
    from configs import mutual

    config = mutual.get_config("model=mlp,widths=0,stale=4,burn_in=2,epochs=2").unlock()
    config.log.eval_every_steps = 0
    config.schedule = ("mutual", "evaluate")
    config.stages.evaluate.nets = ("student0", "student1")
    config.stages.evaluate.methods = {}
    whole = experiment.run(config, tmp_path / "whole", report=False, verbose=False)
    halted, places = tmp_path / "halted", []
    for saved in run_with_stops(config, halted, monkeypatch, (5, 0)):
        places.append(saved.meta["stage_step"])
        for net in ("student0", "student1"):
            copy = saved.tree[f"optimizers/mutual/{net}/stale/params/head/kernel"]
            assert np.any(copy != saved.tree[f"nets/{net}/params/head/kernel"])
    assert places == [6, 7]  # between two copies
    one, two = checkpoint_of(tmp_path / "whole"), checkpoint_of(halted)
    assert tree_sha256(one.tree) == tree_sha256(two.tree)
    assert json.loads((halted / "results.json").read_text())["rows"] == whole["rows"]
    assert not any("stale" in name for name in one.tree)
    config.stages.mutual.stale = 0
    fresh = experiment.run(config, tmp_path / "fresh", report=False, verbose=False)
    assert [r["loss"] for r in fresh["rows"]] != [r["loss"] for r in whole["rows"]]


@pytest.mark.slow
def test_branches_resume_bit_for_bit_on_digits(tmp_path, monkeypatch):
    from configs import one

    config = one.get_config("model=mlp,width=0,epochs=2").unlock()
    config.log.eval_every_steps = 0
    config.schedule = ("distil", "evaluate")
    config.stages.evaluate = common.evaluate(student="native ensemble")
    whole = experiment.run(config, tmp_path / "whole", report=False, verbose=False)
    halted = tmp_path / "halted"
    for saved in run_with_stops(config, halted, monkeypatch, (4,)):
        assert any("owned/one/params/gate/kernel" in name for name in saved.tree)
    one, two = checkpoint_of(tmp_path / "whole"), checkpoint_of(halted)
    assert tree_sha256(one.tree) == tree_sha256(two.tree)
    assert json.loads((halted / "results.json").read_text())["rows"] == whole["rows"]
    nets = [row["net"] for row in whole["rows"]]
    assert nets == ["student", *(f"student.{n}" for n in ("branch1", "branch2", "ensemble"))]
    assert not any("branch" in name or "gate" in name for name in one.tree)


@pytest.mark.slow
def test_a_quantized_net_is_its_own_teacher_on_digits(tmp_path):
    from configs import byot

    config = byot.get_config("model=mlp,width=0,bits=w4a4,epochs=1,deploy").unlock()
    config.log.eval_every_steps = 0
    config.stages.deploy.latency_rounds = 1
    results = experiment.run(config.lock(), tmp_path / "run", report=False, verbose=False)
    rows = {row["net"]: row for row in results["rows"]}
    assert list(rows) == ["alone", "student", "student.hidden1", "student.ensemble"]
    assert rows["student"]["weight_bits"] == 4
    assert rows["student"]["integer"]["argmax_agreement"] == 1.0
    for key in ("params", "weight_bytes", "student_steps"):
        assert rows["student"][key] == rows["alone"][key]
    # The heads moved the net, and their files stayed away.
    tree = checkpoint_of(tmp_path / "run").tree
    names = {n.removeprefix("nets/student/") for n in tree if n.startswith("nets/student/")}
    assert names == {n.removeprefix("nets/alone/") for n in tree if n.startswith("nets/alone/")}
    assert rows["student"]["loss"] != rows["alone"]["loss"]


@pytest.mark.slow
def test_a_student_with_a_borrowed_classifier_from_training_to_integers(tmp_path):
    borrowing = dict(hidden=(12, 8), head_from="teacher")
    simkd = {"simkd": common.term("simkd", "teacher")}
    config = config_of(
        {
            "teach": (4, {"teacher": {"ce": common.ce()}}, ""),
            "distil": (4, {"student": simkd}, ""),
            "quantized": (2, {"low": simkd}, ""),
        },
        nets={"student": borrowing, "low": dict(borrowing, rules="w4a4", init_from="student")},
    )
    config.stages.calibrate = common.calibrate("low")
    config.stages.evaluate = common.evaluate("teacher", student="SimKD", low="SimKD W4A4")
    config.stages.deploy = common.deploy("low")
    config.stages.deploy.latency_rounds = 1
    config.schedule = ("teach", "distil", "calibrate", "quantized", "evaluate", "deploy")
    results = experiment.run(config, tmp_path / "run", report=False, verbose=False)
    tree = checkpoint_of(tmp_path / "run").tree
    for part in ("kernel", "bias"):
        head = tree[f"nets/teacher/params/head/{part}"]
        for net in ("student", "low"):
            np.testing.assert_array_equal(tree[f"nets/{net}/params/head/{part}"], head)
    rows = {(r["net"], r["method"]): r for r in results["rows"]}
    assert rows["low", "SimKD W4A4"]["weight_bits"] == 4
    assert rows["low", "SimKD W4A4"]["integer"]["argmax_agreement"] == 1.0
    assert (tmp_path / "run" / "model" / "low.onnx").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(head_from="techer"), "Did you mean 'teacher'"),
        (dict(head_from="student"), "net with a head of its own in head_from 'student'"),
    ],
)
def test_a_head_comes_from_a_net_that_has_one(fields, message):
    config = config_of(
        {"teach": (1, {"teacher": {"ce": common.ce()}}, "")},
        nets={"student": dict(hidden=(12,), **fields)},
    )
    with pytest.raises(ValueError, match=message):
        experiment.read(config)


def test_simkd_without_a_borrowed_classifier_says_what_is_missing():
    config = config_of({"distil": (1, {"student": taught("simkd")}, "")})
    with pytest.raises(ValueError, match=r"unknown tap 'projected'.*head_from"):
        experiment.read(config)


def test_every_loss_with_a_teacher_has_its_published_row():
    taught_by = {
        name
        for name, row in TABLE.items()
        if any("teacher" in n for n in inspect.signature(row.function).parameters)
    }
    of_labels = {"tf_kd", "hxe", "tree_soft_labels", "lca_alignment"}
    assert taught_by == set(PUBLISHED) - of_labels
    with pytest.raises(ValueError, match="loss is 'kdd'; it must be one of"):
        terms.learn("kdd", "teacher")


@pytest.mark.parametrize("loss", PUBLISHED)
def test_every_loss_plans_in_the_config_of_all_losses(loss):
    from configs import feature_kd

    config = feature_kd.get_config(f"loss={loss},student_width=4,teacher_width=4,teacher=resnet8")
    settings = experiment.read(config)
    assert "distil" in [s.name for s in settings.stages]


def test_qkd_takes_any_loss_in_place_of_kl():
    from configs import qkd

    settings = experiment.read(qkd.get_config("loss=rkd,student_width=4,teacher_width=4"))
    (co_study,) = [s for s in settings.stages if s.name == "co_study"]
    assert set(co_study.fields["learn"]["teacher"]) == {"ce", "rkd"}
    with pytest.raises(ValueError, match="needs another student, several teachers or none"):
        qkd.get_config("loss=kd_mean")


def test_inspect_lists_the_taps():
    config = config_of({"teach": (1, {"teacher": {"ce": common.ce()}}, "")})
    text = experiment.inspect(config, verbose=False)
    assert "taps: hidden1_pre 24, hidden1 24, hidden2_pre 16, hidden2 16, pooled 16;" in text
