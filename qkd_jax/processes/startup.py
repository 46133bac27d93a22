"""The start of a run of several processes: who is of it, the roll call, `jax.distributed`."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from qkd_jax import checks
from qkd_jax.processes.group import (
    EXIT_AGAIN,
    Group,
    PeerError,
    read_frame,
    read_hello,
    send_frame,
)

START_TIMEOUT = 300.0
_HELLO_TIMEOUT = 5.0
PEER_TIMEOUT = 60.0
USAGE_ERROR = 2
# Steps of a Slurm job that are a shell and no task of srun: interactive, batch, extern.
_SLURM_SHELLS = ("4294967290", "4294967291", "4294967292")
_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


class Place(NamedTuple):
    """This process's place in a run: host:port of process 0, how many there are, which it is."""

    coordinator: str
    count: int
    index: int
    by: str


def find_place(
    coordinator: str = "",
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: float = START_TIMEOUT,
) -> Place | None:
    """Returns this process's place in a run of several; None where it is alone.

    Flags go before the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    and these before the clusters that JAX knows: Slurm, Open MPI, Cloud TPU, GKE.

    Raises:
        ValueError: some of the three are given and not all, or a number is out of range.
        PeerError: a cluster does not say which process this is.
    """
    given: dict[str, Any] = {"coordinator": coordinator, "processes": count, "process": index}
    for name, variable in _VARIABLES.items():
        if given[name] in ("", None) and os.environ.get(variable):
            given[name] = os.environ[variable]
    missing = [name for name, value in given.items() if value in ("", None)]
    if len(missing) == 3:
        return _detect(timeout)
    if missing:
        have = ", ".join(f"{name} {value}" for name, value in given.items() if name not in missing)
        ways = " and ".join(f"--{name} ({_VARIABLES[name]})" for name in missing)
        raise ValueError(
            "a run of several processes needs --coordinator=host:port, --processes and --process, "
            f"and flags or variables give {have} alone; give {ways} too, or none of them where "
            "Slurm, Open MPI, GKE or Cloud TPU says so."
        )
    numbers = {}
    for name, low in (("processes", 1), ("process", 0)):
        try:
            numbers[name] = int(given[name])
        except ValueError:
            raise ValueError(
                f"--{name} ({_VARIABLES[name]}) is {given[name]!r}; it must be an integer."
            ) from None
        high = 2**20 if name == "processes" else numbers["processes"] - 1
        checks.integer_in(f"--{name}", numbers[name], low, high)
    _split_address(given["coordinator"])
    if numbers["processes"] == 1:
        return None
    return Place(given["coordinator"], numbers["processes"], numbers["process"], "flags")


def _detect(timeout: float) -> Place | None:
    """Returns the place that a cluster gives this process; None for a job of one task."""
    if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" and not os.environ.get(
        "OMPI_MCA_orte_hnp_uri"
    ):
        raise ValueError(
            "mpirun has started several processes, and JAX finds process 0 with Open MPI 4 alone; "
            "give --coordinator=host:port, --processes=$OMPI_COMM_WORLD_SIZE and "
            "--process=$OMPI_COMM_WORLD_RANK."
        )
    # JAX tells who is where by `initialize` alone, which starts a service even for one process and
    # takes the first GPU of several for it; so its classes are asked.
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        name = cluster.__name__
        if cluster.opt_in_only_method or not _may_apply(name):
            continue
        try:
            if not cluster.is_env_present():
                continue
        except ImportError as error:  # `requests`, by which JAX asks a TPU's host for its place
            raise ValueError(
                f"JAX needs a package to tell whether this is one process of several ({error}); "
                "install it, or say so: --coordinator=localhost:1 --processes=1 --process=0."
            ) from error
        try:
            count = cluster.get_process_count()
            if count <= 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(int(timeout), port)
            return Place(address, count, cluster.get_process_id(), name)
        except (
            Exception
        ) as error:  # a name not known yet, a server that does not answer: many types
            raise PeerError(
                f"JAX takes this for a process of several ({name}) and cannot tell which, or where "
                f"process 0 is ({type(error).__name__}: {error}); start it again, or give "
                "--coordinator=host:port, --processes and --process.",
                EXIT_AGAIN,
            ) from error
    return None


