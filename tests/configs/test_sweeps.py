"""Sweeps of the configs: names, arguments, and what their runs are."""

import importlib
import pathlib

import pytest

from configs import kd_table, sweeps
from qkd_jax.experiment import read
from qkd_jax.experiment.sweep_list import base_of, command_of, entries_of

ROOT = pathlib.Path(__file__).parents[2]
SWEPT = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if "\ndef get_sweep(" in p.read_text()
)


def runs(name, arg=""):
    """{run: arguments of `get_config`} of a config's sweep."""
    module = importlib.import_module(f"configs.{name}")
    base = base_of(f"configs/{name}.py:{arg}", module.SWEEP)
    entries = entries_of(module.get_sweep(arg), {})
    return {e.name: command_of(base, e)[0].partition(":")[2] for e in entries}


@pytest.mark.parametrize("name", SWEPT)
def test_every_run_of_every_sweep_has_a_config(name):
    module = importlib.import_module(f"configs.{name}")
    found = runs(name, "seeds=2")
    configs = [module.get_config(arguments) for arguments in found.values()]
    assert [config.seed for config in configs].count(1) == len(configs) / 2
    read(configs[-1])


def test_arguments_of_a_sweep_and_of_its_runs_lie_in_one_text():
    assert runs("qkd", "seeds=2,bits=w4a4,seed=5") == {
        "seed-5": "bits=w4a4,seed=5",
        "seed-6": "bits=w4a4,seed=6",
    }
    assert runs("kd", "seeds=1,temperatures=1+4,weights=0.5") == {
        "temperature-1_kd_weight-0-5_seed-0": "temperature=1,kd_weight=0.5,seed=0",
        "temperature-4_kd_weight-0-5_seed-0": "temperature=4,kd_weight=0.5,seed=0",
    }
    assert list(runs("qat", "seeds=2,quantizers=lsq+ternary,widths=w2a2")) == [
        "bits-w2a2-lsq_seed-0",
        "bits-w2a4-ternary_seed-0",  # the width that it has
        "bits-w2a2-lsq_seed-1",
        "bits-w2a4-ternary_seed-1",
    ]
    assert list(runs("ptq", "seeds=1,widths=w8a8")) == ["bits-w8a8_seed-0"]
    assert len(runs("qat_table")) == 3 * (12 * 3 + 1 + 1 + 3)
    with pytest.raises(ValueError, match="must be an integer"):
        runs("qkd", "seeds=many")
    with pytest.raises(ValueError, match="loss is 'nothing'"):
        kd_table.get_config("loss=nothing")


def test_a_grid_is_a_product_whose_last_name_varies_fastest():
    fields = {"config.stages.qat.epochs": (1, 2)}
    assert sweeps.grid(loss=["kd", "rkd"], **fields) == [
        ("loss-kd_epochs-1", {"loss": "kd", "config.stages.qat.epochs": 1}),
        ("loss-kd_epochs-2", {"loss": "kd", "config.stages.qat.epochs": 2}),
        ("loss-rkd_epochs-1", {"loss": "rkd", "config.stages.qat.epochs": 1}),
        ("loss-rkd_epochs-2", {"loss": "rkd", "config.stages.qat.epochs": 2}),
    ]


def test_the_rows_of_the_distillation_table():
    """The control and the two of QKD: which nets learn from what, in which order."""

    def learn(loss):
        text = f"loss={loss},bits=w2a2,teachers=t/s{{seed}},students=s/s{{seed}},seed=2"
        config = kd_table.get_config(text)
        assert config.nets.teacher.init_from == "t/s2#net"
        trained = [s for s in config.schedule if config.stages[s].kind == "train"]
        return {s: {n: sorted(r) for n, r in config.stages[s].learn.items()} for s in trained}

    assert learn("kd") == {"distil": {"student": ["ce", "kd"]}}
    assert learn("labels_alone") == {"distil": {"student": ["ce"]}}
    both = {"student": ["ce", "kd"], "teacher": ["ce", "kd"]}
    assert learn("QKD") == {
        "self_study": {"student": ["ce"]},
        "co_study": both,
        "tutor": {"student": ["ce", "kd"]},
    }
    assert learn("QKD_fixed_teacher") == {"qat_fixed_teacher": {"qat_fixed_teacher": ["ce", "kd"]}}
