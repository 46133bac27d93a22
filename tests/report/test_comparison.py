"""The comparison of a folder of runs: its numbers by hand, its files, and what it says."""

import csv
import io
import re
import shutil
import warnings

import pytest
from made_up_runs import CLASSES, FAST, SLOW, row, run, whole
from mutation import accepted, mutated_text
from rich.console import Console
from scipy import stats

from qkd_jax import experiment, report
from qkd_jax.record.json_files import read_json, write_json
from qkd_jax.report import comparison
from qkd_jax.report.comparison_tables import seeds_text

FILES = [f"comparison.{suffix}" for suffix in ("html", "md", "tex", "csv")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = whole(tmp_path_factory.mktemp("runs"))
    report.compare(made, against="slow")
    return made


def texts(folder):
    return {name: (folder / name).read_text(encoding="utf-8") for name in FILES}


def test_numbers_by_hand(folder):
    found = comparison.build(folder, against="slow")
    rows = {(row.arm, row.net): row for row in found.rows}
    mean = rows["slow", "student"].means["top1"]
    values = [0.90, 0.88, 0.91]
    assert (mean.n, mean.mean) == (3, pytest.approx(sum(values) / 3))
    assert mean.high == pytest.approx(stats.t.interval(0.95, 2, mean.mean, stats.sem(values))[1])
    assert rows["slow", "teacher"].front == ("weight_bytes", "bit_operations")
    assert rows["fast", "student"].front == ("weight_bytes", "bit_operations")
    assert rows["slow", "student"].front == ()
    teacher, student = found.compared["top1"]
    assert teacher.difference.same and teacher.adjusted is None
    # The shared teacher is no second net: one comparison is left.
    assert found.tests == {"top1": 1, "loss": 1}
    reference = stats.ttest_rel([0.92, 0.92, 0.92], values)
    assert student.difference.mean == pytest.approx((2 + 4 + 1) / 300)
    assert student.difference.p == pytest.approx(reference.pvalue) == student.adjusted
    change = found.classes[1].differences
    by_hand = [[(FAST[s][c] - SLOW[s][c]) / CLASSES[c] for s in range(3)] for c in (0, 1)]
    assert [d.mean for d in change] == pytest.approx([sum(d) / 3 for d in by_hand])


def test_a_net_that_arms_share_is_in_the_table_once(folder):
    rows = (folder / "comparison.md").read_text().splitlines()
    means = rows[: next(i for i, line in enumerate(rows) if "Row minus control" in line)]
    assert [line.split(" | ")[0] for line in means if "| teacher |" in line] == ["| 2 arms"]
    assert len([line for line in means if "| student |" in line]) == 2


def test_intervals_and_p_values_of_several_comparisons_go_together(tmp_path):
    whole(tmp_path)
    for seed, right in enumerate([(30, 50), (33, 52), (38, 49)]):
        run(tmp_path, f"third_{seed}", seed=seed, lr=0.3, rows=[row("student", "QAT", right)])
    found = comparison.build(tmp_path, against="slow")
    assert found.tests["top1"] == 2
    pairs = [c for c in found.compared["top1"] if c.adjusted is not None]
    ps = [c.difference.p for c in pairs]
    assert sorted(c.adjusted for c in pairs) == pytest.approx(
        sorted([2 * min(ps), max(2 * min(ps), max(ps))])
    )
    for c in pairs:
        differences = [c.row.values["top1"][s] - c.control.values["top1"][s] for s in c.seeds]
        centre, error = sum(differences) / 3, stats.sem(differences)
        assert c.together == pytest.approx(stats.t.interval(0.975, 2, centre, error))


def test_nets_whose_accuracies_agree_by_chance_are_several_comparisons(tmp_path):
    whole(tmp_path, seeds=(0, 1))
    for lr, name in ((0.3, "third"), (0.4, "fourth")):  # the fourth has the nets of the third
        for seed in (0, 1):
            rows = [row("student", "QAT", FAST[seed], loss=0.3 + 0.02 * seed)]
            run(tmp_path, f"{name}_seed{seed}", seed=seed, lr=lr, rows=rows)
    found = comparison.build(tmp_path, against="slow")
    # fast and third: two nets with the same right answers.
    assert found.tests == {"top1": 2, "loss": 2}
    [p] = {c.difference.p for c in found.compared["top1"] if not c.difference.same}
    adjusted = [c.adjusted for c in found.compared["top1"] if not c.difference.same]
    assert adjusted == pytest.approx([min(1, 2 * p)] * 3)


def test_a_difference_that_is_equal_for_all_seeds_has_no_interval(tmp_path):
    for name, lr, right in (("slow", 0.1, (30, 40)), ("fast", 0.2, (30, 41))):
        for seed in (0, 1):
            rows = [row("student", "QAT", right, loss=0.3 + lr * (1 + seed))]
            run(tmp_path, f"{name}_seed{seed}", seed=seed, lr=lr, rows=rows)
    report.compare(tmp_path, against="slow")
    found = texts(tmp_path)["comparison.md"]
    assert "| fast | student | QAT | 2 | +1.00 | - | - | - | - |" in found
    # 0.1 and 0.2: mean 0.15, sd 0.0707107, t(0.975, 1) = 12.7062, p = 2 atan(1 / 3) / pi.
    assert r"| +0.150 | \[-0.485, +0.785\] | \[-0.485, +0.785\] | 0.205 | 0.205 |" in found


def test_the_tables_fit_a_terminal_of_80_characters(tmp_path):
    for number, arm in enumerate(("a" * 70, "b" * 70)):
        for seed in (0, 1):
            right = (30 + number + seed, 40 + 2 * seed)
            rows = [row("teacher", "float", (40, 57)), row("student", "QAT", right)]
            rows += [row("other", f"a method of words {number}", (right[0] - seed, 37))]
            run(tmp_path, f"{arm}_seed{seed}", seed=seed, lr=number, rows=rows)
    for against in ("a" * 70 + "/student/QAT", "b" * 70, "QAT"):
        found = comparison.build(tmp_path, against=against)
        console = Console(width=80, color_system=None)
        with console.capture() as captured:
            console.print(*report.terminal(found))
        text = captured.get()
        assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
        differences = text.partition("difference from")[2]
        for name in ("teacher", "other", "a method of words"):
            assert name in differences, (against, name)


def test_only_seeds_that_both_have_are_paired(tmp_path):
    whole(tmp_path)
    shutil.rmtree(tmp_path / "slow_seed1")
    write_json(
        tmp_path / "fast_seed2" / "results.json",
        {
            **read_json(tmp_path / "fast_seed2" / "results.json"),
            "rows": [row("student", "QAT", (39, 53), loss=None)],
        },
    )
    found = comparison.build(tmp_path, against="slow")
    of = {(c.row.net, m): c for m, each in found.compared.items() for c in each}
    assert (of["student", "top1"].seeds, of["student", "top1"].unpaired) == ((0, 2), (1,))
    assert (of["student", "loss"].seeds, of["student", "loss"].unpaired) == ((0,), (1, 2))
    assert of["teacher", "top1"].seeds == (0,)
    said = "\n".join(found.notes)
    assert "Arm slow lacks seed 1;" in said
    assert "fast / student / QAT has no finite cross-entropy for 1 of 3 seeds" in said
    assert "fast / student / QAT (seed 1)" in said and "(seed 1, 2)" in said
    report.compare(tmp_path, against="slow")
    for name, text in texts(tmp_path).items():
        if name != "comparison.csv":
            assert "2 to 3 seeds (0, 1, 2)" in text and "2 of 3" in text, name


def test_the_files_hold_the_numbers_and_say_the_seeds(folder):
    found = texts(folder)
    for name, text in found.items():
        if name != "comparison.csv":
            captions = re.findall(r"3 seeds \(0, 1, 2\)\.", text)
            assert len(captions) >= 4, name
    assert "| slow | student | QAT | 3 | 89.67 ± 3.79 (1.53) |" in found["comparison.md"]
    assert "| 32/32 | 9,000 | 9.000 M |" in found["comparison.md"]
    # The differences 2, 4, 1: mean 7/3, sd 1.5275, t(0.975, 2) = 4.302653.
    assert r"| 3 | +2.33 | \[-1.46, +6.13\] | \[-1.46, +6.13\] |" in found["comparison.md"]
    assert r"+2.33 & {[$-$1.46, +6.13]}" in found["comparison.tex"]
    assert r"89.67 $\pm$ 3.79 (1.53)" in found["comparison.tex"]
    assert "89.67 ± 3.79<br>(1.53)" in found["comparison.html"]
    lines = list(csv.DictReader(io.StringIO(found["comparison.csv"])))
    [line] = [
        x for x in lines if (x["kind"], x["net"], x["measure"]) == ("difference", "student", "top1")
    ]
    assert float(line["value"]) == pytest.approx(7 / 300) and line["comparisons"] == "1"
    assert (line["control"], line["n"]) == ("slow/student/QAT", "3")
    runs = {x["seed"]: float(x["value"]) for x in lines if (x["kind"], x["arm"]) == ("run", "slow")
            and (x["net"], x["measure"]) == ("student", "top1")}  # fmt: skip
    assert runs == pytest.approx({"0": 0.90, "1": 0.88, "2": 0.91})


def test_the_page_stands_by_itself_and_is_the_same_every_time(folder, tmp_path):
    page = texts(folder)["comparison.html"]
    assert "<script" not in page and "@import" not in page and not re.findall(r"url\((?!#)", page)
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]+)"', page))
    for part in ("results", "pareto", "differences-top1", "classes", "curves", "runs", "reading"):
        assert f'<section id="{part}">' in page, part
    assert page.count("<svg ") == 3
    before = texts(folder)
    report.compare(folder, against="slow")
    assert texts(folder) == before