def _may_apply(cluster: str) -> bool:
    """Whether a cluster's variables can be those of a run of several processes.

    A shell in a Slurm job has the job's number of tasks and is none of them, and a pod of
    Kubernetes need not be of an indexed job.
    """
    if cluster == "SlurmCluster":
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
        return tasks != "1" and os.environ.get("SLURM_STEP_ID") not in _SLURM_SHELLS
    return cluster != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ


def _split_address(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator is {address!r}; it must be the host of process 0 and a free port "
            "there, as node1:29500."
        )
    return host.strip("[]"), int(port)


def start(
    *,
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    start_timeout: float = START_TIMEOUT,
    peer_timeout: float = PEER_TIMEOUT,
) -> Group | None:
    """Starts `jax.distributed` where this process is one of several; before JAX has devices.

    Args:
        coordinator: host:port of process 0, for its roll call; see `find_place`.
        processes: how many there are.
        process: which this is.
        start_timeout: seconds until all must have come.
        peer_timeout: seconds without a word after which a process is dead.

    Returns:
        The group, or None where this process is alone.

    Raises:
        ValueError: see `find_place`.
        PeerError: processes are missing after `start_timeout` seconds, or do not fit together.
    """
    for name, value in (("start_timeout", start_timeout), ("peer_timeout", peer_timeout)):
        checks.in_range(f"--{name}", value, 1, 1e6)
    place = find_place(coordinator, processes, process, timeout=start_timeout)
    if place is None:
        return None
    group, address = _meet(place, start_timeout, peer_timeout)
    # SIGTERM is ours: the service would take it over.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=place.count,
        process_id=place.index,
        cluster_detection_method="deactivate" if place.by == "flags" else None,
        coordinator_bind_address=f"[::]:{address.rpartition(':')[2]}",
        initialization_timeout=int(start_timeout),
        # Ours comes first, and with a name.
        heartbeat_timeout_seconds=int(3 * peer_timeout) + 100,
    )
    _first_sum()
    return group


def _first_sum() -> None:
    """Adds over all devices once: Gloo gives a first sum 30 seconds, which a compilation exceeds.

    It also makes all ask for their devices at one time, for which there are two minutes.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    ones = jax.make_array_from_callback(
        (jax.device_count(),), jax.NamedSharding(mesh, spec("all")), lambda index: _ones(index)
    )
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, spec()))(ones)
    jax.block_until_ready(total)


def _ones(index: Any) -> Any:
    import numpy as np

    return np.ones(jax.device_count(), np.int32)[index]


def _meet(place: Place, start_timeout: float, peer_timeout: float) -> tuple[Group, str]:
    """Connects all processes; returns the group and the address of JAX's service for this one."""
    host, port = _split_address(place.coordinator)
    until = time.monotonic() + start_timeout
    if place.index == 0:
        links = _roll_call(place, port, until, start_timeout)
        service = _free_port()
        for link in (link for _, link in links.values()):
            send_frame(link, {"port": service, "host": socket.gethostname()})
        return Group(0, place.count, links, timeout=peer_timeout), f"127.0.0.1:{service}"
    link = _dial(place, host, port, until, start_timeout)
    try:
        here = {"index": place.index, "count": place.count, "host": socket.gethostname()}
        send_frame(link, {"qkd_jax": 1, **here})
        link.settimeout(start_timeout + 10)
        answer, _ = read_frame(link)
    except (OSError, ValueError) as error:
        link.close()
        raise PeerError(
            f"process 0 at {place.coordinator} has ended before all had come ({error})", EXIT_AGAIN
        ) from error
    if "refused" in answer:
        link.close()
        raise PeerError(answer["refused"], int(answer["code"]))
    group = Group(place.index, place.count, {0: (answer["host"], link)}, timeout=peer_timeout)
    return group, f"127.0.0.1:{_forward(host, int(answer['port']))}"


