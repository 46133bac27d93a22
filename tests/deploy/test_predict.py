"""The predictor: what every engine says of image files, and every way to call it wrongly."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import small_nets
from mutation import COUNT, accepted
from PIL import Image

from qkd_jax import deploy
from qkd_jax.deploy import Description, predict
from qkd_jax.deploy.predict import main, open_predictor
from qkd_jax.numerics import Spec
from qkd_jax.quantize import Rule

NAMES = ("ant", "bee", "cat")
SHAPE = (6, 5, 3)
DESCRIPTION = Description(SHAPE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), NAMES)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def net_of(shape=SHAPE):
    x = jax.random.normal(jax.random.key(0), (8, *shape))
    return small_nets.calibrated(Small(), [Rule(".*", weight=Spec(7), input=Spec(8))], x), x


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as --mode=export leaves it, with two images."""
    folder = tmp_path_factory.mktemp("run")
    (net, variables), x = net_of()
    deploy.save(deploy.convert(net, variables, x), folder / "model/net", description=DESCRIPTION)
    deploy.to_onnx(net, variables, x, folder / "model/net.onnx")
    deploy.stamp_onnx(folder / "model/net.onnx", DESCRIPTION)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, SHAPE).astype(np.uint8) for _ in range(2)]
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder, pixels


