"""Every config loads in a moment, checks, and can be inspected; arguments and names are checked."""

import dataclasses
import importlib
import pathlib
import subprocess
import sys

import pytest

from configs import arguments, common, data_free, qkd, terms
from qkd_jax import experiment
from qkd_jax.data import DATASETS
from qkd_jax.experiment import settings
from qkd_jax.quantize import presets
from qkd_jax.training.hygiene import HYGIENE_FIELDS
from qkd_jax.training.optim import OPTIM_FIELDS

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if "\ndef get_config(" in p.read_text()
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_can_be_inspected(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    text = experiment.inspect(config, verbose=False)
    for stage in config.schedule:
        assert stage in text
    for net in config.nets:
        assert f"{net}: " in text
    assert config.is_locked


@pytest.mark.parametrize("name", CONFIGS)
def test_no_field_is_none(name):
    """A None cannot be overridden on the command line."""
    config = importlib.import_module(f"configs.{name}").get_config()

    def walk(tree, path=""):
        for key, value in tree.items():
            assert value is not None, f"{path}.{key}"
            if hasattr(value, "items"):
                walk(value, f"{path}.{key}")

    walk(config)


def test_every_config_file_loads_without_jax():
    """`get_config` reads the tables of data sets and losses; what is before it stays quick."""
    lines = ["import sys", *(f"import configs.{n}" for n in CONFIGS), "print('jax' in sys.modules)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", CONFIGS)
def test_no_two_fields_are_one(name):
    """A ConfigDict makes one field of a dict in two places; an override would reach both."""
    seen = {}

    def walk(tree, path=""):
        for key, value in tree.items():
            if hasattr(value, "items"):
                assert id(value) not in seen, f"{path}.{key} is {seen[id(value)]}"
                seen[id(value)] = f"{path}.{key}"
                walk(value, f"{path}.{key}")

    walk(importlib.import_module(f"configs.{name}").get_config())


# Where a config says something else than the library on purpose: what the library leaves alone
# when nothing is said, or what a config spells in the words of the command line.
SPELLED = {
    "sgd": {"quant_lr": -1.0, "clip_norm": 0.0, "continues": ""},  # the library's None
    "frame": {"log.eval_every_steps": 100, "log.quant_every_steps": 20},  # curves for the report
    "evaluate": {"ensembles": {}},
    "train": {"hygiene": {"net": common.HYGIENE}},  # all of it off
}


def helpers():
    """(name, fields of a config's helper, the library's defaults)."""
    nets, examples = ("net",), dict(examples=256)
    stages = {
        "train": common.train(learn={"net": {}}, optim={}, epochs=0.0, batch_size=128),
        "calibrate": common.calibrate("net"),
        "synthesize": data_free.synthesize("net", **examples),
        "dafl": data_free.dafl("net", **examples),
        "cmi": data_free.cmi("net", **examples),
        "diagnose": common.diagnose("net"),
        "reestimate_bn": common.reestimate_bn("net"),
        "evaluate": common.evaluate(net="float"),
        "deploy": common.deploy("net"),
    }
    for kind, fields in stages.items():
        given = fields.get("nets", nets), fields.pop("kind")
        assert given == (nets, kind)
        yield kind, fields, experiment.STAGES[kind].defaults
    yield "sgd", common.sgd(0.1, weight_decay=0.0), OPTIM_FIELDS | dict(lr=0.1)
    yield "hygiene", common.hygiene(), HYGIENE_FIELDS
    frame = common.frame(data="synthetic", seed=0, train_examples=0).to_dict()
    nested = {key: value for key, value in frame.items() if key not in settings.STRUCTURE}
    yield "frame", flat(nested), flat(settings.DEFAULTS) | {"data.name": "synthetic"}


def flat(tree, prefix=""):
    if not hasattr(tree, "items"):
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def test_defaults_of_configs_are_those_of_the_library():
    compared = set()
    for name, fields, defaults in helpers():
        shared = set(fields) & set(defaults)
        assert shared, name
        spelled = SPELLED.get(name, {})
        assert set(spelled) <= shared
        for field in shared:
            assert fields[field] == spelled.get(field, defaults[field]), f"{name}.{field}"
        compared |= {f"{name}.{field}" for field in shared}
    assert len(compared) > 90


def test_a_data_set_without_a_recipe_is_refused(monkeypatch):
    bare = dataclasses.replace(DATASETS["cifar10"], recipe=None)
    monkeypatch.setitem(DATASETS, "bare", bare)
    with pytest.raises(ValueError, match=r"'bare' has no recipe.*recipe=Recipe\(.*cifar10"):
        qkd.get_config("data=bare")
    with pytest.raises(ValueError, match=r"unknown data set 'digit'.*Did you mean 'digits'"):
        qkd.get_config("data=digit")


# --- arguments ---------------------------------------------------------------------------------


def test_arguments_types_by_defaults():
    args = arguments.parse(
        "seed=3, lr=1e-2,flag,data=mnist,other=no", seed=0, lr=0.1, flag=False, data="x", other=True
    )
    assert args.to_dict() == dict(seed=3, lr=0.01, flag=True, data="mnist", other=False)
    assert arguments.parse("", seed=1).seed == arguments.parse(None, seed=1).seed == 1


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("sed=1", "Did you mean 'seed'"),
        ("seed=1.5", "must be an integer"),
        ("lr=fast", "must be a number"),
        ("seed", "has no value"),
        ("seed=", "has no value"),
        ("flag=maybe", "true or false"),
        ("seed=1,seed=2", "given twice"),
    ],
)
def test_arguments_says_what_is_wrong(arg, message):
    with pytest.raises(ValueError, match=message):
        arguments.parse(arg, seed=0, lr=0.1, flag=False)


