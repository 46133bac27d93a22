"""Dynamic quantization of a trained float net: weights ahead of time, input ranges at run time.

    python launch.py --config=configs/dynamic.py --workdir=runs/dynamic

Every row of an input (every example, for a convolution) has its own range, so no calibration data
decide anything. The integer model finds the same ranges, and so do the ONNX file's own operations.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `granularity` is that of the weights: "channel", "tensor" or a group size (which is not
    deployed); `init_from` a trained net (see `common.net`) in place of training one.
    """
    args = arguments.parse(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        bits="w8a8",
        granularity="channel",
        seed=0,
        train_examples=-1,
        epochs=0.0,
        init_from="",
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    rules = f"{args.bits}:dynamic:{args.granularity}"
    config.nets.float = common.net(args.model, width=args.width, init_from=args.init_from)
    config.nets.net = common.net(args.model, width=args.width, rules=rules, init_from="float")
    config.stages.pretrain = common.pretrain("float", data=args.data, epochs=args.epochs)
    # The weights' scales; of the images only the shape is used.
    config.stages.calibrate = dict(common.calibrate("net"), examples=1)
    config.stages.evaluate = common.evaluate("float", float="float", net="dynamic")
    config.stages.diagnose = common.diagnose("net")
    config.stages.deploy = common.deploy("net")
    grouped = str(args.granularity).isdigit()
    config.schedule = (
        *(() if args.init_from else ("pretrain",)),  # a net from elsewhere is trained already
        "calibrate",
        "evaluate",
        "diagnose",
        *(() if grouped else ("deploy",)),
    )
    return config.lock()
