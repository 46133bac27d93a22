"""Born-again networks (Furlanello et al. 2018, arXiv 1805.04770): a net teaches its own successor.

    python launch.py --config=configs/born_again.py:generations=3 --workdir=runs/born_again

Generation 0 learns from labels; every later one, of the same size and from fresh weights, from
labels and from the generation before it. The rows show each generation and, as the paper's last
step, the ensemble of all of them: the mean of their probabilities.
"""

from configs import arguments, common


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below."""
    args = arguments.parse(
        arg,
        data="digits",
        model="resnet8",
        width=8,
        generations=3,
        temperature=1.0,
        kd_weight=0.5,
        seed=0,
        train_examples=-1,
        epochs=0.0,
    )
    if args.generations < 1:
        raise ValueError(f"generations is {args.generations}; at least 1 must follow the first.")
    config = common.frame(data=args.data, seed=args.seed, train_examples=args.train_examples)
    recipe = common.recipe(args.data)
    names = [f"generation{k}" for k in range(args.generations + 1)]
    for place, name in enumerate(names):
        config.nets[name] = common.net(args.model, width=args.width)
        learn = dict(ce=common.ce())
        if place:
            kd = common.kd(names[place - 1], args.kd_weight, temperature=args.temperature)
            learn = dict(ce=common.ce(1.0 - args.kd_weight), kd=kd)
        config.stages[f"train_{name}"] = common.train(
            learn={name: learn},
            optim={name: common.sgd(0.1, weight_decay=5e-4)},
            epochs=args.epochs or recipe["epochs"],
            batch_size=recipe["batch_size"],
        )
    config.stages.evaluate = common.evaluate(
        **{name: "born again" if place else "labels" for place, name in enumerate(names)}
    )
    config.stages.evaluate["ensembles"] = dict(ensemble=tuple(names))
    config.schedule = (*(f"train_{name}" for name in names), "evaluate")
    return config.lock()
