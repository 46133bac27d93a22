"""Prepares a data set on disk, without TensorFlow, as TFDS would: `tfds.data_source` then reads it.

    python -m qkd_jax.data.prepare cifar10
    python -m qkd_jax.data.prepare cifar10 --source=cifar-10-binary.tar.gz --data_dir=DIR

Without `--source` the official files are downloaded; each is checked against its SHA-256.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import sys
import urllib.request
from collections.abc import Sequence

from qkd_jax import checks
from qkd_jax.data import DATASETS, digits, record_writer, sources
from qkd_jax.data.official import OFFICIAL, Official
from qkd_jax.whole_files import settle, temporary

TIMEOUT = 60  # seconds without a byte


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    unofficial: bool = False,
) -> pathlib.Path:
    """Writes a data set in array_record, unless it is there, and returns its folder.

    Args:
        name: A key of `DATASETS`.
        data_dir: where to; None for TFDS_DATA_DIR, else `~/tensorflow_datasets`.
        source: the official archive, or the folder that holds the official files; None downloads.
        unofficial: accept files of another hash and other numbers of examples.

    Raises:
        ValueError: for an unknown name, a file that is missing or is not the official one.
        OSError: where a download or a write fails.
    """
    if name not in DATASETS:
        raise checks.unknown("data set", name, DATASETS)
    if DATASETS[name].kind == "generated":
        raise ValueError(f"data set {name!r} is generated when it is loaded; nothing to prepare.")
    if DATASETS[name].kind == "folder":
        raise ValueError(
            "data set 'folder' is read as it lies; give --config.data.dir the folder of its images."
        )
    if DATASETS[name].kind == "embedded":
        return digits.prepare(data_dir)
    if name not in OFFICIAL:
        raise ValueError(
            f"qkd_jax has no reader for {name!r} (it has: {', '.join(OFFICIAL)}); prepare it with "
            "TFDS and file_format='array_record'."
        )
    official = OFFICIAL[name]
    directory = sources.data_directory(data_dir)
    folder = sources.find(name, directory)
    if folder is not None:
        return folder
    files = locate(official, source) if source else download(name, official, directory)
    for file, path in files.items():
        found = _sha256(path)
        if found != official.sha256[file] and not unofficial:
            raise ValueError(
                f"{path} has SHA-256 {found}; the official {file} has {official.sha256[file]}. Get "
                f"it again from {official.base}{file}, or pass --unofficial to take it as it is."
            )
    splits, names = official.read(files)
    for split, wanted in official.examples.items():
        if len(splits[split]["label"]) != wanted and not unofficial:
            raise ValueError(
                f"the {split} split of {name!r} has {len(splits[split]['label'])} examples, not "
                f"{wanted}; pass --unofficial to take it as it is."
            )

    import tensorflow_datasets as tfds

    features: dict[str, tfds.features.FeatureConnector] = {
        "image": tfds.features.Image(shape=DATASETS[name].image_shape),
        **{label: tfds.features.ClassLabel(names=classes) for label, classes in names.items()},
    }
    if "id" in splits["train"]:
        features["id"] = tfds.features.Text()
    return record_writer.write(
        name,
        official.version,
        directory,
        features,
        {split: _examples(arrays) for split, arrays in splits.items()},
        description=DATASETS[name].description,
        homepage=official.base,
        citation=official.citation,
    )


def _examples(arrays):
    for row in range(len(arrays["label"])):
        yield {
            key: array[row] if key == "image" else array[row].item()
            for key, array in arrays.items()
        }


def locate(official: Official, source: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """Returns the official files by name: one archive, or all of them in one folder."""
    path = pathlib.Path(source).expanduser()
    if path.is_file() and len(official.sha256) == 1:
        return {next(iter(official.sha256)): path}
    folder = path.parent if path.is_file() else path
    files = {file: folder / file for file in official.sha256}
    missing = [file for file, place in files.items() if not place.is_file()]
    if missing:
        raise ValueError(
            f"--source={path} lacks {', '.join(missing)}; give the folder that holds "
            f"{', '.join(official.sha256)} (from {official.base})."
        )
    return files


def download(name: str, official: Official, directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Downloads the official files into `<directory>/downloads/<name>`, but for those there."""
    folder = directory / "downloads" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for file, wanted in official.sha256.items():
        files[file] = folder / file
        if files[file].is_file() and _sha256(files[file]) == wanted:
            continue
        url = official.base + file
        print(f"downloading {url}", file=sys.stderr, flush=True)
        try:
            with (
                temporary(files[file]) as target,
                urllib.request.urlopen(url, timeout=TIMEOUT) as response,
            ):
                shutil.copyfileobj(response, target, 1 << 20)
                settle(target, files[file])
        except OSError as error:  # urllib's errors are OSErrors
            raise OSError(
                f"{url} could not be downloaded ({error}). Download {', '.join(official.sha256)} "
                f"elsewhere, then: python -m qkd_jax.data.prepare {name} --source=PATH"
            ) from error
    return files


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qkd_jax.data.prepare", description="Prepares a data set on disk."
    )
    listed = "; ".join(f"{n}: {s.description}" for n, s in DATASETS.items() if s.kind == "prepared")
    parser.add_argument("name", help=listed)
    parser.add_argument("--data_dir", help="default: TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--source", help="the official archive, or a folder with the files")
    parser.add_argument(
        "--unofficial", action="store_true", help="take files of another hash or size as they are"
    )
    options = parser.parse_args(arguments)
    try:
        folder = prepare(
            options.name,
            data_dir=options.data_dir,
            source=options.source,
            unofficial=options.unofficial,
        )
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    print(f"{options.name} is prepared in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