def test_it_says_what_the_model_computes(run, capsys):
    folder, pixels = run
    integer = deploy.load(folder / "model/net")
    x = (np.stack(pixels) / 255 - DESCRIPTION.mean) / np.array(DESCRIPTION.std)
    logits = np.asarray(deploy.integer_apply(integer, x.astype(np.float32)), np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    images = [str(folder / "0.png"), str(folder / "1.png")]
    assert main([str(folder), *images, "--json", "--top=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["image"] for f in found] == images
    for entry, row in zip(found, wanted, strict=True):
        order = np.argsort(-row)
        assert [p["index"] for p in entry["predictions"]] == order.tolist()
        assert [p["class"] for p in entry["predictions"]] == [NAMES[i] for i in order]
        shares = [p["probability"] for p in entry["predictions"]]
        np.testing.assert_allclose(shares, row[order], rtol=1e-4)
    assert main([str(folder / "model/net"), images[0], "--top=1"]) == 0
    text = capsys.readouterr().out
    best = found[0]["predictions"][0]
    assert text == f"{images[0]}: {best['class']} {100 * best['probability']:.2f} %\n"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_agree(run, engine):
    folder, _ = run
    images = [folder / "0.png", folder / "1.png"]
    ours = predict.predict(open_predictor(folder), images)
    theirs = predict.predict(open_predictor(folder / "model/net.onnx", engine=engine), images)
    assert predict.predict(open_predictor(folder, engine=engine), images) == theirs
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one["predictions"], other["predictions"], strict=True):
            assert a["class"] == b["class"] and abs(a["probability"] - b["probability"]) < 0.02


def test_litert_files_say_what_the_net_computes(run, tmp_path, capsys):
    """Within a step of the 8-bit inputs, in the folder of a run and by the name of the file."""
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    folder, _ = run
    (net, variables), x = net_of()
    shutil.copytree(folder / "model", tmp_path / "model")
    image = folder / "0.png"
    refused(capsys, "net.tflite; give one, or write it with --mode=export --target=litert",
            tmp_path, image, "--engine=litert")  # fmt: skip
    path = tmp_path / "model/net.tflite"
    deploy.to_tflite(net, variables, x, path, description=DESCRIPTION)
    (ours,) = predict.predict(open_predictor(tmp_path), [image])
    for model, engine in ((path, None), (tmp_path, "litert")):
        predictor = open_predictor(model, engine=engine)
        assert predictor.engine == "litert"
        (theirs,) = predict.predict(predictor, [image])
        for a, b in zip(ours["predictions"], theirs["predictions"], strict=True):
            assert a["class"] == b["class"] and abs(a["probability"] - b["probability"]) < 0.02
    refused(capsys, "a .tflite file, which openvino does not run; give engine='litert'",
            path, image, "--engine=openvino")  # fmt: skip
    deploy.to_tflite(net, variables, x, path)
    refused(capsys, "net.tflite does not say how images become its input", path, image)


def test_openvino_files_say_what_the_net_computes(run, tmp_path, capsys):
    pytest.importorskip("openvino", reason="openvino is not installed")
    folder, _ = run
    (net, variables), x = net_of()
    image, path = folder / "0.png", tmp_path / "net.xml"
    deploy.to_openvino(net, variables, x, path, description=DESCRIPTION)
    assert main([str(path), str(image), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    (ours,) = predict.predict(open_predictor(folder), [image])
    for a, b in zip(ours["predictions"], found["predictions"], strict=True):
        assert a["class"] == b["class"] and abs(a["probability"] - b["probability"]) < 0.02
    refused(capsys, "a .xml file, which onnxruntime does not run; give engine='openvino'",
            path, image, "--engine=onnxruntime")  # fmt: skip
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-1])
    refused(capsys, "the .bin beside it is not what was written", path, image)
    deploy.to_openvino(net, variables, x, path)
    refused(capsys, "net.xml does not say how images become its input", path, image)


def test_images_of_other_sizes_and_kinds(run, tmp_path):
    grey = np.full((40, 50), 77, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wide = np.dstack([np.full((40, 50, 3), 77, np.uint8), np.full((40, 50), 10, np.uint8)])
    Image.fromarray(wide).save(tmp_path / "alpha.png")
    for name, value in {"grey.png": 77, "alpha.png": 248}.items():  # 10 / 255 of it, over white
        read = DESCRIPTION.read_image(str(tmp_path / name))
        np.testing.assert_array_equal(read, np.full(SHAPE, value, np.uint8))
    one = Description((6, 5, 1), (0.4,), (0.2,))
    red = np.zeros((6, 5, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    Image.fromarray(red).save(tmp_path / "red.png")
    np.testing.assert_array_equal(one.read_image(str(tmp_path / "red.png")), np.full((6, 5, 1), 76))


def test_drawings_on_nothing_and_turned_photographs(tmp_path):
    height, width, _ = SHAPE
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    ink = np.dstack([np.zeros(SHAPE, np.uint8), pixels])  # black: its shape is in the alpha alone
    Image.fromarray(ink).save(tmp_path / "ink.png")
    read = DESCRIPTION.read_image(str(tmp_path / "ink.png"))
    np.testing.assert_array_equal(read, np.dstack([255 - pixels] * 3))
    lying = Image.fromarray(np.rot90(pixels))  # as the sensor has it; 6: turn it clockwise
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "turned.png", exif=exif)
    read = DESCRIPTION.read_image(str(tmp_path / "turned.png"))
    np.testing.assert_array_equal(read, np.dstack([pixels] * 3))


def refused(capsys, match, *arguments):
    assert main([str(a) for a in arguments]) == 2
    assert match in capsys.readouterr().err


def test_what_is_refused(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    image, path = folder / "0.png", folder / "model/net.onnx"
    (tmp_path / "text.png").write_text("no image")
    refused(capsys, "text.png cannot be read as an image", folder, tmp_path / "text.png")
    refused(capsys, "none.png cannot be read as an image", folder, tmp_path / "none.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    refused(capsys, "save it with 8 bits a channel", folder, tmp_path / "deep.png")
    refused(capsys, "top is 0", folder, image, "--top=0")
    refused(capsys, "is no folder of a saved model", tmp_path, image)
    refused(capsys, "unknown net 'nt'; allowed: net. Did you mean 'net'", folder, image, "--net=nt")
    refused(capsys, "is no run folder", folder / "model/net", image, "--net=net")
    refused(capsys, "give engine='onnxruntime' or 'openvino'", path, image, "--engine=jax")
    refused(capsys, "none.onnx cannot be read", tmp_path / "none.onnx", image)
    (tmp_path / "model").mkdir()
    refused(capsys, "--mode=export --workdir=", tmp_path, image)
    for name in ("a", "b"):
        shutil.copytree(folder / "model/net", tmp_path / "model" / name)
    refused(capsys, "has the nets a, b; name one with --net", tmp_path, image)
    refused(capsys, "and there is no", tmp_path / "model/a", image, "--engine=openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(capsys, "onnxruntime is not installed; it comes with the `export` extra", path, image)


def test_models_that_take_no_image(tmp_path, run):
    (net, variables), x = net_of((6, 5, 2))
    integer = deploy.convert(net, variables, x)
    two = Description((6, 5, 2), (0.1, 0.2), (1.0, 1.0))
    deploy.save(integer, tmp_path, description=two)
    with pytest.raises(ValueError, match="takes 2 channels, and an image file gives 1"):
        predict.predict(open_predictor(tmp_path), [run[0] / "0.png"])
    deploy.save(integer, tmp_path, description=DESCRIPTION)
    with pytest.raises(ValueError, match=r"images \(6, 5, 3\) for a model of"):
        open_predictor(tmp_path)
    deploy.save(integer, tmp_path)
    with pytest.raises(ValueError, match="does not say how images become"):
        open_predictor(tmp_path)
    few = Description(SHAPE, (0.1,) * 3, (1.0,) * 3, ("a", "b"))
    (net, variables), x = net_of()
    deploy.save(deploy.convert(net, variables, x), tmp_path, description=few)
    with pytest.raises(ValueError, match="3 logits and 2 names"):
        predict.predict(open_predictor(tmp_path), [run[0] / "0.png"])
    deploy.to_onnx(net, variables, x, tmp_path / "plain.onnx")
    with pytest.raises(ValueError, match=r"plain\.onnx does not say how"):
        open_predictor(tmp_path / "plain.onnx")


def test_logits_that_are_not_finite_fail(run, tmp_path, capsys):
    (net, variables), x = net_of()
    integer = deploy.convert(net, variables, x)
    arrays = dict(integer.arrays)
    (name,) = (key for key in arrays if key.endswith("bias") and arrays[key].shape[-1] == 3)
    arrays[name] = arrays[name].at[..., 1].set(np.nan)
    broken = dataclasses.replace(integer, arrays=arrays)
    deploy.save(broken, tmp_path, description=DESCRIPTION)
    refused(capsys, "logits that are not finite for", tmp_path, run[0] / "0.png")


def test_images_are_read_batch_by_batch(run, monkeypatch):
    seen, calls = [], []
    read, opened = Description.read_image, open_predictor(run[0])
    monkeypatch.setattr(predict, "BATCH", 2)
    monkeypatch.setattr(
        Description, "read_image", lambda self, path, **_: (seen.append(path), read(self, path))[1]
    )
    logits = lambda images: (calls.append((len(images), len(seen))), opened.logits(images))[1]
    paths = [run[0] / f"{i % 2}.png" for i in range(5)]
    found = predict.predict(dataclasses.replace(opened, logits=logits), paths)
    assert calls == [(2, 2), (2, 4), (1, 5)]
    assert [f["image"] for f in found] == [str(path) for path in paths]
    assert found[0] == found[2] == found[4]


def test_the_command_starts_as_a_module():
    command = [sys.executable, "-m", "qkd_jax.deploy.predict", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0 and "--engine" in ran.stdout, ran.stderr


@pytest.mark.slow
def test_damaged_onnx_files(run, tmp_path):
    """A ValueError, or a file whose graph and description are untouched."""
    path, taken = tmp_path / "x.onnx", 0
    path.write_bytes((run[0] / "model/net.onnx").read_bytes())

    def read():
        assert deploy.read_stamp(path) == DESCRIPTION
        # What is left to change is not in the graph: the producer's name, the version.
        return open_predictor(path)

    for predictor in accepted(path, read):
        taken += 1
        assert predictor.logits(np.zeros((2, *SHAPE), np.float32)).shape == (2, 3)
    assert taken < COUNT / 10


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_damaged_images(ending, tmp_path):
    """Only some of these formats have checksums: refused with the file's name, or an image."""
    path = tmp_path / f"x.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    for image in accepted(path, lambda: DESCRIPTION.read_image(str(path))):
        assert image.shape == SHAPE and image.dtype == np.uint8


def test_a_file_that_would_start_another_program_is_no_image(tmp_path, monkeypatch):
    """Pillow hands Encapsulated PostScript to Ghostscript, whatever the file is called."""
    pixels = np.zeros(SHAPE, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    started = lambda *_, **__: pytest.fail("a program was started")
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(shutil, "which", lambda name, *_: f"/usr/bin/{name}")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image: .* Read are PNG"):
        DESCRIPTION.read_image(str(tmp_path / "x.png"))


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is no file"):
        DESCRIPTION.read_image(str(tmp_path / "x.png"))


def test_an_image_of_very_many_pixels_needs_to_be_asked_for(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (8_000, 7_000)).save(path)
    description = Description((8, 8, 1), (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"8000 x 7000 pixels, and up to 50,000,000 are read"):
        description.read_image(str(path))
    assert description.read_image(str(path), max_pixels=60_000_000).shape == (8, 8, 1)
