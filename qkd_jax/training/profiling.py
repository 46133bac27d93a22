"""A trace of some steps by `jax.profiler`, for TensorBoard's profile page or Perfetto.

The step that runs while a profile is asked for carries the names of nets and loss terms in its
scopes ("student", "student/loss/kd", "student/optimizer"), inside of them those of layers and
quantizers. Its operations and numbers are those of the step without names.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qkd_jax import checks

FOLDER = "profile"


class Profile(NamedTuple):
    """Which steps are traced, counted from 1 over the whole schedule, and into which folder."""

    first: int
    last: int
    folder: Path


def parse_steps(text: str) -> tuple[int, int]:
    """Returns (first, last) of "a,b".

    Raises:
        ValueError: anything else, or no step at all.
    """
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(
            f"--profile_steps is {text!r}; give the first and the last step of the trace, such as "
            "--profile_steps=11,14. Steps count from 1 over the whole schedule, as in "
            "metrics.jsonl."
        )
    first, last = (int(part) for part in parts)
    checks.integer_in("--profile_steps, the first step,", first, 1)
    if last < first:
        raise ValueError(
            f"--profile_steps is {text!r}, whose last step is before its first; swap them."
        )
    return first, last


def check_steps(steps: tuple[int, int], stages: Sequence[Any]) -> None:
    """Refuses steps that are not within one `train` stage.

    Args:
        steps: (first, last).
        stages: the laid-out schedule; each has `name`, `first`, `steps`, `trains`.

    Raises:
        ValueError: with the steps of every stage that trains.
    """
    spans = {s.name: (s.first + 1, s.first + s.steps) for s in stages if s.trains}
    if not any(low <= steps[0] and steps[1] <= high for low, high in spans.values()):
        listed = ", ".join(f"{name} {low} to {high}" for name, (low, high) in spans.items())
        raise ValueError(
            f"--profile_steps is {steps[0]},{steps[1]}, which is not within one stage that "
            f"trains: {listed or '(none)'}."
        )


def tracer(profile: Profile, begin: int, say: Callable[[str], None]) -> Callable[[int, Any], None]:
    """Returns `trace(step, state)` for the loop, which calls it before each step and at the end.

    A trace that cannot be begun or written is given up with a message; the steps go on.

    Args:
        profile: which steps.
        begin: steps of the schedule before this stage.
        say: prints where the trace is.
    """
    running = failed = False

    def trace(step: int, state: Any) -> None:
        """Before a step of the stage, from 1 on; 0 ends a trace at once."""
        nonlocal running, failed
        at = begin + step
        inside = step > 0 and profile.first <= at <= profile.last
        if inside == running or (inside and failed):
            return
        jax.block_until_ready(state)  # neither half a step before nor half a step at the end
        try:
            if inside:
                profile.folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(profile.folder))
            else:
                jax.profiler.stop_trace()
                say(
                    f"the trace is in {profile.folder}; TensorBoard (tensorboard-plugin-profile) "
                    "or xprof shows it"
                )
            running = inside
        except (OSError, RuntimeError) as error:  # a full disk; another trace that is running
            running, failed = False, True
            say(f"no trace of these steps ({type(error).__name__}: {error}); the run goes on")

    return trace


def keep_names_apart() -> None:
    """Lets the compilation cache tell a program with names from the same one without them."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def no_trace(step: int, state: Any) -> None:
    """Traces nothing."""


def is_within(profile: Profile | None, stage: Any, done: int) -> bool:
    """Whether a stage, of which some steps are done, still has steps to trace."""
    if profile is None:
        return False
    return stage.first + done < profile.last and profile.first <= stage.first + stage.steps
