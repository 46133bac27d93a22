"""Timing engines side by side.

A single machine's speed drifts by a factor of two within minutes, so engines are called in turns,
each round in the opposite order of the one before, and medians over the rounds are compared.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qkd_jax import checks
from qkd_jax.deploy.onnx.engines import channels_first


def latency(
    engines: Mapping[str, Any], images: Any, *, rounds: int = 9, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Times one call of each engine on the same images, interleaved.

    Args:
        engines: name -> a function of images (its JAX results are waited for), or an
            `onnxruntime.InferenceSession` of a file that `to_onnx` wrote.
        images: [batch, height, width, channels] or [batch, features], as the net takes them. For a
            session they are put in its order of axes beforehand, outside the measurement.
        rounds: timed calls of each engine.
        warmup: calls of each engine before that (compilation).

    Returns:
        name -> {"batch", "median_ms", "min_ms"}; milliseconds per call.

    Raises:
        ValueError: no engine, or less than one round.
    """
    checks.at_least_one("engines", engines)
    checks.integer_in("rounds", rounds, 1)
    checks.integer_in("warmup", warmup, 0)
    calls = {name: _call(engine, images) for name, engine in engines.items()}
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in sorted(calls, reverse=turn % 2 == 1):
            start = time.perf_counter()
            calls[name]()
            times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "batch": int(np.shape(images)[0]),
            "median_ms": statistics.median(times[name]),
            "min_ms": min(times[name]),
        }
        for name in calls
    }


def _call(engine: Any, images: Any) -> Callable[[], Any]:
    if hasattr(engine, "get_inputs"):
        (given,) = engine.get_inputs()
        feed = {given.name: channels_first(images)}
        return lambda: engine.run(None, feed)
    held = jax.numpy.asarray(images)
    return lambda: jax.block_until_ready(engine(held))
