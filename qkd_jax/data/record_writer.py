"""Writes a TFDS data set in array_record, without TensorFlow.

TFDS encodes a NumPy image through TensorFlow, but takes an image that is PNG bytes already as it
is; so images are encoded here, by Pillow, and the files are what TFDS itself would write.
"""

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from qkd_jax.data.records import RANDOM_ACCESS


def png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 1 or 3]; PNG is lossless."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "png")
    return buffer.getvalue()


def write(
    name: str,
    version: str,
    directory: pathlib.Path,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    description: str,
    homepage: str,
    citation: str,
    keep_order: bool = False,
) -> pathlib.Path:
    """Prepares `<directory>/<name>/<version>` and returns it.

    It is written under a temporary name and moved in one operation: a process that is killed leaves
    nothing half done, and of two that prepare at once one wins and both continue.

    Args:
        name: the TFDS name.
        version: the TFDS version, as "1.0.0".
        directory: the data_dir; made if it is not there.
        features: TFDS features by name; "image" is an Image.
        splits: examples by split; "image" is uint8 [H, W, C].
        description: stored with the set, as `homepage` and `citation` are.
        homepage: A URL.
        citation: BibTeX or a line of text.
        keep_order: whether examples keep their order; TFDS's own sets are shuffled by a hash.

    Raises:
        OSError: where the directory cannot be written.
    """
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        # TFDS looks for checksums beside the class's file, by a package that it does not install;
        # nothing is downloaded here.
        url_infos: ClassVar = {}

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(dict(features)),
                supervised_keys=("image", "label"),
                description=description,
                homepage=homepage,
                citation=citation,
                disable_shuffling=keep_order,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for row, example in enumerate(splits[split]):
                yield row, {**example, "image": png(example["image"])}

    Builder.name = name
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / name / version
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory))
    tfds.disable_progress_bar()
    try:
        builder = Builder(data_dir=temporary, file_format=RANDOM_ACCESS)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports a download here
            builder.download_and_prepare()
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(temporary / name / version, target)
        except OSError as error:
            if not (target / "dataset_info.json").is_file():
                raise OSError(f"{target} is in the way and no data set; remove it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
