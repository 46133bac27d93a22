"""Agreement of engines with the trained net: logits on ONNX Runtime and OpenVINO, in steps.

    python benchmarks/engines.py [--models=resnet20,vit] [--rules=w8a8:integer,w8a8:fused,w2a2]

Nets are trained as in `benchmarks/fidelity.py` (and its run folders are used where they are), then
written for each engine and run over the whole test split, two ways:

- trained: the file of the net as it was trained, beside that net in JAX;
- rounded: the file of the net with its biases on the grid of their sums (`ptq.integer_bias`), as
  integer kernels have them, beside that net: an ordinary fake-quantized one.

Differences of logits are in steps: the grid of the logits where they have one, else the largest
logit over 127. `integers` is the share of products that the engine runs on integers.
"""

import os
import pathlib
import sys
import tempfile

import arms
import fidelity
import jax
import numpy as np

from qkd_jax import ptq
from qkd_jax.deploy import has_vnni, kernel_report, open_onnx, to_onnx
from qkd_jax.quantize.targets import TARGETS
from qkd_jax.quantizers import QUANTIZERS

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it forks the process

BATCH = 500
COLUMNS = ["top-1 %", "in JAX %", "same argmax %", "steps max", "steps mean", "integers", "bytes"]


def logits(call, images):
    """Logits of all images, batch by batch."""
    parts = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    return np.concatenate([np.asarray(call(part)) for part in parts])


def step_of(net, variables, logits):
    """The step of the logits' grid, or the largest logit over 127."""
    spec = net.spec_of("head", "output")
    if spec is None:
        return float(np.abs(logits).max()) / 127
    params = variables["quant"]["head"]["output_quantizer"]
    return float(np.asarray(QUANTIZERS[spec.quantizer].integer_view(params, spec)[0]))


def main():
    args = fidelity.arguments(__doc__, "w8a8:integer,w8a8:fused,w4a4,w2a2")
    vnni = "-vnni" if has_vnni() else ""
    print(f"jax {jax.__version__}, {'with' if vnni else 'without'} VNNI, {os.cpu_count()} cores\n")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            for rules in args.rules.split(","):
                net, variables, images, labels = fidelity.trained(model, rules, args)
                rounded = ptq.integer_bias(net, variables, images[:2])
                apply = jax.jit(net.apply)
                for way, given in (("trained", variables), ("rounded", rounded)):
                    wanted = logits(lambda x, v=given, f=apply: f(v, x), images)
                    step = step_of(net, given, wanted)
                    for target in (f"onnxruntime-x86{vnni}", f"openvino-cpu{vnni}"):
                        path = pathlib.Path(folder) / "net.onnx"
                        written = to_onnx(net, given, images[:2], path, target=target)
                        engine = TARGETS[target].engine
                        runs = open_onnx(path, engine, threads=2)
                        found = logits(lambda x, runs=runs: runs(x)[0], images)
                        gap = np.abs(found - wanted) / step
                        cells = [
                            f"{100 * (found.argmax(-1) == labels).mean():.2f}",
                            f"{100 * (wanted.argmax(-1) == labels).mean():.2f}",
                            f"{100 * (found.argmax(-1) == wanted.argmax(-1)).mean():.2f}",
                            f"{gap.max():.2f}",
                            f"{gap.mean():.4f}",
                            f"{kernel_report(path, engine).share:.0%}",
                            f"{written.bytes:,}",
                        ]
                        name = f"{model} {rules} {way}, {engine}"
                        rows[name] = dict(zip(COLUMNS, cells, strict=True))
                print("\n".join(arms.table_lines("net, engine", COLUMNS, rows)), flush=True)


if __name__ == "__main__":
    main()
