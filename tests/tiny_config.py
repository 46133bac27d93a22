"""QKD in seconds: MLPs on synthetic images. Used by the tests of the run as a whole."""

from configs import arguments, common, sweeps

SWEEP = dict(seeds=2)


def get_sweep(arg=""):
    """Returns the runs of some seeds."""
    args, others = sweeps.split(arg, SWEEP)
    return sweeps.grid(seed=sweeps.seeds(args.seeds, others))


def get_config(arg=""):
    """Returns the config. `steps` is the length of every arm."""
    args = arguments.parse(arg, seed=0, steps=8, deploy=False, save_steps=0)
    config = common.frame(data="synthetic", seed=args.seed, train_examples=96)
    config.eval_batch_size = 128
    config.data.augment = ("shift:1",)
    config.log.update(every_steps=3, eval_every_steps=4, quant_every_steps=4)
    config.checkpoint = dict(every_seconds=0.0, every_steps=args.save_steps)
    config.parallel.devices = 1

    tiny = dict(model="mlp", hidden=(12, 12), batch_norm=True)
    config.nets.teacher = dict(tiny, hidden=(24,))
    config.nets.teacher_before = dict(config.nets.teacher, init_from="teacher")
    config.nets.student = dict(tiny, rules="w4a4", init_from="")
    config.nets.qat_only = dict(tiny, rules="w4a4", init_from="student")

    def stage(steps, **losses):
        continues = losses.pop("continues", "")
        return dict(
            kind="train",
            epochs=0.0,
            steps=steps,
            batch_size=16,
            learn=losses,
            optim={
                net: common.sgd(
                    0.05, weight_decay=1e-4, continues=continues if net == "student" else ""
                )
                for net in losses
            },
        )

    ce, steps = dict(ce=common.ce()), args.steps
    taught = dict(ce=common.ce(), kd=common.kd("teacher"))
    stages = config.stages
    stages.pretrain_teacher = stage(steps, teacher=ce)
    stages.pretrain_student = stage(steps, student=ce)
    stages.evaluate_float = common.evaluate("teacher_before", teacher="float", student="float")
    stages.calibrate = common.calibrate("student")
    stages.qat_only = stage(steps, qat_only=ce)
    stages.self_study = stage(steps // 4, student=ce)
    stages.co_study = stage(
        steps // 2,
        student=taught,
        teacher=dict(ce=common.ce(), kd=common.kd("student")),
        continues="self_study",
    )
    stages.tutor = stage(steps // 4, student=taught, continues="co_study")
    stages.reestimate_bn = common.reestimate_bn("student")
    stages.evaluate = common.evaluate(
        "teacher_before", qat_only="QAT alone", student="QKD", teacher="after co-studying"
    )
    stages.deploy = common.deploy("student")
    stages.deploy.latency_rounds = 2
    config.schedule = (
        "pretrain_teacher",
        "pretrain_student",
        "evaluate_float",
        "calibrate",
        "qat_only",
        "self_study",
        "co_study",
        "tutor",
        "reestimate_bn",
        "evaluate",
        *(("deploy",) if args.deploy else ()),
    )
    return config.lock()
