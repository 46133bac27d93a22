"""Entropy calibration: our cumulative sums against the published double loop, side by side.

    python benchmarks/entropy.py [--bins 2048] [--rounds 5]

The loop is the formulation of NVIDIA's tools, restated in NumPy (tests/observers/test_histograms.py
checks that both find the same cut). Interleaved rounds, medians.
"""

import argparse
import pathlib
import platform
import runpy
import statistics
import time

import arms  # noqa: F401  (finds the project)
import numpy as np

from qkd_jax.observers import entropy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bins", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tests = pathlib.Path(__file__).parents[1] / "tests" / "observers" / "test_histograms.py"
    double_loop = runpy.run_path(str(tests))["double_loop"]
    x = abs(np.random.default_rng(0).standard_t(5, 500_000))
    hist = np.histogram(x, args.bins, (0, x.max()))[0]
    times = {"double loop": [], "cumulative sums": []}
    cuts = {}
    for _ in range(args.rounds):
        for name, search in (
            ("double loop", lambda: double_loop(hist, 128)[0]),
            ("cumulative sums", lambda: int(entropy.thresholds(hist, 128))),
        ):
            begin = time.perf_counter()
            cuts[name] = search()
            times[name].append(time.perf_counter() - begin)
    print(f"{platform.machine()}, NumPy {np.__version__}, {args.bins} bins, {args.rounds} rounds")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:16}  {1000 * median:9.2f} ms  cut at bin {cuts[name]}")
    print(f"ratio {medians['double loop'] / medians['cumulative sums']:.0f}")


if __name__ == "__main__":
    main()
