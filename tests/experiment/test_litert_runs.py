"""Runs whose target is LiteRT: the file of the stage, what is said of it, and its predictions."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_config import get_config

from qkd_jax import experiment
from qkd_jax.deploy import predict as predictor

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")


def test_a_run_for_litert_is_compared_with_its_file(tmp_path, capsys):
    config = get_config("deploy=true").unlock()
    config.target, config.nets.student.rules = "litert", "w8a8:integer"
    config.schedule = ("pretrain_student", "calibrate", "deploy")
    results = experiment.run(config, tmp_path, verbose=False)
    export = results["rows"][-1]["export"]
    assert export["engine"] == "LiteRT" and export["biases"] == "integer"
    assert export["argmax_agreement"] == 1 and export["deployed_top1"] == export["top1"]
    model = tmp_path / "model"
    assert export["bytes"] == (model / "student.tflite").stat().st_size
    latency = json.loads((tmp_path / "timings.json").read_text())["latency"]
    assert {(t["model"], t["engine"]) for t in latency} == {
        ("student w8a8", "LiteRT"),
        ("student float32", "LiteRT"),
    }
    (model / "student.tflite").unlink()
    assert experiment.main("export", config=None, workdir=tmp_path, target="litert") == 0
    said = " ".join(capsys.readouterr().out.split())
    made = json.loads((model / "student_target.json").read_text())
    assert made["file"] == "student.tflite" and made["float_operations"] == []
    count = len(made["integer_operations"])
    assert count >= 3 and f"{count} of {count} operations run on integers" in said
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "image.png")
    found = []
    for engine in ("jax", "litert"):
        assert (
            predictor.main([str(tmp_path), str(tmp_path / "image.png"), f"--engine={engine}"]) == 0
        )
        found.append(capsys.readouterr().out)
    assert found[0].split()[1] == found[1].split()[1]
