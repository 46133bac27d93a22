"""RandAugment and colour jitter, image by image, with Pillow's operations.

The operations, their ranges and their order are torchvision's (`transforms.RandAugment`,
`transforms.ColorJitter` on Pillow images): what each draws comes from the words that it is given.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from qkd_jax.data import draws

BINS = 31  # magnitudes run from 0 to 30
OPERATIONS_AN_IMAGE = 2
WORDS = 2 * OPERATIONS_AN_IMAGE  # which operation and which sign, for each

# (image, magnitude as a share of the range in 0..1, its bin, sign) -> image
Operation = Callable[[Any, float, int, int], Any]


def _affine(image: Any, matrix: tuple[float, ...]) -> Any:
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _shear_x(image: Any, share: float, bin: int, sign: int) -> Any:
    # About the upper left corner, as the paper's authors do it.
    return _affine(image, (1.0, sign * 0.3 * share, 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Any, share: float, bin: int, sign: int) -> Any:
    return _affine(image, (1.0, 0.0, 0.0, sign * 0.3 * share, 1.0, 0.0))


def _translate_x(image: Any, share: float, bin: int, sign: int) -> Any:
    pixels = int(sign * share * 150.0 / 331.0 * image.size[0])
    return _affine(image, (1.0, 0.0, -pixels, 0.0, 1.0, 0.0))


def _translate_y(image: Any, share: float, bin: int, sign: int) -> Any:
    pixels = int(sign * share * 150.0 / 331.0 * image.size[1])
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -pixels))


def _rotate(image: Any, share: float, bin: int, sign: int) -> Any:
    return image.rotate(sign * share * 30.0)


def _enhance(name: str) -> Operation:
    def apply(image: Any, share: float, bin: int, sign: int) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1.0 + sign * 0.9 * share)

    return apply


def _posterize(image: Any, share: float, bin: int, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(bin / ((BINS - 1) / 4)))


def _solarize(image: Any, share: float, bin: int, sign: int) -> Any:
    from PIL import ImageOps

    # Pillow takes any number, though its annotation says int.
    threshold: Any = 255.0 * (1.0 - share)
    return ImageOps.solarize(image, threshold)


def _auto_contrast(image: Any, share: float, bin: int, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Any, share: float, bin: int, sign: int) -> Any:
    from PIL import ImageOps

    return ImageOps.equalize(image)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, share, bin, sign: image,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _enhance("Brightness"),
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "sharpness": _enhance("Sharpness"),
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
}


def operate(image: Any, name: str, magnitude: int, sign: int) -> Any:
    """Applies one operation to an image of Pillow, "L" or "RGB".

    Args:
        image: the image.
        name: a key of `OPERATIONS`.
        magnitude: 0 to 30.
        sign: 1 or -1; operations without a direction ignore it.
    """
    return OPERATIONS[name](image, magnitude / (BINS - 1), magnitude, sign)


def randaugment(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Applies two random operations to each image, at the magnitude `amount` of 0 to 30.

    Cubuk et al. 2019, arXiv 1909.13719, as torchvision has it: 14 operations, each equally likely,
    with a random sign where they have one; pixels of value 0 come in.
    """
    names = list(OPERATIONS)
    chosen = draws.below(len(names), words[:, 0::2])
    signs = 1 - 2 * draws.below(2, words[:, 1::2])
    out = images.copy()
    for row, operations, directions in zip(out, chosen, signs, strict=True):
        image = _to_pillow(row)
        for operation, sign in zip(operations, directions.tolist(), strict=True):
            image = operate(image, names[operation], amount, sign)
        row[...] = np.asarray(image).reshape(row.shape)
    return out


def color_jitter(images: np.ndarray, words: np.ndarray, amount: int) -> np.ndarray:
    """Changes brightness, contrast and saturation of each image, in random order.

    Each by a factor that is uniform in 1 - a to 1 + a, with a = `amount` per cent: Pillow's
    `ImageEnhance`, as torchvision's ColorJitter(a, a, a).
    """
    from PIL import ImageEnhance

    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = np.argsort(words[:, :3], axis=1, kind="stable")
    shares = (words[:, 3:] >> np.uint64(11)).astype(np.float64) / 2**53
    factors = np.maximum(1 + amount / 100 * (2 * shares - 1), 0)
    out = images.copy()
    for row, order, scale in zip(out, orders, factors, strict=True):
        image = _to_pillow(row)
        for kind in order.tolist():
            image = kinds[kind](image).enhance(scale[kind])
        row[...] = np.asarray(image).reshape(row.shape)
    return out


def _to_pillow(image: np.ndarray) -> Any:
    from PIL import Image

    if image.shape[-1] not in (1, 3):
        raise ValueError(
            f"an image has {image.shape[-1]} channels; color_jitter and randaugment take 1 or 3."
        )
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image))
