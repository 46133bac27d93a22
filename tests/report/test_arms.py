"""Which runs of a folder are seeds of one arm, and what is said of the others."""

import shutil

import pytest
from made_up_runs import FAST, row, run, whole
from mutation import accepted, mutated_text

from qkd_jax.record.json_files import read_json, write_json
from qkd_jax.report.arms import read_runs


def change(path, **fields):
    write_json(path, {**read_json(path), **fields})


def rows_of(seed):
    return [row("student", "QAT", FAST[seed])]


def test_runs_that_differ_in_the_seed_are_one_arm(tmp_path):
    found = read_runs(whole(tmp_path))
    assert [(arm.label, list(arm.runs)) for arm in found.arms] == [
        ("fast", [0, 1, 2]),
        ("slow", [0, 1, 2]),
    ]
    assert found.notes == ()


def test_a_net_from_a_file_of_the_seeds_own_makes_no_other_arm(tmp_path):
    for seed, source in ((1, "a_seed1#net"), (2, "a_seed2#net"), (12, "a_seed1#net")):
        path = run(tmp_path, f"b_seed{seed}", seed=seed, lr=0.1, rows=rows_of(0))
        change(path / "config.json", nets={"net": {"init_from": f"runs/{source}"}})
    assert [list(arm.runs) for arm in read_runs(tmp_path).arms] == [[1, 2], [12]]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["w4_seed0", "w4_seed1"], "w4"),
        (["seed_0-w4", "seed_1-w4"], "w4"),
        (["s0", "s1"], "digits run"),
        (["w4-0", "w4-1"], "w4"),
        (["w4a4_first", "w4a4_second"], "w4a4"),
        (["one", "two"], "digits run"),
    ],
)
def test_labels(tmp_path, names, label):
    for seed, name in enumerate(names):
        path = run(tmp_path, name, seed=seed, lr=0.1, rows=rows_of(seed))
        change(path / "results.json", experiment="digits run")
    assert [arm.label for arm in read_runs(tmp_path).arms] == [label]


def test_arms_are_in_the_order_of_the_sweep_or_of_their_numbers(tmp_path):
    for bits in (2, 10, 3):
        run(tmp_path, f"w{bits}_seed0", seed=0, lr=bits, rows=rows_of(0))
    assert [arm.label for arm in read_runs(tmp_path).arms] == ["w2", "w3", "w10"]
    for lr in ("0.1", "0.05"):
        run(tmp_path / "rates", f"lr-{lr}_seed0", seed=0, lr=float(lr), rows=rows_of(0))
    assert [arm.label for arm in read_runs(tmp_path / "rates").arms] == ["lr-0.05", "lr-0.1"]
    planned = [{"name": f"w{bits}_seed0", "overrides": {}} for bits in (10, 2, 3)]
    write_json(tmp_path / "sweep.json", {"config": "configs/qat.py", "runs": planned})
    assert [arm.label for arm in read_runs(tmp_path).arms] == ["w10", "w2", "w3"]


def test_the_order_in_which_a_folder_is_listed_says_nothing(tmp_path, monkeypatch):
    names = ["w1", "w01", "w001"]
    for lr, name in enumerate(names):
        run(tmp_path, name, seed=0, lr=lr, rows=rows_of(0))
    orders = []
    for listed in (names, names[::-1]):
        monkeypatch.setattr(type(tmp_path), "iterdir", lambda p, n=listed: map(p.joinpath, n))
        orders.append([arm.label for arm in read_runs(tmp_path).arms])
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(names)


def test_runs_called_by_their_seeds_have_the_name_of_the_sweep_or_the_folder(tmp_path):
    folder = tmp_path / "mine"
    for seed in (0, 1):
        run(folder, f"seed-{seed}", seed=seed, lr=0.1, rows=rows_of(seed))
    assert [arm.label for arm in read_runs(folder).arms] == ["mine"]
    write_json(folder / "sweep.json", {"config": "configs/qkd.py:seeds=2", "runs": []})
    assert [arm.label for arm in read_runs(folder).arms] == ["qkd"]


def test_equal_labels_say_what_differs(tmp_path):
    for i, lr in enumerate((0.1, 0.2)):
        run(tmp_path, ("a_s0", "a_seed0")[i], seed=0, lr=lr, rows=rows_of(0))
    labels = [arm.label for arm in read_runs(tmp_path).arms]
    assert labels == [f"a (stages.train.optim.student.lr={lr})" for lr in (0.1, 0.2)]


def test_numbered_names_meet_no_other_name(tmp_path):
    rows = [row("student", method, FAST[0]) for method in ("a", "a", "a #2", "b #1", "b #1")]
    # Three arms of one name, of which nothing short says what differs; a fourth has the number.
    for i, name in enumerate(("x_0", "x-0", "x.0", "x #2_0")):
        path = run(tmp_path, name, seed=0, lr=0.1, rows=rows)
        change(path / "config.json", long="=" * 50 + str(i))
    arms = read_runs(tmp_path).arms
    assert len({arm.label for arm in arms}) == 4
    methods = [method for _, method in arms[0].runs[0].rows]
    assert methods == ["a", "a #2", "a #2 #2", "b #1", "b #1 #2"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "../elsewhere", 5])
