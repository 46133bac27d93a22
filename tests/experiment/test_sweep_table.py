"""The table of a sweep: rates and times to the end by hand, and what a terminal and a file show."""

import io
import os
import sys

from rich.console import Console

from qkd_jax.experiment.sweep_table import Line, SweepTable, eta_of


def three():
    """One run that is done, one that runs at 2 steps a second, one that waits."""
    done, runs, waits = (Line(name, 100) for name in ("one", "two", "three"))
    done.word, done.step = "done", 100
    runs.begins("running")
    runs.moved(20, "pretrain", "", now=10.0)
    runs.moved(40, "co_study", "student loss 0.5", now=20.0)
    return [done, runs, waits]


def test_times_to_the_end():
    _, runs, waits = lines = three()
    assert runs.rate == 2.0 and runs.eta == "0:30" and waits.eta == ""
    # 60 + 100 steps at 2 a second, one run at a time; two at a time wait for the longer one.
    assert eta_of(lines, jobs=1) == "1:20" and eta_of(lines, jobs=2) == "0:50"
    assert eta_of([lines[0]], jobs=1) == "" and eta_of([waits], jobs=1) == ""
    runs.begins("running")  # another process took it up: its rate is measured again
    assert runs.rate == 0.0 and runs.eta == ""


def test_a_file_gets_a_line_now_and_then():
    now, file = [0.0], io.StringIO()
    lines = three()
    console = Console(file=file, width=200)
    with SweepTable(lines, 1, interval=30.0, console=console, clock=lambda: now[0]) as table:
        for now[0] in (1.0, 29.0, 31.0, 40.0):
            table.show()
        table.say("three: \x1b[2Jfailed")
    assert file.getvalue().splitlines() == [
        "1 of 3 done | ETA 1:20 | two: co_study 40/100, student loss 0.5, ETA 0:30",
        "three: \\u001b[2Jfailed",
    ]


def test_a_sweep_goes_on_without_a_reader(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with SweepTable(three(), 1, interval=0.0) as table:
            table.say("two: done.")
            table.show()


def test_a_terminal_gets_one_table_with_the_runs_that_are_active():
    lines = [Line(f"run-{k}", 10) for k in range(40)]
    for line in lines[:30]:
        line.word = "done"
    lines[30].begins("running")
    lines[30].moved(4, "distil", "student top1 97.5 %", now=0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20)
    table = SweepTable(lines, 1, console=console)
    text = Console(file=io.StringIO(), width=100)
    text.print(table.table())
    shown = text.file.getvalue()
    assert "run-30" in shown and "distil" in shown and "4/10" in shown and "97.5 %" in shown
    assert "30 of 40 done" in shown and shown.count("run-") == 14
