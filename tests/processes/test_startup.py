"""Who is of a run, and the roll call: threads that stand for processes, without JAX's part."""

import socket
import struct
import threading
import time

import pytest

from qkd_jax.processes import startup
from qkd_jax.processes.group import Group, PeerError, send_frame

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-09],other2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def clean(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "KUBE")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_slurm_step_of_several_tasks_is_a_run_of_several_processes(clean):
    for name, value in SLURM.items():
        clean.setenv(name, value)
    # JAX's port: job 4097 modulo 4096, above 65535 - 4096 + 1.
    assert startup.find_place() == ("node07:61441", 4, 2, "SlurmCluster")


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun -n1, a task of an array
        {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"},  # the shell of salloc
        {"SLURM_STEP_NUM_TASKS": "1"},  # the same in a job of four tasks
        {"SLURM_STEP_NODELIST": None, "SLURM_PROCID": None},  # variables left in a laptop's shell
    ],
)
def test_a_job_of_one_task_and_a_shell_with_its_variables_are_alone(clean, changed):
    for name, value in {**SLURM, **changed}.items():
        if value is not None:
            clean.setenv(name, value)
    assert startup.find_place() is None
    assert startup.start() is None


def test_flags_go_before_variables_and_these_before_the_cluster(clean):
    for name, value in SLURM.items():
        clean.setenv(name, value)
    for name, value in (
        ("COORDINATOR_ADDRESS", "a:1"),
        ("NUM_PROCESSES", "3"),
        ("PROCESS_ID", "2"),
    ):
        clean.setenv(f"JAX_{name}", value)
    assert startup.find_place() == ("a:1", 3, 2, "flags")
    assert startup.find_place("b:2", 2, 0) == ("b:2", 2, 0, "flags")
    assert startup.find_place("b:2", 1, 0) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "give coordinator a:1 alone; give --processes .* and --process"),
        (("", 2, 0), "give --coordinator"),
        (("a", 2, 0), "the host of process 0 and a free port"),
        (("a:1", 2, 2), "--process"),
        (("a:1", 0, 0), "--processes"),
    ],
)
def test_mistakes_name_the_flag(clean, given, message):
    with pytest.raises(ValueError, match=message):
        startup.find_place(*given)


def meet(port, index, count, *, said_count=None, timeout=5.0):
    place = startup.Place(f"127.0.0.1:{port}", said_count or count, index, "flags")
    return startup._meet(place, timeout, 30.0)[0]


def together(port, places):
    """What each of several threads gets: a group, or the text of its error."""
    results = [None] * len(places)

    def one(number, place):
        try:
            results[number] = meet(port, **place)
        except PeerError as error:
            results[number] = f"{error.code}: {error}"

    threads = [threading.Thread(target=one, args=item) for item in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def close(groups):
    for group in groups:  # first, so that none takes another for dead, which would end this process
        group._closing = True
    for group in groups:
        group.close()


def test_processes_that_have_come_exchange_bytes_and_find_what_differs(port):
    groups = together(port, [dict(index=i, count=3) for i in (2, 1, 0)])[::-1]
    groups[0].tell({"kind": "x", "n": 1}, b"\0\xff" * 5000)
    assert [g.hear()[1] for g in groups[1:]] == [b"\0\xff" * 5000] * 2
    found = [None] * 3

    def compare(number, facts):
        try:
            groups[number].compare(facts)
        except ValueError as error:
            found[number] = str(error)

    same, other = {"config.seed": 1, "code": "a"}, {"config.seed": 2, "code": "a"}
    for facts, wanted in (((same, same, same), None), ((same, same, other), "process 2")):
        found[:] = [None] * 3
        threads = [threading.Thread(target=compare, args=item) for item in enumerate(facts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(set(found)) == 1
        assert found[0] is wanted is None or wanted in found[0]
    assert "config.seed is 2, in process 0 1" in found[0] and "process 1" not in found[0]
    close(groups)


def test_a_process_that_never_comes_is_named_to_all_that_came(port):
    places = [dict(index=i, count=4, timeout=1.5) for i in (0, 2)]
    for text in together(port, places):
        assert text.startswith("75: processes 1, 3 of 4 have not come within 1.5 s"), text


def test_without_process_0_the_message_says_where_it_was_looked_for(port):
    (text,) = together(port, [dict(index=1, count=2, timeout=0.5)])
    assert text.startswith("75: process 1") and f"127.0.0.1:{port} within 0.5 s" in text


@pytest.mark.parametrize(
    ("second", "message"),
    [(dict(index=1, count=3), "process 1 of 3"), (dict(index=5, count=2), "process 5 of 2")],
)
def test_processes_that_do_not_fit_are_refused(port, second, message):
    for text in together(port, [dict(index=0, count=2), second]):
        assert text.startswith("2: process 0 is one of 2 processes") and message in text


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!IQ", 2, 1 << 62) + b"{}",  # more bytes than there is memory
        struct.pack("!IQ", 1 << 27, 0),
        struct.pack("!IQ", 4000, 0) + b"[" * 4000,
        struct.pack("!IQ", 42, 0) + b'{"index": [1], "count": null, "host": "x"}',
    ],
)
def test_strangers_on_the_port_are_passed_over(port, words):
    def knock():
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                    link.sendall(words)
                    link.recv(1)
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
            except ConnectionError:
                return

    results = []
    stranger = threading.Thread(target=knock)
    first = threading.Thread(
        target=lambda: results.extend(together(port, [dict(index=0, count=2)]))
    )
    stranger.start()
    first.start()
    stranger.join(10)
    others = together(port, [dict(index=1, count=2)])
    first.join(10)
    groups = results + others
    assert [group.count for group in groups] == [2, 2]
    close(groups)


def test_a_process_that_dies_before_all_have_come_may_be_started_again(port):
    results = []
    first = threading.Thread(
        target=lambda: results.extend(together(port, [dict(index=0, count=3)]))
    )
    first.start()
    place = startup.Place(f"127.0.0.1:{port}", 3, 1, "flags")
    with startup._dial(place, "127.0.0.1", port, time.monotonic() + 5, 5) as dies:
        send_frame(dies, {"index": 1, "count": 3, "host": "x"})
    results += together(port, [dict(index=i, count=3) for i in (1, 2)])
    first.join(10)
    assert [group.count for group in results if isinstance(group, Group)] == [3, 3, 3], results
    close(results)


def test_a_cluster_that_does_not_say_who_is_who_is_no_mistake_of_the_config(clean):
    for name, value in {**SLURM, "SLURM_PROCID": "two"}.items():
        clean.setenv(name, value)
    with pytest.raises(PeerError, match=r"SlurmCluster.*'two'.*give --coordinator") as caught:
        startup.find_place()
    assert caught.value.code == 75
