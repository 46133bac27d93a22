"""Images a second of one core: our streamed input beside tf.data's and torchvision's.

The images are synthetic, of the size of ImageNet's: 375x500, noise with the spectrum of photos,
quality 90, about 110 KB. Each loader takes a random-resized crop of 224 and a flip, and gives
batches of 64. Every loader is a process of its own, pinned to one core; they run in turn, a round
each, and the ratios are taken round by round. Seconds are the processor's, of all threads together.
Peers run in the Python that has them (`--tensorflow`, `--torchvision`); without one, their rows are
left out.

"8 bit" ends at the flipped crop (tf.data's is float there), "float" at the normalised float32 batch
that a net reads.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import arms  # noqa: F401  (finds the project)
import numpy as np

LOADERS = pathlib.Path(__file__).with_name("jpeg_loaders.py")
IMAGES, CLASSES = 256, 4
ENDS = ("8 bit", "float")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `compare`."""
    parser.add_argument("--tensorflow", default="", help="a Python that has tensorflow")
    parser.add_argument("--torchvision", default="", help="a Python that has torchvision")
    parser.add_argument("--core", type=int, default=0, help="the core that all are pinned to")


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls with frequency as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0

    def plane(slope: float) -> np.ndarray:
        phases = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        values = np.fft.irfft2(phases * frequency**-slope, s=(height, width))
        return (values - values.mean()) / values.std()

    planes = 128 + 50 * plane(1.1), 128 + 18 * plane(1.6), 128 + 18 * plane(1.6)
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def write(folder: pathlib.Path) -> float:
    """Writes the images as a folder set; returns their mean size in bytes."""
    from PIL import Image

    rng, sizes = np.random.default_rng(0), []
    for split, count in (("train", IMAGES), ("val", CLASSES)):
        for number in range(count):
            shape = (375, 500) if number % 4 else (500, 375)
            buffer = io.BytesIO()
            image = Image.fromarray(picture(rng, *shape), "YCbCr").convert("RGB")
            image.save(buffer, "jpeg", quality=90)
            place = folder / split / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04}.jpg").write_bytes(buffer.getvalue())
            sizes.append(buffer.tell())
    return statistics.mean(sizes)


class Loader:
    """A loader's process: `measure()` returns images a second of one round."""

    def __init__(self, python: str, name: str, end: str, folder: pathlib.Path, core: int) -> None:
        command = [python, str(LOADERS), name, end, str(folder), str(core)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} has ended.")
        return line.strip()

    def measure(self) -> float:
        """Runs a round and returns images a second."""
        assert self.process.stdin is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        rate = float(self._line())
        time.sleep(0.3)  # what it still makes ahead of use must not run into the next one's round
        return rate

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.wait()


def chosen(options: argparse.Namespace) -> dict[str, str]:
    """{loader: the Python that runs it}."""
    from qkd_jax.data import decoding

    found = {"ours, pillow": sys.executable}
    try:
        decoding.check("turbo")
        found = {"ours, turbo": sys.executable, **found}
    except ValueError as error:
        print(f"({error})")
    if options.tensorflow:
        found |= dict.fromkeys(("tf.data", "tf.data, fast"), options.tensorflow)
    if options.torchvision:
        found["torchvision, Pillow"] = options.torchvision
        found["torchvision, decode_jpeg"] = options.torchvision
    return found


def compare(options: argparse.Namespace) -> int:
    """Prints the tables; returns 0 where ours is at least as fast as the faster peer."""
    pythons = chosen(options)
    ours, peers = [n for n in pythons if n[:4] == "ours"], [n for n in pythons if n[:4] != "ours"]
    holds = True
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        size = write(folder)
        print(
            f"{platform.processor() or platform.machine()}, core {options.core} of "
            f"{os.cpu_count()}; {IMAGES} JPEGs of {size / 1e3:.0f} KB on average; "
            f"{options.rounds} rounds in turn, images a second"
        )
        for end in ENDS:
            loaders = {
                name: Loader(python, name, end, folder, options.core)
                for name, python in pythons.items()
            }
            rates: dict[str, list[float]] = {name: [] for name in loaders}
            try:
                for turn in range(options.rounds):
                    for name in list(loaders)[:: 1 if turn % 2 == 0 else -1]:
                        rates[name].append(loaders[name].measure())
            finally:
                for loader in loaders.values():
                    loader.close()
            base = rates[ours[0]]
            print(f"\n{end:26}{'median':>8}{'lowest':>8}{'highest':>9}{'ours over it':>14}  with")
            for name, found in rates.items():
                ratio = statistics.median(a / b for a, b in zip(base, found, strict=True))
                print(
                    f"{name:26}{statistics.median(found):8.0f}{min(found):8.0f}{max(found):9.0f}"
                    f"{ratio:14.2f}  {loaders[name].versions}"
                )
                holds &= name not in peers or end != "float" or ratio >= 1
        stages = json.loads(
            subprocess.run(
                [sys.executable, str(LOADERS), ours[0], "stages", str(folder), str(options.core)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        whole = sum(stages.values())
        print(f"\n{ours[0]}: where an image's time goes, least of 5, ms")
        for name, seconds in stages.items():
            print(f"{name:26}{1e3 * seconds:8.3f}{100 * seconds / whole:7.0f} %")
        print(f"the bottleneck is: {max(stages, key=lambda name: stages[name])}")
    if peers:
        print(f"at least as fast as the faster peer (float): {'holds' if holds else 'FAILS'}")
    return 0 if holds else 1
