"""The environment of a run: code, versions, machine, on which a result may depend."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# Options of JAX, also set by variables such as JAX_DEFAULT_PRNG_IMPL, that reach the numbers.
_NUMERIC_OPTIONS = (
    "jax_allow_f16_reductions",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_numpy_dtype_promotion",
    "jax_optimization_level",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_gpu_kernel_lowering",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
# Variables that XLA and the libraries below it read themselves.
_NUMERIC_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "qkd_jax"),
    *("pillow", "simplejpeg", "opencv-python-headless"),  # what pixels a JPEG has
)


def git_state(directory: str | Path | None = None) -> dict[str, Any]:
    """Returns {"revision", "dirty"} of the checkout that holds the code; None outside of one.

    A package installed into an environment that lies inside some other checkout does not count as
    part of it: its files are not tracked there.
    """
    here = Path(directory or Path(__file__).parent)

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):
        return {"revision": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    revision = git("rev-parse", "HEAD")
    return {"revision": revision, "dirty": None if status is None else bool(status)}


def code_version(git: Mapping[str, Any]) -> str:
    """Returns the revision of a `git_state`, with "-dirty" where files differ from it.

    Outside of a checkout it is the version of the installed package.
    """
    if git["revision"] is None:
        return f"qkd_jax {importlib.metadata.version('qkd_jax')}"
    return git["revision"] + ("-dirty" if git["dirty"] else "")


@functools.cache
def code_sha256() -> str:
    """Returns the SHA-256 of the package's source files: what a revision with changes is not."""
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package).as_posix()}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@functools.cache
def numeric_environment() -> dict[str, Any]:
    """Returns what the last bits of a result depend on beside code, config and data."""
    devices = jax.devices()
    return {
        "versions": _versions(),
        "devices": [devices[0].platform, devices[0].device_kind, len(devices)],
        "machine": [platform.machine(), _processor()],
        # XLA cuts some sums by the number of its threads.
        "threads": _THREADS,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": jax.dtypes.canonicalize_dtype(float).name,
        "options": {name: str(getattr(jax.config, name, None)) for name in _NUMERIC_OPTIONS},
        "variables": {name: os.environ.get(name, "") for name in _NUMERIC_VARIABLES},
    }


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


# When JAX starts its threads; a process may be given other cores later.
_THREADS = _cores()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _processor() -> str:
    """The processor's model, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Returns the facts about versions and machine that run.json records beside `git_state`."""
    devices = jax.devices()
    return {
        "argv": list(sys.argv),
        "versions": _versions(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "hostname": platform.node(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
