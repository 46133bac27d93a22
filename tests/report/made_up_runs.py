"""A folder of runs with made-up numbers: two arms, three seeds, a teacher that both share."""

from qkd_jax.record.json_files import write_json
from qkd_jax.record.metrics_log import MetricsLog

START = {
    "git": {"revision": "ab" * 20, "dirty": False},
    "versions": {"jax": "1.0", "flax": "2.0"},
    "devices": {"count": 1, "kind": "cpu", "platform": "cpu"},
    "processor": "a processor",
}
CLASSES = (40, 60)


def config(seed, lr):
    return {
        "seed": seed,
        "data": {"name": "digits", "dir": f"/somewhere/{seed}"},
        "log": {"every_steps": 10},
        "stages": {"train": {"optim": {"student": {"lr": lr}}}},
        "schedule": ["train"],
    }


def row(net, method, right, **more):
    return {
        "net": net,
        "method": method,
        "top1": sum(right) / sum(CLASSES),
        "loss": 1 - sum(right) / 200,
        "weight_bits": 4,
        "activation_bits": 4,
        "weight_bytes": 1000,
        "bit_operations": 160_000,
        "class_correct": list(right),
        **more,
    }


def run(folder, name, *, seed, lr, rows, data="", steps=0, start=None):
    """Writes a finished run; without `rows`, one that is not finished."""
    path = folder / name
    path.mkdir(parents=True)
    write_json(path / "config.json", config(seed, lr))
    data = {"name": "digits", "fingerprint": data or f"{seed:064d}"}
    write_json(
        path / "run.json", {"schema": 1, "starts": [{**START, "data": data, **(start or {})}]}
    )
    log = MetricsLog(path)
    for step in range(10, steps + 1, 10):
        log.log(step, "train", "train", {"student/loss": 1 / step + seed})
        log.log(step, "train", "test", {"student/top1": 0.5 + 0.01 * seed})
    if rows:
        dataset = {"name": "digits", "test_examples": 100, "class_examples": list(CLASSES)}
        results = {"schema": 1, "seed": seed, "dataset": dataset, "rows": rows}
        write_json(path / "results.json", results)
    return path


# {seed: right answers of each class}
TEACHER = {0: (40, 57), 1: (39, 57), 2: (40, 55)}
SLOW = {0: (37, 53), 1: (36, 52), 2: (38, 53)}
FAST = {0: (38, 54), 1: (39, 53), 2: (39, 53)}


def whole(folder, seeds=(0, 1, 2)):
    """Arms `slow` and `fast`: differences in top-1 of +2, +4 and +1 points."""
    for name, lr, right in (("slow", 0.1, SLOW), ("fast", 0.2, FAST)):
        for seed in seeds:
            teacher = row("teacher", "float", TEACHER[seed], weight_bytes=9000, weight_bits=32)
            teacher |= {"activation_bits": 32, "bit_operations": 9_000_000}
            rows = [teacher, row("student", "QAT", right[seed])]
            run(folder, f"{name}_seed{seed}", seed=seed, lr=lr, rows=rows, steps=50)
    return folder