def test_names_that_no_run_has_are_not_looked_for(tmp_path, name):
    whole(tmp_path, seeds=(0,))
    write_json(tmp_path / "sweep.json", {"config": "configs/qkd.py", "runs": [{"name": name}]})
    [said] = read_runs(tmp_path).notes
    assert "not known which runs were planned" in said and len(said) < 700


def test_what_is_not_finished_is_said_and_not_counted(tmp_path):
    whole(tmp_path)
    (tmp_path / "slow_seed2" / "results.json").unlink()
    (tmp_path / "shared" / "abc").mkdir(parents=True)
    shutil.copytree(tmp_path / "fast_seed0", tmp_path / "deeper" / "fast_seed7")
    planned = [{"name": f"fast_seed{seed}", "overrides": {}} for seed in range(5)]
    write_json(tmp_path / "sweep.json", {"config": "configs/qkd.py", "runs": planned})
    found = read_runs(tmp_path)
    assert list(found.arms[1].runs) == [0, 1]
    said = "\n".join(found.notes)
    assert "slow_seed2 (last logged step 50, stage train)" in said
    assert "fast_seed3 (not begun), fast_seed4 (not begun)" in said
    assert "Arm slow lacks seed 2;" in said
    assert "deeper/ holds runs too" in said and "shared" not in said


def test_other_code_devices_and_processors_are_said(tmp_path):
    whole(tmp_path)
    start = {"git": {"revision": "cd" * 20, "dirty": True}, "processor": "another"}
    run(tmp_path, "fast_seed3", seed=3, lr=0.2, rows=rows_of(0), start=start)
    said = "\n".join(read_runs(tmp_path).notes)
    assert "Runs differ in code" in said
    assert "cdcdcdcdcdcd with uncommitted changes: fast_seed3" in said
    assert "not on record: fast_seed3." in said
    assert "Runs differ in processor" in said and "Runs differ in devices" not in said


def test_other_data_are_refused(tmp_path):
    whole(tmp_path)
    path = run(tmp_path, "other_seed1", seed=1, lr=0.3, rows=rows_of(1), data="f" * 64)
    with pytest.raises(ValueError, match=r"seed 1 are over different data.*other_seed1"):
        read_runs(tmp_path)
    change(path / "config.json", data={"name": "cifar10"})
    with pytest.raises(ValueError, match="cifar10: other_seed1"):
        read_runs(tmp_path)
    shutil.rmtree(path)
    (tmp_path / "fast_seed0" / "run.json").unlink()
    assert "on which data these were made: fast_seed0" in read_runs(tmp_path).notes[-1]


def test_a_seed_counts_once(tmp_path):
    whole(tmp_path)
    copy = tmp_path / "fast_seed0_again"
    shutil.copytree(tmp_path / "fast_seed0", copy)
    found = read_runs(tmp_path)
    assert [list(arm.runs) for arm in found.arms] == [[0, 1, 2], [0, 1, 2]]
    assert "fast_seed0_again (as fast_seed0)" in found.notes[0]
    change(copy / "results.json", rows=[row("student", "QAT", (1, 2))])
    with pytest.raises(ValueError, match="fast_seed0 and fast_seed0_again"):
        read_runs(tmp_path)


def test_a_copy_that_comes_first_does_not_rename_the_arm(tmp_path):
    whole(tmp_path)
    shutil.copytree(tmp_path / "fast_seed0", tmp_path / "fabulous")
    found = read_runs(tmp_path)
    assert [arm.label for arm in found.arms] == ["fast", "slow"]
    assert "fast_seed0 (as fabulous)" in found.notes[0]


@pytest.mark.parametrize(
    ("field", "value"), [("top1", 92.0), ("agreement", -0.1), ("weight_bytes", -1000)]
)
def test_numbers_that_no_run_measures_are_damage(tmp_path, field, value):
    whole(tmp_path, seeds=(0,))
    rows = [row("student", "QAT", FAST[1], **{field: value})]
    run(tmp_path, "fast_seed1", seed=1, lr=0.2, rows=rows)
    [said] = read_runs(tmp_path).notes
    assert "fast_seed1 is left out, its files are damaged" in said and f"{field} is {value}" in said


def test_folders_without_a_finished_run(tmp_path):
    with pytest.raises(ValueError, match=r"has neither a config\.json of its own"):
        read_runs(tmp_path)
    run(tmp_path, "a", seed=0, lr=0.1, rows=[])
    with pytest.raises(ValueError, match=r"a \(no step logged\)"):
        read_runs(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "config.json", "run.json"])
def test_damaged_runs_are_left_out_and_said(tmp_path, name):
    whole(tmp_path, seeds=(0,))
    path = tmp_path / "fast_seed0" / name
    whole_count = 0
    for found in accepted(
        path, lambda: read_runs(tmp_path), damage=mutated_text, named="fast_seed0"
    ):
        named = [run.name for arm in found.arms for run in arm.runs.values()]
        assert "slow_seed0" in named
        said = "\n".join(found.notes)
        assert "fast_seed0" in named or "fast_seed0" in said
        whole_count += "fast_seed0" in named
    assert whole_count
