"""A run on a folder of images: it resumes to the same bits, whatever makes its batches."""

import pytest
from image_folders import make
from stopped_runs import StopAt

from configs import common
from qkd_jax import experiment, ptq
from qkd_jax.data.streams import StreamedImages
from qkd_jax.experiment import orchestrate
from qkd_jax.record.checkpoint import Checkpoints
from qkd_jax.training.loop import Preempted
from qkd_jax.trees import nested, tree_sha256


def get_config(folder, **data):
    config = common.frame(data="folder", seed=0, train_examples=48)
    config.data.update(dict(dir=str(folder), image_size=8, **data))
    config.eval_batch_size = 8
    config.log = dict(every_steps=2, eval_every_steps=4, quant_every_steps=0)
    config.checkpoint = dict(every_seconds=0.0, every_steps=3)
    config.parallel.devices = 1
    tiny = dict(model="mlp", hidden=(12,), batch_norm=True)
    config.nets.teacher = dict(tiny)
    config.nets.student = dict(tiny, rules="w4a4", init_from="teacher")
    common_fields = dict(kind="train", epochs=0.0, steps=8, batch_size=16)
    sgd = common.sgd(0.05, weight_decay=1e-4)
    config.stages.pretrain = dict(
        common_fields, learn=dict(teacher=dict(ce=common.ce())), optim=dict(teacher=sgd)
    )
    config.stages.calibrate = common.calibrate("student", examples=20)
    config.stages.distil = dict(
        common_fields,
        learn=dict(student=dict(kd=common.kd("teacher"))),
        optim=dict(student=dict(sgd)),
        augment=("random_resized_crop", "flip", "randaugment:5", "mixup"),
    )
    config.stages.look_up = dict(
        common_fields,
        learn=dict(student=dict(kd=common.kd("teacher"))),
        optim=dict(student=dict(sgd)),
        views=2,
        cache=common.cache(),
    )
    config.stages.evaluate = common.evaluate(student="distilled")
    config.schedule = ("pretrain", "calibrate", "distil", "look_up", "evaluate")
    return config.lock()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("images"))


def digest(folder):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return tree_sha256(nested(checkpoints.restore_latest().tree))


def test_an_interrupted_run_on_a_folder_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    def run(name, **data):
        return experiment.run(
            get_config(folder, **data), tmp_path / name, report=False, verbose=False
        )

    results = run("whole")
    assert results["dataset"] | {"class_examples": []} == dict(
        name="folder", train_examples=48, test_examples=16, class_examples=[]
    )
    # In the first stage, then in `distil`, whose batches worker processes make from there on.
    for questions, workers in ((5, 0), (8, 1)):
        monkeypatch.setattr(
            orchestrate, "GracefulStop", lambda questions=questions: StopAt(questions)
        )
        with pytest.raises(Preempted):
            run("stopped", workers=workers)
    monkeypatch.undo()
    assert run("stopped") == results
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    (folder / "train" / "class0" / "000.jpg").write_bytes(b"other")
    (tmp_path / "stopped" / "results.json").unlink()
    with pytest.raises(ValueError, match="run on other data"):
        run("stopped")


def test_re_estimation_decodes_a_batch_when_it_needs_it(tmp_path, monkeypatch):
    """The whole of ImageNet as floats would take 770 GB."""
    decoded, ahead = [], []
    decode, estimate = StreamedImages._decode, ptq.reestimate_batch_norm

    def counting(self, row, *args, **options):
        decoded.append(row)
        return decode(self, row, *args, **options)

    def watched(net, variables, batches):
        def each():
            start = len(decoded)
            for number, batch in enumerate(batches, 1):
                ahead.append(len(decoded) - start - 16 * number)
                yield batch

        return estimate(net, variables, each())

    monkeypatch.setattr(StreamedImages, "_decode", counting)
    monkeypatch.setattr(ptq, "reestimate_batch_norm", watched)
    config = get_config(make(tmp_path / "images")).unlock()
    config.stages.reestimate_bn = common.reestimate_bn("teacher")
    config.schedule = ("pretrain", "reestimate_bn")
    experiment.run(config, tmp_path / "run", report=False, verbose=False)
    assert ahead == [0, 0, 0]  # 48 images in batches of 16


def test_the_plan_of_a_set_that_is_not_here(tmp_path):
    experiment.inspect(get_config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="which is no folder"):
        experiment.run(get_config(tmp_path / "nowhere"), tmp_path / "run", verbose=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 3, "config.data.image_size is 3; it must be an integer of at least 8"),
        ("decoder", "jpeg", "config.data.decoder is 'jpeg'"),
        ("workers", -1, "config.data.workers is -1"),
        ("name", "digits", r"config.data.image_size is 8 .*'digits' is in memory"),
    ],
)
def test_fields_of_streamed_sets_are_checked(field, value, message, tmp_path):
    config = get_config(tmp_path)
    config.data[field] = value
    with pytest.raises(ValueError, match=message):
        experiment.inspect(config)
