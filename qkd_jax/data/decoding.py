"""Encoded images to pixels of one size: decoding, cutting out a box and resizing it, in one call.

There are two decoders. "pillow" gives what torchvision's loaders give on Pillow: bilinear with
antialiasing; but a training crop of twice the size or more is decoded at a half, a quarter or an
eighth. "turbo" is about twice as fast: libjpeg-turbo through simplejpeg, with its fast DCT
and upsampling, no row below the box decoded, and OpenCV's bilinear, without antialiasing. What is
no plain JPEG (PNG files under a JPEG's name, CMYK) goes through Pillow in both, as evaluation does.

Grey images become three equal channels, CMYK is converted, transparency is dropped, and the EXIF
orientation is left alone, all as torchvision's loader does it. Of 16 bits the upper 8 count, where
that loader shows white.
"""

import functools
import io
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qkd_jax import checks
from qkd_jax.data.crops import Box

DECODERS = ("pillow", "turbo")
# Given the stored height and width, the box to show.
Chooser = Callable[[int, int], Box]
LARGEST_PIXELS = 178_956_970  # Pillow's limit, so both decoders refuse the same images

_scratch = threading.local()


class UnreadableError(ValueError):
    """An image that cannot be decoded."""


def check(decoder: str) -> None:
    """Refuses an unknown decoder, or one whose packages are not installed.

    Raises:
        ValueError: saying what to install.
    """
    checks.one_of("decoder", decoder, DECODERS)
    if decoder == "turbo":
        try:
            _packages()
        except ImportError as error:
            raise ValueError(
                f"decoder is 'turbo', which needs a package that is not installed ({error}): "
                "pip install 'qkd_jax[input]', or take decoder='pillow'."
            ) from error


def decode(
    decoder: str,
    encoded: bytes,
    choose: Chooser,
    out: np.ndarray,
    *,
    mirrored: bool = False,
    exact: bool = False,
) -> None:
    """Decodes one image and writes a box of it, resized, to `out`.

    Args:
        decoder: "pillow" or "turbo".
        encoded: the content of a file.
        choose: the box, from the stored height and width.
        out: uint8 [height, width, 3]; it is overwritten.
        mirrored: whether left and right are exchanged.
        exact: whether images much larger than `out` are decoded at full size (evaluation), instead
            of at a half, a quarter or an eighth by the DCT.

    Raises:
        UnreadableError: the bytes are no image that can be decoded.
    """
    try:
        if decoder == "pillow" or exact or not _by_turbo(encoded, choose, out, mirrored):
            _by_pillow(encoded, choose, out, mirrored, exact=exact)
    except _unreadable() as error:
        raise UnreadableError(_message(error)) from error


@functools.cache
def _unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for bytes that it cannot decode, and for too many pixels."""
    from PIL import Image

    return OSError, SyntaxError, ValueError, ZeroDivisionError, Image.DecompressionBombError


def _message(error: Exception) -> str:
    from PIL import Image

    if isinstance(error, Image.UnidentifiedImageError):
        return "its bytes are of no image format"
    return str(error) or type(error).__name__


def _by_pillow(
    encoded: bytes, choose: Chooser, out: np.ndarray, mirrored: bool, *, exact: bool
) -> None:
    from PIL import Image

    height, width = out.shape[:2]
    with Image.open(io.BytesIO(encoded)) as image:
        stored_w, stored_h = image.size
        top, left, h, w = choose(stored_h, stored_w)
        shrink = 1 if exact else min(h / height, w / width)
        if shrink >= 2 and image.format == "JPEG":
            # The decoder halves the image as long as no side falls below what is asked for.
            image.draft(None, (int(stored_w / shrink), int(stored_h / shrink)))
        across, down = image.size[0] / stored_w, image.size[1] / stored_h
        box = (left * across, top * down, (left + w) * across, (top + h) * down)
        box = (box[0], box[1], min(box[2], image.size[0]), min(box[3], image.size[1]))
        whole = _rgb(image)
        if not exact:  # a crop ends at its border; a box of the resized image sees beyond it
            whole, box = whole.crop(_whole(box)), None
        resized = whole.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if mirrored:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[...] = np.asarray(resized)


def _rgb(image: Any) -> Any:
    """Returns an image as three channels of 8 bits."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # The upper 8 bits, as Pillow itself reads colour of 16 bits; its convert() cuts at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit numbers, which have no range of their own; save it with 8 bits "
            "a channel"
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _whole(box: Box) -> tuple[int, int, int, int]:
    """Whole pixels, at least one each way, of (left, top, right, bottom)."""
    left, top = int(box[0]), int(box[1])
    return left, top, max(int(box[2]), left + 1), max(int(box[3]), top + 1)


