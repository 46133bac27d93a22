"""Streamed sets: what a folder and TFDS hold, the pixels of each view, and what is refused."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from image_folders import encoded, make, pixels
from PIL import Image

from qkd_jax import data
from qkd_jax.data import augment, crops, decoding, draws, record_writer
from qkd_jax.data.streams import StreamedImages

AUGMENT = ("random_resized_crop", "flip", "color_jitter:40", "randaugment:9", "mixup", "cutmix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def dataset(folder):
    return data.load("folder", data_dir=folder, image_size=12)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_is_read_as_its_sorted_folders_say(folder, dataset):
    assert dataset.num_classes == 4 and dataset.image_shape == (12, 12, 3)
    assert dataset.train_images.shape == (64, 12, 12, 3) and len(dataset.test_images) == 16
    for split, labels in (("train", dataset.train_labels), ("val", dataset.test_labels)):
        paths = [p for k in "0123" for p in sorted((folder / split / f"class{k}").iterdir())]
        assert labels.tolist() == [int(path.parent.name[-1]) for path in paths]
    small = data.load("folder", data_dir=folder, image_size=12, train_examples=10, seed=3)
    chosen = draws.permutation(64, seed=3, stream=draws.TRAIN_EXAMPLES)[:10]
    np.testing.assert_array_equal(small.train_images[:], dataset.train_images[chosen])
    np.testing.assert_array_equal(small.train_labels, dataset.train_labels[chosen])


def test_the_fingerprint_is_of_names_sizes_and_how_they_are_decoded(folder, dataset, tmp_path):
    other = copied(folder, tmp_path)
    assert data.load("folder", data_dir=other, image_size=12).fingerprint == dataset.fingerprint
    assert data.load("folder", data_dir=other, image_size=16).fingerprint != dataset.fingerprint
    path = other / "val" / "class1" / "000.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    longer = data.load("folder", data_dir=other, image_size=12).fingerprint
    path.rename(path.with_name("zzz.jpg"))
    renamed = data.load("folder", data_dir=other, image_size=12).fingerprint
    assert len({dataset.fingerprint, longer, renamed}) == 3


def test_evaluation_resizes_and_cuts_out_the_centre(dataset, folder):
    """Against the two steps on the whole image: at most a level apart by where Pillow rounds."""
    path = sorted((folder / "train" / "class2").iterdir())[5]
    with Image.open(path) as image:
        width, height = image.size
        scale = 14 / min(width, height)  # 14 = round(12 * 256 / 224)
        resized = image.resize(
            (14 if width <= height else int(width * scale), 14)
            if width >= height
            else (14, int(height * scale)),
            Image.Resampling.BILINEAR,
        )
    left, top = (round((side - 12) / 2) for side in resized.size)
    wanted = np.asarray(resized.crop((left, top, left + 12, top + 12))).astype(int)
    found = dataset.train_images[2 * 16 + 5].astype(int)
    assert np.abs(found - wanted).max() <= 2 and np.mean(found != wanted) < 0.2


def test_training_cuts_the_box_that_is_drawn(dataset, folder):
    index = np.array([3, 40, 3])
    raw = draws.words(3 * crops.WORDS, seed=1, stream=9).reshape(3, -1)
    found = dataset.train_images.random_crops(index, raw)
    for row, words, got in zip(index, raw, found, strict=True):
        path = sorted((folder / "train" / f"class{row // 16}").iterdir())[row % 16]
        with Image.open(path) as image:
            top, left, h, w = crops.random_box(words, image.size[1], image.size[0])
            part = image.crop((left, top, left + w, top + h))
            wanted = np.asarray(part.resize((12, 12), Image.Resampling.BILINEAR)).astype(int)
        if min(h, w) < 24:  # above, the JPEG is decoded at half its size
            np.testing.assert_array_equal(got, wanted)
        else:
            assert np.abs(got - wanted).mean() < 6


def test_a_batch_is_the_same_by_rows_by_workers_and_after_any_step(dataset):
    batches = data.train_batches(dataset, batch_size=24, seed=5, augment=AUGMENT)
    whole = [batches[step] for step in range(4)]
    assert whole[0]["image"].shape == (24, 12, 12, 3)
    # Step 2 straddles two epochs; each example comes once in each.
    drawn = np.concatenate([batch["index"] for batch in whole])[:64]
    assert sorted(drawn.tolist()) == list(range(64))
    again = pickle.loads(pickle.dumps(batches))
    np.testing.assert_array_equal(again[3]["image"], whole[3]["image"])
    for rows in (np.arange(12, 24), np.array([7, 0, 7])):
        part = data.train_batches(dataset, batch_size=24, seed=5, augment=AUGMENT, rows=rows)
        np.testing.assert_array_equal(part[2]["image"], whole[2]["image"][rows])
        np.testing.assert_array_equal(part[2]["label"], whole[2]["label"][rows])
    resumed = list(batches.iter(1, 4, workers=2, pixels=True))
    assert [batch["image"].dtype for batch in resumed] == [np.uint8] * 3
    for batch, wanted in zip(resumed, whole[1:], strict=True):
        np.testing.assert_array_equal(
            dataset.normalize(np.asarray(batch["image"])), wanted["image"]
        )
        np.testing.assert_array_equal(batch["index"], wanted["index"])


def test_what_mixes_reads_no_more_images_than_it_needs(dataset, monkeypatch):
    read = []
    decode = StreamedImages._decode
    monkeypatch.setattr(
        StreamedImages,
        "_decode",
        lambda self, row, *a, **k: read.append(row) or decode(self, row, *a, **k),
    )
    rows = np.arange(4)
    data.train_batches(dataset, batch_size=64, seed=5, augment=("mixup",), rows=rows)[0]
    assert 4 <= len(read) <= 8


def test_views_and_evaluation_stream(dataset):
    batches = data.train_batches(dataset, batch_size=32, seed=5, augment=AUGMENT[:2], views=2)
    first, second, third = (batches[step] for step in (0, 2, 4))  # epochs 0, 1 and 2
    shown = {
        row: image
        for batch in (first, batches[1])
        for row, image in zip(batch["index"], batch["image"], strict=True)
    }
    for row, image in zip(third["index"], third["image"], strict=True):  # view 0 again
        np.testing.assert_array_equal(image, shown[row])
    assert any(
        not np.array_equal(shown[r], i)
        for r, i in zip(second["index"], second["image"], strict=True)
    )
    found = list(data.eval_batches(dataset, "test", 6))
    assert [batch["mask"].sum() for batch in found] == [6, 6, 4]
    np.testing.assert_array_equal(
        np.concatenate([b["image"][b["mask"]] for b in found]),
        dataset.normalize(dataset.test_images[:]),
    )
    for batch, outline in zip(found, data.eval_batches(dataset, "test", 6).outlines(), strict=True):
        assert {**batch, "image": None}.keys() == {**outline, "image": None}.keys()
        np.testing.assert_array_equal(batch["index"], outline["index"])


def test_normalisation_is_that_of_imagenet(dataset):
    image = np.full((1, 12, 12, 3), 255, np.uint8)
    wanted = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(dataset.normalize(image)[0, 0, 0], wanted, rtol=1e-6)


# --- files ---------------------------------------------------------------------------------------

PICTURE = pixels(40, 50, colour=np.array([200, 90, 40]), seed=0)
ODD = {
    "grey": encoded(Image.fromarray(PICTURE).convert("L")),
    "cmyk": encoded(Image.fromarray(PICTURE).convert("CMYK")),
    "png under a jpeg's name": encoded(PICTURE, "png"),
    "transparent png": encoded(Image.fromarray(PICTURE).convert("RGBA"), "png"),
    "progressive": encoded(PICTURE, progressive=True),
    "turned by exif": encoded(
        PICTURE, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
}


@pytest.mark.parametrize("decoder", decoding.DECODERS)
@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_decoded_as_torchvision_would(kind, decoder):
    if decoder == "turbo":
        pytest.importorskip("simplejpeg"), pytest.importorskip("cv2")
    out = np.empty((40, 50, 3), np.uint8)
    decoding.decode(decoder, ODD[kind], lambda h, w: (0, 0, h, w), out)
    wanted = np.asarray(Image.open(io.BytesIO(ODD[kind])).convert("RGB")).astype(int)
    if decoder == "pillow":
        np.testing.assert_array_equal(out, wanted)
    else:  # the fast DCT and upsampling are some levels off
        assert np.abs(out - wanted).mean() < 4


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_what_the_fast_decoder_leaves_out_changes_no_pixel(subsampling, progressive):
    simplejpeg = pytest.importorskip("simplejpeg")
    pytest.importorskip("cv2")
    image = Image.fromarray(PICTURE).resize((250, 190), Image.Resampling.BICUBIC)
    content = encoded(image, subsampling=subsampling, progressive=progressive)
    whole = simplejpeg.decode_jpeg(content, fastdct=True, fastupsample=True)
    for top in (0, 15, 16, 17, 100, 130):
        out = np.empty((60, 80, 3), np.uint8)
        decoding.decode("turbo", content, lambda h, w, top=top: (top, 31, 60, 80), out)
        np.testing.assert_array_equal(out, whole[top : top + 60, 31:111])
    decoding.decode("turbo", content, lambda h, w: (9, 31, 60, 80), out, mirrored=True)
    np.testing.assert_array_equal(out, whole[9:69, 31:111][:, ::-1])
    cut = content[: len(content) // 2]
    with pytest.raises(data.UnreadableError, match="truncated"):
        decoding.decode("turbo", cut, lambda h, w: (0, 0, 8, 8), out)


def test_the_fast_decoder_shows_the_same_box():
    pytest.importorskip("simplejpeg"), pytest.importorskip("cv2")
    image = Image.fromarray(PICTURE).resize((500, 375), Image.Resampling.BICUBIC)
    for box in ((0, 0, 375, 500), (30, 200, 224, 224), (100, 10, 60, 80)):
        both = np.empty((2, 112, 112, 3), np.uint8)
        for decoder, out in zip(decoding.DECODERS, both, strict=True):
            decoding.decode(decoder, encoded(image), lambda h, w, box=box: box, out)
        assert np.abs(both[0].astype(int) - both[1]).mean() < 3


def test_a_flip_in_the_decoder_is_the_flip_of_the_crop(dataset):
    index = np.arange(16)
    raw = [draws.words(16 * each, seed=1, stream=9).reshape(16, -1) for each in (crops.WORDS, 1)]
    parsed = augment.parse(("random_resized_crop", "flip"))
    cut = dataset.train_images.random_crops(index, raw[0])
    found = augment.view(dataset.train_images, index, parsed, raw)
    np.testing.assert_array_equal(found, augment.flip(cut, raw[1], 0))
    assert 0 < augment.is_mirrored(raw[1]).sum() < 16


def test_a_broken_image_is_named_with_its_file(folder, tmp_path):
    copy = copied(folder, tmp_path)
    broken = copy / "train" / "class1" / "003.jpg"
    size = broken.stat().st_size
    dataset = data.load("folder", data_dir=copy, image_size=12)
    whole = broken.read_bytes()
    huge = whole.replace(whole[(at := whole.find(b"\xff\xc0") + 5) : at + 4], b"\xff" * 4)
    for content, problem in (
        (b"", "it has 0 bytes, and had"),
        (whole + b"other", "it has"),  # changed since the run began
        (b"no image".ljust(size), "no image format"),
        (whole[: size // 2].ljust(size), "broken|truncated"),
        (huge, "4294836225 pixels"),  # a header that lies, or an image that fills the memory
    ):
        broken.write_bytes(content)
        with pytest.raises(
            data.UnreadableError, match=rf"image 19, .*class1/003\.jpg, cannot be read.*{problem}"
        ):
            dataset.train_images[[2, 19]]
    broken.unlink()
    with pytest.raises(data.UnreadableError, match=r"No such file.*Put a whole file"):
        dataset.train_images[19]


def test_of_16_bits_the_upper_8_are_shown():
    grey = (np.arange(40 * 50, dtype=np.uint16) * 31).reshape(40, 50)
    out = np.empty((40, 50, 3), np.uint8)
    whole = lambda h, w: (0, 0, h, w)
    for kind in ("png", "tiff"):
        decoding.decode("pillow", encoded(Image.fromarray(grey), kind), whole, out)
        np.testing.assert_array_equal(out, np.repeat(grey[..., None] // 256, 3, axis=-1))
    wide = encoded(Image.fromarray(grey.astype(np.float32)), "tiff")
    with pytest.raises(data.UnreadableError, match=r"32-bit numbers.*save it with 8 bits"):
        decoding.decode("pillow", wide, whole, out)


def test_a_worker_that_ends_is_said(dataset):
    class Killed(data.TrainBatches):
        def pixels(self, step):
            os.kill(os.getpid(), 9)

    batches = Killed(dataset, batch_size=8, seed=0)
    with pytest.raises(RuntimeError, match=r"worker process.*exit code -9.*data.workers lower"):
        next(batches.iter(0, 4, workers=1, pixels=True))


def test_what_a_folder_holds_besides_images_and_odd_names(folder, tmp_path):
    inside = copied(folder, tmp_path) / "train" / "class0"
    load = lambda: data.load("folder", data_dir=tmp_path / "copy", image_size=12)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (inside / name).write_bytes(b"x")
    (inside / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate((b"deep/er/0.JPG", b"zwei W\xc3\xb6rter.jpeg", b"zz\xe9.jpg")):
        with open(os.path.join(os.fsencode(inside), name), "wb") as file:  # the last is not UTF-8
            file.write((folder / "train" / "class0" / f"00{number}.jpg").read_bytes())
    images = load().train_images
    assert len(images) == 67
    np.testing.assert_array_equal(images[16:19], images[:3])

    def refused(message, make):
        make()
        with pytest.raises(ValueError, match=message):
            load()
        extra.unlink()

    extra = inside / "extra.jpg"
    refused(r"extra\.jpg is empty", extra.touch)
    refused(r"extra\.jpg is no file", lambda: os.mkfifo(extra))
    refused(r"extra\.jpg is a link to nothing", lambda: extra.symlink_to("nowhere.jpg"))
    refused(r"extra\.jpg is a link to a folder that it lies in", lambda: extra.symlink_to(inside))
    assert len(load().train_images) == 67


def test_folders_of_another_layout_are_refused(folder, tmp_path):
    def refused(message, **more):
        with pytest.raises(ValueError, match=message):
            data.load("folder", data_dir=copy, **more)

    copy = copied(folder, tmp_path)
    refused("image_size is 4; it must be an integer of at least 8", image_size=4)
    refused("decoder is 'turbp'.*'turbo'|turbp", decoder="turbp")
    refused("train_examples of 'folder' is 65", train_examples=65)
    (copy / "train" / "class0" / "notes.txt").write_text("x")
    refused(r"notes\.txt has no extension of an image")
    (copy / "train" / "class0" / "notes.txt").unlink()
    shutil.rmtree(copy / "val" / "class3")
    refused(r"4 classes in 'train' and 3 in 'val': train alone has class3")
    (copy / "val" / "class3").mkdir()
    refused(r"val/class3 holds no image")
    shutil.rmtree(copy / "val")
    refused(r"has no folder 'val'; it must hold <dir>/train/<class>")
    with pytest.raises(data.NotPreparedError, match=r"give --config\.data\.dir"):
        data.load("folder")
    with pytest.raises(ValueError, match=r"image_size is 32.*only streamed sets.*imagenet2012"):
        data.load("synthetic", image_size=32)


# --- TFDS ----------------------------------------------------------------------------------------


def test_imagenet_is_read_from_the_records_of_tfds(tmp_path):
    images = [pixels(20 + k, 30, colour=np.full(3, 20 * k), seed=k) for k in range(9)]
    split = lambda some: [{"image": images[k], "label": 100 * k} for k in some]
    record_writer.write(
        "imagenet2012",
        "5.1.0",
        tmp_path,
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=1000),
        },
        {"train": split(range(6)), "validation": split(range(6, 9))},
        description="a few images",
        homepage="",
        citation="",
        keep_order=True,
    )
    dataset = data.load("imagenet2012", data_dir=tmp_path, image_size=16)
    assert dataset.num_classes == 1000
    assert dataset.train_labels.tolist() == [0, 100, 200, 300, 400, 500]
    assert dataset.test_labels.tolist() == [600, 700, 800]
    for k, found in zip(range(6, 9), dataset.test_images[:], strict=True):
        wanted = np.empty((16, 16, 3), np.uint8)
        box = crops.centre_box(20 + k, 30, (16, 16))
        png = encoded(images[k], "png")
        decoding.decode("pillow", png, lambda h, w, box=box: box, wanted, exact=True)
        np.testing.assert_array_equal(found, wanted)
    again = data.load("imagenet2012", data_dir=tmp_path, image_size=16)  # labels from the cache
    assert again.fingerprint == dataset.fingerprint
    np.testing.assert_array_equal(again.train_labels, dataset.train_labels)
    batch = data.train_batches(dataset, batch_size=4, seed=0, augment=AUGMENT[:2])[1]
    assert batch["image"].shape == (4, 16, 16, 3)


def test_a_crop_comes_first_in_a_streamed_set(dataset):
    with pytest.raises(
        ValueError, match=r"comes first and once: \('random_resized_crop', 'flip'\)"
    ):
        data.train_batches(dataset, batch_size=4, seed=0, augment=("flip", "random_resized_crop"))
