"""Weight-only quantization of a trained float net: a smaller file, the same float products.

    python launch.py --config=configs/weight_only.py --workdir=runs/int8
    python launch.py --config=configs/weight_only.py:model=mlp,width=0,rules=int4_weight_only:8

Weights with a scale a group (int4) run fake-quantized and are not exported.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `rules` is int<k>_weight_only, or int<k>_weight_only:<group size>, which must divide the
    contraction of every layer; `init_from` a trained net (see `common.net`) in place of training
    one.
    """
    args = arguments.parse(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        rules="int8_weight_only",
        seed=0,
        train_examples=-1,
        epochs=0.0,
        init_from="",
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    config.nets.float = common.net(args.model, width=args.width, init_from=args.init_from)
    config.nets.net = common.net(args.model, width=args.width, rules=args.rules, init_from="float")
    config.stages.pretrain = common.pretrain("float", data=args.data, epochs=args.epochs)
    # The weights' scales; of the images only the shape is used.
    config.stages.calibrate = dict(common.calibrate("net"), examples=1)
    config.stages.evaluate = common.evaluate("float", float="float", net="weight only")
    config.stages.diagnose = common.diagnose("net")
    config.stages.deploy = common.deploy("net")
    group = args.rules.partition(":")[2]
    grouped = group.isdigit() or args.rules == "int4_weight_only"
    config.schedule = (
        *(() if args.init_from else ("pretrain",)),  # a net from elsewhere is trained already
        "calibrate",
        "evaluate",
        "diagnose",
        *(() if grouped else ("deploy",)),
    )
    return config.lock()
