"""Preparing: official formats in small, the TFDS road back, and two processes at once.

No test downloads: `download` is pointed at files of this machine.
"""

import gzip
import io
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from qkd_jax import data
from qkd_jax.data import digits, draws, official, prepare, sources

SIZES = {"train": 25, "test": 7}
ROOT = pathlib.Path(__file__).parents[2]


def pixels(count, shape, seed):
    raw = draws.words(count * int(np.prod(shape)), seed=seed, stream=1)
    return (raw >> np.uint64(56)).astype(np.uint8).reshape(count, *shape)


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write_mnist(folder):
    wanted = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = pixels(SIZES[split], (28, 28), seed=len(prefix))
        labels = (np.arange(SIZES[split]) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
        wanted[split] = images[..., None], labels
    return folder, wanted


def write_cifar(folder, name):
    """The binary version: label bytes, then planes R, G, B; CIFAR-10's training set in 5 files."""
    fine = name == "cifar100"
    classes = 100 if fine else 10
    wanted, members = {}, {}
    for split in SIZES:
        images = pixels(SIZES[split], (32, 32, 3), seed=classes)
        labels = (np.arange(SIZES[split]) * 3 % classes).astype(np.uint8)
        columns = [labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)]
        if fine:
            columns.insert(0, labels[:, None] // 5)
        records = np.concatenate(columns, axis=1)
        wanted[split] = images, labels
        if fine:
            members[f"{split}.bin"] = records.tobytes()
        elif split == "test":
            members["test_batch.bin"] = records.tobytes()
        else:
            for part in range(5):
                members[f"data_batch_{part + 1}.bin"] = records[part * 5 : part * 5 + 5].tobytes()
    if fine:
        members["fine_label_names.txt"] = "\n".join(f"fine{n}" for n in range(100)).encode()
        members["coarse_label_names.txt"] = "\n".join(f"coarse{n}" for n in range(20)).encode()
    else:
        members["batches.meta.txt"] = ("\n".join(f"class{n}" for n in range(10)) + "\n\n").encode()
    path = folder / f"cifar-{classes}-binary.tar.gz"
    top = "cifar-100-binary" if fine else "cifar-10-batches-bin"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            entry = tarfile.TarInfo(f"{top}/{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path, wanted


def write_official(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return write_mnist(folder) if "mnist" in name else write_cifar(folder, name)


def by_content(images, labels):
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("name", official.OFFICIAL)
def test_official_files_become_the_set_that_tfds_reads(name, tmp_path, capsys):
    source, wanted = write_official(name, tmp_path / "official")
    arguments = [name, f"--source={source}", f"--data_dir={tmp_path}", "--unofficial"]
    assert prepare.main(arguments) == 0
    assert f"{name} is prepared in {tmp_path / name}" in capsys.readouterr().out

    dataset = data.load(name, data_dir=tmp_path)
    for split in SIZES:
        images, labels = wanted[split]
        assert by_content(*dataset.arrays(split)) == by_content(images, labels)

    import tensorflow_datasets as tfds

    # TFDS's own code for this name reads it: same version, same features.
    records = tfds.data_source(
        name,
        split="train",
        data_dir=tmp_path,
        download=False,
        builder_kwargs={"file_format": "array_record"},
    )
    assert len(records) == SIZES["train"]
    np.testing.assert_array_equal(records[3]["image"], dataset.train_images[3])
    own = tfds.builder_cls(name)(data_dir=tmp_path / "nowhere")
    stored = records.dataset_info
    assert str(stored.version) == str(own.version) == official.OFFICIAL[name].version
    assert set(stored.features) == set(own.info.features) == set(records[0])
    for feature in stored.features.values():
        assert type(feature).__name__ in ("Image", "ClassLabel", "Text")
    # Again is nothing to do.
    assert prepare.main(arguments) == 0
    assert [p.name for p in (tmp_path / name).iterdir()] == [official.OFFICIAL[name].version]
    assert not list(tmp_path.glob(f".{name}-*"))


@pytest.mark.parametrize("name", official.OFFICIAL)
def test_files_that_are_not_the_official_ones_are_refused(name, tmp_path):
    source, _ = write_official(name, tmp_path / "official")
    with pytest.raises(ValueError, match=r"SHA-256.*--unofficial"):
        prepare.prepare(name, data_dir=tmp_path, source=source)
    assert sources.find(name, tmp_path) is None


def test_a_wrong_number_of_examples_is_refused(tmp_path, monkeypatch):
    source, _ = write_official("cifar10", tmp_path)
    (file,) = official.OFFICIAL["cifar10"].sha256
    monkeypatch.setitem(official.OFFICIAL["cifar10"].sha256, file, prepare._sha256(source))
    with pytest.raises(ValueError, match="has 25 examples, not 50000"):
        prepare.prepare("cifar10", data_dir=tmp_path, source=source)


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    source, _ = write_official("cifar10", tmp_path / "official")
    entry = official.OFFICIAL["cifar10"]
    (file,) = entry.sha256
    monkeypatch.setitem(entry.sha256, file, prepare._sha256(source))
    near = official.Official(
        entry.version, f"{source.parent.as_uri()}/", entry.sha256, entry.read, SIZES, ""
    )
    monkeypatch.setitem(official.OFFICIAL, "cifar10", near)
    prepare.prepare("cifar10", data_dir=tmp_path)
    assert len(data.load("cifar10", data_dir=tmp_path).train_images) == 25
    (kept,) = (tmp_path / "downloads" / "cifar10").iterdir()
    assert kept.read_bytes() == source.read_bytes()
    # A second download is not made; a broken one is.
    source.unlink()
    prepare.download("cifar10", near, tmp_path)
    kept.write_bytes(b"broken")
    with pytest.raises(OSError, match=r"could not be downloaded.*--source"):
        prepare.download("cifar10", near, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cifar10", b"no archive", "not CIFAR's binary archive"),
        ("cifar10", gzip.compress(b"no tar" * 500), "not CIFAR's binary archive"),
        ("mnist", b"no gzip", "not a whole gzip file"),
        ("mnist", gzip.compress(b"no idx"), "not an IDX file"),
        ("mnist", gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9])), r"states the shape \(9,\)"),
        ("mnist", gzip.compress(bytes(1000))[:-12], "not a whole gzip file"),
        ("mnist", idx(np.zeros((3, 5, 5), np.uint8)), "must be"),
    ],
    # The contents hold the time of day, which must not get into a test's name.
    ids=range(7),
)
def test_broken_files_are_named(name, content, message, tmp_path):
    source, _ = write_official(name, tmp_path)
    broken = source if source.is_file() else source / "train-images-idx3-ubyte.gz"
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare.prepare(name, data_dir=tmp_path / "d", source=source, unofficial=True)


