"""The hash and the description inside an OpenVINO file, and every way to lose them."""

import os
import shutil

import flax.linen as nn
import numpy as np
import pytest
import small_nets
from mutation import accepted

from qkd_jax import deploy
from qkd_jax.deploy.onnx.openvino_seal import read_sealed_xml
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

NAMES = ("ant & bee", '"cat"', "<dög>")
DESCRIPTION = deploy.Description((4, 4, 2), (0.4, 0.5), (0.2, 0.25), NAMES)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def case():
    """A net with weights in groups, its inputs, and its file's own logits."""
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
    rules = (Rule(".*", weight=Spec(4, granularity=32)),)
    return *small_nets.calibrated(Flat(), rules, x), x


@pytest.fixture
def path(case, tmp_path):
    net, variables, x = case
    return deploy.to_openvino(net, variables, x, tmp_path / "m.xml", description=DESCRIPTION).path


def test_a_file_keeps_its_description(case, path):
    net, variables, x = case
    assert deploy.read_stamp(path) == DESCRIPTION
    np.testing.assert_allclose(
        deploy.open_onnx(path, "openvino")(x)[0], net.apply(variables, x), rtol=1e-5, atol=1e-6
    )
    written = deploy.to_openvino(net, variables, x, path)
    assert written.bytes == sum(p.stat().st_size for p in path.parent.iterdir())
    with pytest.raises(ValueError, match=r"m.xml does not say .* to_openvino\(\.\.\., description"):
        deploy.read_stamp(path)


@pytest.mark.parametrize("ending", [".xml", ".bin"])
def test_a_damaged_file_never_reaches_the_engine(path, ending, monkeypatch):
    opened = lambda *_, **__: pytest.fail("the engine was given the file")
    monkeypatch.setattr(deploy.onnx.engines, "openvino_model", opened)
    damaged = path.with_suffix(ending)
    for _ in accepted(damaged, lambda: deploy.open_onnx(path, "openvino"), named=path):
        pytest.fail("a damaged file was taken")


def test_the_weights_of_another_export_are_refused(case, path, tmp_path):
    net, variables, x = case
    shutil.copy(path.with_suffix(".bin"), tmp_path / "kept.bin")
    moved = {**variables, "params": {"head": {**variables["params"]["head"]}}}
    moved["params"]["head"]["bias"] = moved["params"]["head"]["bias"] + 1
    deploy.to_openvino(net, moved, x, path)
    assert read_sealed_xml(path)
    os.replace(tmp_path / "kept.bin", path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"the \.bin beside it is not what was written"):
        deploy.open_onnx(path, "openvino")
    path.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=r"m\.bin"):
        deploy.open_onnx(path, "openvino")


def test_files_of_others_have_no_seal(path, tmp_path):
    model = openvino.Core().read_model(path)
    model.set_rt_info("", ["qkd_jax", "sha256"])
    openvino.save_model(model, tmp_path / "other.xml")
    with pytest.raises(ValueError, match="no seal of to_openvino"):
        deploy.open_onnx(tmp_path / "other.xml", "openvino")
    assert deploy.openvino_model(tmp_path / "other.xml") is not None


def test_onnx_runtime_does_not_read_them(path):
    with pytest.raises(ValueError, match="is an OpenVINO file; give engine='openvino'"):
        deploy.open_onnx(path, "onnxruntime")