def test_the_runs_are_only_read(tmp_path):
    whole(tmp_path)
    look = lambda: {p: p.read_bytes() for p in tmp_path.glob("*/**/*")}
    before = look()
    elsewhere = tmp_path / "elsewhere.html"
    elsewhere.write_text("mine")
    (tmp_path / "comparison.html").symlink_to(elsewhere)
    report.compare(tmp_path)
    assert look() == before and elsewhere.read_text() == "mine"
    assert not (tmp_path / "comparison.html").is_symlink()


ODD = "<b>$x^2$ & 100 % | _a_ [1] \\ ` \x1b[31m \u65e5\t"


def test_odd_names_are_shown_and_not_obeyed(tmp_path):
    for seed in (0, 1):
        rows = [row("teacher", "float", (40, 55 + seed)), row("<i>net", ODD, (30, 40 + 2 * seed))]
        run(tmp_path, f"a&b_seed{seed}", seed=seed, lr=0.1, rows=rows, steps=20)
        run(tmp_path, f'"\u65e5\t"_seed{seed}', seed=seed, lr=0.2, rows=rows, steps=20)
    report.compare(tmp_path, against="teacher")
    found = texts(tmp_path)
    assert "<b>" not in found["comparison.html"] and "<i>" not in found["comparison.html"]
    assert "&lt;b&gt;$x^2$ &amp; 100 % | _a_" in found["comparison.html"]
    assert r"$<$b$>$\$x\textasciicircum{}2\$ \& 100 \% $|$ \_a\_ [1]" in found["comparison.tex"]
    assert r"&lt;b&gt;$x^2$ &amp; 100 % \| _a_ \[1\] \\ \`" in found["comparison.md"]
    assert not any("\x1b" in text for text in found.values())
    assert "\\char34{}\u65e5 \\char34{} &" in found["comparison.tex"]


