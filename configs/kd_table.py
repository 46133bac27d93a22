"""One student by every loss with a published recipe, at equal budgets: a table of results.md.

    python launch.py --sweep --workdir=runs/resnet20 --config=configs/float.py:seeds=3,\
data=fashion_mnist,model=resnet20,width=8,train_examples=10000,epochs=10
    python launch.py --sweep --workdir=runs/kd \
        --config=configs/kd_table.py:teachers=runs/resnet20/seed-{seed}

A run is the student's part of `configs/feature_kd.py` from a trained teacher. Seeds come one after
another, so that an unfinished table has equal seeds in most rows. Losses of several teachers are
left out. With `bits=w2a2` the students of `students` are quantized and learn again. Beside the
losses there are `labels_alone`, the control; `QKD`, the three phases of `configs/qkd.py`, the
teacher learning in the second; and `QKD_fixed_teacher`, its control with the same terms and steps.
Without `teachers` and `students` these nets are trained here, once for all losses of a seed.
"""

from configs import common, experiments, feature_kd, qkd, sweeps, terms

ALONE, QKD, FIXED = "labels_alone", "QKD", "QKD_fixed_teacher"
METHODS = {ALONE: "labels alone", FIXED: "QKD's terms with a fixed teacher"}
# `losses` is "+"-separated; "all" is `labels_alone` and all losses, without the two of QKD.
SWEEP = dict(seeds=3, losses="all")


def get_sweep(arg=""):
    """Returns a run for each loss and seed."""
    args, others = sweeps.split(arg, SWEEP)
    of_one = [name for name in terms.published() if not terms.entry(name).has_several_teachers]
    runs = [dict(loss=loss) for loss in sweeps.chosen(args.losses, [ALONE, *of_one])]
    return sweeps.with_seeds(runs, sweeps.seeds(args.seeds, others))


def get_config(arg=""):
    """Returns the config; its arguments are the defaults below.

    `teachers` and `students` are folders of float nets' runs; `{seed}` in them stands for the seed.
    """
    args, _ = common.begin(
        arg,
        data="fashion_mnist",
        train_examples=10_000,
        epochs=3.0,
        loss="kd",
        teacher="resnet20",
        teacher_width=8,
        student="resnet8",
        student_width=8,
        bits="float",
        teachers="",
        students="",
    )
    given = dict(args.items())
    teachers, students, loss = (given.pop(name) for name in ("teachers", "students", "loss"))
    if teachers:
        given["teacher_from"] = experiments.net_of_seed(teachers, args.seed)
    if students and loss != "simkd":  # it trains a net with the teacher's head
        given["init_from"] = experiments.net_of_seed(students, args.seed)
    if loss in (QKD, FIXED):
        return _qkd(given, fixed=loss == FIXED)
    return _distil(given | dict(loss="kd" if loss == ALONE else loss), alone=loss == ALONE)


def _distil(given, *, alone):
    """`configs/feature_kd.py` without its control, or with labels alone in the student's place."""
    config = experiments.for_table(feature_kd, given).unlock()
    if alone:
        # Its weights are drawn as the students' of the other runs are: by the net's name.
        config.stages.distil.learn = {"student": dict(ce=common.ce())}
        config.stages.evaluate.methods["student"] = METHODS[ALONE]
    config.schedule = tuple(s for s in config.schedule if s != "alone")
    # The teacher of a seed is looked at in one of its runs.
    left_out = ("alone",) if alone else ("alone", "teacher")
    for stage in config.stages.values():
        if "nets" in stage and stage.kind in ("evaluate", "calibrate", "reestimate_bn"):
            stage.nets = tuple(n for n in stage.nets if n not in left_out)
        if stage.kind == "evaluate":
            stage.methods = {n: m for n, m in stage.methods.items() if n not in left_out}
            if "teacher" in left_out:
                stage.reference = ""
    return config.lock()


def _qkd(given, *, fixed):
    """`configs/qkd.py` from the same nets: the student, or its control with a fixed teacher."""
    config = experiments.for_table(qkd, given).unlock()
    controls = ("qat_only", "qat_fixed_teacher", "reestimate_bn_controls", "evaluate_controls")
    if fixed:
        pretrained = [s for s in config.schedule if s.startswith("pretrain_")]
        kept = (*pretrained, "evaluate_float", "calibrate", *controls[1:])
        config.stages.reestimate_bn_controls.nets = ("qat_fixed_teacher",)
        config.stages.evaluate_controls.nets = ("qat_fixed_teacher",)
        config.stages.evaluate_controls.methods = {"qat_fixed_teacher": METHODS[FIXED]}
    else:
        kept = tuple(s for s in config.schedule if s not in controls)
    config.schedule = kept
    return config.lock()
