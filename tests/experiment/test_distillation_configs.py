"""Who learns from whom in the configs of online, chained and self distillation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import (
    assistant,
    born_again,
    common,
    data_free,
    feature_kd,
    kd,
    multi_teacher,
    mutual,
    patient,
    transfer,
)
from qkd_jax import experiment, weights
from qkd_jax.data import DATASETS
from qkd_jax.models import create

TINY = "data=synthetic,epochs=0.5,train_examples=64"


def small(config):
    """The config with nets of one hidden layer, so that a run takes seconds."""
    config = config.unlock()
    for fields in config.nets.values():
        fields.model, fields.width, fields.hidden = "mlp", 0, (8,)
    config.log.eval_every_steps = 0
    return config.lock()


def learns_from(config, stage, net):
    return {row.get("source") or "labels" for row in config.stages[stage].learn[net].values()}


def test_each_student_learns_from_all_others():
    config = mutual.get_config("students=3")
    for k in range(3):
        others = {f"student{j}" for j in range(3) if j != k}
        assert learns_from(config, "mutual", f"student{k}") == {"labels", *others}
    weights = [row.weight for row in config.stages.mutual.learn.student0.values()]
    assert sorted(weights) == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("students=1", "at least 2"),
        ("students=3,widths=8+16", "one width, or one each"),
    ],
)
def test_mutual_says_what_is_wrong(arg, message):
    with pytest.raises(ValueError, match=message):
        mutual.get_config(arg)


@pytest.mark.slow
def test_the_control_is_the_first_students_twin(tmp_path):
    """Both start from the same weights and see the same batches: without lessons, equal rows."""
    config = small(mutual.get_config(TINY)).unlock()
    for row in config.stages.mutual.learn.student0.values():
        row.weight = 1.0 if row.loss == "ce" else 0.0
    done = experiment.run(config.lock(), tmp_path / "run", report=False, verbose=False)
    rows = {row["net"]: row for row in done["rows"]}
    assert rows["alone"]["loss"] == pytest.approx(rows["student0"]["loss"], rel=1e-6)
    assert rows["alone"]["loss"] != rows["student1"]["loss"]


def test_an_assistant_stands_between():
    config = assistant.get_config("widths=32+16+12+8,bits=w4a4")
    assert learns_from(config, "teach_assistant1", "assistant1") == {"labels", "teacher"}
    assert learns_from(config, "teach_assistant2", "assistant2") == {"labels", "assistant1"}
    assert learns_from(config, "teach_student", "student") == {"labels", "assistant2"}
    assert learns_from(config, "direct", "direct") == {"labels", "teacher"}
    # The control takes its copy before the student moves on.
    order = list(config.schedule)
    assert order.index("calibrate") < order.index("direct") < order.index("teach_student")
    steps = {s.name: s.steps for s in experiment.read(config).stages}
    assert steps["direct"] == steps["teach_student"]


@pytest.mark.parametrize("arg", ["widths=16+8", "widths=16+8+4,models=mlp+resnet8"])
def test_a_chain_has_three_links(arg):
    with pytest.raises(ValueError, match=r"at least\s+one assistant"):
        assistant.get_config(arg)


def test_generations_follow_one_another():
    config = born_again.get_config("generations=2")
    assert learns_from(config, "train_generation0", "generation0") == {"labels"}
    assert learns_from(config, "train_generation2", "generation2") == {"labels", "generation1"}
    with pytest.raises(ValueError, match="at least 1"):
        born_again.get_config("generations=0")


@pytest.mark.slow
def test_the_ensemble_is_the_mean_of_probabilities(tmp_path):
    config = small(born_again.get_config(f"{TINY},generations=1"))
    done = experiment.run(config, tmp_path / "run", report=False, verbose=False)
    rows = {row["net"]: row for row in done["rows"]}
    run = experiment.restore(tmp_path / "run")
    logits = [run.evaluate(name).logits for name in ("generation0", "generation1")]
    mean = np.mean([np.asarray(jax.nn.softmax(z), np.float64) for z in logits], axis=0)
    labels = run.dataset.test_labels
    assert rows["ensemble"]["top1"] == pytest.approx(np.mean(mean.argmax(-1) == labels))
    loss = -np.mean(np.log(mean[np.arange(len(labels)), labels]))
    assert rows["ensemble"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert rows["ensemble"]["params"] == 2 * rows["generation0"]["params"]


@pytest.mark.slow
def test_a_new_head_on_old_layers(tmp_path):
    config = small(transfer.get_config(f"{TINY},teacher=mlp"))
    experiment.run(config, tmp_path / "run", report=False, verbose=False)
    run = experiment.restore(tmp_path / "run")
    source, frozen = (run.variables[name]["params"] for name in ("source", "frozen"))
    np.testing.assert_array_equal(source["dense1"]["kernel"], frozen["dense1"]["kernel"])
    assert not np.allclose(source["head"]["kernel"], frozen["head"]["kernel"])
    tuned = run.variables["tuned"]["params"]
    assert not np.array_equal(source["dense1"]["kernel"], tuned["dense1"]["kernel"])
    # Both began with a head of their own: the source's would have stayed closer.
    correlation = lambda a, b: np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
    assert correlation(source["dense1"]["kernel"], tuned["dense1"]["kernel"]) > 0.9
    assert abs(correlation(source["head"]["kernel"], tuned["head"]["kernel"])) < 0.9


@pytest.mark.parametrize("combine", ["sum", "mean", "confidence"])
def test_several_teachers_and_each_alone(combine):
    config = multi_teacher.get_config(f"teachers=mlp,teacher_widths=0+8+4,combine={combine}")
    learn = config.stages.distil.learn
    assert learn.student.kd.source == ("teacher0", "teacher1", "teacher2")
    assert learn.student.kd.loss == multi_teacher.COMBINE[combine]
    assert [learn[f"single{k}"].kd.source for k in range(3)] == ["teacher0", "teacher1", "teacher2"]
    assert all(config.nets[net].init_from == "student" for net in learn if net != "student")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("teachers=resnet8", "two teachers or more"),
        ("teachers=resnet8+mlp,teacher_widths=8+8+8", "as many of the other"),
        ("combine=max", "allowed: sum, mean, confidence"),
    ],
)
def test_several_teachers_say_what_is_wrong(arg, message):
    with pytest.raises(ValueError, match=message):
        multi_teacher.get_config(arg)


@pytest.mark.slow
def test_arms_of_several_teachers_differ_by_their_lessons_alone(tmp_path):
    """With the teachers' weight at 0 every quantized student ends where `labels` ends."""
    config = small(multi_teacher.get_config(f"{TINY},bits=w4a4,combine=confidence,kd_weight=0.0"))
    done = experiment.run(config, tmp_path / "run", report=False, verbose=False)
    rows = {row["net"]: row for row in done["rows"]}
    for name in ("student", "single0", "single1"):
        assert rows[name]["loss"] == pytest.approx(rows["labels"]["loss"], rel=1e-6)
        assert rows[name]["weight_bits"] == 8  # the first and the last layer are all there is
    assert len({row["student_steps"] for row in rows.values() if row["net"][0] in "sl"}) == 1
    assert rows["teachers"]["method"] == "mean of 2"
    assert rows["teachers"]["loss"] != rows["teacher0"]["loss"]


