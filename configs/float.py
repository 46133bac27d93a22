"""A float net from labels alone: the baseline of every other config.

    python launch.py --config=configs/float.py:model=resnet8,width=8 --workdir=runs/float
    python launch.py --config=configs/float.py:seeds=3,models=resnet8+resnet20 --sweep \
        --workdir=runs/floats

Expect, on the digits: 10 s on two cores of an AMD EPYC beside other work; 96.86 +- 1.01 % top-1 (3
seeds).
"""

from configs import common, sweeps

# `models` are "+"-separated; without them the argument of the config stays.
SWEEP = dict(seeds=3, models="")


def get_sweep(arg=""):
    """Returns a run for each model and seed."""
    args, others = sweeps.split(arg, SWEEP)
    runs = [dict(model=model) for model in sweeps.chosen(args.models)] or [{}]
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below."""
    args, config = common.begin(arg, model="resnet8", width=8)
    config.nets.net = common.net(args.model, width=args.width)
    stages = dict(
        train=common.train_by_recipe(args, dict(net=dict(ce=common.ce()))),
        evaluate=common.evaluate(net="float"),
    )
    return common.finish(config, stages)
