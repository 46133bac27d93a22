"""A float net from labels alone: the baseline of every other config.

python launch.py --config=configs/float.py:data=digits,model=resnet8,width=8 --workdir=runs/float
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below."""
    args = arguments.parse(
        arg, data="digits", model="resnet8", width=8, seed=0, train_examples=-1, epochs=0.0
    )
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)

    config.nets.net = common.net(args.model, width=args.width)
    config.stages.train = common.train(
        learn=dict(net=dict(ce=common.ce())),
        optim=dict(net=common.sgd(0.1, weight_decay=5e-4)),
        epochs=args.epochs or recipe["epochs"],
        batch_size=recipe["batch_size"],
    )
    config.stages.evaluate = common.evaluate(net="float")
    config.schedule = ("train", "evaluate")
    return config.lock()