def without_data(arg=""):
    config = small(data_free.get_config(f"{TINY},bits=w8a8:static,calibration=16,steps=20{arg}"))
    config.unlock()
    for fields in config.nets.values():
        fields.batch_norm = True
    return config


def test_made_images_are_a_stage_of_the_schedule():
    config = without_data()
    config.stages.dafl.examples = 128
    stages = {s.name: s for s in experiment.read(config).stages}
    # Half an epoch of 128 images, and of 64: epochs are counted on what is shown.
    assert stages["student_dafl"].steps == 2 * stages["student_real"].steps > 0
    assert stages["student_real"].steps == stages["teach"].steps == stages["student_cmi"].steps
    assert stages["student_dafl"].data.examples == 128
    assert stages["cmi"].nets == ("teacher", "student_cmi")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages.student_cmi.images", "deep_invrsion", "Did you mean 'deep_inversion'"),
        ("stages.student_real.images", "zeroq", "later in the schedule"),
        (
            "stages.calibrate.images",
            "teach",
            "an earlier stage that makes images: deep_inversion, dafl, cmi, zeroq",
        ),
        ("stages.student_dafl.optim.student_dafl.continues", "extra", "one set of images"),
        ("stages.zeroq.method", "dafl", "stages.zeroq.method"),
        ("stages.zeroq.nets", ("teacher", "student_cmi"), "made from one net"),
        ("stages.zeroq.examples", 0, "stages.zeroq.examples"),
        ("stages.dafl.nets", ("teacher", "student_dafl"), "made from one net"),
        ("stages.dafl.tap", "poled", "stages.dafl: unknown tap 'poled'.*Did you mean 'pooled'"),
        ("stages.dafl.latent", 0, "stages.dafl: latent is 0"),
        ("stages.cmi.nets", (), "made from one net, or one and its student"),
        ("stages.cmi.shift", 8, "stages.cmi: shift is 8"),
        ("stages.cmi.stps", 3, "unknown field of stages.cmi 'stps'.*Did you mean 'steps'"),
        ("nets.teacher.batch_norm", False, "no BatchNorm"),
    ],
)
def test_made_images_say_what_is_wrong(path, value, message):
    config = without_data()
    if value == "extra":
        config.stages.extra = config.stages.student_dafl.copy_and_resolve_references()
        config.stages.extra.images = ""
        config.schedule = ("teach", "dafl", "extra", "student_dafl", "evaluate")
    *keys, last = path.split(".")
    node = config
    for key in keys:
        node = node[key]
    with node.ignore_type():
        node[last] = value
    with pytest.raises(ValueError, match=message):
        experiment.read(config)