def test_qkd_arguments_reach_the_nets():
    config = qkd.get_config(
        "data=fashion_mnist,student=resnet8,teacher=resnet20,bits=w4a4,seed=1,train_examples=1000"
    )
    assert config.nets.teacher.model == "resnet20" and config.nets.student.rules == "w4a4"
    assert config.seed == 1 and config.data.train_examples == 1000
    assert config.stages.qat_only.batch_size == 128


def test_qkd_controls_take_the_students_steps():
    for arg in ("", "epochs=7", "train_examples=123,epochs=3"):
        found = experiment.read(qkd.get_config(arg))
        steps = {s.name: s.steps for s in found.stages}
        phases = ("self_study", "co_study", "tutor")
        assert steps["qat_only"] == steps["qat_fixed_teacher"] == sum(steps[p] for p in phases)


def test_phases_share_one_schedule():
    found = {s.name: s for s in experiment.read(qkd.get_config()).stages}
    total = found["qat_only"].steps
    for phase in ("self_study", "co_study", "tutor"):
        assert found[phase].horizons["student"] == total
    assert found["co_study"].starts == {
        "student": found["self_study"].steps,
        "teacher": 0,
    }
    assert found["self_study"].continued == ("student",) and found["tutor"].continued == ()
    assert found["co_study"].horizons["teacher"] == found["co_study"].steps


def test_published_courses_run_once_over_the_phases():
    """30 and 20 of 240 epochs: of all steps, wherever phases end."""
    rows = qkd.get_config("loss=fsp").stages
    assert rows.co_study.learn.student.fsp.end == pytest.approx(30 / 240 / 0.5)
    assert rows.co_study.learn.student.ce.start == rows.co_study.learn.student.fsp.end
    assert rows.co_study.learn.teacher.fsp.end == rows.co_study.learn.student.fsp.end
    assert set(rows.tutor.learn.student) == {"ce"} and rows.tutor.learn.student.ce.start == 0
    assert rows.qat_fixed_teacher.learn.qat_fixed_teacher.fsp.end == 30 / 240
    rows = qkd.get_config("loss=ft").stages
    assert rows.co_study.learn.student.ft.start == pytest.approx(0.25)
    assert rows.tutor.learn.student.ft.start == 0
    rows = qkd.get_config("loss=dkd").stages
    assert rows.co_study.learn.student.dkd.warmup == pytest.approx(20 / 240 / 0.5)
    assert rows.tutor.learn.student.dkd.warmup == 0
    rows = qkd.get_config("loss=ctkd").stages
    assert rows.co_study.learn.student.ctkd.reversal.steps == pytest.approx(10 / 240 / 0.5)
    assert rows.tutor.learn.student.ctkd.reversal == 1.0
    for loss in ("fsp", "ft", "ctkd"):
        experiment.read(qkd.get_config(f"loss={loss}"))
    for part in (dict(share=0.1), dict(done=0.1, share=0.9)):
        with pytest.raises(ValueError, match=r"end of loss 'fsp' goes on until 0\.125 of the"):
            terms.learn("fsp", "teacher", **part)


def test_the_students_chain_decides_the_order_of_the_data():
    found = {s.name: s for s in experiment.read(qkd.get_config()).stages}
    assert found["co_study"].data_start == found["self_study"].steps
    assert found["tutor"].data_start == found["self_study"].steps + found["co_study"].steps
    assert found["qat_only"].data_start == 0


