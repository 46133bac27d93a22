"""Quantization-aware training from labels alone: float, calibrate, fine-tune, deploy.

python launch.py --config=configs/qat.py:bits=w4a4 --workdir=runs/qat
"""

from configs import common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below."""
    args = common.parse_arg(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        bits="w2a2",
        seed=0,
        train_examples=-1,
        epochs=0.0,
        reduce_range=False,
        init_from="",
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)

    def stage(optim):
        return common.train(
            learn=dict(net=dict(ce=common.ce())),
            optim=dict(net=optim),
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
        )

    config.nets.net = common.net(
        args.model,
        width=args.width,
        rules=args.bits,
        reduce_range=args.reduce_range,
        init_from=args.init_from,
    )
    config.stages.pretrain = stage(common.sgd(0.1, weight_decay=5e-4))
    config.stages.evaluate_float = common.evaluate(net="float")
    config.stages.calibrate = common.calibrate("net")
    config.stages.evaluate_calibrated = common.evaluate(net="calibrated")
    config.stages.qat = stage(common.sgd(0.05, weight_decay=1e-4))
    config.stages.reestimate_bn = common.reestimate_bn("net")
    config.stages.evaluate = common.evaluate(net="QAT")
    config.stages.deploy = common.deploy("net")
    config.schedule = (
        *(() if args.init_from else ("pretrain",)),  # a net from elsewhere is trained already
        "evaluate_float",
        "calibrate",
        "evaluate_calibrated",
        "qat",
        "reestimate_bn",
        "evaluate",
        "deploy",
    )
    return config.lock()
