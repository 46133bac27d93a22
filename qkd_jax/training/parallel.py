"""Compiles a step for devices: `jit` over a mesh (the default) or `pmap`.

The devices may be those of several processes (`jax.distributed`), under `jit`. Each process gives
its own rows of a batch and has the whole state.

Under `jit` the program is written for the whole batch and XLA divides it, so BatchNorm and the
quantizers' statistics are global by construction. Under `pmap` each device runs its share and the
step gets `axis_name`: sums, counts and gradients are added over it. Both equal one device. Under a
`MeshLayout` that divides the nets too, the state goes in and out as it is divided.

From JAX 0.10.0 to 0.12.0.1, `pmap` is `jit` of `shard_map(..., check_vma=False)` over a mesh of one
axis (`jax/_src/pmap.py`); its docstring calls it the "old way of doing parallel map", and it warns
of nothing. Three things here rest on that. Nothing tracks what differs between devices, so a
gradient is the device's own until the step adds it up (`numerics.rounding.match_cotangent`).
`out_axes=None` declares a result replicated without a look: what the step did not reduce would be
one device's. And replicated arrays go in and out with the sharding that `place` gives them, so
the state stays in place and can be donated.
"""

import functools
import os
import pathlib
import platform
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qkd_jax import checks
from qkd_jax.training.mesh import PMAP_AXIS, WHOLE_NETS, MeshLayout
from qkd_jax.training.plan import Plan, StepStructure
from qkd_jax.training.state import TrainState
from qkd_jax.training.step import Metrics, Step, make_step

AXIS = PMAP_AXIS
MODES = ("jit", "pmap")
# The name, in a batch and in a step's metrics, of what processes ask of one another.
REQUESTS = "requests"


