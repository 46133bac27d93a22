"""Records that TFDS has written as array_record, read at random and without TensorFlow."""

import pathlib
from typing import Any

CHUNK = 1000  # records read at once: `__getitems__` is twice as fast as single records
RANDOM_ACCESS = "array_record"


def open_split(name: str, folder: pathlib.Path, split: str) -> Any:
    """Opens one split through TFDS; a record's image stays encoded."""
    import tensorflow_datasets as tfds

    # Naming the version lets TFDS read the files as they are, whatever version its own code has.
    # The file format must be said as soon as data_dir is, or TFDS goes back to TFRecord.
    return tfds.data_source(
        f"{name}:{folder.name}",
        split=split,
        data_dir=folder.parent.parent,
        download=False,
        builder_kwargs={"file_format": RANDOM_ACCESS},
        decoders={"image": tfds.decode.SkipDecoding()},
    )
