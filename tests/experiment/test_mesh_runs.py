"""Runs whose nets are divided over devices: the states of one device, and resuming elsewhere."""

import numpy as np
import pytest
from stopped_runs import StopAt, checkpoint_of
from tiny_config import get_config

from qkd_jax import experiment
from qkd_jax.experiment import orchestrate
from qkd_jax.training.loop import Preempted

STAGES = ("pretrain_teacher", "pretrain_student", "calibrate", "qat_only", "evaluate_float")


def config(devices, model=1, rules=()):
    made = get_config("steps=6").unlock()
    made.schedule = STAGES
    made.parallel = dict(mode="jit", devices=devices, model=model, rules=rules)
    made.stages.qat_only.accumulate = 2
    return made


def test_a_run_goes_on_over_another_mesh_to_the_state_of_one_device(tmp_path, monkeypatch, capsys):
    experiment.run(config(1), tmp_path / "one", report=False, verbose=False)
    # Stopped in pretrain_teacher, then in qat_only: three meshes see a part each.
    meshes = [(4, 2, ()), (4, 4, ((".*/kernel", ("model",)),)), (2, 1, ())]
    for stop, mesh in zip((3, 12, 10**6), meshes, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(orchestrate, "GracefulStop", lambda stop=stop: StopAt(stop))
            if stop < 10**6:
                with pytest.raises(Preempted):
                    experiment.run(config(*mesh), tmp_path / "many", report=False, verbose=False)
            else:
                experiment.run(config(*mesh), tmp_path / "many", report=False)
    said = capsys.readouterr().out
    assert "devices: made on 4 (model 4), going on with 2" in said
    one, many = checkpoint_of(tmp_path / "one").tree, checkpoint_of(tmp_path / "many").tree
    assert one.keys() == many.keys()
    for name, leaf in one.items():
        if name.startswith("nets/"):
            scale = max(np.max(np.abs(leaf)), 1e-3)
            np.testing.assert_allclose(many[name], leaf, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_inspection_tells_what_lies_on_a_device():
    text = experiment.inspect(config(4, 2))
    assert "4 devices: data 2 x model 2" in text
    # The teacher by hand: kernels of 64 x 24 and 24 x 10, a norm's two arrays of 24, a bias of 10,
    # each with a momentum, and the count of steps; the kernels alone are in halves.
    kernels, rest = 64 * 24 + 24 * 10, 24 + 24 + 10
    whole, part = (4 * (2 * (n + rest) + 1) for n in (kernels, kernels // 2))
    assert f"teacher: {whole:,} bytes of parameters and optimizer, {part:,} on each" in text
    averaged = config(4, 2)
    averaged.stages.pretrain_teacher.optim.teacher.ema = 0.9
    # Beside them the average, with the norm's two statistics of 24, and its count.
    whole, part = (
        size + 4 * (n + rest + 48 + 1) for size, n in ((whole, kernels), (part, kernels // 2))
    )
    text = experiment.inspect(averaged)
    assert f"teacher: {whole:,} bytes of parameters, optimizer and average, {part:,} on" in text