@pytest.mark.slow
def test_a_run_without_data(tmp_path, monkeypatch):
    """Stopped behind the making of images, it goes on with the file; another file is refused."""
    folder = tmp_path / "run"
    config = without_data()

    kind = experiment.STAGES["calibrate"]

    @functools.wraps(kind.run)
    def stop(*args, **fields):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setitem(experiment.STAGES, "calibrate", dataclasses.replace(kind, run=stop))
        with pytest.raises(RuntimeError, match="stopped"):
            experiment.run(config, folder, report=False, verbose=False)
    file = folder / "synthetic" / "zeroq.npz"
    kept = file.read_bytes()
    made = dict(np.load(file))
    np.savez(file, images=made["images"] + 1, labels=made["labels"])
    with pytest.raises(ValueError, match=r"zeroq.npz does not hold the images of stage 'zeroq'"):
        experiment.run(config, folder, report=False, verbose=False)
    file.write_bytes(kept)
    done = experiment.run(config, folder, report=False, verbose=False)
    rows = {row["net"]: row for row in done["rows"]}
    students = [name for name in rows if name.startswith("student_")]
    assert len(students) == 4 and len({rows[name]["loss"] for name in students}) == 4
    assert len({rows[name]["student_steps"] for name in students}) == 1
    assert rows["quantized"]["loss"] != rows["quantized_real"]["loss"]
    whole = experiment.run(config, tmp_path / "whole", report=False, verbose=False)
    assert whole == done and (tmp_path / "whole" / "synthetic" / "zeroq.npz").read_bytes() == kept
    inverted = np.load(folder / "synthetic" / "deep_inversion.npz")
    assert inverted["images"].shape == (64, 8, 8, 1) and inverted["images"].dtype == np.float32
    run = experiment.restore(folder)
    for maker in ("deep_inversion", "dafl", "cmi"):
        images = np.load(folder / "synthetic" / f"{maker}.npz")["images"]
        pixels = run.dataset.pixels(images)
        np.testing.assert_allclose(  # within the range of pixels: rounding alone changes them
            run.dataset.normalize(pixels), images, atol=0.51 / 255 / run.dataset.std.min()
        )
    assert set(run.synthetic) == {"deep_inversion", "dafl", "cmi", "zeroq"}