def test_a_truncated_archive_is_named(tmp_path):
    source, _ = write_official("cifar100", tmp_path)
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not CIFAR's binary archive"):
        prepare.prepare("cifar100", data_dir=tmp_path / "d", source=source, unofficial=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "unknown data set 'cifar'.*Did you mean 'cifar1"),
        (["synthetic"], "nothing to prepare"),
        (["mnist", "--source=/nowhere"], "lacks train-images-idx3-ubyte.gz"),
    ],
)
def test_the_command_line_answers_mistakes_in_a_line(arguments, message, tmp_path, capsys):
    assert prepare.main([*arguments, f"--data_dir={tmp_path}"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_digits_prepare_where_they_may(tmp_path, monkeypatch, cache_home):
    assert digits.prepare() == cache_home / "qkd_jax" / "tfds" / "digits" / "1.0.0"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    assert digits.prepare().is_relative_to(tmp_path / "env")
    assert digits.prepare(tmp_path / "given").is_relative_to(tmp_path / "given")
    # A data directory without a write bit is left alone, by root too.
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    assert digits.prepare(closed).is_relative_to(tmp_path / "fresh")
    assert not list(closed.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME or data_dir"):
        digits.prepare(tmp_path / "file")


def test_digits_are_a_tfds_data_set(tmp_path):
    digits.prepare(tmp_path)
    import tensorflow_datasets as tfds

    records = tfds.data_source(
        "digits:1.0.0",
        split="train",
        data_dir=tmp_path,
        download=False,
        builder_kwargs={"file_format": "array_record"},
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    assert len(records) == 1797
    assert [int(r["label"]) for r in records.__getitems__([0, 1, 2])] == [0, 1, 2]
    assert "CC BY 4.0" in records.dataset_info.citation


@pytest.mark.slow
def test_four_processes_prepare_at_once(tmp_path):
    program = (
        "from qkd_jax import data; import sys;"
        "print(data.load('digits', data_dir=sys.argv[1]).fingerprint)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "shared")]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    outcomes = [process.communicate(timeout=120) for process in running]
    for process, (_, errors) in zip(running, outcomes, strict=True):
        assert process.returncode == 0, errors.decode()
    assert len({output for output, _ in outcomes}) == 1
    assert [p.name for p in (tmp_path / "shared").iterdir()] == ["digits"]


def test_neither_jax_nor_tensorflow_is_needed():
    program = (
        "import sys\n"
        "from qkd_jax import data\n"
        "assert not {'grain', 'tensorflow_datasets', 'PIL'} & set(sys.modules)\n"
        "data.load('digits')\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
