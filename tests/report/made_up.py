"""A run folder with made-up numbers, of the size and shape of the main job's."""

import math

import numpy as np

from qkd_jax.record.folder import RunFolder
from qkd_jax.record.json_files import write_json
from qkd_jax.report import weight_histograms

LAYERS = ["stem", *(f"stage{s}_block0/{c}" for s in (1, 2, 3) for c in ("conv1", "conv2"))]
LAYERS += ["stage2_block0/shortcut", "stage3_block0/shortcut", "head"]

STAGES = (
    ("pretrain_teacher", "teacher", 300, 0.02),
    ("pretrain_student", "student", 300, 0.05),
    ("qat_only", "qat_only", 400, 0.09),
    ("qat_fixed_teacher", "qat_fixed_teacher", 400, 0.08),
    ("self_study", "student", 60, 0.12),
    ("co_study", "student", 200, 0.08),
    ("tutor", "student", 140, 0.07),
)

CONFIG = {
    "seed": 1,
    "data": {"name": "digits", "train_examples": 300},
    "nets": {name: {"model": "resnet8"} for name in ("teacher", "student", "qat_only")},
    "schedule": [stage for stage, *_ in STAGES],
}


def results():
    rows = [
        {
            "net": "teacher",
            "method": "float",
            "top1": 0.9713,
            "loss": 0.11,
            "weight_bytes": 310_000,
        },
        {"net": "student", "method": "float", "top1": 0.9532, "loss": 0.19, "weight_bytes": 78_000},
        {"net": "qat_only", "method": "QAT alone", "top1": 0.9412, "loss": 0.2231},
        {"net": "qat_fixed_teacher", "method": "QAT, fixed teacher", "top1": 0.948, "loss": 0.2},
        {
            "net": "student",
            "method": "QKD",
            "top1": 0.9506,
            "loss": 0.1874,
            "export": {
                "engine": "ONNX Runtime",
                "top1": 0.9506,
                "argmax_agreement": 1.0,
                "max_logit_difference": 3.1e-6,
                "as_trained": {"argmax_agreement": 0.9921, "max_logit_difference": 0.02},
            },
        },
    ]
    for row in rows:
        quantized = row["method"] != "float"
        row |= {"weight_bits": 2 if quantized else 32, "activation_bits": 2 if quantized else 32}
        row.setdefault("weight_bytes", 6120)
        row["agreement"] = None if row["net"] == "teacher" else 0.96
        row["agreement_with"], row["student_steps"] = "teacher_before", 400
        row["top5"] = 0.999
    dataset = {"name": "digits", "train_examples": 300, "test_examples": 1497}
    return {"schema": 1, "experiment": "qkd", "dataset": dataset, "rows": rows, "stages": []}


def write_metrics(run, names):
    rng = np.random.default_rng(0)
    step = 0
    for stage, net, steps, floor in STAGES:
        for k in range(10, steps + 1, 10):
            nets = [net, "teacher"] if stage == "co_study" else [net]
            values = {}
            for n in nets:
                low = floor if n == net else 0.02
                loss = (low + 2 * math.exp(-k / 30)) * (1 + 0.15 * rng.normal()) + 0.01
                values |= {f"{n}/loss": abs(loss), f"{n}/top1": 1 - low, f"{n}/lr": 0.1}
            run.metrics.log(step + k, stage, "train", values)
            if k % 20 == 0:
                top1 = {f"{n}/top1": 0.97 - floor - 0.8 * math.exp(-k / 20) for n in nets}
                run.metrics.log(step + k, stage, "test", top1)
            if stage in ("self_study", "co_study", "tutor", "qat_only") and k % 20 == 0:
                quant = {}
                for i, layer in enumerate(names):
                    drift = 1 + 0.2 * math.sin(i + k / 40)
                    quant[f"{net}/{layer}/weight_quantizer/step"] = 0.1 * drift / (1 + i)
                    quant[f"{net}/{layer}/input_quantizer/step"] = 0.4 * drift
                run.metrics.log(step + k, stage, "quant", quant)
        step += steps


def write_model(run, names):
    rng = np.random.default_rng(1)
    layers, table = {}, []
    for layer in names:
        edge = layer in ("stem", "head")
        bits = 8 if edge else 2
        low, high = -(2 ** (bits - 1)) + edge, 2 ** (bits - 1) - 1
        before = rng.normal(size=(3, 3, 16, 16)) * 0.1
        scale = np.abs(before).mean((0, 1, 2), keepdims=True) * (2 / math.sqrt(high))
        weight = before + 0.03 * rng.normal(size=before.shape)
        codes = np.clip(np.round(weight / scale), low, high).astype(np.int8)
        layers[layer] = {"weight": weight, "codes": codes, "scale": scale, "before": before}
        layers[layer]["label"] = f"int{bits} lsq per channel"
        table.append(
            {
                "path": layer,
                "kind": "Dense" if layer == "head" else "Conv",
                "shape": list(before.shape),
                "params": before.size,
                "weight_bits": bits,
                "input_bits": bits,
                "bytes": before.size * bits // 8 + 64,
                "quantizer": f"int{bits} lsq per channel",
            }
        )
    write_json(run.model / "histograms.json", weight_histograms(layers))
    write_json(run.model / "layers.json", table)


def whole_run(folder, names=LAYERS):
    run = RunFolder(folder)
    run.write_config(CONFIG)
    run.write_run(seed=1, data_fingerprint="ab" * 16, nets={"teacher": "cd" * 32})
    write_metrics(run, names)
    write_model(run, names)
    run.write_results(results())
    run.write_timings(
        {
            "stages": {
                stage: {"first_step": 4.2, "steps": steps / 40, "data": 0.1, "count": steps}
                for stage, _, steps, _ in STAGES
            },
            "latency": [
                {
                    "model": f"student {kind}",
                    "engine": "ONNX Runtime",
                    "batch": batch,
                    "median_ms": ms,
                }
                for kind, ms in (("float32", 0.211), ("int8", 0.134))
                for batch in (1, 64)
            ],
        }
    )
    return run
