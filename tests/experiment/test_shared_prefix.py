"""What the key of a prefix depends on, and that a net's rules do not count while it is float."""

import jax
import numpy as np
import pytest
from tiny_config import get_config

from qkd_jax import weights
from qkd_jax.experiment.settings import resolve
from qkd_jax.experiment.shared_prefix import branch_points, prefix_keys
from qkd_jax.experiment.sweep_list import Entry
from qkd_jax.experiment.sweep_plan import plan_runs
from qkd_jax.models import create
from qkd_jax.quantize import presets, quantize
from qkd_jax.quantizers import QUANTIZERS
from qkd_jax.record.json_files import write_json

SCHEDULE = list(get_config().schedule)


def keys_of(fingerprint="data", **fields):
    config = get_config().unlock()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    (run,) = plan_runs([Entry("run", {})], lambda entry: config)
    return prefix_keys(run.config, run.stages, fingerprint)


@pytest.mark.parametrize(
    ("first", "fields"),
    [
        ("pretrain_teacher", dict(seed=4)),
        ("pretrain_teacher", dict(fingerprint="others")),
        ("pretrain_teacher", dict(data__train_examples=80)),
        ("pretrain_teacher", dict(data__augment=("shift:2",))),
        ("pretrain_teacher", dict(log__every_steps=4)),
        ("pretrain_student", dict(stages__pretrain_student__steps=9)),
        ("pretrain_student", dict(stages__pretrain_student__optim__student__lr=0.01)),
        ("pretrain_student", dict(nets__student__hidden=(12, 13))),
        ("qat_only", dict(nets__qat_only__rules="w3a3")),
        # Whether a net has the rules of the one that it copies counts when it copies.
        ("calibrate", dict(nets__student__rules="w3a3")),
        # `self_study` begins a cosine that runs to the end of `tutor`.
        ("self_study", dict(stages__tutor__steps=3)),
        ("tutor", dict(stages__tutor__optim__student__lr=0.01)),
        ("", dict(checkpoint__every_steps=7)),
    ],
)
def test_a_key_changes_from_the_first_stage_on_that_depends_on_a_field(first, fields):
    base, other = keys_of(), keys_of(**fields)
    same = SCHEDULE.index(first) if first else len(SCHEDULE)
    assert base[:same] == other[:same] and set(base[same:]).isdisjoint(other)


def test_weights_count_by_their_content_and_what_is_gone_is_equal_to_nothing(tmp_path):
    variables = {"params": {"dense0": {"kernel": np.ones((2, 3), np.float32)}}}
    files = [tmp_path / f"{name}.npz" for name in ("a", "b", "c", "gone")]
    for file in files[:2]:
        weights.save(file, variables)
    variables["params"]["dense0"]["kernel"] += 1
    weights.save(files[2], variables)
    (tmp_path / "run").mkdir()

    def keys(file):
        config = get_config().unlock()
        config.nets.student.init_from = str(file)
        # It has begun: files are not asked for.
        write_json(tmp_path / "run" / "config.json", resolve(config))
        (run,) = plan_runs([Entry("run", {})], lambda entry: config, folder=tmp_path)
        return prefix_keys(run.config, run.stages, "data")

    teacher = SCHEDULE.index("pretrain_student")
    a, b, c, gone, again = map(keys, [*files, files[-1]])
    assert a == b and a[:teacher] == c[:teacher] == gone[:teacher]
    others = [set(found[teacher:]) for found in (a, c, gone, again)]
    assert len(set.union(*others)) == sum(map(len, others))


@pytest.mark.parametrize("train", [False, True])
def test_a_float_net_is_one_program_whatever_its_rules(train):
    """The keys leave rules out while a net is float; here for every quantizer of the table."""
    model, images = create("resnet8", 10, width=4), np.zeros((2, 8, 8, 1), np.float32)
    plain = quantize(model)
    variables = jax.eval_shape(plain.init, jax.random.key(0), images)

    def program(net):
        mutable = ["batch_stats"] if train else False
        return str(
            jax.make_jaxpr(lambda v, x: net.apply(v, x, train=train, mutable=mutable))(
                variables, images
            )
        )

    wanted = program(plain)
    assert wanted.count("conv_general_dilated") > 5
    bits = {"ternary": "w2a4", "binary": "w1a4", "float": "w8a8"}
    for name in QUANTIZERS:
        rules = presets.rules(
            f"{bits.get(name, 'w4a4')}:{name}", model=model, images=images, train=False
        )
        assert rules and program(quantize(model, rules)) == wanted, name


def test_runs_are_kept_where_they_part():
    class Stage:
        def __init__(self, kind):
            self.kind = kind

    kinds = [Stage(kind) for kind in ("evaluate", "train", "train", "train")]
    keys = {"a": "EABC", "b": "EABD", "c": "EAX", "d": "EY", "e": "EABC"}
    points = branch_points(keys, {name: kinds for name in keys})
    # By hand: behind E (evaluation alone, not kept) d leaves, behind A c, behind B b.
    assert points == {
        "a": [(2, "A"), (3, "B"), (4, "C")],
        "b": [(2, "A"), (3, "B")],
        "c": [(2, "A")],
        "d": [],
        "e": [(2, "A"), (3, "B"), (4, "C")],
    }
