"""Runs with the newer optimizers, schedules and averages: what they end with, and resuming."""

import json

import pytest
from stopped_runs import StopAt, checkpoint_of
from tiny_config import get_config

from configs import common, optimizers
from qkd_jax import experiment
from qkd_jax.experiment import orchestrate
from qkd_jax.training.loop import Preempted
from qkd_jax.trees import tree_sha256


def config_of():
    """A chain of two stages in which one average goes on, and Lion beside it."""
    config = get_config()
    with config.unlocked():
        chain = dict(ema=0.5, ema_warmup=True, layer_rates=("dense1:0.5",), layer_decay=0.8)
        chain |= dict(schedule="wsd", decay=0.5, layer_stem=("dense1",))
        config.stages.self_study.steps = 3
        config.stages.self_study.optim.student = optimizers.muon(
            0.02, weight_decay=1e-3, ema_final=False, **chain
        )
        config.stages.co_study.optim.student = optimizers.muon(
            0.02, weight_decay=1e-3, continues="self_study", **chain
        )
        config.stages.co_study.optim.teacher = optimizers.lion(1e-3, weight_decay=1e-2, ema=0.9)
        config.stages.co_study.stale = 2
        config.stages.self_study.hygiene = dict(student=common.hygiene(max_ratio=8.0))
        config.schedule = ("calibrate", "self_study", "co_study", "reestimate_bn", "evaluate_float")
    config.stages.reestimate_bn.nets = ("student",)
    return config


def logged(folder, split):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted: (folder, results)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, experiment.run(config_of(), folder, report=False, verbose=False)


def test_a_net_ends_its_stage_as_its_average(finished):
    folder, results = finished
    last = [row["values"] for row in logged(folder, "test") if row["stage"] == "co_study"][-1]
    assert {"student/top1", "student/ema_top1", "teacher/ema_loss"} <= set(last)
    assert last["student/loss"] != last["student/ema_loss"]
    rows = {row["net"]: row for row in results["rows"]}
    assert rows["teacher"]["loss"] == pytest.approx(last["teacher/ema_loss"], rel=1e-6)
    # The student's schedule goes on over both stages, 7 steps: 3 flat ones, then 1 - sqrt(t).
    rates = [row["values"]["student/lr"] for row in logged(folder, "train")]
    wanted = [1.0, 1 - (2 / 4) ** 0.5, 1 - (3 / 4) ** 0.5]
    assert rates == pytest.approx([0.02 * factor for factor in wanted], rel=1e-5)


@pytest.mark.parametrize("stop", [2, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, stop):
    whole, _ = finished
    monkeypatch.setattr(orchestrate, "GracefulStop", lambda: StopAt(stop))
    with pytest.raises(Preempted):
        experiment.run(config_of(), tmp_path, report=False, verbose=False)
    monkeypatch.undo()
    saved = checkpoint_of(tmp_path).tree
    stage = "self_study" if stop == 2 else "co_study"
    averaged = [
        name for name in saved if name.startswith(f"optimizers/{stage}/student/ema/average")
    ]
    assert any("/quant/" in name for name in averaged)
    assert any("/batch_stats/" in name for name in averaged)
    experiment.run(config_of(), tmp_path, report=False, verbose=False)
    assert (whole / "metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()
    assert (whole / "results.json").read_bytes() == (tmp_path / "results.json").read_bytes()
    assert tree_sha256(checkpoint_of(whole).tree) == tree_sha256(checkpoint_of(tmp_path).tree)


def test_what_an_average_does_not_go_with():
    config = config_of()
    config.stages.self_study.optim.student.ema_final = True
    with pytest.raises(ValueError, match=r"stages\.self_study\.optim\.student\.ema_final=False"):
        experiment.inspect(config, verbose=False)
    config = config_of()
    text = " ".join(experiment.inspect(config, verbose=False).split())
    assert "student: muon, wsd" in text and "ema=0.9" in text
