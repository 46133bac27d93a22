"""Messages between the processes of a run, and the watch that each keeps over the others.

Each process is connected with process 0. A frame is the lengths of a JSON text and of bytes, the
text, the bytes. A connection that breaks, or on which nothing has come for `timeout` seconds
(each side sends a beat in between), is a dead process: this one says which, and ends.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from qkd_jax import checks

EXIT_AGAIN = 75  # `record.stopping.EXIT_INTERRUPTED`: the same command resumes
# How long a process that hears of another's end has to come to an end by itself.
GRACE = 10.0
_HEADER = struct.Struct("!IQ")
_LONGEST_TEXT, _LONGEST_HELLO = 1 << 28, 1 << 12
OTHER_LANGUAGE = "the other side speaks another language"
Message = dict[str, Any]


class PeerError(Exception):
    """The processes of a run did not come together, or do not agree; `code` is the exit code."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


class Ended(PeerError):
    """Process 0 has ended the run."""


def send_frame(link: socket.socket, message: Mapping[str, Any], data: bytes = b"") -> None:
    """Writes one frame."""
    text = json.dumps(message).encode()
    link.sendall(_HEADER.pack(len(text), len(data)) + text)
    if data:
        link.sendall(data)


def read_frame(
    link: socket.socket, heard: Callable[[], Any] = lambda: None
) -> tuple[Message, bytes]:
    """Reads one frame.

    Args:
        link: the connection.
        heard: called whenever a part has come: a large state takes a slow network minutes.

    Raises:
        OSError: the connection is closed.
        ValueError: what came is no frame.
    """
    length, size = _HEADER.unpack(_exactly(link, _HEADER.size, heard))
    if length > _LONGEST_TEXT:
        raise ValueError(OTHER_LANGUAGE)
    message = _message(_exactly(link, length, heard))
    return message, _exactly(link, size, heard)


def read_hello(link: socket.socket, seconds: float) -> Message:
    """Reads the first frame of anybody: a short one without bytes, that comes in some seconds.

    Raises:
        OSError: the connection is closed, or nothing whole has come.
        ValueError: what came is no such frame.
    """
    until = time.monotonic() + seconds

    def hurry() -> None:
        link.settimeout(max(until - time.monotonic(), 0.001))

    hurry()
    length, size = _HEADER.unpack(_exactly(link, _HEADER.size, hurry))
    if length > _LONGEST_HELLO or size:
        raise ValueError(OTHER_LANGUAGE)
    return _message(_exactly(link, length, hurry))


def _message(text: bytes) -> Message:
    try:
        message = json.loads(text)
    except RecursionError:
        message = None
    if not isinstance(message, dict):
        raise ValueError(OTHER_LANGUAGE)
    return message


def _exactly(link: socket.socket, count: int, heard: Callable[[], Any]) -> bytes:
    data, view = bytearray(count), None
    view, done = memoryview(data), 0
    while done < count:
        got = link.recv_into(view[done:], min(count - done, 1 << 20))
        if not got:
            raise ConnectionError("closed")
        done += got
        heard()
    return bytes(data)


def _takes_more(link: socket.socket) -> bool:
    """Whether a short frame can be written without waiting for the other side."""
    poll = select.poll()
    poll.register(link, select.POLLOUT)
    return any(what & select.POLLOUT for _, what in poll.poll(0))


class _Peer:
    """Another process: its connection, what has come from it, and when the last of it came."""

    def __init__(self, index: int, host: str, link: socket.socket):
        self.index, self.host, self.link = index, host, link
        self.inbox: queue.Queue[tuple[Message, bytes]] = queue.Queue()
        self.heard = time.monotonic()
        self.sending = threading.Lock()
        self.ended = False

    def hear(self) -> None:
        self.heard = time.monotonic()

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


