"""The plan of a sweep against what its folder holds."""

import pytest
from tiny_config import get_config

from qkd_jax.experiment.sweep_list import Entry
from qkd_jax.experiment.sweep_plan import plan_runs
from qkd_jax.record.folder import RunFolder

TWO = [Entry("a", {}), Entry("b", {"seed": 1})]


def config_of(entry, rate=0.05, every=0.0):
    config = get_config(f"seed={entry.overrides.get('seed', 0)}").unlock()
    config.stages.tutor.optim.student.lr = rate
    config.checkpoint.every_seconds = every
    return config.lock()


def test_a_folder_with_runs_of_the_config_as_it_was_is_refused(tmp_path):
    before = plan_runs(TWO, config_of, folder=tmp_path)
    done = RunFolder(tmp_path / "b")
    done.write_config(before[1].config)
    done.write_results({})
    # The file's get_config was edited, and no override says so.
    edited = lambda entry: config_of(entry, rate=0.01)
    with pytest.raises(ValueError, match="run 'b' of the sweep") as error:
        plan_runs(TWO, edited, folder=tmp_path)
    assert "stages.tutor.optim.student.lr: 0.05 in the folder, 0.01 now" in str(error.value)
    assert len(plan_runs(TWO, edited, folder=tmp_path, only_look=True)) == 2
    # How often a run saves reaches no number.
    assert len(plan_runs(TWO, lambda entry: config_of(entry, every=9.0), folder=tmp_path)) == 2
