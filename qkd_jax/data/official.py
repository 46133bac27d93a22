"""The official files of MNIST, Fashion-MNIST and CIFAR: where they lie and how they read.

Hashes are SHA-256, versions and features those of TFDS, so that a set written from here is the set
that TFDS would have written. To add one, write a reader and a line in `OFFICIAL`.

Formats: IDX (big-endian magic, sizes, bytes) at http://yann.lecun.com/exdb/mnist/; CIFAR's binary
version (label bytes, then 3072 bytes in planes R, G, B) at
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import dataclasses
import gzip
import math
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np

# One split: arrays by feature, all of one length; "image" is uint8 [examples, H, W, C].
Splits = dict[str, dict[str, np.ndarray]]
# What a reader returns: the splits, and the names of the classes by label feature.
Content = tuple[Splits, dict[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Official:
    """The files of one data set.

    Attributes:
        version: TFDS's version.
        base: URL of the folder that holds the files.
        sha256: hash of each file by name.
        read: reads the files, given by name.
        examples: number of examples by split.
        citation: A line of text.
    """

    version: str
    base: str
    sha256: Mapping[str, str]
    read: Callable[[Mapping[str, pathlib.Path]], Content]
    examples: Mapping[str, int]
    citation: str


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads one gzipped IDX file of bytes into uint8 of the shape that it states.

    Raises:
        ValueError: where it is not such a file, or cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}.") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes (it starts {content[:4].hex()}).")
    axes = content[3]
    header = content[4 : 4 + 4 * axes].ljust(4 * axes, b"\xff")  # a short one fits no content
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
    if len(content) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{path} states the shape {shape} but holds {len(content)} bytes.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_mnist(files: Mapping[str, pathlib.Path]) -> Content:
    """Reads the four IDX files that MNIST and Fashion-MNIST share."""
    splits: Splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(files[f"{prefix}-images-idx3-ubyte.gz"])
        labels = read_idx(files[f"{prefix}-labels-idx1-ubyte.gz"])
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"the {split} files hold images {images.shape} and labels {labels.shape}; they "
                "must be [examples, 28, 28] and [examples]."
            )
        splits[split] = {"image": images[..., None], "label": labels}
    return splits, {"label": [str(n) for n in range(10)]}


def _read_cifar(
    files: Mapping[str, pathlib.Path],
    folder: str,
    members: Mapping[str, tuple[str, ...]],
    labels: Mapping[str, str],
) -> Content:
    """Reads CIFAR's binary archive; `labels` maps each label byte, in order, to its names' file."""
    (path,) = files.values()
    splits: Splits = {}
    try:
        with tarfile.open(path, "r:gz") as archive:

            def content(member: str) -> bytes:
                file = archive.extractfile(f"{folder}/{member}")
                if file is None:
                    raise KeyError(f"{folder}/{member} is no file")
                return file.read()

            names = {key: content(member).decode().split() for key, member in labels.items()}
            for split, parts in members.items():
                raw = np.frombuffer(b"".join(map(content, parts)), np.uint8)
                records = raw.reshape(-1, len(labels) + 3 * 32 * 32)
                planes = records[:, len(labels) :].reshape(-1, 3, 32, 32)
                splits[split] = {
                    "image": planes.transpose(0, 2, 3, 1),
                    **{key: records[:, byte] for byte, key in enumerate(labels)},
                    "id": np.array([f"{split}_{row:05d}" for row in range(len(records))]),
                }
    except (tarfile.TarError, EOFError, KeyError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is not CIFAR's binary archive ({folder}): {error}.") from error
    return splits, names


def read_cifar10(files: Mapping[str, pathlib.Path]) -> Content:
    """Reads cifar-10-binary.tar.gz."""
    parts = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
    members = {"train": parts, "test": ("test_batch.bin",)}
    return _read_cifar(files, "cifar-10-batches-bin", members, {"label": "batches.meta.txt"})


def read_cifar100(files: Mapping[str, pathlib.Path]) -> Content:
    """Reads cifar-100-binary.tar.gz: a coarse label, then the fine one."""
    members = {"train": ("train.bin",), "test": ("test.bin",)}
    labels = {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
    return _read_cifar(files, "cifar-100-binary", members, labels)


CIFAR_BASE = "https://www.cs.toronto.edu/~kriz/"
CIFAR_CITATION = "A. Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009."

OFFICIAL: dict[str, Official] = {
    "mnist": Official(
        version="3.0.1",
        base="https://storage.googleapis.com/cvdf-datasets/mnist/",
        sha256={
            "train-images-idx3-ubyte.gz": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            "train-labels-idx1-ubyte.gz": (
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        },
        read=read_mnist,
        examples={"train": 60_000, "test": 10_000},
        citation="Y. LeCun, C. Cortes, C. J. C. Burges. The MNIST database. 1998.",
    ),
    "fashion_mnist": Official(
        version="3.0.1",
        base="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        sha256={
            "train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            "train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
        read=read_mnist,
        examples={"train": 60_000, "test": 10_000},
        citation="H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST. 2017. arXiv:1708.07747.",
    ),
    "cifar10": Official(
        version="3.0.2",
        base=CIFAR_BASE,
        sha256={
            "cifar-10-binary.tar.gz": (
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
            ),
        },
        read=read_cifar10,
        examples={"train": 50_000, "test": 10_000},
        citation=CIFAR_CITATION,
    ),
    "cifar100": Official(
        version="3.0.2",
        base=CIFAR_BASE,
        sha256={
            "cifar-100-binary.tar.gz": (
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
            ),
        },
        read=read_cifar100,
        examples={"train": 50_000, "test": 10_000},
        citation=CIFAR_CITATION,
    ),
}
