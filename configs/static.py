"""Static quantization of a trained float net: ranges from calibration data, no training.

    python launch.py --config=configs/static.py --workdir=runs/static
    python launch.py --config=configs/static.py:bits=w4a8,observer=entropy --workdir=runs/w4a8

BatchNorm is folded first. `configs/ptq.py` has what comes after: equalization, bias correction,
learned rounding.

Expect, on the digits, seed 0: 46 s on two cores of an AMD EPYC beside other work; W8A8 97.93 %
top-1, the float net 97.86. The spread over seeds was not measured.
"""

from configs import common, experiments


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `granularity` is that of the weights: "channel", "tensor" or a group size (which is not
    exported); `init_from` a trained net (see `common.net`) in place of training one.
    """
    args, config = common.begin(
        arg,
        model="resnet8",
        width=8,
        bits="w8a8",
        granularity="channel",
        observer="mse",
        reduce_range=False,
        init_from="",
    )
    return experiments.without_training(
        config,
        args,
        f"{args.bits}:static:{args.granularity}",
        "static",
        calibration=common.calibrate("net", observer=args.observer),
        fold=True,
        reduce_range=args.reduce_range,
    )
