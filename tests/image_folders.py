"""Small folders of JPEGs, as `folder` reads them. Used by tests of data and of whole runs."""

import io

import numpy as np
from PIL import Image


def pixels(height, width, *, colour, seed):
    """A noisy picture of a colour: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(-30, 30, width)[None, :, None] + np.linspace(-20, 20, height)[:, None, None]
    return np.clip(slope + colour + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(image, format="jpeg", **options):
    """The bytes of a file."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format, **({"quality": 90} if format == "jpeg" else {}) | options)
    return buffer.getvalue()


def make(root, *, classes=4, train=16, val=4, side=(30, 60)):
    """Writes train/<class>/*.jpg and val/<class>/*.jpg of different sizes; returns `root`."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 215, (classes, 3))
    for split, count in (("train", train), ("val", val)):
        for k in range(classes):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(*side, 2)
                seed = 1000 * k + number + (500 if split == "val" else 0)
                image = pixels(height, width, colour=colours[k], seed=seed)
                (folder / f"{number:03}.jpg").write_bytes(encoded(image))
    return root
