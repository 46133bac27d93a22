"""Frames, and the watch over a process that is slow or reads nothing."""

import socket
import threading

from qkd_jax.processes import group


def test_a_large_frame_is_a_sign_of_life_before_it_is_whole():
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(
            target=group.send_frame, args=(there, {"kind": "x"}, bytes(5 << 20))
        )
        sender.start()
        heard = []
        message, data = group.read_frame(here, lambda: heard.append(1))
        sender.join(10)
    assert message == {"kind": "x"} and len(data) == 5 << 20
    assert len(heard) >= 2 + 5  # the lengths, the text, and a mebibyte at most at a time


def test_a_process_that_reads_nothing_is_found_dead(monkeypatch):
    """Its connection is full, so that a beat to it would wait for ever."""
    lost = threading.Event()
    monkeypatch.setattr(group.Group, "_lost", lambda *_: lost.set())
    here, there = socket.socketpair()
    here.setblocking(False)
    try:
        while True:
            here.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    watched = group.Group(0, 2, {1: ("there", here)}, timeout=1.0)
    assert lost.wait(20)
    watched.close()
    there.close()
