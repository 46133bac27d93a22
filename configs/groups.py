"""Weights in groups, rounded by one method after the other, of one float net.

    python launch.py --config=configs/groups.py:bits=3,group=16 --workdir=runs/groups
    python launch.py --config=configs/groups.py:widths=4+3+2,seeds=3 --sweep --workdir=runs/groups

Every row is a net of its own that starts from the float net, and only weights are quantized, all
layers of them: to nearest on whole ranges; on ranges of the least squared error; `hqq`, without
data; `awq`; `propagate_errors`; `gptq` in the order of columns, by activation order, behind
`awq`, and with the errors of earlier layers propagated.

Expect, on the digits, 3 seeds: 90 s a run on two cores of an Intel Xeon beside other work; float
94.14 +- 0.75 % top-1, at 2 bits 68.45 +- 2.92 by nearest rounding, 86.68 +- 2.48 by hqq,
87.17 +- 3.07 by gptq, 93.08 +- 1.08 with propagation (docs/results.md).
"""

from typing import Any

from configs import common, sweeps

# `widths` is "+"-separated. The float net is trained once a seed.
SWEEP = dict(seeds=3, widths="4+3+2")


def get_sweep(arg=""):
    """Returns a run, with all its rows, for each width and seed."""
    args, others = sweeps.split(arg, SWEEP)
    runs = [dict(bits=width) for width in sweeps.chosen(args.widths)]
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


# Row -> its name in the table, and its stages in order: (kind, options); `calibrate` by "minmax".
ROWS: dict[str, tuple[str, tuple[tuple[str, dict[str, Any]], ...]]] = {
    "nearest": ("nearest", (("calibrate", {}),)),
    "mse": ("nearest, mse ranges", (("calibrate", {"observer": "mse"}),)),
    "hqq": ("hqq", (("calibrate", {}), ("hqq", {}))),
    "awq": ("awq", (("awq", {}), ("calibrate", {}))),
    "awq_scale": ("awq without clipping", (("awq", {"clip": False}), ("calibrate", {}))),
    "qep": ("propagate_errors", (("calibrate", {}), ("propagate_errors", {}))),
    "gptq": ("gptq", (("calibrate", {}), ("gptq", {}))),
    "gptq_order": (
        "gptq, activation order",
        (("calibrate", {}), ("gptq", {"order": "activation"})),
    ),
    "gptq_static": (
        "gptq, activation order, mse ranges",
        (
            ("calibrate", {"observer": "mse"}),
            ("gptq", {"order": "activation", "static_groups": True}),
        ),
    ),
    "gptq_qep": (
        "gptq, propagation",
        (("calibrate", {}), ("gptq", {"order": "activation", "propagation": 0.5})),
    ),
    "awq_gptq": (
        "awq without clipping, gptq, propagation",
        (
            ("awq", {"clip": False}),
            ("calibrate", {}),
            ("gptq", {"order": "activation", "propagation": 0.5}),
        ),
    ),
}


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `group` must divide the contraction of layers that are to have groups (others have a scale a
    channel); `examples` are the images shown to the methods; `rows` a "+"-separated choice, empty
    for all.
    """
    args, config = common.begin(
        arg, model="vit", width=64, bits=4, group=32, examples=256, init_from="", rows=""
    )
    wanted = [row for row in args.rows.split("+") if row] or list(ROWS)
    for row in wanted:
        if row not in ROWS:
            raise ValueError(f"unknown row {row!r} in rows; allowed: {', '.join(ROWS)}.")
    stages: dict[str, Any] = {}
    config.nets.float = common.net(args.model, width=args.width, init_from=args.init_from)
    if not args.init_from:
        learn = dict(float=dict(ce=common.ce()))
        stages["pretrain"] = common.train_by_recipe(args, learn)
    for row in wanted:
        rules = f"int{args.bits}_weight_only:{args.group}"
        config.nets[row] = common.net(args.model, width=args.width, rules=rules, init_from="float")
        for kind, options in ROWS[row][1]:
            stages[f"{row}_{kind}"] = (
                common.calibrate(row, observer=options.get("observer", "minmax"), examples=1)
                if kind == "calibrate"
                else common.post_training(kind, row, examples=args.examples, **options)
            )
    names = {row: ROWS[row][0] for row in wanted}
    stages["evaluate"] = common.evaluate(reference="float", float="float", **names)
    return common.finish(config, stages)