class CompiledStep:
    """A compiled step for some devices: `compiled(state, batch, frozen) -> (state, metrics)`.

    The state is donated (use what comes back), `frozen` is not.

    Attributes:
        mode: "jit" or "pmap".
        devices: the devices it runs on.
        layout: how the devices divide batches and nets.
        traces: how often the step has been traced; 1 as long as the shapes stay.
    """

    def __init__(
        self,
        step: Step,
        mode: str,
        devices: Sequence[jax.Device],
        layout: MeshLayout = WHOLE_NETS,
    ):
        """Wraps `step`; see `compile_step`."""
        self.mode = mode
        self.devices = tuple(devices)
        self.layout = layout
        self.traces = 0
        # Host devices share a pool of as many threads, and a sum over them holds its threads until
        # all have come: two steps in flight hold what the other waits for, and XLA ends the process
        # after 40 seconds.
        self._one_by_one = len(self.devices) > 1 and self.devices[0].platform == "cpu"
        self.spans_processes = jax.process_count() > 1
        check_processes(mode, self.devices)

        @functools.wraps(step)
        def counted(state: TrainState, batch: Mapping[str, Any], frozen: Mapping[str, Any]):
            self.traces += 1  # runs while tracing only
            arrays = dict(batch)
            requests = arrays.pop(REQUESTS, None)
            state, metrics = step(state, arrays, frozen, axis_name=AXIS if mode == "pmap" else None)
            if requests is not None:
                metrics = {**metrics, REQUESTS: jnp.max(requests, axis=0)}
            return state, metrics

        self._counted = counted

        if layout.is_sharded:
            mesh, rows = layout.mesh(self.devices), layout.axes[0]
        else:  # all devices share the batch, and one axis is enough
            axis_types = (AxisType.Auto,)
            mesh = jax.make_mesh(
                (len(self.devices),), (AXIS,), axis_types=axis_types, devices=self.devices
            )
            rows = AXIS
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._sharded = NamedSharding(mesh, PartitionSpec(rows))
        self._divided: dict[Any, Any] = {}
        if layout.is_sharded:
            self.function = self._run_divided
        elif mode == "jit":
            self.function = jax.jit(
                counted,
                in_shardings=(self._replicated, self._sharded, self._replicated),
                out_shardings=(self._replicated, self._replicated),
                donate_argnums=0,
            )
        else:
            self.function = jax.pmap(
                counted,
                axis_name=AXIS,
                in_axes=(None, 0, None),
                out_axes=None,
                donate_argnums=0,
                devices=self.devices,
            )

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> tuple[TrainState, Metrics]:
        """Runs one step, after moving arrays that are elsewhere to the devices.

        Moving `frozen` at every step is slow: `place` it once a stage. Over several CPU
        devices a call returns when the step has ended; elsewhere the next one can be started.
        """
        results = self.function(*self._to_devices(state, batch, frozen))
        return jax.block_until_ready(results) if self._one_by_one else results

    def lower(self, state: TrainState, batch: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
        """Traces and lowers without running: `.lower(...).compile()` tells time and memory."""
        arguments = self._to_devices(state, batch, frozen)
        return self.jitted(arguments[0], arguments[2]).lower(*arguments)

    def _to_devices(
        self, state: TrainState, batch: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> tuple[Any, dict[str, jax.Array], Any]:
        return self._place_once(state), self.shard_batch(batch), self._place_once(frozen)

    def place(self, tree: Any) -> Any:
        """Puts a state, or nets by slot, on the devices: whole copies, or as the layout divides.

        Where devices are of several processes, all of them have the same arrays and call this.
        """
        shardings = self._shardings(tree)
        if not self.spans_processes:
            return jax.device_put(tree, shardings)

        # Not device_put: it compares whole arrays over processes, one by one.
        def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
            if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
                return leaf
            host = _in_jax_dtype(np.asarray(leaf))
            return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])

        if isinstance(shardings, NamedSharding):
            return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
        return jax.tree.map(put, tree, shardings)

    def local(self, tree: Any) -> Any:
        """Returns a tree whose arrays this process can read by itself; all processes call this.

        A state of this process alone is returned as it is. Arrays may share memory with `tree`.
        """
        if not self.spans_processes:
            return tree

        def of_all(leaf: Any) -> Any:
            whole = not isinstance(leaf, jax.Array) or leaf.is_fully_replicated
            return leaf if whole else self._gather(leaf)

        def read(leaf: Any) -> Any:
            return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf

        return jax.tree.map(lambda leaf: read(of_all(leaf)), tree)

    @functools.cached_property
    def _gather(self) -> Any:
        return jax.jit(lambda x: x, out_shardings=self._replicated)

    def rows(self, batch_size: int) -> np.ndarray | None:
        """Returns the rows of a batch that this process gives, ascending; None for all of them.

        Raises:
            ValueError: The batch is not divisible by the number of devices.
        """
        if not self.spans_processes:
            return None
        self._check_even(batch_size)
        parts = self._sharded.addressable_devices_indices_map((batch_size,)).values()
        assert parts is not None
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts]))

    def with_requests(
        self, batch: Mapping[str, Any], *, stop: bool, save: bool
    ) -> Mapping[str, Any]:
        """Adds to a batch what this process asks of all: to stop, to save.

        The step's metrics have what any of them asks, int32 [2], under `REQUESTS`: an agreement
        that waits for nothing but the step.
        """
        parts = len(self.devices) // self.layout.model
        here = self.rows(parts)
        assert here is not None
        asked = np.broadcast_to(np.array([stop, save], np.int32), (len(here), 2))
        return {**self.shard_batch(batch), REQUESTS: self._whole(asked, parts)}

    def _place_once(self, tree: Any) -> Any:
        # The first leaf stands for all: device_put on some hundred leaves that are in place
        # already would cost a small net a tenth of its step.
        leaf = next(iter(jax.tree.leaves(tree)), None)
        if leaf is None:
            return tree
        wanted = jax.tree.leaves(self._shardings(tree))[0]
        in_place = isinstance(leaf, jax.Array) and leaf.sharding == wanted
        return tree if in_place else self.place(tree)

    def _shardings(self, tree: Any) -> Any:
        """The sharding of every array of a tree; one for all where the layout divides nothing."""
        if not self.layout.is_sharded:
            return self._replicated
        leaves, structure = jax.tree.flatten(tree)
        key = structure, tuple(np.shape(leaf) for leaf in leaves)
        if key not in self._divided:
            self._divided[key] = self.layout.shardings(self._mesh, tree)
        return self._divided[key]

    def jitted(self, state: TrainState, frozen: Mapping[str, Any]) -> Any:
        """Returns the function that JAX compiles for a state and nets of these shapes."""
        if not self.layout.is_sharded:
            return self.function
        of_state, of_frozen = self._shardings(state), self._shardings(frozen)
        leaves, structure = jax.tree.flatten((of_state, of_frozen))
        key = structure, tuple(leaves)
        if key not in self._divided:
            self._divided[key] = jax.jit(
                self._counted,
                in_shardings=(of_state, self._sharded, of_frozen),
                out_shardings=(of_state, self._replicated),
                donate_argnums=0,
            )
        return self._divided[key]

    def _run_divided(
        self, state: TrainState, batch: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> tuple[TrainState, Metrics]:
        return self.jitted(state, frozen)(state, batch, frozen)

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Divides a batch over the devices; one that is divided already is returned as it is.

        A step does this itself. Call it to start the transfer earlier, or to reuse a batch.

        Args:
            batch: arrays [batch, ...], on the host or on a device; where devices are of several
                processes, this one's `rows`, on the host.

        Returns:
            Arrays [batch, ...] under `jit`, [devices, batch / devices, ...] under `pmap`, divided
            along their first axis.

        Raises:
            ValueError: The batch is not divisible by the number of devices that share it.
        """
        image, count = batch["image"], len(self.devices) // self.layout.model
        if isinstance(image, jax.Array) and image.sharding == self._sharded:
            # Labels are [batch]; with another axis they have pmap's layout.
            if self.mode == "jit" or batch["label"].ndim == 2:
                return dict(batch)
        if self.spans_processes:
            return self._shard_rows(batch)
        self._check_even(image.shape[0])
        arrays = {name: _in_jax_dtype(array) for name, array in batch.items()}
        if self.mode == "pmap":
            arrays = {n: a.reshape(count, -1, *a.shape[1:]) for n, a in arrays.items()}
        return jax.device_put(arrays, self._sharded)

    def _shard_rows(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Makes arrays of the whole batch from this process's rows of it."""
        parts = len(self.devices) // self.layout.model
        one_a_part = self.rows(parts)
        assert one_a_part is not None
        total = len(batch["image"]) * parts // len(one_a_part)
        return {name: self._whole(array, total) for name, array in batch.items()}

    def _whole(self, array: np.ndarray, total: int) -> jax.Array:
        """Makes an array [total, ...] from this process's rows of it."""
        rows, array = self.rows(total), _in_jax_dtype(array)
        assert rows is not None

        def part(at: Any) -> np.ndarray:
            return array[np.searchsorted(rows, np.arange(total)[at[0]])]

        return jax.make_array_from_callback((total, *array.shape[1:]), self._sharded, part)

    def _check_even(self, rows: int) -> None:
        count = len(self.devices) // self.layout.model
        if rows % count:
            raise ValueError(
                f"the batch has {rows} examples, which {count} devices cannot share evenly; use a "
                f"batch size that is a multiple of {count}, or fewer devices."
            )


def _in_jax_dtype(array: Any) -> Any:
    # The loader's example index is int64, which JAX has only in x64 mode.
    if isinstance(array, np.ndarray):
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    return array


def compile_step(
    step: Step,
    *,
    mode: str = "jit",
    devices: Sequence[jax.Device] | None = None,
    layout: MeshLayout = WHOLE_NETS,
) -> CompiledStep:
    """Compiles a step by `jit` over a mesh of devices, or by `pmap`.

    Args:
        step: from `make_step`.
        mode: "jit" or "pmap".
        devices: which devices take part; all of them by default.
        layout: the mesh that they form; by default all share the batch, and have whole nets.

    Returns:
        A callable (state, batch, frozen) -> (state, metrics); compilation happens at its first
        call, once for the shapes of a stage.

    Raises:
        ValueError: An unknown mode, no device, or a layout that the mode or the number of devices
            does not allow.
    """
    checks.one_of("mode", mode, MODES)
    devices = jax.devices() if devices is None else list(devices)
    checks.at_least_one("devices", devices)
    layout.check_devices(mode, len(devices))
    return CompiledStep(step, mode, devices, layout)


def check_processes(mode: str, devices: Sequence[jax.Device]) -> None:
    """Raises ValueError where several processes (`jax.distributed`) cannot share a step."""
    count, here = jax.process_count(), len({device.process_index for device in devices})
    if count > 1 and mode == "pmap":
        raise ValueError("mode is 'pmap', which is for one process; several need mode='jit'.")
    if here < count:
        raise ValueError(
            f"devices is {len(devices)}, which are those of {here} of {count} processes; set it to "
            "0, which takes the devices of all."
        )


class StepCache:
    """Compiled steps by structure: stages and arms that differ in numbers share one."""

    def __init__(
        self,
        *,
        mode: str = "jit",
        devices: Sequence[jax.Device] | None = None,
        layout: MeshLayout = WHOLE_NETS,
    ):
        """Takes the mode, the devices and the layout of all its steps; see `compile_step`."""
        self.mode = mode
        self.devices = devices
        self.layout = layout
        self._steps: dict[StepStructure, CompiledStep] = {}

    def get(self, plan: Plan) -> CompiledStep:
        """Returns the compiled step of a plan, built at the first request for its structure."""
        if plan.structure not in self._steps:
            self._steps[plan.structure] = compile_step(
                make_step(plan.structure),
                mode=self.mode,
                devices=self.devices,
                layout=self.layout,
            )
        return self._steps[plan.structure]

    @property
    def traces(self) -> int:
        """Number of traces of all steps together."""
        return sum(compiled.traces for compiled in self._steps.values())

    def __len__(self) -> int:
        """Number of distinct structures."""
        return len(self._steps)


def _machine() -> str:
    """Returns this processor's architecture and a checksum of its features."""
    features = platform.processor()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        found = (line for line in lines if line.split(":")[0].strip() in ("flags", "Features"))
        features = " ".join(sorted(next(found, features).split()))
    except OSError:
        pass
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> str | None:
    """Keeps XLA's compiled programs on disk, for the next process.

    Each kind of processor has a folder of its own: a program that was compiled for another may stop
    with an illegal instruction, and home directories are shared in clusters.

    Args:
        directory: where; by default JAX_COMPILATION_CACHE_DIR, else qkd_jax/xla under
            XDG_CACHE_HOME or ~/.cache.

    Returns:
        The folder in use, or None (with a warning) if it cannot be written: a run does not fail
        because of its cache.

    Note:
        jaxlib 0.10 prints an error on CPU for every program that it loads ("+prefer-no-gather is
        not supported on the host machine"), though it was compiled there and runs (openxla/xla
        issue 44565). A program silences it with TF_CPP_MIN_LOG_LEVEL=3 before it imports jax.
    """
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        directory = os.path.join(home, "qkd_jax", "xla")
    path = pathlib.Path(directory).expanduser() / _machine()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Writing is the test: permission bits say nothing about a full or read-only disk.
        probe = path / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        warnings.warn(
            f"the compilation cache {path} cannot be written ({error}); this run compiles all.",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's defaults skip what compiles in under a second: most of what a small net needs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(path)
