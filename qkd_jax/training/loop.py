"""The training loop. There is one, and every stage that trains runs in it.

The device never waits for a metric: the metrics of step k-1 are read after step k has been handed
to it. A batch is a function of its number, so the loop starts anywhere. What happens at intervals
(logging, evaluation, saving) comes in as plain functions and never changes the state, so when it
happens cannot change the result.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from qkd_jax.record.progress import Progress
from qkd_jax.training.feed import on_host
from qkd_jax.training.nonfinite import locate_nonfinite
from qkd_jax.training.parallel import REQUESTS, CompiledStep
from qkd_jax.training.plan import Plan
from qkd_jax.training.profiling import no_trace
from qkd_jax.training.state import TrainState
from qkd_jax.training.step import name_metrics

Named = dict[str, dict[str, float]]


class NonFiniteError(Exception):
    """A loss, gradient or statistic is not finite; the message names stage, step, net and layer."""


class Preempted(Exception):
    """The run was asked to stop, and has saved."""


@dataclasses.dataclass
class Window:
    """Means of the metrics since the last logged line; small enough to travel in a checkpoint."""

    steps: int = 0
    sums: Named = dataclasses.field(default_factory=dict)
    last: Named = dataclasses.field(default_factory=dict)

    def add(self, named: Mapping[str, Mapping[str, float]]) -> None:
        """Adds the metrics of one step."""
        self.steps += 1
        for net, values in named.items():
            sums = self.sums.setdefault(net, {})
            for key, value in values.items():
                sums[key] = sums.get(key, 0.0) + value
        self.last = {net: dict(values) for net, values in named.items()}

    def take(self) -> dict[str, float]:
        """Returns {"net/metric": mean} (rates: the last step's) and empties the window."""
        means = {}
        for net, sums in self.sums.items():
            for key, value in sums.items():
                is_rate = key in ("lr", "quant_lr")
                means[f"{net}/{key}"] = self.last[net][key] if is_rate else value / self.steps
        self.steps, self.sums, self.last = 0, {}, {}
        return means


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Actions of the loop between steps. Steps count from 1 and are those that are done.

    Attributes:
        log: called with (step, values) every `log_every` steps and at the end.
        look: called with (step, state) if `look_at(step)`: evaluation, the quantizers' paths.
        look_at: whether to look after a step.
        save: called with (step, state, window) if `save_at(step)`, and before stopping.
        save_at: whether to save after a step.
        stop: whether the run has been asked to stop.
        late: whether a save is overdue by the clock.
        log_every: interval of `log`; 0 logs at the end only.
        trace: called with (step, state) before each step, behind the last one, and with step 0
            where the stage is left before its end; see `profiling`.
    """

    log: Callable[[int, dict[str, float]], None]
    look: Callable[[int, TrainState], None]
    look_at: Callable[[int], bool]
    save: Callable[[int, TrainState, Window], None]
    save_at: Callable[[int], bool]
    stop: Callable[[], bool]
    late: Callable[[], bool] = lambda: False
    log_every: int = 10
    trace: Callable[[int, TrainState], None] = no_trace


def run_steps(
    compiled: CompiledStep,
    plan: Plan,
    state: TrainState,
    frozen: Mapping[str, Any],
    batches: Iterator[Mapping[str, Any]],
    hooks: Hooks,
    progress: Progress,
    *,
    done: int,
    steps: int,
    window: Window | None = None,
) -> TrainState:
    """Runs the steps of a stage that are left.

    Args:
        compiled: the compiled step.
        plan: the stage's plan, for names.
        state: the state after `done` steps; it is donated.
        frozen: {slot: variables} of the nets that only teach.
        batches: yields the batch of step `done` first.
        hooks: what to do between steps.
        progress: the stage's progress line; it also keeps the times.
        done: steps of the stage that are done.
        steps: length of the stage.
        window: metrics since the last logged line, when resuming.

    Returns:
        The state after the last step.

    Raises:
        NonFiniteError: A step was not finite. Its state was not saved.
        Preempted: `hooks.stop()` was true; the state has been saved.
    """
    window = Window() if window is None else window
    frozen = compiled.place(dict(frozen))
    pending: tuple[int, Any, Any] | None = None

    # What processes have asked for in the newest step whose metrics are here. All read the same
    # numbers, so all stop and save at the same step: the one after that of the request.
    requests = (False, False)

    def settle(waited: float = 0.0, later: int = 0) -> None:
        """Reads the metrics of the pending step; `later` steps have been started since."""
        nonlocal pending, requests
        if pending is None:
            return
        (step, batch, metrics), pending = pending, None
        if not bool(jax.device_get(metrics["finite"])):
            # A step that was started since has left the nets as they were.
            hooks.trace(0, state)
            bad = state.replace(step=state.step - later)
            bad, batch, nets = compiled.local((bad, batch, frozen))
            here = on_host(batch)
            raise NonFiniteError(_explain(plan, bad, here, nets, progress.stage, step, steps))
        if compiled.spans_processes:
            stops, saves = jax.device_get(metrics[REQUESTS])
            requests = bool(stops), bool(saves)
        named = name_metrics(plan, metrics)
        window.add(named)
        progress.update(step, loss=named[plan.learners[0]]["loss"], waited=waited)
        if step == steps or (hooks.log_every and step % hooks.log_every == 0):
            hooks.log(step, window.take())

    for step in range(done + 1, steps + 1):
        hooks.trace(step, state)
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        if compiled.spans_processes:
            batch = compiled.with_requests(batch, stop=hooks.stop(), save=hooks.late())
        state, metrics = compiled(state, batch, frozen)
        settle(waited, later=1)
        pending = (step, batch, metrics)
        stop, late = requests if compiled.spans_processes else (hooks.stop(), hooks.late())
        look, save = hooks.look_at(step), step < steps and (late or hooks.save_at(step))
        if stop or look or save or step in (done + 1, steps):
            settle()
            acting = time.perf_counter()
            saving = save or (stop and step < steps)
            readable = compiled.local(state) if look or saving else state
            if look:
                hooks.look(step, readable)
            if saving:
                hooks.save(step, readable, window)
                requests = (requests[0], False)
            progress.paused(time.perf_counter() - acting)
            if stop and step < steps:
                hooks.trace(0, state)
                raise Preempted(f"stage {progress.stage!r}, step {step} of {steps}")
    hooks.trace(0, state)
    return compiled.local(state)


def _explain(
    plan: Plan,
    state: TrainState,
    batch: Mapping[str, Any],
    frozen: Mapping[str, Any],
    stage: str,
    step: int,
    steps: int,
) -> str:
    located = locate_nonfinite(plan, state, batch, frozen)
    where = "every layer is finite when run by itself" if located is None else str(located)
    return (
        f"stage {stage!r}, step {step} of {steps}: the loss or a gradient is not finite. {where}. "
        "Lower the learning rate or clip gradients (optim.<net>.clip_norm), and start again in "
        "another folder; the checkpoints of this one are from before the bad step."
    )
