"""The preprocessing of a model's images, and the names of its classes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkd_jax import checks
from qkd_jax.record.restoring import first_line
from qkd_jax.whole_files import check_file

LARGEST = 1 << 26  # numbers of an image, so that a damaged file cannot exhaust the memory
MAX_PIXELS = 50_000_000  # of an image file, unless told otherwise
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
# Of the more than forty that Pillow knows some start other programs (EPS: Ghostscript), and many
# are read by nobody.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


@dataclasses.dataclass(frozen=True)
class Description:
    """Preprocessing of a net's images, and the meaning of its logits.

        input = image / 255 * gain + offset, with gain = 1 / std and offset = -mean / std

    computed as `data.Dataset.normalize` does: one multiplication and one addition in float32.

    Attributes:
        image_shape: (height, width, channels) of the net's input.
        mean: of each channel, of pixels scaled to 0..1.
        std: of each channel, above 0.
        classes: a name for each logit, or empty.

    Raises:
        ValueError: a shape, mean or std that fits no image.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.image_shape
        if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
            raise ValueError(f"image_shape is {shape!r:.80}; it must be (height, width, channels).")
        for axis, size in zip(("height", "width", "channels"), shape, strict=True):
            checks.integer_in(f"image_shape's {axis}", size, 1, 1 << 16)
        if math.prod(shape) > LARGEST:
            raise ValueError(
                f"image_shape is {tuple(shape)}, {math.prod(shape):,} numbers; give at most "
                f"{LARGEST:,}."
            )
        object.__setattr__(self, "image_shape", tuple(int(n) for n in shape))
        for name in ("mean", "std"):
            values = getattr(self, name)
            plain = isinstance(values, Sequence | np.ndarray) and not isinstance(values, str)
            if not plain or len(values) != shape[2]:
                raise ValueError(
                    f"{name} is {values!r:.80}; it must have a number for each of the {shape[2]} "
                    "channels."
                )
            values = tuple(v.item() if isinstance(v, np.generic) else v for v in values)
            for value in values:
                checks.number(f"{name} of a channel", value, low=-math.inf)
            if name == "std" and min(values) <= 0:
                raise ValueError(f"std is {values}; it must be greater than 0.")
            object.__setattr__(self, name, tuple(float(v) for v in values))
        classes = self.classes
        if not isinstance(classes, list | tuple) or not all(isinstance(c, str) for c in classes):
            raise ValueError(f"classes is {classes!r:.80}; it must be names, one for each logit.")
        object.__setattr__(self, "classes", tuple(classes))

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for a JSON file."""
        return {k: list(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, data: Any) -> Description:
        """Inverts `to_json`.

        Raises:
            ValueError: other fields, or values out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"a description is {data!r:.80}; its fields are {', '.join(names)}.")
        return cls(**data)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Turns uint8 images [..., height, width, channels] into the net's float32 input."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        gain = (1 / (255.0 * std)).astype(np.float32)
        offset = (-mean / std).astype(np.float32)
        scaled = np.multiply(images, gain, dtype=np.float32)
        return np.add(scaled, offset, out=scaled)

    def read_image(self, path: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Reads an image file as the net's size and channels: uint8 [height, width, channels].

        The image is turned as its EXIF orientation says and, where it is transparent, laid over
        white. Grey and colour are converted into each other, and the size is changed by Pillow's
        bilinear filter, which averages where it shrinks.

        Raises:
            ValueError: the file is no image of one of `FORMATS` with 8 bits a channel, or has more
                pixels than `max_pixels`; or the net takes neither 1 nor 3 channels.
        """
        from PIL import Image

        height, width, channels = self.image_shape
        if channels not in MODES:
            raise ValueError(
                f"the model takes {channels} channels, and an image file gives 1 (grey) or 3 "
                "(RGB); call the model on arrays instead: qkd_jax.deploy.load, integer_apply."
            )
        check_file(path)
        refusal, image = "", None
        try:
            # Pillow warns of what is refused here, or of what it goes on with.
            with warnings.catch_warnings(action="ignore"), Image.open(path, "r", FORMATS) as file:
                if file.width * file.height > max_pixels:
                    refusal = (
                        f"{path} has {file.width} x {file.height} pixels, and up to {max_pixels:,} "
                        "are read; a small file may hold very many. Raise max_pixels for this one."
                    )
                elif file.mode.startswith(("I", "F")):
                    refusal = (
                        f"{path} has pixels of mode {file.mode!r}; save it with 8 bits a channel."
                    )
                else:
                    image = _upright(file).convert(MODES[channels])
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many types
            raise ValueError(
                f"{path} cannot be read as an image: {first_line(error)}. Read are "
                f"{', '.join(FORMATS)}."
            ) from error
        if image is None:
            raise ValueError(refusal)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, np.uint8).reshape(self.image_shape)


def _upright(image: Any) -> Any:
    """Turns an image as its EXIF orientation says, and lays a transparent one over white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