def test_rows_of_older_runs_and_methods_that_repeat(tmp_path):
    for seed in (0, 1):
        rows = [row("net", "QAT", (30, 40 + seed + i)) for i in (0, 5)]
        for each in rows:
            del each["bit_operations"], each["class_correct"]
        run(tmp_path, f"seed{seed}", seed=seed, lr=0.1, rows=rows)
    found = report.compare(tmp_path, against="QAT #2")
    assert [row.method for row in found.rows] == ["QAT", "QAT #2"]
    assert "before these were recorded" in found.notes[0] and found.classes == ()
    assert "bit operations" not in texts(tmp_path)["comparison.md"].split("|")[1:12]


def test_one_seed_has_no_interval(tmp_path):
    whole(tmp_path, seeds=(1,))
    report.compare(tmp_path, against="slow")
    text = texts(tmp_path)["comparison.md"]
    assert "1 seed (1). One value each" in text
    assert "| fast | student | QAT | 1 | +4.00 | - |" in text


def test_the_front_door(tmp_path, capsys):
    folder = whole(tmp_path)
    experiment.report(folder, against="slow")
    said = capsys.readouterr().out
    assert "89.67 ± 3.79" in said and "comparison.html" in said
    experiment.report(folder)
    assert "name a control by --against=, one of fast, slow, teacher/float" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="Did you mean 'slow'"):
        experiment.report(folder, against="slwo")
    with pytest.raises(ValueError, match="is one run; give the folder"):
        experiment.report(folder / "slow_seed0", against="slow")


def test_the_numbers_of_a_folder_that_cannot_be_written_are_shown(tmp_path, capsys):
    (whole(tmp_path, seeds=(0, 1)) / "comparison.html").mkdir()
    with pytest.raises(OSError, match="comparison"):
        experiment.report(tmp_path, against="slow")
    said = capsys.readouterr().out
    assert "+3.00" in said and "beside it" not in said


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl"])
def test_damaged_files_break_no_page(tmp_path, name):
    warnings.simplefilter("ignore")  # matplotlib's, of odd names and numbers
    whole(tmp_path, seeds=(0, 1))
    path = tmp_path / "fast_seed0" / name
    damage = (
        mutated_text if name == "results.json" else lambda data, rng: data[: rng.randrange(900)]
    )
    read = lambda: report.compare(tmp_path, against="slow")
    assert list(accepted(path, read, damage=damage, named="fast_seed0", count=6))


def test_captions_say_of_how_many_seeds_the_arms_have_some(tmp_path):
    for name, lr, seed in (("a_seed0", 0.1, 0), ("b_seed1", 0.2, 1)):
        run(tmp_path, name, seed=seed, lr=lr, rows=[row("student", "QAT", FAST[seed])])
    assert seeds_text(comparison.build(tmp_path)) == "1 of 2 seeds (0, 1)"
    run(tmp_path, "a_seed2", seed=2, lr=0.1, rows=[row("student", "QAT", FAST[2])])
    assert seeds_text(comparison.build(tmp_path)) == "1 to 2 of 3 seeds (0, 1, 2)"
