"""The run as a whole: rows, resuming, stopping, and what it says when something is wrong."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stopped_runs import StopAt, checkpoint_of
from tiny_config import get_config

from qkd_jax import experiment, weights
from qkd_jax.data import load
from qkd_jax.deploy import ONNX_ENGINES
from qkd_jax.deploy import predict as predictor
from qkd_jax.experiment import orchestrate
from qkd_jax.training.loop import NonFiniteError, Preempted
from qkd_jax.trees import nested, tree_sha256

ROOT = Path(__file__).parents[2]


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run that was never interrupted: (folder, results)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    results = experiment.run(get_config(), folder, report=False, verbose=False)
    return folder, results


def test_a_run_ends_with_a_row_per_net_and_method(finished):
    folder, results = finished
    rows = results["rows"]
    assert [(r["net"], r["method"]) for r in rows] == [
        ("teacher", "float"),
        ("student", "float"),
        ("qat_only", "QAT alone"),
        ("student", "QKD"),
        ("teacher", "after co-studying"),
    ]
    for row in rows:
        assert 0 <= row["top1"] <= row["top5"] <= 1 and math.isfinite(row["loss"])
        assert row["agreement_with"] == "teacher_before" and 0 <= row["agreement"] <= 1
    assert rows[0]["agreement"] == 1.0  # the copy is of this moment
    assert [r["student_steps"] for r in rows] == [8, 8, 8, 8, 12]
    assert [r["weight_bits"] for r in rows] == [32, 32, 4, 4, 32]
    assert rows[1]["weight_bytes"] == 4 * rows[1]["params"] > rows[3]["weight_bytes"]
    examples = results["dataset"]["class_examples"]
    assert sum(examples) == results["dataset"]["test_examples"]
    for row in rows:
        assert sum(row["class_correct"]) == pytest.approx(row["top1"] * sum(examples))
        assert all(0 <= c <= n for c, n in zip(row["class_correct"], examples, strict=True))
    inputs = math.prod(load("synthetic").image_shape)
    assert rows[0]["bit_operations"] == (inputs * 24 + 24 * len(examples)) * 32 * 32
    edges, middle = inputs * 12 + 12 * len(examples), 12 * 12
    assert rows[1]["bit_operations"] == (edges + middle) * 32 * 32
    assert rows[3]["bit_operations"] == edges * 8 * 8 + middle * 4 * 4
    assert results["dataset"]["train_examples"] == 96
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert not any("second" in key for row in rows for key in row)


def test_a_run_folder_is_the_record(finished):
    folder, _ = finished
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "run.json", "metrics.jsonl", "results.json", "timings.json"} <= names
    start = json.loads((folder / "run.json").read_text())["starts"][0]
    assert start["seed"] == 0 and len(start["data"]["fingerprint"]) == 64
    assert set(start["nets"]) == {"teacher", "teacher_before", "student", "qat_only"}
    stages = json.loads((folder / "timings.json").read_text())["stages"]
    assert set(stages) == set(get_config().schedule)
    rows = lines(folder)
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    trained = [r for r in rows if r["split"] == "train" and r["stage"] == "co_study"]
    assert {"student/loss", "student/kd", "teacher/ce", "student/lr"} <= set(trained[0]["values"])
    # The student's rate runs on over the three phases instead of starting anew.
    rates = [r["values"]["student/lr"] for r in rows if "student/lr" in r["values"]][-3:]
    assert rates == sorted(rates, reverse=True) and rates[0] < 0.05
    paths = [r for r in rows if r["split"] == "quant"]
    assert "student/dense2/weight_quantizer/step" in paths[-1]["values"]


def test_a_finished_run_does_nothing_again(finished, capsys):
    folder, results = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert experiment.run(get_config(), folder, report=False) == json.loads(json.dumps(results))
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    said = capsys.readouterr().out
    assert "finished run" in said and "QKD" in said
    assert before == after


def test_another_config_is_refused_with_the_differing_fields(finished):
    folder, _ = finished
    config = get_config()
    config.stages.tutor.optim.student.lr = 0.5
    with pytest.raises(ValueError, match=r"stages\.tutor\.optim\.student\.lr: 0\.05.*0\.5"):
        experiment.run(config, folder, verbose=False)
    # What cannot change a result may differ.
    config = get_config()
    config.checkpoint.every_steps = 3
    experiment.run(config, folder, report=False, verbose=False)


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    config = get_config()
    config.nets.student.rules = "w4a"
    with pytest.raises(ValueError, match="Did you mean 'w4a4'"):
        experiment.run(config, tmp_path / "run", verbose=False)
    assert not (tmp_path / "run").exists()


def test_eval_and_report_need_the_folder_alone(finished, capsys):
    folder, results = finished
    found = experiment.evaluate(folder, verbose=False)
    rows = {r["net"]: r for r in found["rows"]}
    for key in ("top1", "loss", "student_steps"):
        assert rows["student"][key] == results["rows"][-2][key]
    # The reference is still what the float teacher was, which the teacher no longer is.
    assert rows["teacher_before"]["loss"] == results["rows"][0]["loss"] != rows["teacher"]["loss"]
    with pytest.raises(ValueError, match="no deploy stage"):
        experiment.export(folder)
    with pytest.raises(ValueError, match="does not exist"):
        experiment.evaluate(folder / "nowhere")


@pytest.mark.parametrize(
    "stop", [5, 26, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (0, 33))]
)
def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, stop):
    folder, _ = finished
    monkeypatch.setattr(orchestrate, "GracefulStop", lambda: StopAt(stop))
    with pytest.raises(Preempted):
        experiment.run(get_config(), tmp_path, report=False, verbose=False)
    monkeypatch.undo()
    experiment.run(get_config(), tmp_path, report=False, verbose=False)
    same(folder, tmp_path)


def same(folder, other):
    """Asserts that two runs ended with the same parameters, results and log."""
    assert (folder / "results.json").read_bytes() == (other / "results.json").read_bytes()
    assert tree_sha256(checkpoint_of(folder).tree) == tree_sha256(checkpoint_of(other).tree)
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_a_broken_newest_checkpoint_is_reported_and_the_one_before_used(finished, tmp_path, capsys):
    folder, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "results.json").unlink()
    newest = max(int(p.name) for p in (copy / "checkpoints").iterdir() if p.name.isdigit())
    victims = [p for p in (copy / "checkpoints" / str(newest)).rglob("*") if p.stat().st_size > 500]
    for victim in victims:
        if victim.is_file():
            victim.write_bytes(victim.read_bytes()[:100])
    experiment.run(get_config(), copy, report=False)
    assert f"checkpoint of step {newest}" in capsys.readouterr().out
    same(folder, copy)


def test_a_run_that_goes_bad_says_where_and_keeps_its_checkpoint(tmp_path):
    config = get_config()
    config.stages.qat_only.optim.qat_only.lr = 1e6
    config.stages.qat_only.learn.qat_only.ce.weight = 1e30
    with pytest.raises(NonFiniteError, match=r"stage 'qat_only', step \d of 8.*'qat_only', layer"):
        experiment.run(config, tmp_path, report=False, verbose=False)
    assert experiment.main("run", config=config, workdir=tmp_path) == experiment.EXIT_NONFINITE
    saved = checkpoint_of(tmp_path)
    assert saved.meta["stage"] == "qat_only" and saved.meta["stage_step"] == 0
    assert all(np.isfinite(leaf).all() for leaf in saved.tree.values())
    assert not (tmp_path / "results.json").exists()


def test_each_structure_compiles_once(finished, tmp_path, monkeypatch):
    made = []
    build = orchestrate.step_cache
    monkeypatch.setattr(orchestrate, "step_cache", lambda s: made.append(build(s)) or made[-1])
    experiment.run(get_config("seed=1"), tmp_path, report=False, verbose=False)
    # teacher; float student; QAT (its control is self-studying's step); co-studying; tutoring
    assert made[0].traces == 5


def test_a_net_starts_from_a_file_or_another_run(finished, tmp_path):
    folder, _ = finished
    config = get_config()
    config.nets.qat_only.init_from = f"{folder}#student"
    config.schedule = ("calibrate", "qat_only")
    config.stages.calibrate.nets = ("qat_only",)
    experiment.run(config, tmp_path / "a", report=False, verbose=False)
    config.nets.qat_only.init_from = f"{folder}#studnt"
    with pytest.raises(ValueError, match="Did you mean 'student'"):
        experiment.run(config, tmp_path / "b", report=False, verbose=False)
    config.nets.qat_only.init_from = str(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match=r"nets.qat_only.init_from: .*there is no file"):
        experiment.inspect(config, verbose=False)
    assert not (tmp_path / "b").exists()


def test_images_are_cut_without_losing_any(finished):
    folder, _ = finished
    state = experiment.restore(folder)
    for count, batch_size, sizes in [
        (0, 64, [48, 48]),
        (0, 40, [32, 32, 32]),
        (95, 40, [32, 32, 31]),
        (7, 40, [7]),
        (1000, 96, [96]),
    ]:
        assert [len(b) for b in state.images(count, batch_size=batch_size)] == sizes
    whole = np.concatenate(state.images(0, batch_size=40))
    images = state.dataset.normalize(state.dataset.train_images)
    assert sorted(x.tobytes() for x in whole) == sorted(x.tobytes() for x in images)


def test_options_that_find_nothing_in_a_net_are_warned_of():
    config = get_config().unlock()
    config.stages.qat_only.remat = "blocks"
    config.stages.qat_only.optim.qat_only.layer_rates = ("dens1:0.5",)
    text = " ".join(experiment.inspect(config, verbose=False).split())
    assert "WARNING: stages.qat_only.remat is 'blocks', but net 'qat_only' has no blocks" in text
    assert "WARNING: stages.qat_only will end the run" in text and "Did you mean 'dense1'" in text


def test_equal_nets_with_unequal_steps_are_warned_of(tmp_path, capsys):
    assert "WARNING" not in experiment.inspect(get_config(), verbose=False)
    config = get_config()
    config.stages.co_study.steps = 5
    warning = "different numbers of steps.*: student 9, qat_only 8"
    assert re.search(warning, " ".join(experiment.inspect(config, verbose=False).split()))
    config.schedule = ("calibrate", "qat_only", "self_study")
    experiment.run(config, tmp_path, report=False)
    assert "student 2, qat_only 8" in capsys.readouterr().out


def test_an_old_report_is_written_anew(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    page = folder / "report.html"
    page.write_text("old")
    os.utime(page, (0, 0))
    experiment.run(get_config(), folder, verbose=False)
    written = page.read_text()
    assert "same argmax as teacher_before" in written and ">steps<" in written
    experiment.run(get_config(), folder, verbose=False)
    assert page.read_text() == written and not list(folder.glob(".*.tmp"))


def test_deploying_compares_the_files_with_the_trained_net(tmp_path, capsys):
    config = get_config("deploy=true")
    results = experiment.run(config, tmp_path, verbose=False)
    row = results["rows"][-2]
    assert row["integer"]["max_logit_difference"] < 1e-4
    assert row["integer"]["argmax_agreement"] == 1.0
    export = row["export"]
    assert export["engine"] == "ONNX Runtime" and export["biases"] == "integer"
    # The head's 8-bit bias is rounded: the file's logits are the rounded net's, and not those of
    # the trained one.
    assert export["argmax_agreement"] == 1 and export["max_logit_difference"] < 1e-5
    assert export["as_trained"]["max_logit_difference"] > 1e-4
    assert export["deployed_top1"] == export["top1"]
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"student.onnx", "student_float.onnx", "student.npz", "student"} <= names
    files = {p.name: p.stat().st_size for p in (tmp_path / "model" / "student").iterdir()}
    assert row["integer"]["files"].items() <= files.items() and "model.stablehlo" in files
    image = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
    image.save(tmp_path / "image.png")
    for engine in ("jax", *ONNX_ENGINES):
        said = capsys.readouterr()
        command = [str(tmp_path), str(tmp_path / "image.png"), f"--engine={engine}", "--json"]
        assert predictor.main(command) == 0, said
        (found,) = json.loads(capsys.readouterr().out)
        assert [len(p["class"]) for p in found["predictions"]] == [1, 1, 1]
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert {t["model"] for t in timings["latency"]} == {"student w4a4", "student float32"}
    assert "<svg" in (tmp_path / "report.html").read_text()

    (tmp_path / "model" / "student.onnx").unlink()
    (tmp_path / "report.html").unlink()
    with pytest.raises(ValueError, match=r"deploy.target: rules\[0\].*whose sums saturate on onnx"):
        experiment.main("export", config=None, workdir=tmp_path, target="onnxruntime-x86")
    vnni = "onnxruntime-x86-vnni"
    assert experiment.main("export", config=None, workdir=tmp_path, target=vnni) == 0
    said = capsys.readouterr().out
    made = json.loads((tmp_path / "model" / "student_target.json").read_text())
    assert made["target"] == vnni and made["file"] == "student.onnx"
    products = len(made["integer_products"]) + len(made["float_products"])
    assert f"{len(made['integer_products'])} of {products} products run on integers" in said
    assert all(name in said for name in made["float_products"])
    assert "products run on integers from 7 bits on; inside of them: relu" in said
    vnni = "openvino-cpu-vnni"
    assert experiment.main("export", config=None, workdir=tmp_path, target=vnni) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "student on OpenVINO" in said and "deployed 100.00 %, as trained 100.00 %" in said
    # The ONNX file beside StableHLO is compared with the net that it holds.
    export = experiment.export(tmp_path, target="xla", verbose=False)["rows"][-1]["export"]
    assert export["biases"] == "integer" and export["max_logit_difference"] < 1e-5
    (tmp_path / "model" / "student.onnx").unlink()
    capsys.readouterr()
    assert experiment.main("export", config=None, workdir=tmp_path) == 0
    assert (tmp_path / "model" / "student.onnx").exists()
    assert not (tmp_path / "model" / "student_target.json").exists()
    assert " for xla" not in capsys.readouterr().out
    assert experiment.main("report", config=None, workdir=tmp_path) == 0
    assert (tmp_path / "report.html").exists() and "QKD" in capsys.readouterr().out


def test_nested_is_the_inverse_of_flat():
    assert nested({"a/b": 1, "a/c/d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


# --- processes -----------------------------------------------------------------------------------


def launch(folder, *more, arg="steps=40,save_steps=2"):
    """Starts a tiny run as a process; what it says goes into <folder>.txt."""
    command = [sys.executable, "launch.py", f"--config=tests/tiny_config.py:{arg}"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # importing jax has set it for this process
    with open(f"{folder}.txt", "a", encoding="utf-8") as said:
        return subprocess.Popen(
            [*command, f"--workdir={folder}", *more],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def said(folder):
    return Path(f"{folder}.txt").read_text(encoding="utf-8")


def wait_for(process, folder, count):
    """Waits until metrics.jsonl has so many lines."""
    path = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"ended or stuck before line {count}:\n{said(folder)}")


def test_sigterm_saves_and_leaves_with_its_own_code(tmp_path):
    folder = tmp_path / "run"
    process = launch(folder, arg="steps=100000")
    wait_for(process, folder, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == experiment.EXIT_INTERRUPTED == 75, said(folder)
    assert "the same command resumes" in said(folder)
    saved = checkpoint_of(folder)
    assert saved.meta["stage"] == "pretrain_teacher" and saved.meta["stage_step"] > 0


def readers(folder, stop):
    """Reads a run folder in a loop, in every way there is; returns how often each way worked."""
    ways = {
        "weights": lambda: weights.load(f"{folder}#student"),
        "eval": lambda: experiment.evaluate(folder, verbose=False),
        "report": lambda: experiment.report(folder, verbose=False),
        "export": lambda: experiment.export(folder, verbose=False),
    }
    worked = dict.fromkeys(ways, 0)
    while not stop.is_set():
        for name, read in ways.items():
            try:
                read()
                worked[name] += 1
            except ValueError as error:  # the first net is not saved or trained yet
                early = ("no checkpoint", "unknown net", "not been trained", "which is float")
                assert any(text in str(error) for text in early), error
    return worked


@pytest.mark.slow
def test_killed_twenty_times_beside_readers_it_ends_with_the_same_bits(tmp_path):
    arg = "steps=40,save_steps=2,deploy=True"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole, arg=arg).wait(timeout=300) == 0, said(whole)
    total = (whole / "metrics.jsonl").read_bytes().count(b"\n")
    rng, stop = random.Random(0), threading.Event()
    with ThreadPoolExecutor() as pool:
        reading = None
        try:
            for kill in range(20):
                process = launch(killed, arg=arg)
                wait_for(process, killed, round(total * kill / 24) + 1)
                reading = reading or pool.submit(readers, killed, stop)
                time.sleep(0.2 * rng.random())
                process.kill()
                process.wait()
                assert not reading.done(), reading.exception()
            assert launch(killed, arg=arg).wait(timeout=300) == 0, said(killed)
        finally:
            stop.set()
        worked = reading.result()
    assert min(worked.values()) > 0, worked
    # How many were killed before they had read it is a matter of the machine's load.
    assert said(killed).count("resuming from the checkpoint") >= 3
    same(whole, killed)
    before, after = checkpoint_of(whole).tree, checkpoint_of(killed).tree
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[name], err_msg=name)
