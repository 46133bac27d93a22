"""Runs with a class tree, a cached teacher and soft labels shown: MLPs on synthetic images."""

import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, kd
from qkd_jax import experiment, hierarchy
from qkd_jax.experiment.stages import teacher_cache
from qkd_jax.models import create
from qkd_jax.quantize import quantize
from qkd_jax.quantize.presets import rules
from qkd_jax.report.soft_labels import choose, rank_correlation

STEPS = 12


def make(views=0, top_k=0, **losses):
    """A teacher, a net taught by labels, and one taught by both; 10 classes, the digits' tree."""
    config = common.frame(data="synthetic", seed=0, train_examples=96)
    config.eval_batch_size = 64
    config.data.tree = "digits"
    config.data.augment = ("shift:1",) if views > 1 else ()
    config.log = dict(every_steps=6, eval_every_steps=0, quant_every_steps=0)
    config.parallel.devices = 1
    mlp = dict(model="mlp", hidden=(12,), rules="float")
    config.nets = ConfigDict(dict(teacher=dict(mlp, hidden=(16,)), alone=mlp, student=mlp))

    def stage(net, **terms):
        optim = {net: common.sgd(0.1, weight_decay=0.0)}
        made = common.train(learn={net: terms}, optim=optim, epochs=0, batch_size=16)
        return {**made, "steps": STEPS}

    taught = dict(ce=common.ce(0.5), kd=common.kd("teacher", 0.5, temperature=3.0), **losses)
    distil = stage("student", **taught)
    if views:
        distil.update(views=views, cache=common.cache(top_k=top_k))
    config.stages = ConfigDict(
        dict(
            teach=stage("teacher", ce=common.ce()),
            alone=stage("alone", ce=common.ce()),
            distil=distil,
            evaluate=common.evaluate("teacher", teacher="t", alone="a", student="s"),
        )
    )
    config.schedule = ("teach", "alone", "distil", "evaluate")
    return config


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, experiment.run(make(), folder, verbose=False)


def variables(folder, net):
    state = experiment.restore(folder)
    return {k: np.asarray(v) for k, v in state.variables[net]["params"]["head"].items()}


def test_rows_have_the_severity_that_the_logits_have(plain):
    folder, results = plain
    state = experiment.restore(folder)
    heights = hierarchy.TREES["digits"]().heights
    labels = state.dataset.test_labels
    for row in results["rows"]:
        answers = state.evaluate(row["net"]).logits.argmax(1)
        wrong = answers != labels
        assert wrong.any()
        d = heights[labels, answers]
        np.testing.assert_allclose(row["severity"], d[wrong].mean(), rtol=1e-6)
        np.testing.assert_allclose(row["hierarchy"]["hier_dist1"], d.mean(), rtol=1e-6)
    json.dumps(results, allow_nan=False)


def test_the_report_shows_soft_labels_and_makes_them_anew(plain):
    folder, _ = plain
    page = (folder / "report.html").read_text()
    for text in (
        "Soft and hard labels",
        "T = 3 (taught)",
        "distance in the class tree",
        "Severity",
    ):
        assert text in page, text
    data = json.loads((folder / "soft_labels.json").read_text())
    assert (data["teacher"], data["student"], data["others"]) == ("teacher", "student", ["alone"])
    rows = np.sum(data["similarity"]["teacher"], axis=1)
    np.testing.assert_allclose(rows, 1, atol=1e-4)
    assert -1 <= rank_correlation(data, "teacher") <= 1
    (folder / "soft_labels.json").unlink()
    experiment.report(folder, verbose=False)
    assert json.loads((folder / "soft_labels.json").read_text()) == data


@pytest.mark.slow
def test_cached_logits_teach_what_the_teacher_teaches(plain, tmp_path):
    folder, _ = plain
    cached = tmp_path / "cached"
    experiment.run(make(views=1), cached, report=False, verbose=False)
    ours, theirs = variables(cached, "student"), variables(folder, "student")
    assert all(
        (variables(cached, "teacher")[k] == v).all()
        for k, v in variables(folder, "teacher").items()
    )
    for key, value in theirs.items():
        # float16 moves a logit of size z by z 2^-11 at most; a step moves weights by lr times that.
        np.testing.assert_allclose(ours[key], value, atol=STEPS * 0.1 * 2**-11 * 4)
        assert (ours[key] != value).any()  # it did go through float16
    assert len(list((cached / "cache" / "teacher_views1_topall").iterdir())) == 2


@pytest.mark.slow
def test_the_control_sees_the_students_views(tmp_path):
    """Without the teacher's part of the loss, student and control end alike, with and without."""
    losses = set()
    for views in (0, 2):
        config = kd.get_config(
            f"data=synthetic,epochs=1,train_examples=64,kd_weight=0,views={views}"
        ).unlock()
        config.data.augment = ("shift:1",)
        for fields in config.nets.values():
            fields.update(model="mlp", width=0)
        done = experiment.run(config.lock(), tmp_path / str(views), report=False, verbose=False)
        rows = {row["net"]: row for row in done["rows"]}
        assert rows["student"]["loss"] == pytest.approx(rows["alone"]["loss"], rel=1e-6)
        losses.add(rows["alone"]["loss"])
    assert len(losses) == 2  # two views are not fresh ones


