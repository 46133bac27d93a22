"""Whole experiments that several configs share."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common


def without_training(
    config: ConfigDict,
    args: ConfigDict,
    rules: str,
    method: str,
    *,
    calibration: dict[str, Any],
    fold: bool = False,
    reduce_range: bool = False,
) -> ConfigDict:
    """Returns a finished config: pretrain, calibrate, evaluate, diagnose and deploy one net.

    Args:
        config: of `begin`.
        args: with `model`, `width`, `data`, `epochs`, and `init_from`: a trained float net to take
            in place of training one.
        rules: of the quantized net.
        method: its name in the results.
        calibration: its `calibrate` stage.
        fold: whether BatchNorms are folded before.
        reduce_range: see `net`.
    """
    config.nets.float = common.net(args.model, width=args.width, init_from=args.init_from)
    config.nets.net = common.net(
        args.model, width=args.width, rules=rules, reduce_range=reduce_range, init_from="float"
    )
    stages = dict(
        pretrain=common.train_by_recipe(args, dict(float=dict(ce=common.ce()))),
        **(dict(fold=common.post_training("fold_bn", "net")) if fold else {}),
        calibrate=calibration,
        evaluate=common.evaluate("float", float="float", net=method),
        diagnose=common.diagnose("net"),
        deploy=common.deploy("net"),
    )
    return common.finish(config, stages, unscheduled=["pretrain"] if args.init_from else [])


def for_table(module: Any, arguments: Mapping[str, Any]) -> ConfigDict:
    """Returns a config as a row of a table needs it: no deploy and diagnose stages, no curves.

    Args:
        module: a config file's.
        arguments: of its `get_config`.
    """
    config = module.get_config(",".join(f"{key}={value}" for key, value in arguments.items()))
    config = config.copy_and_resolve_references().unlock()
    kinds = config.stages
    config.schedule = tuple(
        s for s in config.schedule if kinds[s].kind not in ("deploy", "diagnose")
    )
    config.log.eval_every_steps = 0
    config.log.quant_every_steps = 0
    return config.lock()


def beside_labels(
    config: ConfigDict, args: ConfigDict, method: str, *, deployed: bool = False, **term: Any
) -> ConfigDict:
    """Returns a finished config of a `student` that is its own teacher, beside `alone`.

    The student learns from labels and by a term without a teacher, `alone` from labels. With
    `args.bits` both learn in float first, from labels, and then by their methods, quantized.

    Args:
        config: of `begin`.
        args: with `model`, `width`, `bits`, `data` and `epochs`.
        method: the student's, in the results.
        deployed: whether the student is deployed.
        **term: {label: the term's row}.
    """
    config.nets.alone = common.net(args.model, width=args.width, rules=args.bits)
    config.nets.student = common.net(
        args.model, width=args.width, rules=args.bits, init_from="alone"
    )
    labels = dict(ce=common.ce())
    stages = {}
    if args.bits != "float":
        stages["start"] = common.train_by_recipe(args, dict(alone=labels))
        stages["calibrate"] = common.calibrate("alone", "student")
    # The student first: it copies `alone` at the moment at which it first takes part.
    stages["distil"] = common.train_by_recipe(args, dict(student=labels | term), bits=args.bits)
    stages["alone"] = common.train_by_recipe(args, dict(alone=labels), bits=args.bits)
    stages["evaluate"] = common.evaluate(alone="labels", student=method)
    if deployed:
        stages["deploy"] = common.deploy("student")
    return common.finish(config, stages)


def net_of_seed(folder: str, seed: int) -> str:
    """Returns the float net of a run's folder, in whose name `{seed}` stands for the seed."""
    return folder.replace("{seed}", str(seed)) + "#net"
