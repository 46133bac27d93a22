"""What trackers and live values cost, as a share of a training step at the default intervals.

    python benchmarks/trackers.py [--steps 100] [--rounds 25]

A ResNet-8 of width 8 at W4A4 on 8x8 digits, batches of 64: a step as short as they come, so shares
are upper bounds. Each arm runs the loop of a stage with lines every 10 steps and the quantizers'
means every 20, as configs have it. Arms take turns; quoted are medians of the ratios round by round
to the arm without trackers, of the processor time of this process, which a busy machine disturbs
less than the time on the wall. wandb runs offline, its own process is not counted; arms whose
package is missing are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import arms
import jax
import numpy as np

from qkd_jax import MODELS, calibrate, presets, quantize
from qkd_jax.experiment.live_values import codes, ranges
from qkd_jax.experiment.stages.train import quantizer_means
from qkd_jax.record import trackers
from qkd_jax.record.metrics_log import MetricsLog
from qkd_jax.record.progress import Progress
from qkd_jax.training.loop import Hooks, run_steps
from qkd_jax.training.parallel import compile_step
from qkd_jax.training.plan import LIVE, plan_step, with_live
from qkd_jax.training.state import net_variables, start_state
from qkd_jax.training.step import make_step


def runner(
    plan: Any, variables: dict[str, Any], batch: Any, log: MetricsLog, steps: int, *, looks: bool
) -> Callable[[], None]:
    """Returns a function that runs some steps of a stage and logs as a stage does."""
    compiled = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
    held = [start_state(plan, {"net": variables})]
    batch = compiled.shard_batch(batch)

    def look(step: int, state: Any) -> None:
        nets = net_variables(plan, state)
        log.log(step, "stage", "quant", quantizer_means(nets))
        if looks:
            net = plan.structure.nets["net0"]
            log.log(step, "stage", "ranges", ranges(net, nets["net"]))
            log.log(step, "stage", "codes", codes(net, nets["net"]))

    hooks = Hooks(
        log=lambda step, values: log.log(step, "stage", "train", values),
        look=look,
        look_at=lambda step: step % 20 == 0,
        save=lambda *_: None,
        save_at=lambda step: False,
        stop=lambda: False,
    )

    def run() -> None:
        with Progress("stage", steps, 64, start=0, enabled=False) as progress:
            batches = iter([batch] * steps)
            held[0] = run_steps(
                compiled, plan, held[0], {}, batches, hooks, progress, done=0, steps=steps
            )
            jax.block_until_ready(held[0])

    return run


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")

    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(64, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 64).astype(np.int32),
    }
    model = MODELS["resnet8"](num_classes=10, width=8)
    rules = presets.rules("w4a4", model=model, images=batch["image"])
    net = quantize(model, rules)
    variables = jax.jit(net.init)(jax.random.key(0), batch["image"])
    variables = calibrate(net, variables, [batch["image"]])
    plan = plan_step({"net": net}, {"net": {"ce": {}}}, {"net": {"lr": 0.01}}, horizon=1000)

    names = {"no tracker": (), "tensorboard": ("tensorboard",), "wandb": ("wandb",)}
    names |= {"norms and agreement": (), "ranges and codes": ()}
    names = {
        name: chosen
        for name, chosen in names.items()
        if all(importlib.util.find_spec(trackers.PACKAGES[c]) for c in chosen)
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        runs = {}
        for name, chosen in names.items():
            folder = pathlib.Path(directory) / name.replace(" ", "_")
            folder.mkdir()
            log = MetricsLog(folder)
            fields = {"trackers": chosen, "project": "benchmark"}
            stack.enter_context(trackers.tracking(log, fields, {}, print))
            log.truncate(0, lines=0)
            own = with_live(plan, LIVE if name == "norms and agreement" else ())
            looks = name == "ranges and codes"
            runs[name] = runner(own, variables, batch, log, args.steps, looks=looks)
        for name, run in runs.items():
            run()

            def timed(run: Callable[[], None] = run, kept: list[float] = seconds[name]) -> None:
                begin = time.process_time()
                run()
                kept.append(time.process_time() - begin)

            runs[name] = timed
        walls = arms.in_turns(runs, args.rounds)

    base = seconds["no tracker"]
    print(f"{args.steps} steps, {args.rounds} rounds in turn, jax {jax.__version__}")
    for name, spent in seconds.items():
        ratios = sorted(100 * (a / b - 1) for a, b in zip(spent, base, strict=True))
        quarter = len(ratios) // 4
        print(
            f"{name:20} {1e3 * statistics.median(walls[name]) / args.steps:7.3f} ms a step, "
            f"processor {statistics.median(ratios):+6.2f} % "
            f"(half of the rounds {ratios[quarter]:+.2f} to {ratios[-quarter - 1]:+.2f})"
        )


if __name__ == "__main__":
    main()
