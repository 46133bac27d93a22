"""A teacher from another library's file, in a run that distils its features into a student."""

import json
import pathlib

import numpy as np
import pytest
from formula_weights import fill

from configs import feature_kd
from qkd_jax import experiment
from qkd_jax.data import DATASETS
from qkd_jax.weights.files import safetensors_bytes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vision.json"
HEIGHT, WIDTH, CHANNELS = DATASETS["synthetic"].image_shape
FIELDS = dict(model="vit_tiny", patch=8, depth=2, width=32, heads=2, epsilon=1e-12)


def teachers_file(path):
    """A ViT of Hugging Face's names for the synthetic images; returns its weights."""
    shapes = json.loads(GOLDEN.read_text())["hf_vit"]["shapes"]
    shapes["vit.embeddings.patch_embeddings.projection.weight"][1] = CHANNELS
    patches = -(-HEIGHT // 8) * -(-WIDTH // 8)
    shapes["vit.embeddings.position_embeddings"][1] = patches + 1
    state = {n: fill(n, shape, i) for i, (n, shape) in enumerate(shapes.items())}
    path.write_bytes(safetensors_bytes(state, {"format": "pt"}))
    return state


def config_of(path, fresh="head"):
    text = f"loss=fitnet,data=synthetic,train_examples=64,teacher_from={path},student=mlp"
    config = feature_kd.get_config(text).unlock()
    config.nets.teacher = dict(FIELDS, init_from=str(path), fresh=fresh)
    for name in ("student", "alone"):
        config.nets[name].update(model="mlp", width=0, hidden=(8,))
    for stage in config.stages.values():
        if stage.kind == "train":
            stage.update(steps=2, epochs=0.0, batch_size=16)
    config.log.eval_every_steps = 0
    return config.lock()


@pytest.mark.slow
def test_its_features_are_distilled(tmp_path):
    state = teachers_file(tmp_path / "vit.safetensors")
    config = config_of(tmp_path / "vit.safetensors")
    done = experiment.run(config, tmp_path / "run", report=False, verbose=False)
    assert {row["net"] for row in done["rows"]} >= {"teacher", "student"}
    run = experiment.restore(tmp_path / "run")
    teacher = run.variables["teacher"]["params"]
    query = state["vit.encoder.layer.1.attention.attention.query.weight"]
    kernel = teacher["block1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel.reshape(32, 32), query.T)
    assert teacher["head"]["kernel"].shape == (32, DATASETS["synthetic"].num_classes)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("fitnet" in line for line in lines)


def test_a_teacher_that_does_not_fit_is_named_before_the_run(tmp_path):
    teachers_file(tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"nets\.teacher\.init_from: .*head/bias has shape \(5,\)"):
        experiment.run(config_of(tmp_path / "vit.safetensors", ""), tmp_path / "run", report=False)
    config = config_of(tmp_path / "vit.safetensors").unlock()
    config.nets.teacher.patch = 4
    with pytest.raises(ValueError, match=r"nets\.teacher\.init_from: .*build the net with grid=1 "):
        experiment.run(config.lock(), tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()
