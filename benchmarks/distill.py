"""The cost of distillation in a step: of the teacher inside it, and of each family of losses.

    python benchmarks/distill.py [--batch 128] [--rounds 9] [--losses rkd,crd] [--teacher_width 16]

A ResNet-8 student of width 8 and a ResNet-20 teacher of width 16 on 28x28x1 images. The programs
run in turn (the order alternates), so that machine drift affects all alike; quoted are medians and
the median of the ratios round by round.

- `student step`: cross-entropy alone.
- `teacher forward`: the teacher's pass in evaluation mode, a program of its own.
- `kd step`: cross-entropy and `kd`, the teacher inside: at most 1.05 times the sum of the two.
- `kd step, cached`: the same with the teacher's logits in the batch, as a stage's cache reads them
  from disk: at most 1.1 times the student's step.
- other losses: their step over that same sum, for what the loss and its adaptor cost, as
  published. `--losses=all` takes all of one teacher but `simkd`, whose student is another net.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
from collections.abc import Callable
from typing import Any

import arms
import jax
import jax.numpy as jnp

from configs import terms
from qkd_jax import MODELS, quantize
from qkd_jax.distillation.forward import forward
from qkd_jax.losses import TABLE
from qkd_jax.training import (
    DataShape,
    compile_step,
    frozen_variables,
    make_step,
    plan_step,
    start_state,
)
from qkd_jax.training.plan import cached_key
from qkd_jax.training.state import jit_once

Runner = Callable[[], Any]
IMAGE, EXAMPLES = (28, 28, 1), 10_000
OPTIM = {"lr": 0.01, "weight_decay": 1e-4}


def step_of(
    nets: dict[str, Any],
    variables: dict[str, Any],
    rows: dict[str, Any],
    batch: dict[str, Any],
    cached: jax.Array | None = None,
) -> Runner:
    """Runs one training step of the student; `cached` are the teacher's logits of the batch."""
    plan = plan_step(
        nets,
        {"student": rows},
        {"student": OPTIM},
        horizon=1000,
        data=DataShape(IMAGE, EXAMPLES),
        cached=() if cached is None else ("teacher",),
    )
    step = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
    held = [start_state(plan, variables)]
    frozen = step.place(frozen_variables(plan, variables))
    if cached is not None:
        batch = {**batch, cached_key(plan.slots["teacher"]): cached}
    batch = step.shard_batch(batch)

    def run() -> None:
        held[0], metrics = step(held[0], batch, frozen)
        jax.block_until_ready((held[0].nets, metrics))

    return run


def forward_of(net: Any, variables: Any, images: jax.Array) -> Runner:
    """Runs a net's pass in evaluation mode."""
    compiled = jax.jit(functools.partial(forward, net))
    return lambda: jax.block_until_ready(compiled(variables, images)[0])


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--losses", default="", help="more losses, with commas between, or all")
    parser.add_argument("--teacher_width", type=int, default=16)
    args = parser.parse_args()

    nets = {
        "student": quantize(MODELS["resnet8"](num_classes=10, width=8)),
        "teacher": quantize(MODELS["resnet20"](num_classes=10, width=args.teacher_width)),
    }
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "image": jax.random.normal(keys[0], (args.batch, *IMAGE)),
        "label": jax.random.randint(keys[1], (args.batch,), 0, 10),
        "index": jnp.arange(args.batch, dtype=jnp.int32),
    }
    variables = {
        name: jit_once(net.init)(key, batch["image"])
        for (name, net), key in zip(nets.items(), keys[2:], strict=True)
    }
    build = functools.partial(step_of, nets, variables, batch=batch)
    teach: dict[str, Any] = {"source": "teacher"}
    taught, _ = jax.jit(functools.partial(forward, nets["teacher"]))(
        variables["teacher"], batch["image"]
    )
    runners = {
        "student step": build({"ce": {}}),
        "teacher forward": forward_of(nets["teacher"], variables["teacher"], batch["image"]),
        "kd step": build({"ce": {}, "kd": teach}),
        "kd step, cached": build({"ce": {}, "kd": teach}, cached=taught),
    }
    losses = args.losses.split(",")
    if args.losses == "all":
        losses = [
            name
            for name, row in TABLE.items()
            if row.recipe is not None
            and name not in ("kd", "byot", "simkd")
            and not row.has_several_teachers
        ]
    for loss in filter(None, losses):
        runners[f"{loss} step"] = build(terms.learn(loss, "teacher"))

    times = arms.in_turns(runners, args.rounds)
    parts = [a + b for a, b in zip(times["student step"], times["teacher forward"], strict=True)]
    print(
        f"{platform.processor() or platform.machine()}, jax {jax.__version__}, batch {args.batch}"
    )
    for name, seconds in times.items():
        line = f"{name:24s} {1e3 * statistics.median(seconds):8.1f} ms"
        if name not in ("student step", "teacher forward"):
            base, what = parts, "student step + teacher forward"
            if name.endswith("cached"):
                base, what = times["student step"], "student step"
            ratio = statistics.median(s / p for s, p in zip(seconds, base, strict=True))
            line += f"   {ratio:.3f} of {what}"
        print(line)


if __name__ == "__main__":
    main()
