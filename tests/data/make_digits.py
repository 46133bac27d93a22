"""Writes `qkd_jax/data/digits.npz` from scikit-learn's copy; needs scikit-learn, nothing else does.

Run: `python tests/data/make_digits.py`. The file's arrays are pinned by a hash in
`qkd_jax/data/digits.py`, which this script prints.
"""

import hashlib
import pathlib

import numpy as np


def main() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = digits.images.astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    assert levels.shape == (1797, 8, 8) and levels.max() == 16 and np.all(levels == digits.images)
    path = pathlib.Path(__file__).parents[2] / "qkd_jax" / "data" / "digits.npz"
    np.savez_compressed(path, levels=levels, labels=labels)
    print(path, hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
