"""Static quantization of a trained float net: ranges from calibration data, no training.

    python launch.py --config=configs/static.py --workdir=runs/static
    python launch.py --config=configs/static.py:bits=w4a8,observer=entropy --workdir=runs/w4a8

BatchNorm is folded first. `configs/ptq.py` goes on from here: equalization, bias correction and
learned rounding.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `granularity` is that of the weights: "channel", "tensor" or a group size (which is not
    exported); `init_from` a trained net (see `common.net`) in place of training one.
    """
    args = arguments.parse(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        bits="w8a8",
        granularity="channel",
        observer="mse",
        seed=0,
        train_examples=-1,
        epochs=0.0,
        reduce_range=False,
        init_from="",
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    rules = f"{args.bits}:static:{args.granularity}"
    config.nets.float = common.net(args.model, width=args.width, init_from=args.init_from)
    config.nets.net = common.net(
        args.model,
        width=args.width,
        rules=rules,
        reduce_range=args.reduce_range,
        init_from="float",
    )
    config.stages.pretrain = common.pretrain("float", data=args.data, epochs=args.epochs)
    config.stages.fold = dict(kind="fold_bn", nets=("net",))
    config.stages.calibrate = dict(common.calibrate("net"), observer=args.observer)
    config.stages.evaluate = common.evaluate("float", float="float", net="static")
    config.stages.diagnose = common.diagnose("net")
    config.stages.deploy = common.deploy("net")
    config.schedule = (
        *(() if args.init_from else ("pretrain",)),  # a net from elsewhere is trained already
        "fold",
        "calibrate",
        "evaluate",
        "diagnose",
        "deploy",
    )
    return config.lock()
