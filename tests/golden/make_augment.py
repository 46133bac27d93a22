"""Writes augment.npz: the operations of torchvision's RandAugment and its random-resized crop.

python tests/golden/make_augment.py        (torchvision 0.28.0, torch 2.13.0, Pillow 12.3.0)
"""

import pathlib

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import autoaugment, transforms

NAMES = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
}
MAGNITUDES = (4, 9, 30)


def main():
    rng = np.random.default_rng(0)
    smooth = np.linspace(30, 220, 14)[:, None, None] + np.linspace(-25, 25, 17)[:, None]
    image = np.clip(smooth + rng.normal(0, 12, (14, 17, 3)), 0, 255).astype(np.uint8)
    arrays = {"image": image}
    space = autoaugment.RandAugment()._augmentation_space(31, image.shape[:2])
    for ours, theirs in NAMES.items():
        magnitudes, signed = space[theirs]
        for magnitude in MAGNITUDES if magnitudes.ndim else MAGNITUDES[:1]:
            for sign in (1, -1) if signed else (1,):
                value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
                found = autoaugment._apply_op(
                    Image.fromarray(image),
                    theirs,
                    sign * value,
                    transforms.InterpolationMode.NEAREST,
                    None,
                )
                arrays[f"{ours}/{magnitude}/{sign}"] = np.asarray(found)
    # Boxes of 20,000 random-resized crops for each of some sizes: quantiles of area and ratio.
    for height, width in ((375, 500), (500, 375), (120, 640)):
        torch.manual_seed(0)
        canvas = torch.empty(3, height, width)
        boxes = [
            transforms.RandomResizedCrop.get_params(canvas, (0.08, 1.0), (3 / 4, 4 / 3))
            for _ in range(20_000)
        ]
        arrays[f"boxes/{height}x{width}"] = np.quantile(
            np.array(boxes, np.float64), np.linspace(0, 1, 21), axis=0
        )
    np.savez_compressed(pathlib.Path(__file__).with_name("augment.npz"), **arrays)


if __name__ == "__main__":
    main()