@functools.cache
def _packages() -> tuple[Any, Any]:
    import cv2  # pyrefly: ignore[missing-import]  # optional
    import simplejpeg  # pyrefly: ignore[missing-import]  # optional

    cv2.setNumThreads(0)  # the workers are what runs in parallel
    return cv2, simplejpeg


class _Frame(NamedTuple):
    """What a JPEG's frame header says; `at` is where the header begins."""

    at: int
    height: int
    width: int
    components: int
    sequential: bool
    unit: int  # rows of pixels that are coded together


def _frame(encoded: bytes) -> _Frame | None:
    """Reads the frame header of a JPEG of 8 bits; None where there is none."""
    at = 2
    while at + 20 < len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(encoded[at + k : at + k + 2]) for k in (5, 7))
            components = encoded[at + 9]
            rows = max((encoded[at + 11 + 3 * k] & 15 for k in range(components)), default=0)
            known = marker <= 0xC2 and encoded[at + 4] == 8 and height and width
            return _Frame(at, height, width, components, marker < 0xC2, 8 * rows) if known else None
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4])
    return None


def _by_turbo(encoded: bytes, choose: Chooser, out: np.ndarray, mirrored: bool) -> bool:
    """Whether simplejpeg took the image."""
    cv2, simplejpeg = _packages()
    # Without its end a file is cut short, which the early stop below would not see.
    if encoded[:2] != b"\xff\xd8" or encoded.rfind(b"\xff\xd9", -256) < 0:
        return False
    frame = _frame(encoded)
    if frame is None or frame.components not in (1, 3):
        return False
    if frame.height * frame.width > LARGEST_PIXELS:
        return False  # Pillow's message
    top, left, h, w = choose(frame.height, frame.width)
    content, stored_h, strict = encoded, frame.height, True
    last = -(-int(top + h) // frame.unit) * frame.unit
    if frame.sequential and last < stored_h:
        # Rows below the box are not decoded: the header says that the image ends there. With the
        # simple upsampling no row depends on those of the next unit. What follows the last row is
        # what `strict` complains of.
        content, stored_h, strict = bytearray(encoded), last, False
        content[frame.at + 5 : frame.at + 7] = last.to_bytes(2)
    shrink = min(h / out.shape[0], w / out.shape[1])
    least: dict[str, Any] = {}
    if shrink >= 2:
        least = dict(min_height=int(stored_h / shrink), min_width=int(frame.width / shrink))
        least["min_factor"] = 2
    try:
        image = simplejpeg.decode_jpeg(
            content,
            fastdct=True,
            fastupsample=True,
            strict=strict,
            # A buffer that is used again spares the page faults of half a megabyte an image.
            buffer=_buffer(stored_h * frame.width * 3),
            **least,
        )
    except ValueError:
        return False  # Pillow reads what it can, and says what is wrong with the rest
    across, down = image.shape[1] / frame.width, image.shape[0] / stored_h
    left, top, right, bottom = _whole(
        (left * across, top * down, (left + w) * across, (top + h) * down)
    )
    part, size = image[top:bottom, left:right], (out.shape[1], out.shape[0])
    if mirrored:
        out[...] = cv2.flip(cv2.resize(part, size, interpolation=cv2.INTER_LINEAR), 1)
    else:
        cv2.resize(part, size, dst=out, interpolation=cv2.INTER_LINEAR)
    return True


def _buffer(size: int) -> np.ndarray:
    """Returns this thread's buffer, of at least `size` bytes."""
    held = getattr(_scratch, "held", None)
    if held is None or len(held) < size:
        held = _scratch.held = np.empty(size, np.uint8)
    return held
