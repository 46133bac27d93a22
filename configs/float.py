"""A float net from labels alone: the baseline of every other config.

    python launch.py --config=configs/float.py:model=resnet8,width=8 --workdir=runs/float

Expect, on the digits: 10 s on two cores of an AMD EPYC beside other work; 96.86 +- 1.01 % top-1 (3
seeds).
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below."""
    args, config = common.begin(arg, model="resnet8", width=8)
    config.nets.net = common.net(args.model, width=args.width)
    stages = dict(
        train=common.train_by_recipe(args, dict(net=dict(ce=common.ce()))),
        evaluate=common.evaluate(net="float"),
    )
    return common.finish(config, stages)