@pytest.mark.slow
def test_students_of_made_images_know_real_ones(tmp_path):
    """Digits: 10 % is chance, and the student sees no real image and no label."""
    config = data_free.get_config("makers=dafl+cmi,epochs=40,teacher_width=8").unlock()
    config.stages.dafl.update(steps=300, batch_size=64)
    config.log.eval_every_steps = 0
    config.schedule = tuple(
        s for s in config.schedule if not ("calib" in s or s in ("zeroq", "student_real"))
    )
    config.stages.evaluate = common.evaluate(**{f"student_{m}": m for m in ("dafl", "cmi")})
    done = experiment.run(config.lock(), tmp_path / "run", report=False, verbose=False)
    rows = {row["net"]: row["top1"] for row in done["rows"]}
    assert rows["student_dafl"] > 0.4 and rows["student_cmi"] > 0.8


@pytest.mark.parametrize("makers", ["dafl+dafl", "gan"])
def test_makers_are_named(makers):
    with pytest.raises(ValueError, match=r"allowed, each once.*deep_inversion, dafl, cmi"):
        data_free.get_config(f"makers={makers}")


@pytest.mark.slow
def test_old_layers_come_from_a_net_of_other_classes(tmp_path):
    net = create("mlp", 5, hidden=(8,))
    images = np.zeros((1, *DATASETS["synthetic"].image_shape), np.float32)
    variables = jax.device_get(net.init(jax.random.key(3), images))
    weights.save(tmp_path / "five.npz", variables)
    config = small(transfer.get_config(f"{TINY},teacher=mlp,source={tmp_path}/five.npz")).unlock()
    config.schedule = ("frozen",)
    experiment.run(config.lock(), tmp_path / "run", report=False, verbose=False)
    run = experiment.restore(tmp_path / "run")
    frozen = run.variables["frozen"]["params"]
    np.testing.assert_array_equal(
        frozen["dense1"]["kernel"], variables["params"]["dense1"]["kernel"]
    )
    assert frozen["head"]["kernel"].shape == (8, 10)
    config.unlock().nets.frozen.fresh = ""
    with pytest.raises(ValueError, match=r"nets.frozen.init_from: .*head/bias has shape \(5,\)"):
        experiment.run(config.lock(), tmp_path / "other", report=False, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("get_config", "arg"),
    [(kd.get_config, ""), (feature_kd.get_config, "loss=rkd"), (feature_kd.get_config, "loss=hxe")],
)
def test_the_control_starts_where_the_student_starts(get_config, arg, tmp_path):
    """Both learn from labels alone here, on the same batches, and end with equal rows."""
    words = f"{TINY},teacher=mlp,student=mlp" + (f",{arg}" if arg else "")
    config = small(get_config(words)).unlock()
    config.stages.distil.learn.student = dict(ce=common.ce())
    done = experiment.run(config.lock(), tmp_path / "run", report=False, verbose=False)
    rows = {row["net"]: row for row in done["rows"]}
    assert rows["alone"]["loss"] == rows["student"]["loss"]


def test_mixtures_are_for_teachers_alone():
    config = patient.get_config("data=synthetic").unlock()
    stages = {s.name: s for s in experiment.read(config).stages}
    assert stages["patient"].steps == 4 * stages["short"].steps == stages["labels"].steps
    assert (
        stages["patient"].fields["augment"][-1] == "mixup" and not stages["plain"].fields["augment"]
    )
    config.stages.labels.augment = ("mixup",)
    with pytest.raises(ValueError, match=r"stages.labels.augment mixes images.*'ce'"):
        experiment.read(config)
    config.stages.labels.augment = ("mixip",)
    with pytest.raises(ValueError, match=r"stages.labels.augment.*Did you mean 'mixup'"):
        experiment.read(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(nets__scratch__fresh="head"), "every layer is fresh"),
        (dict(nets__tuned__fresh="haed"), r"nets.tuned.fresh is 'haed' and matches no layer"),
    ],
)
def test_wrong_layers_are_named(change, message, tmp_path):
    config = small(transfer.get_config(f"{TINY},teacher=mlp")).unlock()
    ((path, value),) = change.items()
    *keys, last = path.split("__")
    node = config
    for key in keys:
        node = node[key]
    node[last] = value
    config.schedule = tuple(s for s in config.schedule if s in ("source", "tuned", "frozen"))
    with pytest.raises(ValueError, match=message):
        experiment.run(config.lock(), tmp_path / "run", report=False, verbose=False)