def _roll_call(
    place: Place, port: int, until: float, timeout: float
) -> dict[int, tuple[str, socket.socket]]:
    """Waits for all other processes: {index: (host, connection)}."""
    links: dict[int, tuple[str, socket.socket]] = {}
    try:
        server = _server(port)
    except OSError as error:
        raise PeerError(
            f"process 0 cannot listen on port {port} ({error.strerror}); give --coordinator "
            "another port.",
            USAGE_ERROR,
        ) from error
    with server:
        while True:
            _drop_gone(links)
            if len(links) == place.count - 1:
                return links
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                link, _ = server.accept()
            except TimeoutError:
                missing = [i for i in range(1, place.count) if i not in links]
                raise _refuse(links, _missing(missing, place.count, timeout), EXIT_AGAIN) from None
            try:
                hello = read_hello(link, _HELLO_TIMEOUT)
                index, count = int(hello["index"]), int(hello["count"])
                host = str(hello["host"])
            except (OSError, ValueError, TypeError, KeyError):
                link.close()  # somebody else's
                continue
            _drop_gone(links)  # the same process, before it was started again
            if count != place.count or not 0 < index < place.count or index in links:
                taken = f", as {links[index][0]} has said already" if index in links else ""
                text = (
                    f"process 0 is one of {place.count} processes, and {host} says that it is "
                    f"process {index} of {count}{taken}; give each its own --process, and all the "
                    "same --processes."
                )
                links[-1] = (host, link)
                raise _refuse(links, text, USAGE_ERROR)
            _keep_alive(link)
            links[index] = (host, link)


def _drop_gone(links: dict[int, tuple[str, socket.socket]]) -> None:
    """Forgets processes that have died before all had come: they may be started again."""
    for index in [i for i, (_, link) in links.items() if _has_gone(link)]:
        links.pop(index)[1].close()


def _has_gone(link: socket.socket) -> bool:
    """Whether the other side of a connection on which it has nothing to say is closed."""
    link.settimeout(0)
    try:
        return not link.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        link.settimeout(_HELLO_TIMEOUT)


def _missing(missing: Sequence[int], count: int, timeout: float) -> str:
    named = ", ".join(map(str, missing))
    which, have = ("processes", "have") if len(missing) > 1 else ("process", "has")
    return (
        f"{which} {named} of {count} {have} not come within {timeout:g} s (--start_timeout). Look "
        "at their output, and start all again with the same command."
    )


def _refuse(links: dict[int, tuple[str, socket.socket]], text: str, code: int) -> PeerError:
    for _, link in links.values():
        try:
            with link:
                send_frame(link, {"refused": text, "code": code})
        except OSError:
            continue
    return PeerError(text, code)


def _dial(place: Place, host: str, port: int, until: float, timeout: float) -> socket.socket:
    """Connects with process 0, which may start later."""
    why: OSError | None = None
    while time.monotonic() < until:
        try:
            link = socket.create_connection((host, port), timeout=min(10.0, timeout))
        except OSError as error:
            why = error
            time.sleep(0.2)
            continue
        if link.getsockname() == link.getpeername():  # TCP on one host can call itself
            link.close()
            continue
        _keep_alive(link)
        return link
    raise PeerError(
        f"process {place.index} ({socket.gethostname()}) has not reached process 0 at "
        f"{place.coordinator} within {timeout:g} s ({why}; --start_timeout). Look at its output, "
        "and start all again with the same command.",
        EXIT_AGAIN,
    )


def _keep_alive(link: socket.socket) -> None:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def _free_port() -> int:
    with _server(0) as server:
        return server.getsockname()[1]


def _forward(host: str, port: int) -> int:
    """Returns a local port through which JAX reaches its service in process 0.

    When a connection with the service breaks, JAX ends its process at once, from C++ and without
    a name. Here the end of process 0 is not passed on, so that `Group` can say it.
    """
    server = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept() -> None:
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection((host, port), timeout=10.0)
            except OSError:
                near.close()  # JAX tries again
                continue
            for link in (near, far):
                link.settimeout(None)
                _keep_alive(link)
            threading.Thread(target=_pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=_pump, args=(far, near, False), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


def _pump(source: socket.socket, target: socket.socket, closes: bool) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    if closes:
        target.close()