class Group:
    """The processes of a run, as one of them sees it.

    Args:
        index: of this process.
        count: of all.
        links: {index of the process: (its host, the connection with it)}; process 0 has one with
            each of the others, which have one with process 0.
        timeout: seconds without a word after which a process is dead.

    Attributes:
        asked: another process has been asked to stop.
    """

    def __init__(
        self,
        index: int,
        count: int,
        links: Mapping[int, tuple[str, socket.socket]],
        *,
        timeout: float,
    ):
        self.index, self.count, self.timeout = index, count, timeout
        self.asked = False
        self._closing = False
        self._ending = threading.Lock()
        self._peers = {i: _Peer(i, host, link) for i, (host, link) in links.items()}
        for peer in self._peers.values():
            peer.link.settimeout(None)
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def __str__(self) -> str:
        return f"process {self.index} ({socket.gethostname()})"

    # --- messages -----------------------------------------------------------------------------

    def tell(self, message: Mapping[str, Any], data: bytes = b"") -> None:
        """Sends a message, and its bytes with their SHA-256, to all that this one is connected to.

        A connection that breaks is `_listen`'s to report.
        """
        message = {**message, "sha256": hashlib.sha256(data).hexdigest()}
        for peer in self._peers.values():
            self._send(peer, message, data)

    def hear(
        self, index: int = 0, *, meanwhile: Callable[[], Any] = lambda: None
    ) -> tuple[Message, bytes]:
        """Returns the next message of a process and its bytes, however long that takes.

        Args:
            index: of the process.
            meanwhile: called about once a second.

        Raises:
            Ended: the process says that it ends.
            PeerError: the bytes are not those that were sent.
        """
        peer = self._peers[index]
        while True:
            try:
                message, data = peer.inbox.get(timeout=1.0)
                break
            except queue.Empty:
                meanwhile()
        if message["kind"] == "end":
            raise Ended(f"{peer} has ended: {message['text']}", int(message["code"]))
        if hashlib.sha256(data).hexdigest() != message["sha256"]:
            raise PeerError(f"{peer} sent bytes that did not arrive as they were", EXIT_AGAIN)
        return message, data

    def ask_stop(self) -> None:
        """Tells process 0 that this one has been asked to stop."""
        self.tell({"kind": "stop"})

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Compares facts of all processes; all of them call this.

        Args:
            facts: {what it is: value}, JSON-able.

        Raises:
            ValueError: processes differ; each of them and each fact is named.
        """
        facts = json.loads(json.dumps(dict(facts)))
        if not self.leads:
            self.tell({"kind": "facts", "facts": facts})
            text = self.hear()[0]["text"]
        else:
            there = {i: self.hear(i)[0]["facts"] for i in self._peers}
            text = "\n".join(
                f"  {self._peers[i]}: {line}"
                for i, found in there.items()
                for line in _differences(facts, found)
            )
            self.tell({"kind": "verdict", "text": text})
        if text:
            raise ValueError(
                f"the processes of this run differ from process 0:\n{text}\n"
                "Start all of them with the same command, code and data."
            )

    # --- the end ------------------------------------------------------------------------------

    def leave(self, code: int, text: str = "") -> None:
        """Ends this process with an exit code, once the others know; does not return.

        A process that led waits until the others are gone: their JAX talks to its service.
        """
        with self._ending:
            self._closing = True
        self._tell_end(code, text)
        self._await_others()
        _exit(code)

    def close(self) -> None:
        """Closes the connections; this process goes on, and the others take it for dead."""
        with self._ending:
            self._closing = True
        for peer in self._peers.values():
            peer.ended = True
            with contextlib.suppress(OSError):
                peer.link.shutdown(socket.SHUT_RDWR)

    def _tell_end(self, code: int, text: str) -> None:
        self.tell({"kind": "end", "code": code, "text": text})

    def settle(self, seconds: float = 3.0) -> None:
        """Waits for news: where a step failed because a process died, the watch ends this one."""
        until = time.monotonic() + seconds
        while self._closing or time.monotonic() < until:
            time.sleep(0.05)

    def _send(self, peer: _Peer, message: Mapping[str, Any], data: bytes = b"") -> None:
        with contextlib.suppress(OSError), peer.sending:
            send_frame(peer.link, message, data)

    def _await_others(self) -> None:
        """Process 0 goes last: JAX in the others talks to its service."""
        until = time.monotonic() + GRACE
        while self.leads and time.monotonic() < until:
            if all(peer.ended for peer in self._peers.values()):
                break
            time.sleep(0.02)

    def _listen(self, peer: _Peer) -> None:
        try:
            while True:
                message, data = read_frame(peer.link, peer.hear)
                kind = message.get("kind")
                if kind == "stop":
                    self.asked = True
                elif kind == "end":
                    self._hear_end(peer, message)
                elif kind != "beat":
                    peer.inbox.put((message, data))
        except (OSError, ValueError, KeyError, struct.error):
            peer.link.close()
            known, peer.ended = peer.ended, True
            if not known:
                self._lost(peer, "has died or lost its connection")

    def _beat(self) -> None:
        every = min(5.0, self.timeout / 4)
        while not self._closing:
            time.sleep(every)
            now = time.monotonic()
            for peer in self._peers.values():
                if now - peer.heard > self.timeout and not peer.ended:
                    peer.ended = True
                    self._lost(peer, f"has not been heard of for {self.timeout:g} s")
            for peer in self._peers.values():
                if peer.sending.acquire(blocking=False):
                    try:  # a send to a process that reads nothing would keep the clock unread
                        with contextlib.suppress(OSError, ValueError):
                            if _takes_more(peer.link):
                                send_frame(peer.link, {"kind": "beat"})
                    finally:
                        peer.sending.release()

    def _hear_end(self, peer: _Peer, message: Message) -> None:
        peer.ended = True
        code, text = int(message["code"]), str(message["text"])
        if not self.leads:  # the main thread ends, unless it waits for a step of all
            peer.inbox.put((message, b""))
            threading.Timer(GRACE, self._stop, (code, f"{peer} has ended: {text}")).start()
        elif not self._closing:
            self._stop(code, f"{peer} has ended: {text}")

    def _lost(self, peer: _Peer, why: str) -> None:
        self._stop(
            EXIT_AGAIN,
            f"{peer} {why}. The run ends; the same command resumes it from its newest checkpoint.",
        )

    def _stop(self, code: int, text: str) -> None:
        """Ends this process from a thread, since the main one may wait for a sum for ever."""
        with self._ending:
            if self._closing:
                return
            self._closing = True
        line = checks.printable(f"{self}: {text}")
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
        # The others hear why from process 0, and not of its end alone.
        teller = threading.Thread(target=self._tell_end, args=(code, text), daemon=True)
        teller.start()
        teller.join(2.0)
        self._await_others()
        _exit(code)


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Returns a line for each fact that differs."""
    return [
        f"{name} is {_shown(there, name)}, in process 0 {_shown(here, name)}"
        for name in sorted(here.keys() | there.keys())
        if name not in here or name not in there or here[name] != there[name]
    ]


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return json.dumps(facts[name]) if name in facts else "(not there)"


def _exit(code: int) -> None:
    # Not `sys.exit`: JAX's clean-up at the end of an interpreter waits for all processes. So what
    # multiprocessing would clean up is ours to end: the workers of the input.
    for worker in multiprocessing.active_children():
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