@pytest.mark.slow
def test_a_changed_teacher_is_told_and_its_logits_are_made_anew(tmp_path, capsys):
    shared = tmp_path / "shared"
    config = make(views=2, top_k=3)
    config.stages.distil.cache.dir = str(shared)
    experiment.run(config, tmp_path / "a", report=False, verbose=False)
    (note,) = shared.glob("*/info.json")
    before = json.loads(note.read_text())
    assert before["views"] == 2 and before["top_k"] == 3 and before["augment"] == ["shift:1"]
    config.stages.teach.optim.teacher.lr = 0.05
    experiment.run(config, tmp_path / "b", report=False)
    assert "another teacher" in capsys.readouterr().out
    assert json.loads(note.read_text())["teacher_sha256"] != before["teacher_sha256"]
    (data,) = shared.glob("*/*.array_record")
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"is damaged.*Remove"):
        experiment.run({**config.to_dict(), "seed": 0}, tmp_path / "c", report=False, verbose=False)


def test_a_teachers_key_knows_what_leaves_no_array():
    variables = {"params": {"head": {"kernel": np.ones((2, 3), np.float32)}}}
    programs = [("vit", {}, "float"), ("vit", {"heads": 2}, "float"), ("vit", {}, "w4a4")]
    keys = []
    for _ in range(2):
        nets = {i: quantize(create(n, 3, **f), rules(r)) for i, (n, f, r) in enumerate(programs)}
        run = types.SimpleNamespace(nets=nets, variables=dict.fromkeys(nets, variables))
        keys.append([teacher_cache._sha256(run, net) for net in nets])
    assert keys[0] == keys[1] and len(set(keys[0])) == 3


def test_losses_over_a_tree_take_the_datas(tmp_path):
    config = make(hxe=dict(loss="hxe", weight=0.5, alpha=0.3), near=dict(loss="tree_soft_labels"))
    text = experiment.inspect(config, verbose=False)
    assert text.count("tree='digits'") == 2
    config.data.tree = "none"
    with pytest.raises(ValueError, match="needs a class tree, and data set 'synthetic' has none"):
        experiment.inspect(config, verbose=False)
    config.data.tree = "cifar100"
    with pytest.raises(ValueError, match=r"config.data.tree: .*100 leaves.*10 classes"):
        experiment.inspect(config, verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.stages.distil.update(views=0), r"distil.views is 0.*drop the cache"),
        (lambda c: c.stages.distil.update(views=-1), r"distil.views is -1"),
        (lambda c: c.stages.alone.update(views=2**16), r"alone.views is 65536"),
        (lambda c: c.stages.distil.update(augment=("mixup",)), "mixes the images.*distil.views"),
        (lambda c: c.stages.distil.cache.update(top_k=-1), "cache.top_k is -1"),
        (
            lambda c: c.stages.alone.update(views=1, cache=common.cache()),
            "stages.alone.cache is set, but no",
        ),
        (
            lambda c: c.stages.distil.update(cache=dict(top=2)),
            "unknown field stages.distil.cache 'top'.*Did you mean 'top_k'",
        ),
        (
            lambda c: c.stages.distil.update(
                cache=common.cache(top_k=3),
                learn=dict(student=dict(apart=common.term("dkd", "teacher"))),
            ),
            r"learn\.student\.apart: loss 'dkd' looks at every logit of 'teacher'.*the 3 largest.*"
            r"distil\.cache\.top_k=0",
        ),
        (
            lambda c: c.stages.distil.update(
                cache=common.cache(top_k=3),
                learn=dict(student=dict(kd=common.term("kd", "teacher", standardize=True))),
            ),
            r"learn\.student\.kd: loss 'kd' with standardize looks at every logit",
        ),
    ],
)
def test_wrong_caches(change, message):
    config = make(views=2)
    with config.unlocked():
        change(config)
    with pytest.raises(ValueError, match=message):
        experiment.inspect(config, verbose=False)


def test_chosen_images_show_each_kind():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 10
    sure = 6.0 * np.eye(10)[labels]
    teacher = sure + 2 * rng.standard_normal((200, 10))
    student = sure + 3 * rng.standard_normal((200, 10))
    chosen = choose(teacher, student, labels, 4.0, 6)
    right = {
        row: (teacher[row].argmax() == labels[row], student[row].argmax() == labels[row])
        for row, _ in chosen
    }
    wanted = {
        "the teacher sees likeness": (True, True),
        "the teacher is sure": (True, True),
        "the teacher alone is right": (True, False),
        "the student alone is right": (False, True),
        "both are wrong": (False, False),
    }
    assert len({row for row, _ in chosen}) == 6 == len({labels[row] for row, _ in chosen})
    assert {why for _, why in chosen} <= set(wanted)
    assert all(right[row] == wanted[why] for row, why in chosen)