def test_every_row_is_compared_with_the_teacher_of_one_moment():
    config = qkd.get_config()
    references = {s.reference for s in config.stages.values() if s.kind == "evaluate"}
    assert references == {"teacher_before"}
    learning = [s.learn for s in config.stages.values() if s.kind == "train"]
    assert not any("teacher_before" in learn for learn in learning)


# --- names -------------------------------------------------------------------------------------


def changed(**changes):
    """The resolved QKD config with some dotted fields replaced."""
    config = settings.resolve(qkd.get_config())
    for path, value in changes.items():
        node = config
        *keys, last = path.split("__")
        for key in keys:
            node = node[key]
        node[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schedule", ["pretrain_teacher", "co_studdy"], "Did you mean 'co_study'"),
        ("schedule", ["self_study,co_study"], "is one string.*'self_study', 'co_study',"),
        ("schedule", [], "schedule is empty"),
        ("schedule", ["qat_only", "qat_only"], "twice"),
        ("schedule", ["tutor"], "it must be an earlier train stage"),
        ("data__name", "digit", "Did you mean 'digits'"),
        ("data__nam", "digits", "Did you mean 'name'"),
        ("sed", 1, "Did you mean 'seed'"),
        ("nets__student__model", "resnet9", "6n"),
        ("nets__student__model", "resnet8x", "Did you mean 'resnet8"),
        ("nets__student__widht", 3, "Did you mean 'width'"),
        ("nets__student__rules", "w2a", "Did you mean 'w2a2'"),
        ("nets__student__rules", "w40a2", "at most 8"),
        ("nets__student__rules", [{"patern": "x"}], "Did you mean 'pattern'"),
        ("nets__student__rules", [{"pattern": "x", "weight": {"bit": 2}}], "Did you mean 'bits'"),
        ("nets__qat_only__init_from", "studnt", "Did you mean 'student'"),
        ("stages__tutor__kind", "trian", "Did you mean 'train'"),
        ("stages__tutor__epoch", 3, "Did you mean 'epochs'"),
        ("stages__tutor__epochs", 0.0, "no step at all"),
        ("stages__tutor__batch_size", 0, "at least 1"),
        ("stages__calibrate__nets", ["studnt"], "Did you mean 'student'"),
        ("stages__tutor__accumulate", 7, "accumulate is 7, and batches of .* a multiple of"),
        ("stages__tutor__remat", "block", "Did you mean 'blocks'"),
        ("stages__tutor__compute", "float16", "compute is 'float16'; allowed"),
        ("stages__tutor__learn__student__kd__loss", "kdd", "Did you mean 'kd'"),
        ("stages__tutor__learn__student__kd__source", "techer", "Did you mean 'teacher'"),
        ("stages__tutor__learn__student__kd__temp", 1.0, "temperature"),
        ("stages__tutor__optim__student__name", "sdg", "Did you mean 'sgd'"),
        ("stages__tutor__optim__student__schedule", "cosin", "Did you mean 'cosine'"),
        ("stages__tutor__optim__student__lrr", 1.0, "Did you mean 'lr'"),
        ("stages__tutor__optim__student__continues", "co_studdy", "Did you mean 'co_study'"),
        ("stages__tutor__optim__student__continues", "pretrain_teacher", "does not learn there"),
        ("stages__tutor__optim__student__continues", "self_study", "continues already"),
        ("stages__calibrate__observer", "minmx", "Did you mean 'minmax'"),
        ("stages__calibrate__examples", -1, "at least 0"),
        ("stages__calibrate__nets", ["teacher"], "whose rules are float"),
        ("stages__reestimate_bn__keep", "beter", "Did you mean 'better'"),
        ("stages__reestimate_bn__examples", 0.5, "at least 0"),
        ("stages__evaluate__methods", {"studnt": "QKD"}, "Did you mean 'student'"),
        ("stages__deploy__target", "onnxruntime-x87", "Did you mean 'onnxruntime-x86'"),
        ("stages__deploy__latency_rounds", -1, "at least 0"),
        ("stages__deploy__latency_batches", [1, 0], r"latency_batches\[1\] is 0"),
        ("stages__deploy__latency_batches", 64, r"such as \(1, 64\)"),
        ("stages__deploy__nets", ["teacher"], "whose rules are float"),
        ("parallel__mode", "pmp", "Did you mean 'pmap'"),
        ("parallel__devices", 1000, "devices is 1000"),
        ("parallel__model", 3, r"config\.parallel: model is 3, which does not divide 4 devices"),
        (
            "parallel",
            {"mode": "pmap", "model": 2},
            r"config\.parallel: mode is 'pmap', which keeps",
        ),
        ("parallel__rules", "model", "it must be a tuple of"),
        ("parallel__rules", [[".*/kernel", ["modle"]]], "Did you mean 'model'"),
        (
            "parallel",
            {"model": 2, "rules": [["heat/kernel", ["model", ""]]]},
            "matches no array.*Did you mean 'head/kernel'",
        ),
        ("data__augment", ["shft:1"], "config.data.augment.*Did you mean 'shift'"),
        ("data__augment", "shift:1", "give a tuple"),
        ("data__train_examples", 5000, "train_examples of 'digits' is 5000"),
        ("data__train_examples", -1, "train_examples of 'digits' is -1"),
        ("data", 3, "config.data is 3; it must be a dict"),
        ("log__every_steps", -1, "config.log.every_steps is -1"),
        ("log__eval_every_steps", 0.5, "config.log.eval_every_steps"),
        ("checkpoint__every_seconds", -1.0, "config.checkpoint.every_seconds"),
        ("checkpoint__every_steps", -1, "config.checkpoint.every_steps"),
        ("nets__student__width", -8, "nets.student.width is -8"),
        ("nets__student", "resnet8", "nets.student is 'resnet8'; it must be a dict"),
        ("nets__student__rules", [{"pattern": "hed"}], r"nets.student: rules\[0\].*'head'"),
        ("nets__student__init_from", "student", "in a circle, student -> student"),
        ("nets__student__init_from", "qat_only", "circle, .*qat_only -> student|student -> qat"),
        ("stages__tutor", 3, "stages.tutor is 3; it must be a dict"),
        ("stages__tutor__learn__student", "ce", "learn.student is 'ce'; it must be a dict"),
        ("stages__tutor__learn__student__ce", 1.0, "student.ce is 1.0; it must be a dict"),
        ("stages__tutor__optim__student", None, "optim.student is None; it must be a dict"),
        ("stages__tutor__optim__student__lr", 0.0, "lr is 0.0; it must be greater than 0"),
        ("stages__tutor__optim__student__momentum", 1.0, "momentum is 1: "),
        ("stages__tutor__optim__student__b1", 1.5, "b1 is 1.5"),
        ("stages__co_study__optim__teacher__continues", "pretrain_teacher", "different places"),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(path, value, message):
    with pytest.raises(ValueError, match=message):
        experiment.read(changed(**{path: value}))


def test_values_that_are_not_data_are_refused():
    with pytest.raises(ValueError, match="plain data"):
        settings.resolve({"nets": {}, "stages": {}, "schedule": (), "seed": object()})
    with pytest.raises(ValueError, match="ConfigDict or a dict"):
        settings.resolve("configs/qkd.py")


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_every_preset_builds(name):
    rules = presets.rules(name)
    assert (rules == ()) == (name == "float")


def test_reduced_range_spares_the_low_bits():
    rules = presets.rules("w2a2", reduce_range=True)
    assert [r.weight.bits for r in rules] == [7, 7, 2]
    assert [r.input.bits for r in rules] == [8, 8, 2]
    assert presets.rules("w5a3")[-1].weight.bits == 5
    assert presets.rules("ternary")[-1].weight.format.qmin == -1


def test_qkd_starts_from_nets_that_are_trained():
    config = qkd.get_config("teacher_from=t.npz,init_from=s.npz")
    assert config.schedule[0] == "evaluate_float"
    assert "pretrain_teacher" not in config.stages
    assert "pretrain_student" not in config.stages
    assert config.nets.teacher.init_from == "t.npz"
    assert config.nets.student.init_from == "s.npz"
    assert qkd.get_config("init_from=s.npz").schedule[0] == "pretrain_teacher"


TRAINED_LOW = "assistant byot feature_kd multi_teacher mutual one patient ptq qat qkd"


@pytest.mark.parametrize("name", TRAINED_LOW.split())
def test_learned_steps_are_clamped_in_every_low_bit_recipe(name):
    config = importlib.import_module(f"configs.{name}").get_config("bits=w2a2")
    seen = set()
    for stage in config.stages.values():
        if stage.kind != "train":
            continue
        for net in stage.learn:
            low = stage.optim[net].lr == 0.05
            assert stage.hygiene[net].max_ratio == (8.0 if low else 0.0)
            seen.add(low)
            assert not low or config.nets[net].rules == "w2a2"
    assert True in seen
