"""The progress line of a stage and the flag that stops a run."""

import io
import signal
import threading

import pytest
from rich.console import Console

from qkd_jax.record.progress import Progress, duration
from qkd_jax.record.stopping import EXIT_INTERRUPTED, GracefulStop


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def progress(stream, clock, **kwargs):
    console = Console(file=stream, width=200)
    return Progress("co_study", 100, 32, console=console, clock=clock, **kwargs)


def test_plain_lines_at_a_low_rate_and_rates_without_compilation():
    stream, clock = io.StringIO(), Clock()
    with progress(stream, clock) as line:
        clock.now += 20  # compilation
        line.update(1, waited=3.0)
        for step in range(2, 101):
            clock.now += 0.1
            if step == 50:
                clock.now += 2
                line.paused(2.0)
            line.update(step, loss=1.0 / step, waited=0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("co_study 1/100 | first step 20.0 s")
    assert "10 steps/s | 320 examples/s | ETA 0:05" in lines[1]
    last = lines[-1]
    assert last.startswith("co_study 100/100 | loss 0.0100 | 10 steps/s | 320 examples/s")
    assert "data wait 10 %" in last and "total 0:32" in last and "ETA" not in last
    numbers = line.summary()
    assert numbers["steps"] == 100
    assert numbers["first_step_seconds"] == pytest.approx(20)
    assert numbers["train_seconds"] == pytest.approx(9.9)
    assert numbers["outside_seconds"] == 2.0
    assert numbers["examples_per_second"] == pytest.approx(320)
    assert numbers["data_wait_fraction"] == pytest.approx(0.1)


def test_stages_without_steps_resumed_stopped_and_silent():
    stream, clock = io.StringIO(), Clock()
    with progress(stream, clock, start=100) as line:
        pass
    assert stream.getvalue() == "co_study 100/100\n"
    assert line.summary()["steps_per_second"] == 0
    with pytest.raises(KeyError), progress(stream, clock, start=40) as line:
        line.update(41, loss=float("nan"))
        raise KeyError
    assert stream.getvalue().splitlines()[-1].endswith("(stopped)")
    assert line.summary()["steps"] == 1
    silent = io.StringIO()
    with progress(silent, clock, enabled=False) as line:
        line.update(1)
        clock.now += 60
        line.update(2)
    assert silent.getvalue() == "" and line.summary()["steps_per_second"] == pytest.approx(1 / 60)
    assert [duration(s) for s in (7, 200.4, 3723)] == ["0:07", "3:20", "1:02:03"]


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=150)
    with Progress("tutor[x]", 3, 32, console=console) as line:
        for step in (1, 2, 3):
            line.update(step, loss=0.25)
    text = stream.getvalue()
    assert "3/3" in text and "loss 0.2500" in text and "steps/s" in text


@pytest.fixture
def default_interrupt():
    # A shell starts background jobs with SIGINT ignored, and then a second one does nothing.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("default_interrupt")
def test_the_first_signal_asks_and_the_second_acts(request):
    # A shell starts jobs in the background with SIGINT ignored.
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    # `raise_signal` sends to this thread; a signal to the process may reach another thread, and
    # after the old handler is back, which for SIGTERM ends the process.
    with GracefulStop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert EXIT_INTERRUPTED == 75


def test_the_flag_outside_the_main_thread():
    found = []

    def work():
        with GracefulStop() as stop:
            stop.request()
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]
