"""The cost of a step of quantization-aware training, beside the float step and qwix.

    python benchmarks/step.py [--batch 128] [--rounds 7]

ResNet-20 on 32x32x3 images. The steps run in turn (the order alternates), so that machine drift
affects all alike; quoted are medians and the median of the ratios round by round. "Temporary
memory" is what XLA reserves for one compiled step besides its arguments and results. qwix 0.1.8
runs where it is installed (`pip install qwix==0.1.8`), at W8A8, since its W4A4 convolution does not
compile on CPU; its scales are dynamic maxima, not learned steps, and its update is plain SGD, so
its row is a direction, not a like-for-like race.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from typing import Any

import arms
import jax
import jax.numpy as jnp

from qkd_jax import MODELS, Rule, Spec, calibrate, quantize
from qkd_jax.training.parallel import compile_step
from qkd_jax.training.plan import plan_step
from qkd_jax.training.state import start_state
from qkd_jax.training.step import make_step

END = Spec(8, quantizer="lsq")
RULES = (
    Rule("stem", weight=END, input=Spec(8, symmetric=False)),
    Rule("head", weight=END, input=Spec(8, quantizer="lsq", signed=False)),
    Rule(
        ".*",
        weight=Spec(4, quantizer="lsq", granularity="channel"),
        input=Spec(4, quantizer="lsq", signed=False),
    ),
)
Runner = Callable[[], Any]


def temporary_bytes(lowered: Any) -> int:
    """What XLA reserves for one call besides arguments and results."""
    return lowered.compile().memory_analysis().temp_size_in_bytes


def ours(net: Any, variables: Any, batch: dict[str, jax.Array]) -> tuple[Runner, int]:
    """Our training step of one net on labels; returns (run one step, temporary bytes)."""
    learn = {"net": {"ce": {}}}
    optim = {"net": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4}}
    plan = plan_step({"net": net}, learn, optim, horizon=1000)
    step = compile_step(make_step(plan.structure), devices=jax.devices()[:1])
    state = start_state(plan, {"net": variables}, step=0, seed=0)
    memory = temporary_bytes(step.lower(state, batch, {}))
    held = [state]

    def run() -> None:
        held[0], metrics = step(held[0], batch, {})
        jax.block_until_ready(metrics)

    return run, memory


def qwix_step(model: Any, variables: Any, batch: dict[str, jax.Array]) -> tuple[Runner, int]:
    """The same net trained through qwix's W8A8 provider, plain SGD."""
    import qwix  # pyrefly: ignore[missing-import]  # optional peer

    rule = qwix.QtRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    net = qwix.quantize_model(model, qwix.QtProvider([rule]))

    @jax.jit
    def step(variables: Any, image: jax.Array, label: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            joined = {**variables, "params": params}
            logits, stats = net.apply(joined, image, train=True, mutable=["batch_stats"])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
            return -jnp.mean(picked), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads)
        return {**variables, "params": params, **stats}, value

    held = [variables]
    args = batch["image"], batch["label"]
    memory = temporary_bytes(step.lower(held[0], *args))

    def run() -> None:
        held[0], value = step(held[0], *args)
        jax.block_until_ready(value)

    return run, memory


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), 3)
    batch = {
        "image": jax.random.normal(keys[0], (args.batch, 32, 32, 3)),
        "label": jax.random.randint(keys[1], (args.batch,), 0, 10),
    }
    model = MODELS["resnet20"](num_classes=10)
    floats, student = quantize(model), quantize(model, RULES)
    variables = jax.jit(floats.init)(keys[2], batch["image"])
    quantized = calibrate(student, variables, [batch["image"][:32]])

    steps = {
        "float": ours(floats, variables, batch),
        "W4A4 LSQ (ours)": ours(student, quantized, batch),
    }
    try:
        steps["W8A8 (qwix 0.1.8)"] = qwix_step(model, variables, batch)
    except ImportError:
        print("qwix is not installed; its row is left out (pip install qwix==0.1.8)")

    times = arms.in_turns({name: run for name, (run, _) in steps.items()}, args.rounds)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {jax.devices()[0].platform}, jax {jax.__version__}")
    print(f"ResNet-20, batch {args.batch}, 32x32x3, {args.rounds} rounds in turn\n")
    columns = ("median s", "min s", "time/float", "temp MB", "memory/float")
    print(f"{'step':20}" + "".join(f"{c:>13}" for c in columns))
    base = steps["float"][1]
    for name, (_, memory) in steps.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["float"], strict=True))
        median, least = statistics.median(times[name]), min(times[name])
        print(
            f"{name:20}{median:13.3f}{least:13.3f}{ratio:13.2f}{memory / 1e6:13.0f}"
            f"{memory / base:13.2f}"
        )


if __name__ == "__main__":
    main()
