"""Two runs are never mixed in one folder, and names stay inside of it."""

import hashlib
import json
import shutil
import subprocess

import jax
import pytest
from tiny_config import get_config

from qkd_jax import checks, experiment
from qkd_jax.experiment import origin
from qkd_jax.experiment.reading import read
from qkd_jax.record import environment
from qkd_jax.record.folder import FREE_FIELDS, config_fields
from qkd_jax.training.loop import Preempted


def config(steps=4, lr=0.05):
    made = get_config(f"steps={steps}")
    for stage in made.stages.values():
        for numbers in stage.get("optim", {}).values():
            numbers.lr = lr
    return made


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that stopped before its second stage."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.orchestrate.GracefulStop, "requested", True, raising=False)
        patch.setattr(
            experiment.orchestrate.GracefulStop, "__init__", lambda self: None, raising=False
        )
        patch.setattr(experiment.orchestrate.GracefulStop, "__enter__", lambda self: self)
        patch.setattr(experiment.orchestrate.GracefulStop, "__exit__", lambda self, *_: None)
        with pytest.raises(Preempted):
            experiment.run(config(), folder, report=False, verbose=False)
    return folder


@pytest.fixture
def run_folder(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def again(folder, **changes):
    return experiment.run(config(**changes), folder, report=False, verbose=False)


def test_without_its_config_a_run_goes_on_under_its_own_alone(run_folder):
    (run_folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing, and this config is not the"):
        again(run_folder, lr=0.01)
    assert not (run_folder / "config.json").exists(), "a refused start writes no config"
    again(run_folder)
    assert (run_folder / "config.json").exists() and (run_folder / "results.json").exists()


def test_a_config_beside_the_checkpoints_of_another_run(run_folder):
    plain = experiment.settings.resolve(config(lr=0.01))
    (run_folder / "config.json").write_text(json.dumps(plain))
    for use in (lambda: again(run_folder, lr=0.01), lambda: experiment.evaluate(run_folder)):
        with pytest.raises(ValueError, match=r"config\.json is not the one that they were made"):
            use()


def test_a_checkpoint_of_a_time_of_fewer_fields_is_read(tmp_path):
    written = {
        "seed": 3,
        "data": {"name": "digits", "dir": "somewhere"},
        "checkpoint": {"every_steps": 5},
        "parallel": {"mode": "jit", "devices": 2},
    }
    text = '{"data.name": "digits", "parallel.devices": 2, "parallel.mode": "jit", "seed": 3}'
    there = {"config": hashlib.sha256(text.encode()).hexdigest()}
    origin.check_written(there, written, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not the one that they were made"):
        origin.check_written(there, written | {"seed": 4}, tmp_path)


HERE = {"config": "a", "data": "b" * 64, "code": "rev1", "devices": 1}


def test_what_differs(tmp_path):
    for there in (HERE, None):
        origin.check_digest(there, "a", tmp_path, known=True)
        origin.check_data(there, HERE["data"], tmp_path)
        assert origin.changes(there, HERE) == {}
    with pytest.raises(ValueError, match=r"checkpoints but no config\.json"):
        origin.check_digest(None, "a", tmp_path, known=False)
    with pytest.raises(ValueError, match=r"run on other data \(fingerprint cccccccccccc"):
        origin.check_data({**HERE, "data": "c" * 64}, HERE["data"], tmp_path)
    changed = origin.changes({**HERE, "code": "rev0", "devices": 4}, HERE)
    assert changed == {"code": ["rev0", "rev1"], "devices": [4, 1]}
    first, second = origin.lines_of(changed)
    assert "rev0" in first and "rev1" in first and "made on 4, going on with 1" in second


def test_other_code_and_devices_are_said_and_recorded(run_folder, monkeypatch, capsys):
    asked = []

    def git(command, **_):
        asked.append(command[3])
        said = {"ls-files": "x", "status": "", "rev-parse": "another-revision"}[command[3]]
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(environment.subprocess, "run", git)
    experiment.restore(run_folder)
    assert asked == [], "reading a run needs no version of the code"
    experiment.run(config(), run_folder, report=False)
    assert asked.count("rev-parse") == 1, "a start asks git once"
    assert "going on with another-revision" in capsys.readouterr().out
    start = json.loads((run_folder / "run.json").read_text())["starts"][-1]
    assert start["changed"]["code"][1] == start["git"]["revision"] == "another-revision"


def test_free_fields_do_not_count(interrupted):
    plain = experiment.settings.resolve(config())
    fields = lambda **more: config_fields({**plain, **more}, ignore=FREE_FIELDS)
    assert fields(checkpoint={"every_seconds": 1.0}) == fields()
    assert fields(seed=1) != fields()


@pytest.mark.parametrize("name", ["../../../x", "my/net", "", ".", "..", "a b", "a\nb", "-x", "é"])
def test_names_that_are_paths(name, tmp_path):
    with pytest.raises(ValueError, match="it names files too"):
        checks.name("config.nets", name)
    made = config().to_dict()
    made["nets"][name] = made["nets"]["teacher"]
    with pytest.raises(ValueError, match=r"config\.nets has the name"):
        read(made)
    made = config().to_dict()
    made["stages"][name] = made["stages"]["tutor"]
    with pytest.raises(ValueError, match=r"config\.stages has the name"):
        read(made)
    made = config().to_dict()
    made["stages"]["tutor"]["learn"]["student"][name] = {"loss": "ce", "weight": 1.0}
    with pytest.raises(ValueError, match=r"learn\.student has the name"):
        experiment.run(made, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_names():
    for name in ("student", "teacher_2", "resnet-20", "1st", "x" * 64):
        checks.name("config.nets", name)


def test_numbers_of_absurd_size_and_depth():
    with pytest.raises(ValueError, match=r"config\.eval_batch_size is 1000000+; numbers"):
        read({**config().to_dict(), "eval_batch_size": 10**30})
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="nested too deep"):
        read({**config().to_dict(), "nets": deep})


def test_a_folder_that_cannot_be_made_ends_with_its_own_code(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = experiment.main("run", config=config(), workdir=tmp_path / "file" / "run")
    said = capsys.readouterr().err
    assert code == 74 and said.count("\n") == 1 and "Not a directory" in said


@pytest.mark.parametrize("error", [MemoryError("8 GB"), "RESOURCE_EXHAUSTED: Out of memory"])
def test_no_memory_ends_with_its_own_code(tmp_path, capsys, monkeypatch, error):
    def no_memory(*_, **__):
        raise error if isinstance(error, MemoryError) else jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(experiment.modes, "run", no_memory)
    assert experiment.main("run", config=config(), workdir=tmp_path) == 71
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory" in said
